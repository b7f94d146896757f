"""The function calls in a model's text, in the syntax of any family; nothing is evaluated.

Which syntaxes are read, which of several calls count and what cannot be read: `docs/verdicts.md`.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from . import json_calls, python_calls, tagged_calls
from .json_calls import Unread
from .reasoning import answer_text

MAX_TEXT, MAX_LENGTH, MAX_BLOCKS, MAX_BROKEN = 100_000, 10_000, 50, 3
MAX_UNCLOSED = 8  # blocks of data without an end: each is looked at to the end of the text

_FENCE = r"```(?:json|python|tool_code|tool_call)"
_TAG = (
    r"<tool_calls?>|<\|tool_call\|>|<\|python_tag\|>|<\|tool_call_start\|>|<TOOLCALL>"
    r"|\[TOOL_CALLS\]|<\|START_ACTION\|>|<\|action_start\|>|functools(?=\[)"
)
_MARK = re.compile(
    rf"{_FENCE}|{_TAG}|<function=|<\|?tool_call|<｜tool▁call|<\w*:?invoke name=|to=functions\."
)
_LINE = r"^[ \t`]*+(?:\w+ ?= ?)?|(?<=\)[,;])\s*+"  # what a call that begins a line may follow
_START = re.compile(
    rf"{tagged_calls.START}"
    rf"|(?:(?P<tag>{_TAG})\s*+|(?P<fence>{_FENCE})\s*+|(?P<line>{_LINE}))?"
    r"""(?:(?P<json>\{(?=\s*+(?:["'{}\[]|name["']?\s*:))|\[(?=\s*+[\[\]{]))"""
    rf"|(?P<list>\[\s*+)?(?<![\w.\-])(?<!\bdef )(?P<python>{tagged_calls.WORD})\()",
    re.MULTILINE,
)
_SURPLUS = re.compile(r"(?:\s*[\]}])*+")
_UNOPENED = re.compile(
    rf"""(?P<tag>(?:{_TAG})\s*+)?["']?name["']?\s*:\s*["'][^"'\n]{{1,200}}["']\s*,"""
    r"""\s*["']?(?:arguments|parameters)["']?\s*:"""
)
_NAMED = re.compile(r"\s*+(?:[\w.\-]++\s*+=(?!=)|\Z)")  # what follows the parenthesis of a call
# what follows a call that is part of a larger expression
_GOES_ON = re.compile(r"\(|\[[\d'\"]|\.[^\W\d]|\s*+[=!<>]=")


@dataclass
class _Part:
    """A part of the text: its calls, or None if it was meant as calls but cannot be read."""

    calls: list[dict] | None
    mark: str = ""  # "tag", "fence", or none before it
    is_python: bool = False


def calls(text: str | None, declared: Collection[str] = ()) -> list[dict]:
    """Return the calls of `text` in order, each {"name": str, "arguments": dict}; none for `[]`.

    `declared` are the names of the tools. Raises Unread when nothing looks like a call or one
    cannot be read.
    """
    parts = _counted(list(_parts(_readable(answer_text(text)), declared)))
    if any(part.calls is None for part in parts):
        raise Unread("invalid_json")
    if not parts:
        raise Unread("no_call")
    return [call for part in parts for call in part.calls]


def _readable(text: str) -> str:
    """Return what is read of a text: if it is long, from the first mark on. Raises Unread if that
    is too long."""
    if len(text) <= MAX_LENGTH:
        return text
    mark = _MARK.search(text) if len(text) <= MAX_TEXT else None
    if mark and len(text) - mark.start() <= MAX_LENGTH:
        return text[mark.start() :]
    raise Unread("invalid_json" if mark or '"name":' in text else "no_call")


def _counted(parts: list[_Part]) -> list[_Part]:
    """Return the parts that count: from the first tag on, else from the first fence, else all."""
    for mark in ("tag", "fence"):
        marked = [index for index, part in enumerate(parts) if part.mark == mark]
        if marked:
            parts = parts[marked[0] :]
            break
    others = any(not part.is_python for part in parts if part.calls != [])
    return [part for part in parts if part.mark or not (part.is_python and others)]


def _parts(text: str, declared: Collection[str]) -> Iterator[_Part]:
    """Yield what `text` holds, from its start to its end."""
    reader = _Reader(text, declared)
    position = blocks = broken = 0
    while position is not None and broken < MAX_BROKEN:
        start = reader.next(position)
        unopened = _UNOPENED.search(text, position, start.start() if start else len(text))
        if unopened:
            yield _Part(None, "tag" if unopened["tag"] else "")
        if start is None:
            return
        is_python = start.lastgroup == "python"
        blocks += not is_python
        if blocks > MAX_BLOCKS:
            yield _Part(None)
            return
        try:
            calls, position = reader.read(start)
        except Unread:
            broken += 1
            position = reader.next_mark(start.end())
            yield _Part(None, _mark_of(start), is_python)
            continue
        if calls is not None:
            yield _Part(calls, _mark_of(start), is_python)


def _mark_of(start: re.Match) -> str:
    if start["tag"] or start.lastgroup not in ("json", "python"):
        return "tag"
    return "fence" if start["fence"] else ""


def _stands_alone(start: re.Match) -> bool:
    """Whether Python's syntax begins a line or list or follows a mark, not in a sentence."""
    return any(start[group] is not None for group in ("tag", "fence", "list", "line"))


class _Reader:
    """Reads the blocks of one text, each at most once."""

    def __init__(self, text: str, declared: Collection[str]):
        self.text = text
        self.declared = declared
        self.python_left = python_calls.MAX_LENGTH  # characters
        self.unclosed_left = MAX_UNCLOSED

    def next(self, position: int) -> re.Match | None:
        """Return where the next block begins; a word before a parenthesis seldom is one."""
        for start in _START.finditer(self.text, position):
            if start.lastgroup != "python" or self._may_be_python(start):
                return start
        return None

    def next_mark(self, position: int) -> int | None:
        """Return where the next mark begins."""
        mark = _MARK.search(self.text, position)
        return mark.start() if mark else None

    def read(self, start: re.Match) -> tuple[list[dict] | None, int | None]:
        """Return the calls of a block (None: other data) and its end (None: that of the text)."""
        if start.lastgroup == "json":
            return self._json(start.start("json"), start["tag"] is not None)
        if start.lastgroup == "python":
            return self._python(start)
        return tagged_calls.read(self.text, start)

    def _json(self, at: int, is_tagged: bool) -> tuple[list[dict] | None, int | None]:
        end = json_calls.end_of(self.text, at)
        if end is None:
            if is_tagged or json_calls.looks_like_call(self.text[at:], self.declared, is_cut=True):
                raise Unread("invalid_json")
            self.unclosed_left -= 1
            return None, self.next_mark(at) if self.unclosed_left else None
        end = _SURPLUS.match(self.text, end).end()
        block = self.text[at:end]
        try:
            value = json_calls.parse(block)
        except Unread:
            if is_tagged or json_calls.looks_like_call(block, self.declared):
                raise
            return None, end
        calls = json_calls.calls_in(value, self.declared)
        if calls is None and is_tagged:
            raise Unread("invalid_json")
        return calls, end

    def _may_be_python(self, start: re.Match) -> bool:
        if not _stands_alone(start) and start["python"] not in self.declared:
            return False
        return self.python_left > 0 or _NAMED.match(self.text, start.end()) is not None

    def _python(self, start: re.Match) -> tuple[list[dict] | None, int]:
        at = start.start("python") if start["list"] is None else start.start("list")
        is_alone = _stands_alone(start)
        try:
            calls, end = self._parsed(at)
        except ValueError:
            is_meant = start["python"] in self.declared and _NAMED.match(self.text, start.end())
            if start["tag"] or is_alone and is_meant:
                raise Unread("invalid_json") from None
            return None, start.end()
        is_mention = not is_alone and not calls[0]["arguments"]
        return None if is_mention else calls, end

    def _parsed(self, at: int) -> tuple[list[dict], int]:
        if self.python_left <= 0:
            raise ValueError("too long")
        end = json_calls.end_of(self.text, at, python_calls.TOKEN)
        # a short one takes as long as 80 characters
        self.python_left -= (end or len(self.text)) - at + 80
        if end is None or self.python_left < 0:
            raise ValueError("cut short, nested too deep or too long")
        if _GOES_ON.match(self.text, end):
            raise ValueError("part of a larger expression")
        return python_calls.parse(self.text[at:end]), end
