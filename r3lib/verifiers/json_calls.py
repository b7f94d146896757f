"""Calls in JSON: strict parsing of a piece of text, and which values are calls, envelopes of
calls, or other data."""

import json
import math
import re
from collections.abc import Collection

MAX_DEPTH = 50  # of nested brackets

_TOKEN = re.compile(r'"(?:[^"\\\n]|\\.)*+"?|[\[\]{}]')
_STEP = {"{": 1, "[": 1, "(": 1, "}": -1, "]": -1, ")": -1}
_NAMES, _ARGUMENTS = ("name", "tool_name", "function"), ("arguments", "parameters")
_BARE = {*_NAMES, "id", "type", "tool_call_id", "call_id"}
_NAME = re.compile(r"\b(?:tool_)?name\b")
_ARGUMENT = re.compile(r"\b(?:arguments|parameters)\b")
_NAMED = re.compile(r"""\b(?:name|tool_name)["']\s*:\s*["']([^"'\n]{1,200})["']""")
_FORM = re.compile(r"""["']?name["']?\s*:\s*<[\w -]{1,40}>""")  # a prompt's form of a call, echoed
# before its second key is complete
_CUT = re.compile(r"""\{\s*["']?(?:name|tool_name)\b[^,]*,?\s*["']?\w*$""")


class Unread(ValueError):
    """No calls can be read from a text; the message is the reason, "no_call" or "invalid_json"."""


def end_of(text: str, start: int, tokens: re.Pattern = _TOKEN) -> int | None:
    """Return where the first bracket from `start` on is closed; `tokens` are brackets and strings.

    None without one, unclosed, or with more than `MAX_DEPTH` in one another.
    """
    depth = 0
    for token in tokens.finditer(text, start):
        depth += _STEP.get(token[0], 0)
        if not 0 < depth <= MAX_DEPTH:
            return None if depth else token.end()
    return None


def parse(text: str):
    """Return the JSON value of `text`; raises Unread for others, repeated keys, NaN, infinities."""
    text = text.strip()
    if text[:1] in ("{", "[") and end_of(text, 0) is None:
        raise Unread("invalid_json")
    hooks = dict(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
    try:
        return json.loads(text, **hooks)
    except ValueError:
        raise Unread("invalid_json") from None


def _unique(pairs: list[tuple]) -> dict:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key is repeated")
    return made


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


def looks_like_call(broken: str, declared: Collection[str], is_cut: bool = False) -> bool:
    """Whether a block that cannot be parsed was meant as a call, not `{"name": <name>, ...}`."""
    if _FORM.search(broken):
        return False
    if _NAME.search(broken) and _ARGUMENT.search(broken):
        return True
    if any(name in declared for name in _NAMED.findall(broken)):
        return True
    return is_cut and _CUT.match(broken, max(broken.rfind("{"), 0)) is not None


def calls_in(value, declared: Collection[str] = ()) -> list[dict] | None:
    """Return the calls that a JSON value is, [] for an empty list, None for other data.

    Raises Unread for what is meant as calls but cannot be read as such.
    """
    if not isinstance(value, list):
        return _calls_in_object(value, declared)
    if not value:
        return []
    made = [calls_in(item, declared) for item in value]
    if not any(made):
        return None
    if not all(made) or any(isinstance(item, list) for item in value):
        raise Unread("invalid_json")
    return [call for calls in made for call in calls]


def _calls_in_object(item, declared: Collection[str], enveloped: bool = False) -> list[dict] | None:
    if not isinstance(item, dict):
        return None
    listed = item.get("tool_calls")
    if isinstance(listed, list):
        made = [_calls_in_object(one, declared, enveloped=True) for one in listed]
        if None in made:
            raise Unread("invalid_json")
        return [call for calls in made for call in calls]
    for key in ("function_call", "function"):
        inner = item.get(key)
        if isinstance(inner, dict) and isinstance(inner.get("name"), str):
            return _call(inner, declared, enveloped=True)
    return _call(item, declared, enveloped)


def _call(item: dict, declared: Collection[str], enveloped: bool) -> list[dict] | None:
    name = next((item[key] for key in _NAMES if key in item), None)
    given = [item[key] for key in _ARGUMENTS if key in item]
    is_declaration = "description" in item and "arguments" not in item
    if name is None or is_declaration or given and isinstance(given[0], int | float):
        return None
    if not given:
        is_bare = isinstance(name, str) and item.keys() <= _BARE and (enveloped or name in declared)
        return [{"name": name, "arguments": {}}] if is_bare else None
    arguments = _decoded(given[0])
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise Unread("invalid_json")
    return [{"name": name, "arguments": arguments}]


def _decoded(arguments):
    """Return arguments that may be JSON in a string, also encoded twice; "" and null are none."""
    for _ in range(2):
        if isinstance(arguments, str):
            arguments = parse(arguments) if arguments.strip() else None
    return {} if arguments is None else arguments
