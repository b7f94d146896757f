"""Mental arithmetic: a task for pretrained models of half a billion parameters and more.

An answer must be the number alone, so the result between cannot be written down in it. A reflection
is the only place where a model can work it out. Whether it does is up to the model; nothing asks
for it. `make reproduce PROFILE=qwen` runs the study.
"""

import re
from dataclasses import dataclass
from random import Random

from r3lib import Task, Verdict
from r3lib.tasks import CountdownTask
from r3lib.tasks.sources import check_request, draw_distinct, split_by_hash


@dataclass(frozen=True)
class Sum:
    """An expression, which is its `id`, and its value."""

    id: str
    value: int


class Arithmetic(Task):
    """Expressions of two operations in three kinds, one third each.

    `reflection_prompt` asks for the reflection: by default in the paper's words for Countdown.
    """

    name = "arithmetic"
    reasons = ("no_number", "not_only_a_number", "wrong_number")

    def __init__(self, reflection_prompt: str = CountdownTask.reflection_prompt):
        self.reflection_prompt = reflection_prompt

    def problems(self, split, n, seed):
        """`n` distinct expressions, each in the split that its hash says; R3Error: it has fewer."""
        check_request(split, n, ("train", "validation", "test"))
        random = Random(f"{split} {seed}")

        def drawn(_index):
            problem = draw(random)
            return problem if split_by_hash(problem.id) == split else None

        return draw_distinct(drawn, n, f"arithmetic {split}")

    def messages(self, problem):
        """One question."""
        asked = f"Compute {problem.id}. Answer with the number only, without any other words."
        return [{"role": "user", "content": asked}]

    def verify(self, text, problem):
        """Right is the number and nothing beside it, but for a full stop or commas in it."""
        answer = text.strip().replace("\u2212", "-")  # as typeset
        if not re.search("[0-9]", answer):
            return Verdict(False, "no_number")
        if not re.fullmatch(r"-?([0-9]{1,9}|[0-9]{1,3}(,[0-9]{3})+)\.?", answer):
            return Verdict(False, "not_only_a_number")
        ok = answer.rstrip(".").replace(",", "") == str(problem.value)
        return Verdict(ok, "ok" if ok else "wrong_number")

    def style(self, reflection):
        """Does a reflection have a result in it, as in "= 90" or "is 90"?"""
        return "works it out" if re.search(r"(=|is|equals|gives) -?[0-9]", reflection) else "other"

    def part(self, problem_id):
        """The kind: how many products the expression has."""
        return ("two sums", "product and sum", "two products")[problem_id.count("*")]


def draw(random: Random) -> Sum:
    """One expression of a random kind."""
    sign, other = random.choices("+-", k=2)

    def number(least, most):
        return random.randint(least, most)

    kind = random.randrange(3)
    if kind == 0:
        text = f"{number(11, 98)} {sign} {number(3, 40)} {other} {number(11, 98)}"
    elif kind == 1:
        text = f"{number(3, 20)} * {number(3, 9)} {sign} {number(3, 40)}"
    else:
        text = f"{number(3, 20)} * {number(3, 9)} {sign} {number(3, 20)} * {number(3, 9)}"
    terms = re.findall(r"(-?) ?([0-9]+)(?: \* ([0-9]+))?", text)
    return Sum(text, sum(int(f"{minus}{a}") * int(b or 1) for minus, a, b in terms))
