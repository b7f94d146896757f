"""Does a text solve a Countdown problem? A small parser reads it; nothing is evaluated as code.

The rule is the paper's: an equation with every given number exactly once, whose value is the
target. The notations that are accepted are in `docs/verdicts.md`.
"""

import operator
import re
import unicodedata
from collections.abc import Iterable
from fractions import Fraction

from .reasoning import answer_text
from .verdict import Verdict

MAX_LENGTH = 500
MAX_DEPTH = 50

_ANSWER = re.compile(
    r"<(?ai:answer)>([^<]*+(?:<(?!/?(?ai:answer)>)[^<]*+)*+)</(?ai:answer)>"  # no tag inside
)
_QUOTES = frozenset("\"'`“”‘’")
_SPELLINGS = {"*": "×✕✖⨯⨉·⋅∙•∗⁎✱", "/": "÷∕⁄⧸➗", "-": "−–—―‒‑‐˗⁃﹘➖", "+": "➕"}
_INVISIBLE = "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufe0e\ufe0f\ufeff"
# Small forms, fullwidth forms, mathematical and segmented digits; no superscripts, no fractions.
_LOOKALIKES = ((0xFE50, 0xFE6F), (0xFF01, 0xFF5E), (0x1D7CE, 0x1D7FF), (0x1FBF0, 0x1FBF9))
_PLAIN = {
    code: unicodedata.normalize("NFKC", chr(code))
    for first, last in _LOOKALIKES
    for code in range(first, last + 1)
}
_PLAIN |= {ord(odd): plain for plain, spellings in _SPELLINGS.items() for odd in spellings}
_PLAIN |= dict.fromkeys(map(ord, _INVISIBLE))

_MACRO = re.compile(r"\\{1,2}([A-Za-z]+|[^A-Za-z\\])")
_MACROS = dict.fromkeys(("times", "cdot", "ast"), "*") | {"div": "/"}
_MACROS |= dict.fromkeys(("frac", "dfrac", "tfrac", "cfrac"), "\\frac")
_MACROS |= dict.fromkeys("left right big Big bigl bigr Bigl Bigr bigg Bigg".split(), "")
_MACROS |= dict.fromkeys(("boxed", "fbox", "mathbf", "displaystyle"), "")
_MACROS |= dict.fromkeys(("quad", "qquad", *",;:! "), " ") | {sign: sign for sign in "*{}"}

_FENCE = re.compile(r"```(?:[A-Za-z]+\n)?([^`]*)```|`([^`]*)`")
_AROUND = re.compile(
    r"""\$\$([^$]*)\$\$ | \$([^$]*)\$                                      # mathematics
    | \\{1,2}\(((?:(?!\\\)).)*?)\\{1,2}\) | \\{1,2}\[((?:(?!\\\]).)*?)\\{1,2}\]
    | (?P<stars>\*\*\*?)(?![\s*])((?:(?!\*\*).)*)(?<![\s*])(?P=stars)      # bold
    | __([^_]*)__
    | \A\s*"([^"]*)"\s*\Z | \A\s*'([^']*)'\s*\Z | \A\s*“([^”]*)”\s*\Z""",
    re.VERBOSE | re.DOTALL,
)
_FULL_STOP = re.compile(r"(?<!\.)[.。]\s*\Z")
_LETTER_X = re.compile(r"(?<!\b0)[xX]")  # 0x10 is not 0 times 10

_NUMBER = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|0|[1-9][0-9]*)"
_TOKEN = re.compile(rf"{_NUMBER}(?:\.[0-9]*)?|\\frac(?![A-Za-z])|\S")
_RESULT = re.compile(rf"[+-] {_NUMBER}(?:\.[0-9]*)?|{_NUMBER}\.[0-9]*")
_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": Fraction}


def verify(text: str | None, nums: Iterable[int], target: int) -> Verdict:
    """Judge an answer to "reach `target` with each of `nums` exactly once".

    The reason is the first that applies of:

    - "no_answer": no well-formed answer tag outside reasoning, or `text` is None
    - "invalid_expression": outside the table, or a division by zero
    - "wrong_numbers": no side of the equation has exactly the given numbers, as a multiset
    - "missed_target": a side of the equation has another value
    - "ok"
    """
    content = answer(text)
    if content is None:
        return Verdict.of("no_answer")
    try:
        sides = [_side(tokens) for tokens in _sides(_tokens(content))]
    except (ValueError, ZeroDivisionError):
        return Verdict.of("invalid_expression")
    used = [sorted(numbers) for _, numbers in sides if numbers is not None]
    if not used:
        return Verdict.of("invalid_expression")
    if sorted(nums) not in used:
        return Verdict.of("wrong_numbers")
    return Verdict.of("ok" if all(value == target for value, _ in sides) else "missed_target")


def answer(text: str | None) -> str | None:
    """Return what the last well-formed `<answer>...</answer>` of `text` holds; None without one.

    Only text outside reasoning and before the end of the turn counts. Tags may be in any case.
    Neither a later unclosed tag nor a stray closing one hides an answer. Nor does one that is only
    mentioned: without a digit, or in quotation marks or backticks.
    """
    found = list(_ANSWER.finditer(answer_text(text)))
    plain = [one for one in found if not _is_quoted(one)]
    answers = _given(plain) or _given(found) or found
    return answers[-1][1] if answers else None


