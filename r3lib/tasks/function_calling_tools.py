"""Generated function-calling problems: tools, requests, and the steps that lead to every value.

Their words are in `function_calling.yaml`.

Tools are named after what is asked ("heat the oven" is `heat_oven`). Where two differ only in size
(`book_small_hall`, `book_large_hall`), their descriptions say which amounts each takes, so that the
amount has to be worked out before the tool can be chosen. No held-out tool, no request in a
held-out phrasing and no set of candidate tools of a held-out split is ever in a
training conversation.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from random import Random

from .function_calling_records import FunctionCallingProblem
from .function_calling_values import DATA, Value, draw_value, type_of
from .sources import split_by_hash

# what is new in a test problem, and its share
PARTS = {"combinations": 0.5, "phrasings": 0.25, "tools": 0.25}
TWO_CALLS = 0.2  # chance of a second call
SIZED = 0.3  # chance of a sized tool
LOOK_ALIKE = 0.6  # chance that a distractor shares a word
PHRASINGS, HELD_OUT_PHRASINGS = DATA["phrasings"], DATA["held_out_phrasings"]


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
        parameters = {name: {"description": "", **type_of(kind)} for name, kind in self.parameters}
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


def _tools(domains: dict[str, str]) -> list[Tool]:
    tools = []
    for domain, entries in domains.items():
        for entry in entries.split("; "):
            title, inside = entry.removesuffix(")").split("(")
            parameters = tuple((p.split("=")[0], p.split("=")[-1]) for p in inside.split(", "))
            tools.append(Tool(*title.split(), parameters, domain == "sizes"))
    return tools


SEEN, NEW = _tools(DATA["tools"]), _tools(DATA["held_out_tools"])
VERBS, NOUNS = sorted({tool.verb for tool in SEEN}), sorted({tool.noun for tool in SEEN})
WORDS = {*VERBS, *NOUNS, *DATA["places"], *DATA["people"]}


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
    return split_by_hash(" ".join(sorted(names)))


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
    tools = [first]
    taken = 1 + first.sized
    [count] = random.choices((1, 2, 3, 4), (3, 3, 2, 2))
    while taken < count:
        others = [t for t in SEEN if t not in tools and taken + 1 + t.sized <= 4]
        near = [t for t in others if t.verb == first.verb or t.noun == first.noun]
        tools.append(random.choice(near if near and random.random() < LOOK_ALIKE else others))
        taken += 1 + tools[-1].sized
    return tools


def _case(random: Random, tools: list[Tool], part: str, hard: float, invented: float) -> Case:
    two = len(tools) > 1 and random.random() < TWO_CALLS
    calls = tuple(_call(random, tool, hard) for tool in tools[: 2 if two else 1])
    records = []
    uncalled = [_call(random, tool, hard) for tool in tools[len(calls) :]]
    for tool, call in zip(tools, [*calls, *uncalled]):
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
        keys = ("openings", "closings", "marks")
        opening, closing, mark = (random.choice(DATA[key]) for key in keys)
        phrasing = f"{opening}{{act}}{closing}{mark}"
    query = phrasing.format(act=act, Act=act[0].upper() + act[1:])
    content = json.dumps([query, sorted(record["name"] for record in records)])
    name = f"{part}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    answers = tuple(call.answer for call in calls)
    problem = FunctionCallingProblem(name, query, tuple(records), answers, kind=part)
    return Case(problem, calls)


def _call(random: Random, tool: Tool, hard: float) -> Call:
    values = {name: draw_value(random, kind, hard, name) for name, kind in tool.parameters}
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
