"""The values that generated requests ask for, each with its words and the steps that lead to it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import yaml

DATA = yaml.safe_load(Path(__file__).with_name("function_calling.yaml").read_text("utf-8"))
NUMBER_WORDS = DATA["numbers"]


@dataclass(frozen=True)
class Value:
    """A value, the words that ask for it, and the steps that lead from the words to it."""

    words: str
    value: object
    steps: tuple[str, ...] = ()


def type_of(kind: str) -> dict:
    """Return the declared type of a parameter of this kind."""
    return DATA["types"].get(kind, {"type": "int"})


def draw_value(random: Random, kind: str, hard: float, name: str = "") -> Value:
    """Draw a value for the parameter `name`; `hard` is the chance of more than two steps."""
    if kind in DATA["amounts"]:
        return _amount(random, hard, DATA["amounts"][kind])
    if kind in DATA["choices"]:
        words, values = DATA["choices"][kind]
        value = random.choice(values)
        return Value(words.format(value), value)
    return _OTHERS[kind](random, hard, name)


def _amount(random: Random, hard: float, amount: dict) -> Value:
    numbers = {name: _in_range(random, *ends) for name, ends in amount["numbers"].items()}
    if random.random() >= hard:
        return _worked_out(amount["easy"], numbers)
    if "sum" in amount and random.random() >= 0.5:
        a, b, c, d = (random.randint(11, 99) for _ in range(4))
        words = f"for {a}, {b}, {c} and {d} {amount['sum']}"
        return Value(words, *_total((a, 1), (b, 1), (c, 1), (d, 1)))
    return _worked_out(amount["hard"], numbers)


def _in_range(random: Random, first: int, last: int, step: int = 1) -> int:
    return random.randrange(first, last + 1, step)


def _worked_out(form: list[str], numbers: dict[str, int]) -> Value:
    """Fill in a form of an amount: its words, then its formulas."""
    words, *formulas = form
    said = re.sub(r"\{(.+?)\}", lambda part: str(_number(part[1], numbers)), words)
    steps = ()
    for formula in formulas:
        factors = [[*term.split(" * "), "1"][:2] for term in formula.split(" + ")]
        total, more = _total(*((_number(a, numbers), _number(b, numbers)) for a, b in factors))
        steps += more
        numbers = {**numbers, "it": total}
    return Value(said, total, steps)


def _number(written: str, numbers: dict[str, int]) -> int:
    """Return what a name, a number, "a%b" or "a+b" stands for."""
    left, plus, right = written.partition("+")
    if plus:
        return _number(left, numbers) + _number(right, numbers)
    left, percent, right = written.partition("%")
    if percent:
        return _number(left, numbers) % _number(right, numbers)
    return numbers[written] if written in numbers else int(written)


def _total(*terms: tuple[int, int]) -> tuple[int, tuple[str, ...]]:
    """The sum of products a * b (a alone for b = 1), and the small steps to it.

    Products of two long numbers go digit by digit.
    """
    steps, total = [], None
    for a, b in terms:
        product = a * b
        if b != 1 and a > 9 and 9 < b < 100 and a % 10 and b % 10:
            tens, ones = b // 10 * 10, b % 10
            steps += [f"{a} * {tens} = {a * tens}", f"{a} * {ones} = {a * ones}"]
            steps.append(f"{a * tens} + {a * ones} = {product}")
        elif b != 1:
            steps.append(f"{a} * {b} = {product}")
        if total is not None:
            steps.append(f"{total} + {product} = {total + product}")
        total = product + (total or 0)
    return total, tuple(steps)


def _dollars(random: Random, hard: float, name: str) -> Value:
    count = 3 if random.random() < hard else 1
    sales = [(random.randint(11, 39), random.randint(2, 9)) for _ in range(count)]
    said = [f"{pieces} at {price} dollars" for price, pieces in sales]
    return Value(f"for {_listed(said)}", *_total(*sales))


def _time(random: Random, hard: float, name: str) -> Value:
    hour = random.randint(1, 11)
    said, minute = random.choice((("half past", 30), ("a quarter past", 15), ("", 0)))
    part, shift = random.choice((("in the morning", 0), ("in the evening", 12)))
    words = f"{said} {NUMBER_WORDS[hour]} {part}".strip()
    at = (hour + shift) * 60 + minute
    if random.random() >= hard:
        return Value(f"at {words}", clock(at))
    gap = random.randint(1, 11) * 5
    word, sign, new = random.choice((("before", "-", at - gap), ("after", "+", at + gap)))
    step = f"{clock(at)} {sign} {gap} = {clock(new)}"
    return Value(f"at {gap} minutes {word} {words}", clock(new), (step,))


def clock(minutes: int) -> str:
    """The time of day so many minutes after midnight, as "09:05"."""
    return f"{minutes // 60 % 24:02d}:{minutes % 60:02d}"


def _litres(random: Random, hard: float, name: str) -> Value:
    said, part = random.choice((("a half", 0.5), ("a quarter", 0.25), ("three quarters", 0.75)))
    whole = random.randint(1, 9)
    return Value(f"with {NUMBER_WORDS[whole]} and {said} litres", whole + part)


def _flag(random: Random, hard: float, name: str) -> Value:
    is_on = random.random() < 0.5
    return Value(f"with {name}" if is_on else f"without {name}", is_on)


def _names(random: Random, hard: float, name: str) -> Value:
    people = random.sample(DATA["people"], random.randint(2, 3))
    return Value(f"with {_listed(people)}", people)


def _rooms(random: Random, hard: float, name: str) -> Value:
    rooms = sorted(random.sample(range(1, 20), random.randint(2, 3)))
    return Value(f"in rooms {_listed(list(map(str, rooms)))}", rooms)


def _listed(words: list[str]) -> str:
    """Return the words as "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


_OTHERS: dict[str, Callable[[Random, float, str], Value]] = {
    "dollars": _dollars,
    "time": _time,
    "litres": _litres,
    "flag": _flag,
    "names": _names,
    "rooms": _rooms,
}
