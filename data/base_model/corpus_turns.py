"""The turns of a conversation of the corpora, and the style of its reflection."""

from collections.abc import Callable
from random import Random

from r3lib.tasks import Task

DIRECT, BLIND = 0.30, 0.08  # shares of conversations; the rest reflect
FOREIGN = 0.06  # share of reflections that were written for another problem


def turns(
    task: Task, problem, right: str, attempt: str = "", reflection: str = "", own: bool = True
) -> list[tuple[str, str, bool]]:
    """Return one (role, text, learn it) a turn: only the answer `right`, or a wrong attempt before.

    A reflection is learned if it is its `own` problem's; without one the second try is blind.
    """
    first = ("user", task.messages(problem)[0]["content"], False)
    last = ("assistant", right, True)
    if not attempt:
        return [first, last]
    told, reflected = task.blind_retry_prompt, []
    if reflection:
        told = task.retry_prompt
        reflected = [("user", task.reflection_prompt, False), ("assistant", reflection, own)]
    again = ("user", task.second_turn(told, problem), False)
    return [first, ("assistant", attempt, False), *reflected, again, last]


def write_reflection(
    writers: dict[str, Callable], shares: dict, problem, attempt, random: Random, style: str | None
) -> str:
    """A reflection on `attempt` in `style`, by default one drawn with `shares`."""
    style = style or random.choices(list(shares), shares.values())[0]
    return writers[style](problem, attempt, random)
