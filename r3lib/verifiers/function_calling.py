"""Are the function calls in a text the ones a problem asks for?

How calls are read is in `calls_reader`, what a tool declares in `schemas`, and the two rules that
compare calls with gold, "strict" and "lenient" (BFCL's), are in `docs/verdicts.md`.
"""

import json
from collections.abc import Iterator

import numpy as np

from ..errors import R3Error
from .calls_reader import calls
from .json_calls import Unread, calls_in
from .schemas import Argument, Type, declared_arguments
from .tagged_calls import Untyped
from .verdict import Verdict

# Of several reasons the first is given; from "missing_argument" on they are of paired calls.
REASONS = ("ok", "no_call", "invalid_json", "wrong_function", "wrong_call_count")
REASONS += ("missing_argument", "unexpected_argument", "wrong_type", "wrong_value")
RULES = ("strict", "lenient")
_FOLDED = str.maketrans("'", '"', " ,./-_*^")


def verify(
    text: str | None, tools: list | str, answers: list | str, rule: str = "strict"
) -> Verdict:
    """Judge the calls in `text` against `answers`; `tools` give the declared types and defaults.

    `tools` (xlam's form or JSON Schema) and `answers` (plain calls or BFCL's possible answers) are
    lists or their JSON text. The reason is the first that applies of `REASONS`: "no_call" (nothing
    looks like a call, or None), "invalid_json" (it does, but cannot be read), "wrong_function"
    (one not in gold is called), "wrong_call_count" (also for `[]`). Then calls and gold are paired
    so that most pairs are right and the others fail as late in `REASONS` as they can; "wrong_type"
    is a type that neither the tool nor gold allows, or (strict) the only difference, as 1 for 1.0.
    Raises R3Error for an unknown rule, `tools` that are no list of objects, or an answer in neither
    form.
    """
    if rule not in RULES:
        raise R3Error(f"unknown rule {rule!r}: use one of {', '.join(RULES)}")
    declared = _declared(tools)
    expected = _expected(answers, declared, rule)
    try:
        found = calls(text, declared)
    except Unread as error:
        return Verdict.of(str(error))
    if {call["name"] for call in found} - {name for name, _, _ in expected}:
        return Verdict.of("wrong_function")
    if len(found) != len(expected):
        return Verdict.of("wrong_call_count")
    judge = _strict if rule == "strict" else _lenient
    reasons = [
        [_pair(call, one, declared.get(call["name"], {}), judge) for one in expected]
        for call in found
    ]
    return Verdict.of(_paired(reasons))


def _paired(reasons: list[list[str]]) -> str:
    """Return the first reason among the pairs of a call (row) and one of gold (column)."""
    from scipy.optimize import linear_sum_assignment  # takes a second, which few have to wait

    ranks = np.array([list(map(REASONS.index, row)) for row in reasons], dtype=int, ndmin=2)
    # first of all, few wrong pairs
    ranks = ranks[linear_sum_assignment(np.where(ranks, 10 * len(ranks) - ranks, 0))]
    return REASONS[min(ranks[ranks > 0], default=0)]


def gold(answers: list | str) -> list[dict]:
    """Return `answers` as plain calls: of BFCL's accepted values the first, no argument where that
    is ""."""
    return [
        {"name": name, "arguments": arguments if plain else _first(arguments)}
        for name, arguments, plain in _answers(answers)
    ]


def unwrapped(tool: dict) -> dict:
    """Return the function of a tool in OpenAI's form, other tools as they are."""
    inner = tool.get("function")
    return inner if isinstance(inner, dict) and isinstance(inner.get("name"), str) else tool


def _declared(tools: list | str) -> dict[str, dict[str, Argument]]:
    functions = [unwrapped(tool) for tool in loaded(tools, "tools")]
    return {tool["name"]: declared_arguments(tool) for tool in functions}


def loaded(value: list | str, what: str) -> list[dict]:
    """Return a list of objects that may be written as JSON."""
    value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, list | tuple) or not all(isinstance(item, dict) for item in value):
        raise R3Error(f"the {what} must be a list of objects")
    return value


def _answers(answers: list | str) -> Iterator[tuple[str, dict, bool]]:
    """Yield name and arguments of each answer, and if these are values, not accepted ones."""
    for answer in loaded(answers, "answers"):
        try:
            plain = calls_in(answer) or []
        except Unread as error:
            raise R3Error(f"an answer cannot be read as a call: {answer}") from error
        for call in plain:
            yield call["name"], call["arguments"], True
        if plain:
            continue
        if [*map(type, answer.values())] != [dict]:
            raise R3Error(f"an answer is neither a call nor BFCL's possible answers: {answer}")
        yield *next(iter(answer.items())), False


def _first(value):
    """Return the first accepted value throughout a value in BFCL's form."""
    if isinstance(value, list):
        return [_first(item) for item in value]
    if not isinstance(value, dict):
        return value
    firsts = [(key, _options(options)[:1]) for key, options in value.items()]
    return {key: _first(first[0]) for key, first in firsts if first and first[0] != ""}


