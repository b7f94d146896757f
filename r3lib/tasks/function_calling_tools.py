"""Generated function-calling problems: tools, requests, and the steps that lead to every value.

Tools are named after what is asked ("heat the oven" is `heat_oven`). Where two differ only in size
(`book_small_hall`, `book_large_hall`), their descriptions say which amounts each takes, so that the amount has
to be worked out before the tool can be chosen. No tool of HELD_OUT, no request in a phrasing of
HELD_OUT_PHRASINGS and no set of candidate tools of a held-out split is ever in a training conversation.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from random import Random

from .function_calling_records import FunctionCallingProblem

SPLITS = {"pretrain": 0.60, "train": 0.20, "validation": 0.05, "test": 0.15}  # share of the sets of candidates
PARTS = {"combinations": 0.5, "phrasings": 0.25, "tools": 0.25}  # what is new in a test problem, and its share
TWO_CALLS, SIZED, LOOK_ALIKE = 0.2, 0.3, 0.6  # chances: a second call, a sized tool, a distractor that shares a word

# Domain by domain: verb noun(parameters); a parameter's kind is its name, or stands after "=".
TOOLS = """
home: dim lights(minutes, level); heat room(hours, level); lock door(time, alarm=flag); clean floor(seconds, rooms);
  paint wall(metres, color); open curtains(time); charge battery(minutes); air bedroom(seconds);
  clean windows(minutes, rooms); paint fence(metres, color); heat cellar(days)
kitchen: heat oven(minutes, level); boil eggs(seconds); chill drinks(hours); mix dough(grams, level);
  order flour(grams, city); bake bread(items, time); steam rice(grams); grill fish(seconds, level);
  heat soup(minutes, level); mix salad(people)
travel: book hotel(days, city); rent car(hours, city, insurance=flag); reserve table(people, time);
  pack suitcase(grams, color); plan trip(days, names); buy ticket(dollars, city); board ferry(people, time);
  book guide(hours, person); rent boat(hours, city); plan hike(metres, names)
office: schedule meeting(minutes, names); print report(items, color); send invoice(dollars, person);
  record call(seconds, person); ship desk(grams, city); move printer(metres, rooms); archive files(days);
  pay rent(dollars, time); print badges(people, color); send report(items, names)
shop: order boxes(items, city); sell apples(grams); refund order(dollars, notice=flag); wrap gift(items, color);
  stock shelf(items, rooms); weigh fruit(grams); deliver milk(litres, city); order flowers(dollars, person);
  sell bread(items); ship books(grams, city)
health: log run(seconds, metres); track sleep(minutes); plan fast(hours); give syrup(litres, person);
  walk dog(minutes, person); book massage(minutes, time); measure pulse(seconds); rest knee(days); track steps(items);
  log swim(metres)
media: play song(seconds, level); record show(minutes, time); pause video(seconds); loop clip(items);
  rent movie(hours, subtitles=flag); mute phone(hours); share album(names); download podcast(items, wifi=flag);
  play video(minutes, level); share song(names)
garden: water roses(litres, minutes); mow lawn(metres, time); plant tulips(items, color); feed ducks(grams, time);
  dig pond(hours, metres); trim hedge(metres); dry herbs(days); rake leaves(minutes); water trees(litres);
  feed dog(grams, time)
sizes: book hall(people); hire van(items, city); rent tent(people, days); fill tank(grams);
  order cable(metres, color); reserve camp(days); start course(hours, person); pick bag(grams, color)
