"""Generated function-calling conversations, on which the embedded model is pretrained.

As in the Countdown corpus, every conversation ends with right calls whatever the reflection before them, so
nothing in training says which style of reflection helps.
"""

import json
import re
from random import Random

from ..errors import R3Error
from .function_calling_records import FunctionCallingProblem
from .function_calling_tools import KINDS, PARTS, SPLITS, Case, clock, draw
from .styles import most_said

DIRECT, BLIND = 0.30, 0.08  # shares of conversations; the rest reflect
STYLES = {"vague": 0.25, "verbose": 0.22, "diagnosis": 0.22, "hint": 0.09, "worked": 0.22}
FOREIGN = 0.06  # share of reflections that were written for another problem
HARD, INVENTED = 0.5, 0.35  # chances that an amount takes several steps, that a tool is renamed (pretraining)
COMPUTED = ("minutes", "seconds", "hours", "days", "items", "people", "dollars", "grams", "metres", "time")

VAGUE = (
    "I should read the query again and be more careful.",
    "I should check my call before I answer.",
    "I made a mistake, so I will look at the tools again.",
    "I should think about what was asked.",
    "I need to pay more attention to the details.",
)
VERBOSE = (
    "I tried performing the task and the call was wrong.",
    "The call has to do what the query asks.",
    "The query is: {query}",
    "To be right, the call has to be right in every part.",
    "Each argument has a value, and each value matters.",
    "Next time I will make sure that the call is the correct one.",
    "If the call is not what was asked, then it is wrong.",
)
DIAGNOSES = ("My call was not", "I did not make", "The tool ", "I left out", "The value of", "I do not see")
WORKED = "I work through it."
VERBOSE_OPENINGS = tuple(line.split("{")[0] for line in VERBOSE)
COMPUTES = re.compile(r"[0-9] [-+*/] [0-9:]{1,12} = [0-9]")
CHOOSES = re.compile(r"\b[a-z_]{1,40}: [^\n]{1,200}?[.] So [a-z]+_[a-z]+")


