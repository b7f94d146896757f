"""Does a text solve a Countdown problem? A small parser reads the answer; nothing is evaluated as code.

The answer is what the last well-formed `<answer>...</answer>` holds, in this grammar:

    answer     = expression [ "=" [ "-" ] number ]
    expression = product { ( "+" | "-" ) product }
    product    = atom { ( "*" | "/" ) atom }
    atom       = number | "(" expression ")"
    number     = "0" | digit 1 to 9 { digit 0 to 9 }            ASCII digits only

Unicode spellings of the four operators count as the operators, and white space may stand between tokens.
So these are invalid: a sign before a number or a parenthesis in the expression (it is not an operation on
two given numbers), leading zeros (`007`), decimals, powers, `//`, several equals signs, and more than
`MAX_LENGTH` characters or `MAX_DEPTH` nested parentheses. The rule is the paper's (its Countdown task): every
given number exactly once, and the value equals the target.
"""

import operator
import re
from collections.abc import Iterable
from fractions import Fraction

from .verdict import Verdict

MAX_LENGTH = 500
MAX_DEPTH = 50

_OPEN, _CLOSE = b"<answer>", b"</answer>"
_SPELLINGS = {"*": "×✕✖⨯·⋅∙∗", "/": "÷∕⁄", "-": "−–‒‑‐"}
_PLAIN = str.maketrans({odd: plain for plain, spellings in _SPELLINGS.items() for odd in spellings})
_NUMBER = r"(?:0|[1-9][0-9]*)"
_TOKEN = re.compile(_NUMBER + r"|\S")
_TAIL = re.compile(rf"-?{_NUMBER}")
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": Fraction}


def verify(text: str | None, nums: Iterable[int], target: int) -> Verdict:
    """Judge an answer to "reach `target` with each of `nums` exactly once".

    The reason is the first that applies of "no_answer" (no well-formed answer tag, or `text` is None),
    "invalid_expression" (outside the grammar, or a division by zero), "wrong_numbers" (not exactly the given
    numbers, as a multiset), "missed_target" (another value, or an `= number` tail not the target), or "ok".
    Raises TypeError when `text` is neither a string nor None.
    """
    content = answer(text)
    if content is None:
        return Verdict.of("no_answer")
    try:
        expression, claimed = _split(content)
        result, used = _read(expression)
    except ValueError:
        return Verdict.of("invalid_expression")
    if sorted(used) != sorted(nums):
        return Verdict.of("wrong_numbers")
    return Verdict.of("ok" if result == target and claimed in (None, target) else "missed_target")


def answer(text: str | None) -> str | None:
    """Return what the last well-formed `<answer>...</answer>` of `text` holds, or None when there is none.

    Tags may be in any case. The content runs from the last opening tag that a closing one follows to the
    first closing tag after it, so neither a later unclosed tag nor a stray closing one hides it. Raises
    TypeError when `text` is neither a string nor None.
    """
    if text is None:
        return None
    if not isinstance(text, str):
        raise TypeError(f"the text to verify must be a string or None, not {type(text).__name__}")
    # One byte a character, so positions are those of `text`; str.lower would change the length of some.
    folded = text.encode("ascii", "replace").lower()
    start = folded.rfind(_OPEN, 0, max(folded.rfind(_CLOSE), 0))
    if start < 0:
        return None
    start += len(_OPEN)
    return text[start : folded.find(_CLOSE, start)]


def value(expression: str) -> Fraction:
    """Return the exact value of `expression` (without an `=` tail).

    Raises ValueError for anything outside the grammar and for a division by zero.
    """
    return _read(expression)[0]


def numbers(expression: str) -> list[int]:
    """Return the numbers of `expression` (without an `=` tail) in order; raises ValueError like `value`."""
    return _read(expression)[1]


def _read(expression: str) -> tuple[Fraction, list[int]]:
    """Parse `expression` into its value and its numbers."""
    tokens = _TOKEN.findall(_normalise(expression))
    rest = ["the end", *reversed(tokens)]
    result = _sum(rest, 0)
    if len(rest) > 1:
        raise ValueError(f"unexpected {rest[-1]!r} in the expression")
    return Fraction(result), [int(token) for token in tokens if token.isdecimal()]


def _split(content: str) -> tuple[str, int | None]:
    """Split an answer into its expression and the number its `=` tail claims, None without a tail."""
    expression, equals, tail = _normalise(content).partition("=")
    if not equals:
        return expression, None
    if not _TAIL.fullmatch(tail.strip()):
        raise ValueError("what follows the equals sign is not one whole number")
    return expression, int(tail)


def _normalise(text: str) -> str:
    if len(text) > MAX_LENGTH:
        raise ValueError(f"the expression has {len(text)} characters, more than {MAX_LENGTH}")
    return text.translate(_PLAIN)


def _sum(tokens: list[str], depth: int) -> Fraction | int:
    """Read a sum off the end of `tokens`, which are in reverse order and begin with an end marker."""
    result = _product(tokens, depth)
    while tokens[-1] in ("+", "-"):
        result = _OPERATIONS[tokens.pop()](result, _product(tokens, depth))
    return result


def _product(tokens: list[str], depth: int) -> Fraction | int:
    result = _atom(tokens, depth)
    while tokens[-1] in ("*", "/"):
        try:
            result = _OPERATIONS[tokens.pop()](result, _atom(tokens, depth))
        except ZeroDivisionError:
            raise ValueError("the expression divides by zero") from None
    return result


def _atom(tokens: list[str], depth: int) -> Fraction | int:
    token = tokens.pop()
    if token.isascii() and token.isdecimal():
        return int(token)
    if token != "(":
        raise ValueError(f"expected a number or a parenthesis, found {token!r}")
    if depth == MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} nested parentheses")
    result = _sum(tokens, depth + 1)
    if tokens.pop() != ")":
        raise ValueError("a parenthesis is not closed")
    return result
