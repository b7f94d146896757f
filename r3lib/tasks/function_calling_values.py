"""The values that generated requests ask for, each with its words and the steps that lead to it."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

TYPES = {
    "level": {"type": "str", "enum": ["low", "medium", "high"]},
    "color": {"type": "str", "enum": ["red", "green", "blue", "white"]},
    "names": {"type": "List[str]"},
    "rooms": {"type": "List[int]"},
    "litres": {"type": "float"},
    "flag": {"type": "bool"},
} | dict.fromkeys(("time", "person", "city"), {"type": "str"})
WHOLE = {"type": "int"}
PLACES = "Paris Rome Oslo Lima Cairo Delhi Quito Berlin Madrid Tokyo".split()
PEOPLE = "Ann Bob Cleo Dan Eva Finn Gus Hana Ivo June Karl Lena".split()
NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()


@dataclass(frozen=True)
class Value:
    """A value, the words that ask for it, and the steps that lead from the words to it."""

    words: str
    value: object
    steps: tuple[str, ...] = ()


def _total(*terms: tuple[int, int]) -> tuple[int, tuple[str, ...]]:
    """The sum of products a * b (a alone for b = 1) in small steps.

    Products of two long numbers go digit by digit.
    """
    steps, total = [], None
    for a, b in terms:
        if b != 1 and a > 9 and b > 9 and a % 10 and b % 10 and b < 100:
            tens, ones = a * (b // 10 * 10), a * (b % 10)
            steps += [
                f"{a} * {b // 10 * 10} = {tens}",
                f"{a} * {b % 10} = {ones}",
                f"{tens} + {ones} = {a * b}",
            ]
        elif b != 1:
            steps.append(f"{a} * {b} = {a * b}")
        if total is not None:
            steps.append(f"{total} + {a * b} = {total + a * b}")
        total = a * b if total is None else total + a * b
    return total, tuple(steps)


def _minutes(random, hard, name) -> Value:
    d, h, m = random.randint(1, 6), random.randint(1, 23), random.randint(1, 59)
    if random.random() >= hard:
        return Value(f"for {h % 9 + 1} hours and {m} minutes", *_total((h % 9 + 1, 60), (m, 1)))
    hours, steps = _total((d, 24), (h, 1))
    total, more = _total((hours, 60), (m, 1))
    return Value(f"for {d} days, {h} hours and {m} minutes", total, steps + more)


def _seconds(random, hard, name) -> Value:
    h, m, s = random.randint(1, 9), random.randint(1, 59), random.randint(1, 59)
    if random.random() >= hard:
        return Value(f"for {m} minutes and {s} seconds", *_total((m, 60), (s, 1)))
    return Value(f"for {h} hours, {m} minutes and {s} seconds", *_total((h, 3600), (m, 60), (s, 1)))


def _hours(random, hard, name) -> Value:
    w, d, h = random.randint(1, 6), random.randint(1, 6), random.randint(1, 23)
    if random.random() >= hard:
        return Value(f"for {d} days and {h} hours", *_total((d, 24), (h, 1)))
    days, steps = _total((w, 7), (d, 1))
    total, more = _total((days, 24), (h, 1))
    return Value(f"for {w} weeks, {d} days and {h} hours", total, steps + more)


def _days(random, hard, name) -> Value:
    y, w, d = random.randint(1, 6), random.randint(1, 40), random.randint(1, 6)
    if random.random() >= hard:
        return Value(f"for {w} weeks and {d} days", *_total((w, 7), (d, 1)))
    return Value(f"for {y} years, {w} weeks and {d} days", *_total((y, 365), (w, 7), (d, 1)))


def _items(random, hard, name) -> Value:
    a, b, c = random.randint(11, 59), random.randint(11, 39), random.randint(11, 99)
    if random.random() >= hard:
        return Value(f"for {b} and {c} pieces", *_total((b, 1), (c, 1)))
    if random.random() < 0.5:
        return Value(f"for {a} boxes of {b} pieces and {c} more", *_total((a, b), (c, 1)))
    return _sum_of(random, "pieces")


def _people(random, hard, name) -> Value:
    a, b, c = random.randint(3, 9), random.randint(11, 39), random.randint(2, 9)
    if random.random() >= hard:
        return Value(f"for {a} groups of {b} people", *_total((b, a)))
    if random.random() < 0.5:
        return Value(
            f"for {a} groups of {b} people and {c} of {b + a}", *_total((b, a), (b + a, c))
        )
    return _sum_of(random, "people")


def _sum_of(random, unit) -> Value:
    a, b, c, d = (random.randint(11, 99) for _ in range(4))
    return Value(f"for {a}, {b}, {c} and {d} {unit}", *_total((a, 1), (b, 1), (c, 1), (d, 1)))


def _dollars(random, hard, name) -> Value:
    sales = [
        (random.randint(11, 39), random.randint(2, 9))
        for _ in range(3 if random.random() < hard else 1)
    ]
    said = [f"{count} at {price} dollars" for price, count in sales]
    return Value(
        "for " + " and ".join([", ".join(said[:-1]), said[-1]][len(said) == 1 :]), *_total(*sales)
    )


def _grams(random, hard, name) -> Value:
    k, bags, g, rest = (
        random.randint(1, 9),
        random.randint(2, 9),
        random.randint(11, 39) * 10,
        random.randint(11, 99),
    )
    if random.random() >= hard:
        return Value(f"of {k} kilos and {g + rest} grams", *_total((k, 1000), (g + rest, 1)))
    return Value(
        f"of {k} kilos, {bags} bags of {g} grams and {rest} grams",
        *_total((k, 1000), (g, bags), (rest, 1)),
    )


def _metres(random, hard, name) -> Value:
    laps, length = random.randint(2, 9), random.randint(11, 49) * 10
    more, other = random.randint(2, 9), random.randint(11, 49)
    if random.random() >= hard:
        return Value(f"over {laps} stretches of {length} metres", *_total((length, laps)))
    return Value(
        f"over {laps} stretches of {length} metres and {more} of {other} metres",
        *_total((length, laps), (other, more)),
    )


def _time(random, hard, name) -> Value:
    hour, (said, minute) = (
        random.randint(1, 11),
        random.choice((("half past", 30), ("a quarter past", 15), ("", 0))),
    )
    part, shift = random.choice((("in the morning", 0), ("in the evening", 12)))
    words = f"{said} {NUMBER_WORDS[hour]} {part}".strip()
    at = (hour + shift) * 60 + minute
    if random.random() >= hard:
        return Value(f"at {words}", clock(at))
    gap = random.randint(1, 11) * 5
    word, sign, new = random.choice((("before", "-", at - gap), ("after", "+", at + gap)))
    return Value(
        f"at {gap} minutes {word} {words}",
        clock(new),
        (f"{clock(at)} {sign} {gap} = {clock(new)}",),
    )


def clock(minutes: int) -> str:
    """The time of day so many minutes after midnight, as "09:05"."""
    return f"{minutes // 60 % 24:02d}:{minutes % 60:02d}"


def _litres(random, hard, name) -> Value:
    said, part = random.choice((("a half", 0.5), ("a quarter", 0.25), ("three quarters", 0.75)))
    whole = random.randint(1, 9)
    return Value(f"with {NUMBER_WORDS[whole]} and {said} litres", whole + part)


def _level(random, hard, name) -> Value:
    return Value(f"on {(level := random.choice(TYPES['level']['enum']))}", level)


def _color(random, hard, name) -> Value:
    return Value(f"in {(color := random.choice(TYPES['color']['enum']))}", color)


def _flag(random, hard, name) -> Value:
    return Value(f"with {name}" if (on := random.random() < 0.5) else f"without {name}", on)


def _city(random, hard, name) -> Value:
    return Value(f"in {(city := random.choice(PLACES))}", city)


def _person(random, hard, name) -> Value:
    return Value(f"for {(person := random.choice(PEOPLE))}", person)


def _names(random, hard, name) -> Value:
    people = random.sample(PEOPLE, random.randint(2, 3))
    return Value(f"with {', '.join(people[:-1])} and {people[-1]}", people)


def _rooms(random, hard, name) -> Value:
    rooms = sorted(random.sample(range(1, 20), random.randint(2, 3)))
    return Value(f"in rooms {', '.join(map(str, rooms[:-1]))} and {rooms[-1]}", rooms)


KINDS: dict[str, Callable[[Random, float, str], Value]] = {
    "minutes": _minutes, "seconds": _seconds, "hours": _hours, "days": _days, "items": _items,
    "people": _people, "dollars": _dollars, "grams": _grams, "metres": _metres, "time": _time,
    "litres": _litres, "level": _level, "color": _color, "flag": _flag, "city": _city,
    "person": _person, "names": _names, "rooms": _rooms,
}  # fmt: skip
