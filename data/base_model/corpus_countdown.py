"""Generated Countdown conversations, on which the embedded model is pretrained.

Nothing here says which style of reflection helps: every conversation ends with a right answer,
whatever the reflection before it. Only whole, non-negative intermediate values are used; with three
numbers they reach every solvable target.
"""

import re
from collections.abc import Iterator
from random import Random

from corpus_turns import BLIND, DIRECT, FOREIGN, turns, write_reflection

from r3lib.errors import R3Error
from r3lib.tasks.countdown import CountdownProblem, CountdownTask, split_of
from r3lib.tasks.styles import SENTENCES

STYLES = {"vague": 0.23, "verbose": 0.20, "diagnosis": 0.20, "hint": 0.12, "search": 0.25}
FOUND = 0.40  # chance that the next try of a search is a right one
GIVE_UP = 0.04  # chance that a search stops after a wrong try
MOST_TRIES = 8  # of one search
SEARCH, GAVE_UP = "I try other ways.", "I did not find it."


def conversation(task: CountdownTask, random: Random) -> list[tuple[str, str, bool]]:
    """Return one conversation about a "pretrain" problem, one (role, text, learn it) a turn.

    R3Error: `task` has problems of other than three numbers, which the corpus does not know.
    """
    problem = draw(task, random)
    right = random.choice(solutions(problem.nums, problem.target))[1]
    kind = random.random()
    if kind < DIRECT:
        return turns(task, problem, tagged(right))
    attempt = wrong_attempt(problem, random)
    if kind < DIRECT + BLIND:
        return turns(task, problem, tagged(right), tagged(attempt))
    text, own = reflection(problem, attempt, random), True
    if random.random() < FOREIGN:
        other = draw(task, random)
        text, own = reflection(other, wrong_attempt(other, random), random), False
    else:
        right = _announced(text, problem) or right
    return turns(task, problem, tagged(right), tagged(attempt), text, own)


def draw(task: CountdownTask, random: Random) -> CountdownProblem:
    """Draw a problem of the split "pretrain"."""
    if task.count != (3,):
        raise R3Error(f"countdown option count={task.count}: the corpus knows 3 numbers: use 3")
    while True:
        problem = task.draw(random)
        if split_of(problem) == "pretrain":
            return problem


def tagged(equation: str) -> str:
    """The form of an answer."""
    return f"<answer>{equation}</answer>"


def solutions(nums, target) -> list[tuple[str, str]]:
    """All (first step, equation) that reach `target`, such as ("14 / 7 = 2", "(14 / 7) + 13")."""
    found = []
    for last in sorted(set(nums)):
        for step, value in first_steps(*others(nums, last)):
            equations = finish(step, value, last, target)
            found += [(f"{step} = {value}", equation) for equation in equations]
    return found


def others(nums, last) -> tuple[int, int]:
    """The two numbers that remain when `last` is set aside, larger first."""
    rest = list(nums)
    rest.remove(last)
    return max(rest), min(rest)


