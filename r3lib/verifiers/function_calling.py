"""Are the function calls in a text the ones a problem asks for? They are read as JSON; nothing is evaluated.

What is read: the text from the first `<tool_call>` on, else `<|python_tag|>`, else "```json", if a `"name":`
follows, otherwise the whole text. In it every outermost JSON object or list with the word `name` must be a call or
a list of calls, so one broken block spoils the text and a call made twice is two calls; other blocks and the prose
around them are passed over. A call is `{"name", "arguments"}`, or has "parameters" instead (Llama), or is the value
of "function" (OpenAI, xlam), or has its arguments as a JSON string (OpenAI). Repeated keys, NaN, infinities, numbers
beyond what Python reads and more than `MAX_DEPTH` nested brackets are invalid JSON. So is a text with a `"name":`
outside its blocks, or with one and more than `MAX_LENGTH` characters or `MAX_BLOCKS` blocks left to read.

Two rules compare the calls with gold; the order of calls is free, and 1, "1" and true are three values:

- "strict": the arguments of gold and no others, with equal values. Types count, so 1 is not 1.0; strings and
  lists are exact, objects unordered. Of BFCL's accepted values the first is gold's.
- "lenient": BFCL's AST checker. Any accepted value will do, an argument with "" among them may be left out (with
  a plain gold, one that the tool declares optional), integers pass for floats but not the reverse, and strings
  are compared without case, spaces and `,./-_*^`. Unlike BFCL it pairs calls optimally instead of greedily, looks
  into nested values, takes integers in lists of floats, and lets "" stand for a required argument, so that the
  gold of every record is right.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ..errors import R3Error
from .verdict import Verdict

# Of several reasons the first is given. Those from "missing_argument" on are of the calls as paired with gold.
REASONS = ("ok", "no_call", "invalid_json", "wrong_function", "wrong_call_count")
REASONS += ("missing_argument", "unexpected_argument", "wrong_type", "wrong_value")
RULES = ("strict", "lenient")
MAX_LENGTH, MAX_DEPTH, MAX_BLOCKS = 10_000, 50, 50

_MARKS, _KEY, _NAME = ("<tool_call>", "<|python_tag|>", "```json"), '"name":', re.compile(r"\bname\b")
_START = re.compile(r"""\{\s*(?:["'{}\[]|name["']?\s*:)|\[\s*[\[\]{]""")
_TOKEN = re.compile(r'"(?:[^"\\\n]|\\.)*+"?|[\[\]{}]')
_CLOSING = re.compile(r"(?:\s*[\]}])*+")
_STEP = {"{": 1, "[": 1, "}": -1, "]": -1}
_WORDS = {str: "str string char", int: "int integer long", float: "float number double", bool: "bool boolean"}
_WORDS |= {list: "list array tuple set", dict: "dict object", type(None): "none null"}
_TYPES = {word: kind for kind, words in _WORDS.items() for word in words.split()}


class Unread(ValueError):
    """No calls can be read from a text; the message is the reason, "no_call" or "invalid_json"."""


@dataclass
class _Type:
    """The types of JSON values that are allowed, and those of the items of a list (None allows any)."""

    kinds: set[type] = field(default_factory=set)
    items: "_Type | None" = None


def verify(text: str | None, tools: list | str, answers: list | str, rule: str = "strict") -> Verdict:
    """Judge the calls in `text` against `answers`; `tools` give the declared types and optional arguments.

    `tools` (xlam's form or JSON schema) and `answers` (plain calls or BFCL's possible answers) are lists or their
    JSON text. The reason is the first that applies of `REASONS`: "no_call" (nothing looks like a call, or None),
    "invalid_json" (it does, but cannot be read), "wrong_function" (one not in gold is called), "wrong_call_count"
    (also for `[]`). Then calls and gold are paired so that most pairs are right and the others fail as late in
    `REASONS` as they can; "wrong_type" is a type that neither the tool nor gold allows, or (strict) the only
    difference, as 1 for 1.0. Raises TypeError when `text` is neither a string nor None, and R3Error for an
    unknown rule, `tools` that are no list of objects, or an answer in neither form.
    """
    if rule not in RULES:
        raise R3Error(f"unknown rule {rule!r}: use one of {', '.join(RULES)}")
    declared = {tool.get("name"): _arguments(tool) for tool in map(_unwrap, _loaded(tools, "tools"))}
    expected = _expected(answers, declared, rule)
    try:
        found = calls(text)
    except Unread as error:
        return Verdict.of(str(error))
    if {call["name"] for call in found} - {name for name, _, _ in expected}:
        return Verdict.of("wrong_function")
    if len(found) != len(expected):
        return Verdict.of("wrong_call_count")
    from scipy.optimize import linear_sum_assignment  # here: it takes a second that few processes need to wait

    judge = _strict if rule == "strict" else _lenient
    reasons = [[_pair(call, one, declared.get(call["name"], {}), judge) for one in expected] for call in found]
    ranks = np.array([[REASONS.index(reason) for reason in row] for row in reasons], dtype=int, ndmin=2)
    ranks = ranks[linear_sum_assignment(np.where(ranks, 10 * len(found) - ranks, 0))]  # first of all, few wrong pairs
    return Verdict.of(REASONS[min(ranks[ranks > 0], default=0)])


def calls(text: str | None) -> list[dict]:
    """Return the calls of `text` in order, each {"name": str, "arguments": dict}; none for the text `[]`.

    Raises Unread when nothing looks like a call or one cannot be read, TypeError for no string and not None.
    """
    if not isinstance(text, str | None):
        raise TypeError(f"the text to verify must be a string or None, not {type(text).__name__}")
    text = text or ""
    key = text.rfind(_KEY)
    unread = Unread("no_call" if key < 0 else "invalid_json")
    text = text[next((at for mark in _MARKS if (at := text.find(mark, 0, max(key, 0))) >= 0), 0) :]
    if len(text) > MAX_LENGTH:
        raise unread
    found, empty, keys = [], False, text.count(_KEY)
    for count, block in enumerate(_blocks(text)):
        if count == MAX_BLOCKS:
            raise unread
        if _NAME.search(block):
            found += map(_call, parsed if isinstance(parsed := _parse(block), list) else [parsed])
        keys -= block.count(_KEY)
        empty = empty or block.split() in (["[]"], ["[", "]"])
    if keys or not found and not empty:
        raise unread
    return found


def gold(answers: list | str) -> list[dict]:
    """Return `answers` as plain calls: of BFCL's accepted values the first, no argument where that is ""."""
    return [
        {"name": name, "arguments": arguments if plain else _first(arguments)}
        for name, arguments, plain in _answers(answers)
    ]


def render(calls: list[dict]) -> str:
    """Return the JSON text of `calls`, a list of {"name", "arguments"}, on one line."""
    return json.dumps(calls, ensure_ascii=False)


def _blocks(text: str) -> Iterator[str]:
    """Yield the outermost bracketed parts of `text`, each with the surplus closing brackets after it."""
    end = 0
    while start := _START.search(text, end):
        end = _end(text, start.start())
        if end is None and _NAME.search(text, start.start()):
            raise Unread("invalid_json")
        if end is None:
            return
        end = _CLOSING.match(text, end).end()
        yield text[start.start() : end]


def _end(text: str, start: int) -> int | None:
    """Return where the first bracket from `start` on is closed; None without one, unclosed or nested too deep."""
    depth = 0
    for token in _TOKEN.finditer(text, start):
        depth += _STEP.get(token[0], 0)
        if not 0 < depth <= MAX_DEPTH:
            return None if depth else token.end()
    return None


def _parse(text: str):
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
    except ValueError:
        raise Unread("invalid_json") from None


def _unique(pairs: list[tuple]) -> dict:
    if len(made := dict(pairs)) < len(pairs):
        raise ValueError("a key is repeated")
    return made


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no finite number")
    return number


def _unwrap(item):
    inner = item.get("function") if isinstance(item, dict) else None
    return inner if isinstance(inner, dict) and isinstance(inner.get("name"), str) else item


def _call(item) -> dict:
    item = _unwrap(item)
    if not isinstance(item, dict):
        raise Unread("invalid_json")
    name, arguments = item.get("name"), item.get("arguments", item.get("parameters"))
    if isinstance(arguments, str) and _end(arguments, 0):
        arguments = _parse(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise Unread("invalid_json")
    return {"name": name, "arguments": arguments}


def _loaded(value: list | str, what: str) -> list[dict]:
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise R3Error(f"the {what} are not valid JSON: {error}") from None
    if not isinstance(value, list | tuple) or not all(isinstance(item, dict) for item in value):
        raise R3Error(f"the {what} must be a list of objects")
    return value


def _answers(answers: list | str) -> Iterator[tuple[str, dict, bool]]:
    """Yield of each answer the name, the arguments, and whether they are plain values or lists of accepted ones."""
    for answer in _loaded(answers, "answers"):
        plain = isinstance(_unwrap(answer).get("name"), str)
        try:
            ((name, arguments),) = [_call(answer).values()] if plain else answer.items()
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise R3Error(f"an answer is neither a call nor BFCL's possible answers: {answer}")
        yield name, arguments, plain


def _first(value):
    """Return the first accepted value throughout a value in BFCL's form."""
    if isinstance(value, dict):
        firsts = {key: _options(options)[:1] for key, options in value.items()}
        return {key: _first(option) for key, options in firsts.items() for option in options if option != ""}
    return [_first(item) for item in value] if isinstance(value, list) else value


def _options(options) -> list:
    return options if isinstance(options, list) else [options]


def _possible(value):
    """Return a plain value in BFCL's form."""
    if isinstance(value, dict):
        return {key: [_possible(item)] for key, item in value.items()}
    return [_possible(item) for item in value] if isinstance(value, list) else value


def _expected(answers: list | str, declared: dict, rule: str) -> list[tuple[str, dict, set]]:
    """Return name, accepted values of each argument, and the arguments that may be left out, of each call."""
    if rule == "strict":
        return [(call["name"], {a: [v] for a, v in call["arguments"].items()}, set()) for call in gold(answers)]
    expected = []
    for name, accepted, plain in _answers(answers):
        if plain:
            accepted = {arg: [_possible(value)] for arg, value in accepted.items()}
            optional = {arg for arg, (_, is_optional) in declared.get(name, {}).items() if is_optional}
        else:
            optional = {arg for arg, options in accepted.items() if "" in options or not options}
        expected.append((name, accepted, optional))
    return expected


def _arguments(tool: dict) -> dict[str, tuple[_Type, bool]]:
    """Return the declared type of each argument of a tool, and whether it is optional."""
    parameters = tool.get("parameters") or {}
    if isinstance(parameters.get("type"), str):  # JSON schema; in xlam's form this is an argument named "type"
        required = parameters.get("required", ())
        return {arg: (_type(_words(s)), arg not in required) for arg, s in parameters.get("properties", {}).items()}
    required = tool.get("required", [arg for arg, spec in parameters.items() if not is_optional(spec)])
    return {arg: (_type(_words(s)), arg not in required) for arg, s in parameters.items()}


def is_optional(spec: dict) -> bool:
    """Whether an argument in xlam's form may be left out: it has a default or is declared optional."""
    return "default" in spec or "optional" in _words(spec)


def _words(spec: dict) -> str:
    """Return a declared type as in `list[int], optional`."""
    words = spec.get("type", "")
    words = " ".join(words) if isinstance(words, list) else str(words).lower()
    return f"{words}[{_words(spec['items'])}]" if "items" in spec else words


def _type(words: str) -> _Type:
    stack = [_Type()]
    for word, bracket in re.findall(r"(\w+|\])(\[?)", words):
        if word in _TYPES:
            stack[-1].kinds.add(_TYPES[word])
        if bracket:
            inner = stack[-1] if word in ("optional", "union") else _Type()
            if _TYPES.get(word) is list:
                stack[-1].items = inner
            stack.append(inner)
        elif word == "]" and len(stack) > 1:
            stack.pop()
    return stack[0]


def _widened(declared: _Type, values: list) -> _Type:
    """Return `declared` with the types of `values` (gold's) added, which not every tool declares rightly."""
    lists, items = [value for value in values if isinstance(value, list)], declared.items
    if lists and (items or list not in declared.kinds):
        items = _widened(items or _Type(), [item for value in lists for item in value])
    return _Type(declared.kinds | set(map(type, values)), items)


def _allowed(values: list, types: _Type) -> bool:
    """Whether all `values` are of `types`; level by level, as text may hold very many of them."""
    kinds = set(map(type, values)) - ({int} if float in types.kinds else set())
    items = [item for value in values if isinstance(value, list) for item in value] if types.items else []
    return kinds <= types.kinds and (not items or _allowed(items, types.items))


def _pair(call: dict, expected: tuple[str, dict, set], declared: dict, judge) -> str:
    """Return the first reason of `REASONS` that applies to a call paired with one of gold."""
    (name, accepted, optional), arguments = expected, call["arguments"]
    if call["name"] != name:
        return "wrong_function"
    if any(arg not in arguments and arg not in optional for arg in accepted):
        return "missing_argument"
    if any(arg not in accepted for arg in arguments):
        return "unexpected_argument"
    unknown = (_Type(), False)
    reasons = {judge(arguments[arg], accepted[arg], declared.get(arg, unknown)[0]) for arg in arguments}
    return min(reasons - {"ok"}, key=REASONS.index, default="ok")


def _strict(value, accepted: list, declared: _Type) -> str:
    (wanted,) = accepted
    if _same(value, wanted):
        return "ok"
    return "wrong_value" if value != wanted and _allowed([value], _widened(declared, accepted)) else "wrong_type"


def _lenient(value, accepted: list, declared: _Type) -> str:
    if not _allowed([value], _widened(declared, [option for option in accepted if option != ""] or accepted)):
        return "wrong_type"
    return "ok" if any(_match(value, option) for option in accepted) else "wrong_value"


def _same(a, b) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(_same, a, b)) if isinstance(a, list) else a == b


def _match(value, option) -> bool:
    """Whether a value is an accepted one as BFCL compares them; an empty list is as good as leaving it out."""
    if isinstance(value, str) and isinstance(option, str):
        return _fold(value) == _fold(option)
    if isinstance(value, list) and isinstance(option, list):
        return len(value) == len(option) and all(map(_match, value, option))
    if isinstance(value, dict) and isinstance(option, dict):
        return value.keys() <= option.keys() and all(
            any(_match(value[key], one) for one in _options(options)) if key in value else "" in _options(options)
            for key, options in option.items()
        )
    return value == ([] if option == "" else option) and isinstance(value, bool) == isinstance(option, bool)


def _fold(text: str) -> str:
    for mark in " ,./-_*^":
        text = text.replace(mark, "")
    return text.lower().replace("'", '"')
