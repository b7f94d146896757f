"""Generated function-calling conversations, on which the embedded model is pretrained.

As in the Countdown corpus, every conversation ends with right calls whatever the reflection before
them, so nothing in training says which style of reflection helps.
"""

import json
from random import Random

from corpus_turns import BLIND, DIRECT, FOREIGN, turns, write_reflection

from r3lib.tasks import FunctionCallingTask
from r3lib.tasks import function_calling_tools as tools
from r3lib.tasks.function_calling_tools import Case
from r3lib.tasks.function_calling_values import clock, draw_value
from r3lib.tasks.styles import SENTENCES

STYLES = {"vague": 0.25, "verbose": 0.22, "diagnosis": 0.22, "hint": 0.09, "worked": 0.22}
INVENTED = 0.35  # chance that a tool is renamed
HARD = 0.5  # chance that the amount of an exercise takes several steps
MISTAKES = {"value": 55, "tool": 25, "missing": 6, "type": 4, "count": 6, "form": 4}  # and weights
WORKED = "I work through it."
COMPUTED = (
    "minutes", "seconds", "hours", "days", "items", "people", "dollars", "grams", "metres", "time",
)  # fmt: skip


def conversation(task: FunctionCallingTask, random: Random) -> list[tuple[str, str, bool]]:
    """Return one conversation about a "pretrain" problem, one (role, text, learn it) a turn.

    Problems are generated ones, whatever the task's `source` is.
    """
    case = draw(task, random)
    right = json.dumps(case.problem.answers)
    kind = random.random()
    if kind < DIRECT:
        return turns(task, case.problem, right)
    attempt = wrong_attempt(case, random)
    said = attempt if isinstance(attempt, str) else json.dumps(attempt)
    if kind < DIRECT + BLIND:
        return turns(task, case.problem, right, said)
    own = random.random() >= FOREIGN
    other = case if own else draw(task, random)
    text = reflection(other, attempt if own else wrong_attempt(other, random), random)
    return turns(task, case.problem, right, said, text, own)


def exercise(random: Random) -> list[tuple[str, str, bool]]:
    """A conversation in which an amount is worked out, outside of any task.

    Arithmetic is learned from few of them.
    """
    name = random.choice(COMPUTED)
    while True:
        value = draw_value(random, name, HARD)
        if value.steps:
            break
    asked = f"Work out {name}: {value.words}."
    return [("user", asked, False), ("assistant", ", ".join(value.steps), True)]


def draw(task: FunctionCallingTask, random: Random) -> Case:
    """Draw a problem of the split "pretrain", some of its tools renamed."""
    return tools.draw(random, "pretrain", hard=task.hard, invented=INVENTED)


def wrong_attempt(case: Case, random: Random) -> list[dict] | str:
    """Plausible wrong calls: mostly a wrong value, else a mistake of another kind (MISTAKES)."""
    calls = json.loads(json.dumps(case.problem.answers))
    call = random.choice(calls)
    arguments = call["arguments"]
    kind = random.choices(list(MISTAKES), MISTAKES.values())[0]
    names = _other_tools(case, call["name"]) if kind == "tool" else []
    if names:
        call["name"] = random.choice(names)
        return calls
    if kind == "missing" and len(arguments) > 1:
        del arguments[random.choice(list(arguments))]
        return calls
    if kind == "count" and len(calls) > 1:
        return [call]
    if kind == "form":
        return json.dumps(calls)[: -random.randint(1, 3)]
    name = random.choice(_computed(case, call["name"]) or list(arguments))
    value = arguments[name]
    arguments[name] = json.dumps(value) if kind == "type" else _off(value, random)
    return calls


def _other_tools(case: Case, name: str) -> list[str]:
    """The tools to mistake for `name`: the one of the other size if there is one, else all."""
    others = [tool for tool in case.problem.tools if tool["name"] != name]
    sized = [t["name"] for t in others if t["description"] and _other_size(t["name"], name)]
    return sized or [tool["name"] for tool in others]


def _other_size(a: str, b: str) -> bool:
    small_and_large = {a.replace("_large_", "_small_"), a.replace("_small_", "_large_")}
    return a != b and {a, b} == small_and_large


def _computed(case: Case, name: str) -> list[str]:
    """The parameters of the call `name` whose values take steps."""
    calls = [call for call in case.calls if call.answer["name"] == name]
    return [p for call in calls for p, value in call.values.items() if value.steps]


def _off(value, random: Random):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        size = 10 ** random.randrange(max(1, len(str(value)) - 1))
        near = [d for d in (-3, -2, -1, 1, 2, 3) if value + d * size > 0]
        return value + random.choice(near or [1]) * size
    if isinstance(value, float):
        return value + random.choice((-0.25, 0.25, 1.0))
    if isinstance(value, list):
        return value[:-1]
    if ":" in value:
        hours, minutes = map(int, value.split(":"))
        return clock(60 * hours + minutes + random.choice((-60, -15, -5, 5, 15, 60)))
    return value[::-1]


def reflection(case: Case, attempt, random: Random, name: str | None = None) -> str:
    """A reflection on `attempt` in the style `name`, by default drawn with the shares in STYLES."""
    writers = dict(vague=_vague, verbose=_verbose, diagnosis=_diagnosis, hint=_hint, worked=_worked)
    return write_reflection(writers, STYLES, case, attempt, random, name)


def _vague(case, attempt, random) -> str:
    return random.choice(SENTENCES["function_calling"]["vague"])


def _verbose(case, attempt, random) -> str:
    sentences = SENTENCES["function_calling"]["verbose"]
    lines = [random.choice(sentences) for _ in range(random.randint(3, 5))]
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
    """Goes through the calls: each argument's value step by step, the size to choose, the tool."""
    text = WORKED
    for call in case.calls:
        text += f" {call.tool.verb} the {call.tool.noun}:"
        for name, value in call.values.items():
            said = value.value if isinstance(value.value, str) else json.dumps(value.value)
            text += f" {name}: {', '.join(value.steps) or said}."
        if call.size:
            amount = next(iter(call.values.values())).value
            text += (
                f" {amount} is {'at most' if call.size == 'small' else 'more than'} {call.limit}."
            )
        name = call.tool.name(call.size)
        text += f" So {', not '.join([name, *_near(case, name)])}."
    return text


def _near(case: Case, name: str) -> list[str]:
    """The candidates that share a word with `name`."""
    others = [tool["name"] for tool in case.problem.tools if tool["name"] != name]
    return [other for other in others if set(other.split("_")) & set(name.split("_"))]