def first_steps(a, b) -> list[tuple[str, int]]:
    """What a >= b can give in one step: [("14 + 7", 21), ...]."""
    steps = [(f"{a} + {b}", a + b), (f"{a} - {b}", a - b), (f"{a} * {b}", a * b)]
    return steps + ([(f"{a} / {b}", a // b)] if a % b == 0 else [])


def finish(step, value, last, target) -> list[str]:
    """The equations that take `value`, the result of `step`, to `target` with `last`."""
    ways = {
        f"({step}) + {last}": value + last == target,
        f"({step}) - {last}": value - last == target,
        f"{last} - ({step})": last - value == target,
        f"({step}) * {last}": value * last == target,
        f"({step}) / {last}": value == target * last,
        f"{last} / ({step})": value * target == last,
    }
    return [equation for equation, reaches in ways.items() if reaches]


def wrong_attempt(problem, random: Random) -> str:
    """A plausible wrong equation: mostly near the target, or with wrong numbers, or ill-formed."""
    kind = random.choices(("missed", "numbers", "form"), (0.75, 0.2, 0.05))[0]
    nums = list(problem.nums)
    if kind == "numbers":
        other = random.choice(nums + [random.randint(1, 20)])
        nums[random.randrange(len(nums))] = other
    candidates = [_random_equation(nums, random) for _ in range(6)]
    if sorted(nums) == sorted(problem.nums):
        candidates = [c for c in candidates if c[1] != problem.target]
    if not candidates:
        return f"{nums[0]} + {nums[1]}"
    equation = min(candidates, key=lambda c: abs(c[1] - problem.target))[0]
    return equation.replace(")", "", 1) if kind == "form" else equation


def _random_equation(nums, random: Random) -> tuple[str, int]:
    last = random.choice(nums)
    step, value = random.choice(first_steps(*others(nums, last)))
    ways = [(f"({step}) + {last}", value + last), (f"({step}) * {last}", value * last)]
    if value >= last:
        ways.append((f"({step}) - {last}", value - last))
    else:
        ways.append((f"{last} - ({step})", last - value))
    return random.choice(ways)


def reflection(problem, attempt: str, random: Random, name: str | None = None) -> str:
    """A reflection on `attempt` in the style `name`, by default drawn with the shares in STYLES."""
    writers = dict(vague=_vague, verbose=_verbose, diagnosis=_diagnosis, hint=_hint, search=_search)
    return write_reflection(writers, STYLES, problem, attempt, random, name)


def _vague(problem, attempt, random) -> str:
    return random.choice(SENTENCES["countdown"]["vague"])


def _verbose(problem, attempt, random) -> str:
    lines = [random.choice(SENTENCES["countdown"]["verbose"]) for _ in range(random.randint(3, 5))]
    return " ".join(lines).format(target=problem.target, nums=_listed(problem.nums))


def _diagnosis(problem, attempt, random) -> str:
    used = [int(x) for x in re.findall(r"\d+", attempt)]
    if attempt.count("(") != attempt.count(")"):
        return "My equation was not well formed."
    if sorted(used) != sorted(problem.nums):
        return f"I used {_listed(used)} but I was given {_listed(problem.nums)}."
    steps = list(evaluate(attempt))
    gap = steps[-1][1] - problem.target
    said = ", ".join(f"{step} = {value}" for step, value in steps)
    missed = f"It is {abs(gap)} too {'big' if gap > 0 else 'small'}."
    return f"My equation gives {said}, not {problem.target}. {missed}"


def _listed(numbers) -> str:
    return ", ".join(map(str, numbers))


def evaluate(equation: str) -> Iterator[tuple[str, int]]:
    """Yield the two steps of one of our own equations, ("14 / 7", 2), then ("2 + 13", 15)."""
    inner = re.search(r"\((\d+) (.) (\d+)\)", equation)
    value = _apply(int(inner[1]), inner[2], int(inner[3]))
    yield inner[0][1:-1], value
    outer = equation.replace(inner[0], str(value))
    a, op, b = outer.split(" ")
    yield outer, _apply(int(a), op, int(b))


def _apply(a, op, b) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[op] if op != "/" else a // b


def _hint(problem, attempt, random) -> str:
    step, _ = random.choice(solutions(problem.nums, problem.target))
    return f"A good first step is {step}."


def _search(problem, attempt, random) -> str:
    """Other equations one after the other, each computed and compared with the target."""
    text, tried = SEARCH, {attempt}
    for _ in range(MOST_TRIES):
        if random.random() < FOUND:
            equation = random.choice(solutions(problem.nums, problem.target))[1]
            return f"{text} {_tried(equation, problem.target)}, yes."
        equation = _near_miss(problem, tried, random)
        tried.add(equation)
        text += f" {_tried(equation, problem.target)}, no."
        if random.random() < GIVE_UP:
            break
    return f"{text} {GAVE_UP}"


def _near_miss(problem, tried, random) -> str:
    """A wrong equation on the right numbers, the nearest of several to the target, not `tried`."""
    while True:
        candidates = [_random_equation(list(problem.nums), random) for _ in range(4)]
        wrong = [c for c in candidates if c[1] != problem.target and c[0] not in tried]
        if wrong:
            return min(wrong, key=lambda c: abs(c[1] - problem.target))[0]


def _tried(equation: str, target: int) -> str:
    """The steps of one of our own equations: "14 / 7 = 2, 2 + 13 = 15, need 15"."""
    steps = [f"{step} = {value}" for step, value in evaluate(equation)]
    return ", ".join([*steps, f"need {target}"])


def _announced(text: str, problem) -> str | None:
    """The equation that a search found or that begins as a hint says, if there is one."""
    found = text.removesuffix(", yes.").split(". ")[-1].removeprefix(f"{SEARCH} ")
    first = text.removeprefix("A good first step is ").removesuffix(".")
    for step, equation in solutions(problem.nums, problem.target):
        if step == first or _tried(equation, problem.target) == found:
            return equation
    return None
