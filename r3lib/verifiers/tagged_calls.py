"""Calls in the tags of one family: the name, then the arguments as JSON, as Gemma's form of it, or
in XML.

`START` matches where such a call begins; its last group says how `read` goes on.
"""

import json
import re

from .json_calls import Unread, end_of, parse

WORD = r"\w[\w.\-]{0,199}+"
_DEEPSEEK = r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?"
START = "|".join((
    r"<function=(?P<llama>[^>\n]{1,200}+)>\s*+(?=\{)",
    rf"\[TOOL_CALLS\]\s*(?P<mistral>{WORD})(?:\[CALL_ID\]\w{{1,99}})?(?:\[ARGS\])?\s*+(?=\{{)",
    rf"\bto=functions\.(?P<gptoss>{WORD})(?=[\s<])[^{{}}]{{0,99}}+(?=\{{)",
    rf"{_DEEPSEEK}(?P<deepseek>{WORD})(?:<｜tool▁sep｜>)?\s*+(?:```json)?\s*+(?=\{{)",
    rf"<\|tool_call_begin\|>(?:functions\.)?(?P<kimi>{WORD})(?::\d{{1,9}})?"
    r"\s*+<\|tool_call_argument_begin\|>\s*+(?=\{)",
    rf"(?:<\|tool_call>|<start_function_call>)call:(?P<gemma>{WORD})(?=\{{)",
    r"""<(?:\w{1,20}:)?(?:function|invoke)(?:=|\s+name=)["']?(?P<xml>[^>"'\n]{1,200}+)["']?>""",
    rf"<tool_call>\n?(?P<glm>{WORD})\s*+(?=<arg_key>|</tool_call>|\Z)",
))  # fmt: skip

_XML = re.compile(
    r"""\s*+<(?P<tag>(?:\w{1,20}:)?param(?:eter)?)(?:=|\s+name=)["']?(?P<key>[^>"'\n]+)["']?>"""
)
_GLM = re.compile(r"\s*+<arg_key>(?P<key>[^<]+)</arg_key>\s*+<(?P<tag>arg_value)>")
_CLOSED = re.compile(r"\s*+</(?:\w{1,20}:)?(?:function|invoke|tool_call)>")
_GEMMA_END = re.compile(r"<tool_call\|>|<end_function_call>")
_GEMMA = re.compile(
    r'<\|"\|>(?P<a>.*?)<\|"\|>|<escape>(?P<b>.*?)<escape>'
    r'|(?<=[{,])\s*+(?P<key>[^\s{}\[\]:,"]++)(?=\s*:)',
    re.DOTALL,
)
_SURPLUS = re.compile(r"\s*+[\]}]")
_CONSTANTS = {"True": True, "False": False, "None": None}


class Untyped(str):
    """The text of an argument in XML: which JSON value it is, the text does not tell."""

    def readings(self) -> list:
        """Return all values that the text may mean."""
        stripped = self.strip()
        made = [str(self), re.sub(r"\A\n|\n\Z", "", self), stripped]
        if stripped in _CONSTANTS:
            return [*made, _CONSTANTS[stripped]]
        try:
            return [*made, parse(stripped)]
        except Unread:
            return made


def read(text: str, start: re.Match) -> tuple[list[dict], int]:
    """Return the call of `start`, a match of `START`, and its end; raises Unread if broken."""
    kind = start.lastgroup
    if kind == "xml":
        arguments, end = _elements(text, start.end(), _XML)
    elif kind == "glm":
        arguments, end = _elements(text, start.end(), _GLM)
    elif kind == "gemma":
        stop = _GEMMA_END.search(text, start.end())
        end = stop.start() if stop else len(text)
        arguments = parse(_GEMMA.sub(_quoted, text[start.end() : end]))
    else:
        end = end_of(text, start.end())
        if end is None or _SURPLUS.match(text, end):
            raise Unread("invalid_json")
        arguments = parse(text[start.end() : end])
    return [{"name": start[kind].strip(), "arguments": arguments}], end


def _quoted(part: re.Match) -> str:
    return json.dumps(next(text for text in part.groups() if text is not None))


def _elements(text: str, position: int, element: re.Pattern) -> tuple[dict, int]:
    """Return the arguments that stand in XML from `position` on, and where the call is closed."""
    arguments = {}
    while opened := element.match(text, position):
        closing = f"</{opened['tag']}>"
        end = text.find(closing, opened.end())
        if end < 0 or opened["key"] in arguments:
            raise Unread("invalid_json")
        arguments[opened["key"]] = Untyped(text[opened.end() : end])
        position = end + len(closing)
    closed = _CLOSED.match(text, position)
    if closed is None:
        raise Unread("invalid_json")
    return arguments, closed.end()