def _options(options) -> list:
    return options if isinstance(options, list) else [options]


def _possible(value):
    """Return a plain value in BFCL's form."""
    if isinstance(value, dict):
        return {key: [_possible(item)] for key, item in value.items()}
    return [_possible(item) for item in value] if isinstance(value, list) else value


def _expected(answers: list | str, declared: dict, rule: str) -> list[tuple[str, dict, set]]:
    """Return of each call the name, each argument's accepted values, and what may be left out."""
    expected = []
    for name, arguments, plain in _answers(answers):
        if rule == "strict":
            wanted = arguments if plain else _first(arguments)
            expected.append((name, {arg: [value] for arg, value in wanted.items()}, set()))
        elif plain:
            expected.append((name, *_with_defaults(arguments, declared.get(name, {}))))
        else:
            optional = {arg for arg, options in arguments.items() if "" in options or not options}
            expected.append((name, arguments, optional))
    return expected


def _with_defaults(plain: dict, declared: dict[str, Argument]) -> tuple[dict, set]:
    """Return the accepted values of gold's arguments and of defaults, and what may be left out."""
    accepted = {arg: [_possible(value)] for arg, value in plain.items()}
    optional = set()
    for arg, argument in declared.items():
        for default in argument.default:
            options = accepted.setdefault(arg, [_possible(default)])
            if _match(default, options[0]):
                optional.add(arg)
    return accepted, optional


def _widened(declared: Type, values: list) -> Type:
    """Return `declared` with the types of gold's `values`, which tools may declare wrongly."""
    lists = [value for value in values if isinstance(value, list)]
    items = declared.items
    if lists and (items or list not in declared.kinds):
        items = _widened(items or Type(), [item for value in lists for item in value])
    return Type(declared.kinds | set(map(type, values)), items)


def _allowed(values: list, types: Type) -> bool:
    """Whether all `values` are of `types`; level by level, as text may hold very many of them."""
    kinds = set(map(type, values)) - ({int} if float in types.kinds else set())
    if not kinds <= types.kinds:
        return False
    lists = [value for value in values if isinstance(value, list)]
    items = [item for value in lists for item in value]
    return not (items and types.items) or _allowed(items, types.items)


def _pair(call: dict, expected: tuple[str, dict, set], declared: dict, judge) -> str:
    """Return the first reason of `REASONS` that applies to a call paired with one of gold."""
    (name, accepted, optional), arguments = expected, call["arguments"]
    if call["name"] != name:
        return "wrong_function"
    if any(arg not in arguments and arg not in optional for arg in accepted):
        return "missing_argument"
    if any(arg not in accepted for arg in arguments):
        return "unexpected_argument"
    types = {arg: declared[arg].type if arg in declared else Type() for arg in arguments}
    reasons = {_best(judge, arguments[arg], accepted[arg], types[arg]) for arg in arguments}
    return min(reasons - {"ok"}, key=REASONS.index, default="ok")


def _best(judge, value, accepted: list, declared: Type) -> str:
    """Return the reason for a value; text that has no type is read as what suits best."""
    if not isinstance(value, Untyped):
        return judge(value, accepted, declared)
    reasons = {judge(reading, accepted, declared) for reading in value.readings()}
    return "ok" if "ok" in reasons else max(reasons, key=REASONS.index)


def _strict(value, accepted: list, declared: Type) -> str:
    (wanted,) = accepted
    if _same(value, wanted):
        return "ok"
    is_typed = value != wanted and _allowed([value], _widened(declared, accepted))
    return "wrong_value" if is_typed else "wrong_type"


def _lenient(value, accepted: list, declared: Type) -> str:
    present = [option for option in accepted if option != ""]
    if not _allowed([value], _widened(declared, present or accepted)):
        return "wrong_type"
    return "ok" if any(_match(value, option) for option in accepted) else "wrong_value"


def _same(a, b) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(_same, a, b)) if isinstance(a, list) else a == b


def _match(value, option) -> bool:
    """Whether a value is an accepted one as BFCL compares them; [] is as good as leaving it out."""
    if isinstance(value, str) and isinstance(option, str):
        return _fold(value) == _fold(option)
    if isinstance(value, list) and isinstance(option, list):
        return len(value) == len(option) and all(map(_match, value, option))
    if isinstance(value, dict) and isinstance(option, dict):
        given = {key: _options(options) for key, options in option.items()}
        return value.keys() <= given.keys() and all(
            any(_match(value[key], one) for one in options) if key in value else "" in options
            for key, options in given.items()
        )
    if isinstance(value, bool) != isinstance(option, bool):
        return False
    return value == ([] if option == "" else option)


def _fold(text: str) -> str:
    return text.translate(_FOLDED).lower()
