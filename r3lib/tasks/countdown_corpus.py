"""Generated Countdown conversations, on which the embedded model is pretrained.

Nothing here says which style of reflection helps: every conversation ends with a right answer, whatever
the reflection before it. Only whole, non-negative intermediate values are used; with three numbers they
reach every solvable target.
"""

import re
from random import Random

from .styles import most_said

DIRECT, BLIND = 0.30, 0.08  # shares of conversations; the rest reflect
STYLES = {"vague": 0.23, "verbose": 0.20, "diagnosis": 0.20, "hint": 0.12, "search": 0.25}
FOREIGN = 0.06  # share of reflections that were written for another problem
FOUND, GIVE_UP = 0.40, 0.04  # chances that the next try of a search is a right one, that it stops after a wrong one
MOST_TRIES = 8  # of one search

VAGUE = (
    "I should read the problem again and be more careful.",
    "I should be more careful next time.",
    "I made a mistake, so I will check my work.",
    "I should think step by step and try another way.",
    "I need to try different operations.",
)
VERBOSE = (
    "I tried solving the problem and got the wrong answer.",
    "The answer was wrong because it did not equal {target}.",
    "To equal {target} the equation has to equal {target}.",
    "I used the numbers {nums} but the answer was wrong.",
    "Each number can only be used once, so each number has to be used once.",
    "Next time I will make sure that the answer is right.",
    "If the answer is not {target} then the answer is wrong.",
)
SEARCH, GAVE_UP = "I try other ways.", "I did not find it."
VERBOSE_OPENINGS = tuple(line.split("{")[0] for line in VERBOSE)
COMPARED = re.compile(r"[0-9] [-+*/] [0-9]{1,9} = -?[0-9]{1,9}, need [0-9]")
DIAGNOSED = re.compile(r"My equation (gives|was)|I used [0-9]|It is [0-9]+ too (big|small)")


def solutions(nums, target) -> list[tuple[str, str]]:
    """All (first step, equation) pairs such as ("14 / 7 = 2", "(14 / 7) + 13") that reach `target`."""
    found = []
    for last in sorted(set(nums)):
        for step, value in first_steps(*others(nums, last)):
            found += [(f"{step} = {value}", equation) for equation in finish(step, value, last, target)]
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
    """A plausible wrong equation: mostly near the target, sometimes with wrong numbers or ill-formed."""
    kind = random.choices(("missed", "numbers", "form"), (0.75, 0.2, 0.05))[0]
    nums = list(problem.nums)
    if kind == "numbers":
        nums[random.randrange(len(nums))] = random.choice(nums + [random.randint(1, 20)])
    candidates = [_random_equation(nums, random) for _ in range(6)]
    candidates = [c for c in candidates if c[1] != problem.target or sorted(nums) != sorted(problem.nums)]
    if not candidates:
        return f"{nums[0]} + {nums[1]}"
    equation = min(candidates, key=lambda c: abs(c[1] - problem.target))[0]
    return equation.replace(")", "", 1) if kind == "form" else equation


def _random_equation(nums, random: Random) -> tuple[str, int]:
    last = random.choice(nums)
    step, value = random.choice(first_steps(*others(nums, last)))
    ways = [(f"({step}) + {last}", value + last), (f"({step}) * {last}", value * last)]
    ways += [(f"({step}) - {last}", value - last)] if value >= last else [(f"{last} - ({step})", last - value)]
    return random.choice(ways)


def reflection(problem, attempt: str, random: Random, name: str | None = None) -> str:
    """A reflection on `attempt`, in the style `name` (by default drawn with the shares in STYLES)."""
    name = name or random.choices(list(STYLES), STYLES.values())[0]
    write = {"vague": _vague, "verbose": _verbose, "diagnosis": _diagnosis, "hint": _hint, "search": _search}[name]
    return write(problem, attempt, random)


def _vague(problem, attempt, random) -> str:
    return random.choice(VAGUE)


def _verbose(problem, attempt, random) -> str:
    lines = [random.choice(VERBOSE) for _ in range(random.randint(3, 5))]
    return " ".join(lines).format(target=problem.target, nums=", ".join(map(str, problem.nums)))


