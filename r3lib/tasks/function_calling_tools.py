"""Generated function-calling problems: tools, requests, and the steps that lead to every value.

Tools are named after what is asked ("heat the oven" is `heat_oven`). Where two differ only in size
(`book_small_hall`, `book_large_hall`), their descriptions say which amounts each takes, so that the
amount has to be worked out before the tool can be chosen. No tool of HELD_OUT, no request in a
phrasing of HELD_OUT_PHRASINGS and no set of candidate tools of a held-out split is ever in a
training conversation.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from itertools import accumulate
from random import Random

from .function_calling_records import FunctionCallingProblem
from .function_calling_values import KINDS, PEOPLE, PLACES, TYPES, WHOLE, Value

# shares of the sets of candidates
SPLITS = {"pretrain": 0.60, "train": 0.20, "validation": 0.05, "test": 0.15}
# what is new in a test problem, and its share
PARTS = {"combinations": 0.5, "phrasings": 0.25, "tools": 0.25}
TWO_CALLS = 0.2  # chance of a second call
SIZED = 0.3  # chance of a sized tool
LOOK_ALIKE = 0.6  # chance that a distractor shares a word

# Domain by domain: verb noun(parameters); a parameter's kind is its name, or stands after "=".
TOOLS = """
home: dim lights(minutes, level); heat room(hours, level); lock door(time, alarm=flag);
  clean floor(seconds, rooms); paint wall(metres, color); open curtains(time);
  charge battery(minutes); air bedroom(seconds); clean windows(minutes, rooms);
  paint fence(metres, color); heat cellar(days)
kitchen: heat oven(minutes, level); boil eggs(seconds); chill drinks(hours);
  mix dough(grams, level); order flour(grams, city); bake bread(items, time); steam rice(grams);
  grill fish(seconds, level); heat soup(minutes, level); mix salad(people)
travel: book hotel(days, city); rent car(hours, city, insurance=flag); reserve table(people, time);
  pack suitcase(grams, color); plan trip(days, names); buy ticket(dollars, city);
  board ferry(people, time); book guide(hours, person); rent boat(hours, city);
  plan hike(metres, names)
office: schedule meeting(minutes, names); print report(items, color); send invoice(dollars, person);
  record call(seconds, person); ship desk(grams, city); move printer(metres, rooms);
  archive files(days); pay rent(dollars, time); print badges(people, color);
  send report(items, names)
shop: order boxes(items, city); sell apples(grams); refund order(dollars, notice=flag);
  wrap gift(items, color); stock shelf(items, rooms); weigh fruit(grams);
  deliver milk(litres, city); order flowers(dollars, person); sell bread(items);
  ship books(grams, city)
health: log run(seconds, metres); track sleep(minutes); plan fast(hours);
  give syrup(litres, person); walk dog(minutes, person); book massage(minutes, time);
  measure pulse(seconds); rest knee(days); track steps(items); log swim(metres)
media: play song(seconds, level); record show(minutes, time); pause video(seconds);
  loop clip(items); rent movie(hours, subtitles=flag); mute phone(hours); share album(names);
  download podcast(items, wifi=flag); play video(minutes, level); share song(names)
garden: water roses(litres, minutes); mow lawn(metres, time); plant tulips(items, color);
  feed ducks(grams, time); dig pond(hours, metres); trim hedge(metres); dry herbs(days);
  rake leaves(minutes); water trees(litres); feed dog(grams, time)
sizes: book hall(people); hire van(items, city); rent tent(people, days); fill tank(grams);
  order cable(metres, color); reserve camp(days); start course(hours, person);
  pick bag(grams, color)
"""
HELD_OUT = """
home: clean oven(minutes, level); paint door(metres, color); heat bedroom(hours, level);
  open windows(time)