"""
HELD_OUT = """
home: clean oven(minutes, level); paint door(metres, color); heat bedroom(hours, level); open windows(time)
kitchen: mix drinks(people); chill salad(hours); grill bread(seconds, level)
travel: rent desk(days, city); book boat(hours, city); plan meeting(minutes, names)
shop: wrap boxes(items, color); ship suitcase(grams, city); order fruit(grams, city)
media: record video(seconds, person); charge phone(minutes)
garden: water lawn(litres, minutes); plant roses(items, color)
sizes: rent hall(people); order bag(grams, color)
"""
TYPES = {
    "level": {"type": "str", "enum": ["low", "medium", "high"]},
    "color": {"type": "str", "enum": ["red", "green", "blue", "white"]},
    "names": {"type": "List[str]"},
    "rooms": {"type": "List[int]"},
    "litres": {"type": "float"},
    "flag": {"type": "bool"},
} | dict.fromkeys(("time", "person", "city"), {"type": "str"})
WHOLE = {"type": "int"}
PHRASINGS = (
    "{Act}.", "Please {act}.", "Can you {act}?", "I want to {act}.", "I need to {act}.", "{Act}, please.",
    "Help me {act}.", "Could you {act} today?", "My plan is to {act}.",
)  # fmt: skip
HELD_OUT_PHRASINGS = ("Would you mind helping me {act}?", "It is time to {act}.", "{Act} as soon as you can.")
# Pretraining also has phrasings put together from these, so that requests are read and not only recognised.
OPENINGS = (
    "I would like to ", "We have to ", "You should ", "Remember to ", "Let us ", "Kindly ", "I was asked to ",
    "Your job is to ", "Somebody has to ", "Do not forget to ", "Is it possible to ", "It would be nice to ",
    "Be so kind as to ", "Will you ", "I hope that you can ", "The next thing is to ", "I think we ought to ",
    "Try to ", "Can somebody ", "Shall we ", "You are to ", "My boss told me to ", "All that is left is to ",
    "If you have a minute, ", "I am sorry to ask, but ", "There is one more thing: ", "Here is what I want: ",
    "The customer wrote: ", "As agreed, ", "I wonder whether you could ", "Before we go home we have to ",
    "Thanks for offering to ", "What about trying to ", "Nobody else is free to ", "You said that you would ",
)  # fmt: skip
CLOSINGS = ("", "", " now", " tonight", " right away", " if possible", " again", " at once", " straight away", " today")
MARKS = (".", "?", "!", ", thanks.", ", will you?", "")
PLACES = "Paris Rome Oslo Lima Cairo Delhi Quito Berlin Madrid Tokyo".split()
PEOPLE = "Ann Bob Cleo Dan Eva Finn Gus Hana Ivo June Karl Lena".split()
NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()


@dataclass(frozen=True)
class Tool:
    """A tool without sizes: verb, noun, its parameters with their kinds, and whether it comes in two sizes."""

    verb: str
    noun: str
    parameters: tuple[tuple[str, str], ...]
    sized: bool

    def name(self, size: str = "") -> str:
        """`heat_oven`, or `book_small_hall` with a size."""
        return "_".join(filter(None, (self.verb, size, self.noun)))

    def record(self, size: str = "", description: str = "") -> dict:
        """The tool in the form of an xlam record."""
        parameters = {name: {"description": "", **TYPES.get(kind, WHOLE)} for name, kind in self.parameters}
        return {"name": self.name(size), "description": description, "parameters": parameters}


@dataclass(frozen=True)
class Value:
    """A value, the words that ask for it, and the steps that lead from the words to it."""

    words: str
    value: object
    steps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Call:
    """One call that a request asks for. `limit` is that of a sized tool, `size` the one to choose."""

    tool: Tool
    values: dict[str, Value]
    size: str = ""
    limit: int = 0

    @property
    def answer(self) -> dict:
        """The call in the form of an xlam record."""
        arguments = {name: value.value for name, value in self.values.items()}
        return {"name": self.tool.name(self.size), "arguments": arguments}


@dataclass(frozen=True)
class Case:
    """A problem with the working of its answer."""

    problem: FunctionCallingProblem
    calls: tuple[Call, ...]


def _tools(table: str) -> list[Tool]:
    tools = []
    for line in filter(None, table.replace(";\n ", ";").split("\n")):
        domain, entries = line.split(": ")
        for entry in entries.split("; "):
            title, inside = entry.removesuffix(")").split("(")
            parameters = tuple((p.split("=")[0], p.split("=")[-1]) for p in inside.split(", "))
            tools.append(Tool(*title.split(), parameters, domain == "sizes"))
    return tools


SEEN, NEW = _tools(TOOLS), _tools(HELD_OUT)
VERBS, NOUNS = sorted({tool.verb for tool in SEEN}), sorted({tool.noun for tool in SEEN})
WORDS = {*VERBS, *NOUNS, *PLACES, *PEOPLE}


def draw(random: Random, split: str, part: str = "combinations", hard: float = 0.5, invented: float = 0.0) -> Case:
    """Draw one problem of `split`; `hard` is the chance that an amount takes more than one or two steps.

    `invented` is the share of tools that are given the verb of another and the noun of a third, so that names
    have to be read, not remembered; the same share of requests gets a phrasing of its own.
    """
    while True:
        tools = [_renamed(t, random) if random.random() < invented else t for t in _candidates(random, part)]
        names = sorted(tool.name() for tool in tools)
        if part == "tools" or split_of(names) == split:
            return _case(random, tools, part, hard, invented)


def split_of(names: list[str]) -> str:
    """Assign a set of candidate tools to a split by hash."""
    place = int.from_bytes(hashlib.sha256(" ".join(sorted(names)).encode()).digest()[:4]) / 2**32
    return next(split for split, end in zip(SPLITS, accumulate(SPLITS.values())) if place < end)


def _renamed(tool: Tool, random: Random) -> Tool:
    known = {tool.name() for tool in SEEN + NEW}
    while (new := replace(tool, verb=random.choice(VERBS), noun=random.choice(NOUNS))).name() in known:
        pass
    return new


def _candidates(random: Random, part: str) -> list[Tool]:
    """One to four tools (a sized one counts twice); those that are to be called stand first."""
    size = random.random() < SIZED
    first = random.choice([tool for tool in (NEW if part == "tools" else SEEN) if tool.sized == size])
    tools, count = [first], random.choices((1, 2, 3, 4), (3, 3, 2, 2))[0]
    while (taken := len(tools) + sum(tool.sized for tool in tools)) < count:
        others = [t for t in SEEN if t not in tools and taken + 1 + t.sized <= 4]
        near = [t for t in others if t.verb == first.verb or t.noun == first.noun]
        tools.append(random.choice(near if near and random.random() < LOOK_ALIKE else others))
    return tools


def _case(random: Random, tools: list[Tool], part: str, hard: float, invented: float) -> Case:
    two = len(tools) > 1 and random.random() < TWO_CALLS
    calls = tuple(_call(random, tool, hard) for tool in tools[: 2 if two else 1])
    records = []
    for tool, call in zip(tools, [*calls, *(_call(random, t, hard) for t in tools[len(calls) :])]):
        if tool.sized:
            records += [tool.record("small", f"at most {call.limit}"), tool.record("large", f"more than {call.limit}")]
        else:
            records.append(tool.record())
    random.shuffle(records)
    act = random.choice((" and ", ", then ")).join(_act(random, call) for call in calls)
    phrasing = random.choice(HELD_OUT_PHRASINGS if part == "phrasings" else PHRASINGS)
    if invented and random.random() < invented:
        phrasing = random.choice(OPENINGS) + "{act}" + random.choice(CLOSINGS) + random.choice(MARKS)
    query = phrasing.format(act=act, Act=act[0].upper() + act[1:])
    name = hashlib.sha256(json.dumps([query, sorted(r["name"] for r in records)]).encode()).hexdigest()[:12]
    answers = tuple(call.answer for call in calls)
    return Case(FunctionCallingProblem(f"{part}-{name}", query, tuple(records), answers, kind=part), calls)


def _call(random: Random, tool: Tool, hard: float) -> Call:
    values = {name: KINDS[kind](random, hard, name) for name, kind in tool.parameters}
    if not tool.sized:
        return Call(tool, values)
    amount = next(iter(values.values())).value
    size = random.choice(("small", "large"))
    gap = random.randint(1, max(2, amount // 3))
    limit = amount + gap if size == "small" else max(1, amount - gap)
    return Call(tool, values, size, limit)


def _act(random: Random, call: Call) -> str:
    """What is asked, such as "heat the oven for 3 hours and 20 minutes on low"."""
    words = [value.words for value in call.values.values()]
    return " ".join([f"{call.tool.verb} the {call.tool.noun}", *random.sample(words, len(words))])


def _total(*terms: tuple[int, int]) -> tuple[int, tuple[str, ...]]:
    """The sum of products a * b (a alone for b = 1) in small steps, products of two long numbers by digit."""
    steps, total = [], None
    for a, b in terms:
        if b != 1 and a > 9 and b > 9 and a % 10 and b % 10 and b < 100:
            tens, ones = a * (b // 10 * 10), a * (b % 10)
            steps += [f"{a} * {b // 10 * 10} = {tens}", f"{a} * {b % 10} = {ones}", f"{tens} + {ones} = {a * b}"]
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
        return Value(f"for {a} groups of {b} people and {c} of {b + a}", *_total((b, a), (b + a, c)))
    return _sum_of(random, "people")


def _sum_of(random, unit) -> Value:
    a, b, c, d = (random.randint(11, 99) for _ in range(4))
    return Value(f"for {a}, {b}, {c} and {d} {unit}", *_total((a, 1), (b, 1), (c, 1), (d, 1)))


def _dollars(random, hard, name) -> Value:
    sales = [(random.randint(11, 39), random.randint(2, 9)) for _ in range(3 if random.random() < hard else 1)]
    said = [f"{count} at {price} dollars" for price, count in sales]
    return Value("for " + " and ".join([", ".join(said[:-1]), said[-1]][len(said) == 1 :]), *_total(*sales))


def _grams(random, hard, name) -> Value:
    k, bags, g, rest = random.randint(1, 9), random.randint(2, 9), random.randint(11, 39) * 10, random.randint(11, 99)
    if random.random() >= hard:
        return Value(f"of {k} kilos and {g + rest} grams", *_total((k, 1000), (g + rest, 1)))
    return Value(f"of {k} kilos, {bags} bags of {g} grams and {rest} grams", *_total((k, 1000), (g, bags), (rest, 1)))


def _metres(random, hard, name) -> Value:
    laps, length = random.randint(2, 9), random.randint(11, 49) * 10
    more, other = random.randint(2, 9), random.randint(11, 49)
    if random.random() >= hard:
        return Value(f"over {laps} stretches of {length} metres", *_total((length, laps)))
    return Value(
        f"over {laps} stretches of {length} metres and {more} of {other} metres", *_total((length, laps), (other, more))
    )


def _time(random, hard, name) -> Value:
    hour, (said, minute) = random.randint(1, 11), random.choice((("half past", 30), ("a quarter past", 15), ("", 0)))
    part, shift = random.choice((("in the morning", 0), ("in the evening", 12)))
    words = f"{said} {NUMBER_WORDS[hour]} {part}".strip()
    at = (hour + shift) * 60 + minute
    if random.random() >= hard:
        return Value(f"at {words}", clock(at))
    gap = random.randint(1, 11) * 5
    word, sign, new = random.choice((("before", "-", at - gap), ("after", "+", at + gap)))
    return Value(f"at {gap} minutes {word} {words}", clock(new), (f"{clock(at)} {sign} {gap} = {clock(new)}",))


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
    "minutes": _minutes, "seconds": _seconds, "hours": _hours, "days": _days, "items": _items, "people": _people,
    "dollars": _dollars, "grams": _grams, "metres": _metres, "time": _time, "litres": _litres, "level": _level,
    "color": _color, "flag": _flag, "city": _city, "person": _person, "names": _names, "rooms": _rooms,
}  # fmt: skip