def _diagnosis(problem, attempt, random) -> str:
    used = [int(x) for x in re.findall(r"\d+", attempt)]
    if attempt.count("(") != attempt.count(")"):
        return "My equation was not well formed."
    if sorted(used) != sorted(problem.nums):
        return f"I used {', '.join(map(str, used))} but I was given {', '.join(map(str, problem.nums))}."
    steps = list(evaluate(attempt))
    gap = steps[-1][1] - problem.target
    said = ", ".join(f"{step} = {value}" for step, value in steps)
    return f"My equation gives {said}, not {problem.target}. It is {abs(gap)} too {'big' if gap > 0 else 'small'}."


def evaluate(equation: str):
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
        tried.add(equation := _near_miss(problem, tried, random))
        text += f" {_tried(equation, problem.target)}, no."
        if random.random() < GIVE_UP:
            break
    return f"{text} {GAVE_UP}"


def _near_miss(problem, tried, random) -> str:
    """A wrong equation on the right numbers, the nearest to the target of several, not among `tried`."""
    while True:
        candidates = [_random_equation(list(problem.nums), random) for _ in range(4)]
        wrong = [c for c in candidates if c[1] != problem.target and c[0] not in tried]
        if wrong:
            return min(wrong, key=lambda c: abs(c[1] - problem.target))[0]


def _tried(equation: str, target: int) -> str:
    """The steps of one of our own equations: "14 / 7 = 2, 2 + 13 = 15, need 15"."""
    return ", ".join([f"{step} = {value}" for step, value in evaluate(equation)] + [f"need {target}"])


def style(text: str) -> str:
    """Name the style of a reflection by what it says, not by its opening words, which training may drop.

    "search": at least one computed try is compared with the target ("7 + 8 = 15, need 25"). Else the style of
    most of its sentences: "diagnosis" (what the attempt gives or used), "hint" (a good first step), "verbose"
    or "vague" (sentences that name no number of their own); "other" where most are of none.
    """
    return "search" if COMPARED.search(text) else most_said(text, _says)


def _says(sentence: str) -> str:
    """The style that a single sentence is written in."""
    if "good first step is" in sentence:
        return "hint"
    if sentence.startswith(VERBOSE_OPENINGS):
        return "verbose"
    if DIAGNOSED.search(sentence):
        return "diagnosis"
    return "vague" if sentence in VAGUE else "other"


def conversation(task, draw, random: Random) -> list[tuple[str, str, bool]]:
    """One conversation: (role, text, learn from it) a turn. `draw(random)` gives a training problem."""
    problem = draw(random)
    user = task.messages(problem)[0]["content"]
    right = random.choice(solutions(problem.nums, problem.target))[1]
    kind = random.random()
    if kind < DIRECT:
        return [("user", user, False), ("assistant", tagged(right), True)]
    attempt = wrong_attempt(problem, random)
    turns = [("user", user, False), ("assistant", tagged(attempt), False)]
    if kind < DIRECT + BLIND:
        again = task.second_turn(task.blind_retry_prompt, problem)
        return turns + [("user", again, False), ("assistant", tagged(right), True)]
    text, own = reflection(problem, attempt, random), True
    if random.random() < FOREIGN:
        other = draw(random)
        text, own = reflection(other, wrong_attempt(other, random), random), False
    else:
        right = _announced(text, problem) or right
    turns += [("user", task.reflection_prompt, False), ("assistant", text, own)]
    again = task.second_turn(task.retry_prompt, problem)
    return turns + [("user", again, False), ("assistant", tagged(right), True)]


def _announced(text: str, problem) -> str | None:
    """The equation that a search found or that begins as a hint says, if there is one."""
    found = text.removesuffix(", yes.").split(". ")[-1].removeprefix(f"{SEARCH} ")
    first = text.removeprefix("A good first step is ").removesuffix(".")
    for step, equation in solutions(problem.nums, problem.target):
        if step == first or _tried(equation, problem.target) == found:
            return equation
    return None


def tagged(equation: str) -> str:
    """The form of an answer."""
    return f"<answer>{equation}</answer>"