def problems(split: str, n: int, seed: int, parts: dict[str, float] = PARTS, hard: float = HARD) -> list:
    """Return `n` distinct problems of `split`; in "test", `parts` gives the share of each part."""
    if sum(parts.values()) <= 0 or min(parts.values()) < 0:
        raise R3Error(f"function_calling option parts={parts}: give shares above 0, for example {PARTS}")
    if unknown := set(parts) - set(PARTS):
        raise R3Error(f"function_calling option parts: unknown {sorted(unknown)[0]!r}: known: {', '.join(PARTS)}")
    if split not in SPLITS:
        raise R3Error(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    shares = parts if split == "test" else {"combinations": 1.0}
    found: dict[str, FunctionCallingProblem] = {}
    for index in range(3 * n + 1000):
        random = Random(f"{seed}/{index}")
        part = random.choices(list(shares), shares.values())[0]
        problem = draw(random, split, part, hard).problem
        found.setdefault(problem.id, problem)
        if len(found) == n:
            return list(found.values())
    raise R3Error(f"function_calling {split} holds only about {len(found)} distinct problems, {n} were asked for")


def wrong_attempt(case: Case, random: Random) -> list[dict] | str:
    """Plausible wrong calls: mostly a wrong value, else a wrong tool, a missing argument or broken JSON."""
    calls = json.loads(json.dumps(case.problem.answers))
    call = random.choice(calls)
    kind = random.choices(("value", "tool", "missing", "type", "count", "form"), (55, 25, 6, 4, 6, 4))[0]
    if kind == "tool":
        sized = [t["name"] for t in case.problem.tools if t["description"] and _other_size(t["name"], call["name"])]
        names = sized or [t["name"] for t in case.problem.tools if t["name"] != call["name"]]
        if names:
            call["name"] = random.choice(names)
            return calls
    if kind == "missing" and len(call["arguments"]) > 1:
        del call["arguments"][random.choice(list(call["arguments"]))]
        return calls
    if kind == "count" and len(calls) > 1:
        return [call]
    if kind == "form":
        return json.dumps(calls)[: -random.randint(1, 3)]
    name = random.choice(_computed(case, call["name"]) or list(call["arguments"]))
    value = call["arguments"][name]
    call["arguments"][name] = json.dumps(value) if kind == "type" else _off(value, random)
    return calls


def _other_size(a: str, b: str) -> bool:
    return a != b and {a, b} == {a.replace("_large_", "_small_"), a.replace("_small_", "_large_")}


def _computed(case: Case, name: str) -> list[str]:
    """The parameters of the call `name` whose values take steps."""
    return [p for call in case.calls if call.answer["name"] == name for p, v in call.values.items() if v.steps]


def _off(value, random: Random):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        size = 10 ** random.randrange(max(1, len(str(value)) - 1))
        return value + random.choice([d for d in (-3, -2, -1, 1, 2, 3) if value + d * size > 0] or [1]) * size
    if isinstance(value, float):
        return value + random.choice((-0.25, 0.25, 1.0))
    if isinstance(value, list):
        return value[:-1]
    if ":" in value:
        hours, minutes = map(int, value.split(":"))
        return clock(60 * hours + minutes + random.choice((-60, -15, -5, 5, 15, 60)))
    return value[::-1]


def reflection(case: Case, attempt, random: Random, name: str | None = None) -> str:
    """A reflection on `attempt`, in the style `name` (by default drawn with the shares in STYLES)."""
    name = name or random.choices(list(STYLES), STYLES.values())[0]
    write = {"vague": _vague, "verbose": _verbose, "diagnosis": _diagnosis, "hint": _hint, "worked": _worked}[name]
    return write(case, attempt, random)


def _vague(case, attempt, random) -> str:
    return random.choice(VAGUE)


def _verbose(case, attempt, random) -> str:
    lines = [random.choice(VERBOSE) for _ in range(random.randint(3, 5))]
    return " ".join(lines).format(query=case.problem.query)


def _diagnosis(case, attempt, random) -> str:
    """Which part was wrong, without the right one."""
    if isinstance(attempt, str):
        return "My call was not valid JSON."
    right = case.problem.answers
    if len(attempt) != len(right):
        return "I did not make all the calls."
    for mine, gold in zip(attempt, right):
        if mine["name"] != gold["name"]:
            return f"The tool {mine['name']} was wrong."
        for argument, value in gold["arguments"].items():
            if argument not in mine["arguments"]:
                return f"I left out {argument}."
            if mine["arguments"][argument] != value:
                return f"The value of {argument} was wrong."
    return "I do not see what was wrong."


def _hint(case, attempt, random) -> str:
    return f"The right tool is {' and '.join(a['name'] for a in case.problem.answers)}."


def _worked(case, attempt, random) -> str:
    """Goes through the calls: the candidates, the value of each argument step by step, the size to choose."""
    text = WORKED
    for call in case.calls:
        text += f" {call.tool.verb} the {call.tool.noun}:"
        for name, value in call.values.items():
            said = value.value if isinstance(value.value, str) else json.dumps(value.value)
            text += f" {name}: {', '.join(value.steps) or said}."
        if call.size:
            amount = next(iter(call.values.values())).value
            text += f" {amount} is {'at most' if call.size == 'small' else 'more than'} {call.limit}."
        text += f" So {', not '.join([name := call.tool.name(call.size), *_near(case, name)])}."
    return text


def _near(case: Case, name: str) -> list[str]:
    """The candidates that share a word with `name`."""
    others = [tool["name"] for tool in case.problem.tools if tool["name"] != name]
    return [other for other in others if set(other.split("_")) & set(name.split("_"))]


def style(text: str) -> str:
    """Name the style of a reflection by what it says, not by its opening words, which training may drop.

    "worked": it computes a step ("9 * 3600 = 32400") or gives the value of an argument ("person: Eva") and
    then the tool ("So book_hall."). Else the style of most of its sentences: "diagnosis" (which part was
    wrong), "hint" (the right tool), "verbose" or "vague"; "other" where most are of none.
    """
    return "worked" if COMPUTES.search(text) or CHOOSES.search(text) else most_said(text, _says)


def _says(sentence: str) -> str:
    """The style that a single sentence is written in."""
    if sentence.startswith("The right tool is"):
        return "hint"
    if sentence.startswith(DIAGNOSES):
        return "diagnosis"
    if sentence.startswith(VERBOSE_OPENINGS):
        return "verbose"
    return "vague" if sentence in VAGUE else "other"


def exercise(random: Random) -> list[tuple[str, str, bool]]:
    """A conversation in which an amount is worked out, outside of any task: arithmetic is learned from few of them."""
    name = random.choice(COMPUTED)
    while not (value := KINDS[name](random, HARD, name)).steps:
        pass
    return [("user", f"Work out {name}: {value.words}.", False), ("assistant", ", ".join(value.steps), True)]


def conversation(task, draw_case, random: Random) -> list[tuple[str, str, bool]]:
    """One conversation: (role, text, learn from it) a turn. `draw_case(random)` gives a training Case."""
    case = draw_case(random)
    user = task.messages(case.problem)[0]["content"]
    right = json.dumps(case.problem.answers)
    kind = random.random()
    if kind < DIRECT:
        return [("user", user, False), ("assistant", right, True)]
    attempt = wrong_attempt(case, random)
    said = attempt if isinstance(attempt, str) else json.dumps(attempt)
    turns = [("user", user, False), ("assistant", said, False)]
    if kind < DIRECT + BLIND:
        again = task.second_turn(task.blind_retry_prompt, case.problem)
        return turns + [("user", again, False), ("assistant", right, True)]
    own = random.random() >= FOREIGN
    other = case if own else draw_case(random)
    text = reflection(other, attempt if own else wrong_attempt(other, random), random)
    turns += [("user", task.reflection_prompt, False), ("assistant", text, own)]
    again = task.second_turn(task.retry_prompt, case.problem)
    return turns + [("user", again, False), ("assistant", right, True)]