kitchen: mix drinks(people); chill salad(hours); grill bread(seconds, level)
travel: rent desk(days, city); book boat(hours, city); plan meeting(minutes, names)
shop: wrap boxes(items, color); ship suitcase(grams, city); order fruit(grams, city)
media: record video(seconds, person); charge phone(minutes)
garden: water lawn(litres, minutes); plant roses(items, color)
sizes: rent hall(people); order bag(grams, color)
"""
PHRASINGS = (
    "{Act}.", "Please {act}.", "Can you {act}?", "I want to {act}.", "I need to {act}.",
    "{Act}, please.", "Help me {act}.", "Could you {act} today?", "My plan is to {act}.",
)  # fmt: skip
HELD_OUT_PHRASINGS = (
    "Would you mind helping me {act}?",
    "It is time to {act}.",
    "{Act} as soon as you can.",
)
# Pretraining also has phrasings put together from these, so that requests are read.
OPENINGS = (
    "I would like to ", "We have to ", "You should ", "Remember to ", "Let us ", "Kindly ",
    "I was asked to ", "Your job is to ", "Somebody has to ", "Do not forget to ",
    "Is it possible to ", "It would be nice to ", "Be so kind as to ", "Will you ",
    "I hope that you can ", "The next thing is to ", "I think we ought to ", "Try to ",
    "Can somebody ", "Shall we ", "You are to ", "My boss told me to ", "All that is left is to ",
    "If you have a minute, ", "I am sorry to ask, but ", "There is one more thing: ",
    "Here is what I want: ", "The customer wrote: ", "As agreed, ", "I wonder whether you could ",
    "Before we go home we have to ", "Thanks for offering to ", "What about trying to ",
    "Nobody else is free to ", "You said that you would ",
)  # fmt: skip
CLOSINGS = (
    "", "", " now", " tonight", " right away", " if possible", " again", " at once",
    " straight away", " today",
)  # fmt: skip
MARKS = (".", "?", "!", ", thanks.", ", will you?", "")


@dataclass(frozen=True)
class Tool:
    """A tool: verb, noun, parameters with their kinds, and whether it comes in two sizes."""

    verb: str
    noun: str
    parameters: tuple[tuple[str, str], ...]
    sized: bool

    def name(self, size: str = "") -> str:
        """`heat_oven`, or `book_small_hall` with a size."""
        return "_".join(filter(None, (self.verb, size, self.noun)))

    def record(self, size: str = "", description: str = "") -> dict:
        """The tool in the form of an xlam record."""
        parameters = {
            name: {"description": "", **TYPES.get(kind, WHOLE)} for name, kind in self.parameters
        }
        return {"name": self.name(size), "description": description, "parameters": parameters}


@dataclass(frozen=True)
class Call:
    """One call that a request asks for. `limit`: of a sized tool; `size`: the one to choose."""

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


def draw(
    random: Random, split: str, part: str = "combinations", hard: float = 0.5, invented: float = 0.0
) -> Case:
    """Draw one problem of `split`; `hard` is the chance that an amount takes more than two steps.

    `invented` is the share of tools that are given the verb of another and the noun of a third, so
    that names have to be read, not remembered; the same share of requests gets a phrasing of its
    own.
    """
    while True:
        tools = [
            _renamed(t, random) if random.random() < invented else t
            for t in _candidates(random, part)
        ]
        names = sorted(tool.name() for tool in tools)
        if part == "tools" or split_of(names) == split:
            return _case(random, tools, part, hard, invented)


def split_of(names: list[str]) -> str:
    """Assign a set of candidate tools to a split by hash."""
    place = int.from_bytes(hashlib.sha256(" ".join(sorted(names)).encode()).digest()[:4]) / 2**32
    return next(split for split, end in zip(SPLITS, accumulate(SPLITS.values())) if place < end)


def _renamed(tool: Tool, random: Random) -> Tool:
    known = {tool.name() for tool in SEEN + NEW}
    while True:
        new = replace(tool, verb=random.choice(VERBS), noun=random.choice(NOUNS))
        if new.name() not in known:
            return new


def _candidates(random: Random, part: str) -> list[Tool]:
    """One to four tools (a sized one counts twice); those that are to be called stand first."""
    size = random.random() < SIZED
    known = NEW if part == "tools" else SEEN
    first = random.choice([tool for tool in known if tool.sized == size])
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
            records += [
                tool.record("small", f"at most {call.limit}"),
                tool.record("large", f"more than {call.limit}"),
            ]
        else:
            records.append(tool.record())
    random.shuffle(records)
    act = random.choice((" and ", ", then ")).join(_act(random, call) for call in calls)
    phrasing = random.choice(HELD_OUT_PHRASINGS if part == "phrasings" else PHRASINGS)
    if invented and random.random() < invented:
        opening, closing, mark = (random.choice(some) for some in (OPENINGS, CLOSINGS, MARKS))
        phrasing = f"{opening}{{act}}{closing}{mark}"
    query = phrasing.format(act=act, Act=act[0].upper() + act[1:])
    content = json.dumps([query, sorted(record["name"] for record in records)])
    name = f"{part}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    answers = tuple(call.answer for call in calls)
    problem = FunctionCallingProblem(name, query, tuple(records), answers, kind=part)
    return Case(problem, calls)


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