def _is_quoted(found: re.Match) -> bool:
    before = found.string[found.start() - 1 : found.start()]
    after = found.string[found.end() : found.end() + 1]
    return before in _QUOTES and after in _QUOTES


def _given(found: list[re.Match]) -> list[re.Match]:
    """Those that may be answers: with a digit, or too long to look."""
    return [one for one in found if len(one[1]) > MAX_LENGTH or re.search(r"\d", one[1])]


def _tokens(text: str) -> list[str]:
    """Return the tokens of `text` in plain notation; marks around a part become brackets."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"the answer has {len(text)} characters, more than {MAX_LENGTH}")
    text = _FULL_STOP.sub("", text.translate(_PLAIN))
    text = _FENCE.sub(_bracketed, text)
    text = _MACRO.sub(_replaced, text)
    marked = ""
    while marked != text:  # marks may stand in one another, as in **$3*5$**
        marked = text
        text = _AROUND.sub(_bracketed, text)
    text = text.replace("{,}", ",")
    return _TOKEN.findall(_LETTER_X.sub("*", text))


def _replaced(macro: re.Match) -> str:
    """Return what a macro of LaTeX stands for; one for looks parts digits that it is between."""
    plain = _MACROS.get(macro[1], macro[0])
    before = macro.string[macro.start() - 1 : macro.start()]
    return plain or (" " if before.isdigit() else "")


def _bracketed(marked: re.Match) -> str:
    """Return what is marked in brackets, but a sign alone, as in `3 $\\times$ 5`, as it is."""
    inside = marked[marked.lastindex]
    if inside.strip() in (*_OPERATIONS, "=") and not marked[0].startswith("*"):
        return inside
    return f"({inside})"


def _sides(tokens: list[str]) -> list[list[str]]:
    """Split an equation, perhaps in brackets as a whole, at its equals signs."""
    if "=" not in tokens:
        return [tokens]
    return [side.split() for side in " ".join(_unwrapped(tokens)).split("=")]


def _unwrapped(tokens: list[str]) -> list[str]:
    """Return `tokens` without the brackets that enclose them all."""
    open_at: list[int] = []
    closed_at = {}
    for place, token in enumerate(tokens):
        if token in _BRACKETS:
            open_at.append(place)
        elif open_at and token == _BRACKETS[tokens[open_at[-1]]]:
            closed_at[open_at.pop()] = place
    layers = 0
    while closed_at.get(layers) == len(tokens) - 1 - layers:
        layers += 1
    return tokens[layers : len(tokens) - layers]


def _side(tokens: list[str]) -> tuple[Fraction, list[int] | None]:
    """Return value and numbers of one side; None for those of a result with a sign or a point."""
    result = " ".join(_unwrapped(tokens))
    if _RESULT.fullmatch(result):
        return Fraction(result.replace(" ", "").replace(",", "")), None
    return _read(tokens)


def _read(tokens: list[str]) -> tuple[Fraction, list[int]]:
    """Parse the tokens of an expression into its value and its numbers."""
    rest = ["the end", *reversed(tokens)]
    result = _sum(rest, 0)
    if len(rest) > 1:
        raise ValueError(f"unexpected {rest[-1]!r} in the expression")
    return Fraction(result), [_whole(token) for token in tokens if token[0] in "0123456789"]


def _sum(tokens: list[str], depth: int) -> Fraction | int:
    """Read a sum off the end of `tokens`, which are reversed and begin with an end marker."""
    result = _product(tokens, depth)
    while tokens[-1] in ("+", "-"):
        result = _OPERATIONS[tokens.pop()](result, _product(tokens, depth))
    return result


def _product(tokens: list[str], depth: int) -> Fraction | int:
    result = _atom(tokens, depth)
    while tokens[-1] in ("*", "/"):
        result = _OPERATIONS[tokens.pop()](result, _atom(tokens, depth))
    return result


def _atom(tokens: list[str], depth: int) -> Fraction | int:
    token = tokens.pop()
    if token in _BRACKETS:
        return _group(token, tokens, depth)
    if token == "\\frac":
        numerator = _argument(tokens, depth)
        return Fraction(numerator, _argument(tokens, depth))
    return _whole(token)


def _argument(tokens: list[str], depth: int) -> Fraction | int:
    if tokens[-1] != "{":
        raise ValueError(f"expected an argument in curly brackets, found {tokens[-1]!r}")
    return _group(tokens.pop(), tokens, depth)


def _group(opening: str, tokens: list[str], depth: int) -> Fraction | int:
    """Read up to the bracket that closes `opening`."""
    if depth == MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} nested brackets")
    result = _sum(tokens, depth + 1)
    if tokens.pop() != _BRACKETS[opening]:
        raise ValueError("a bracket is not closed")
    return result


def _whole(token: str) -> int:
    if not re.fullmatch(_NUMBER, token):
        raise ValueError(f"expected a whole number or a bracket, found {token!r}")
    return int(token.replace(",", ""))
