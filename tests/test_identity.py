"""What decides a verdict is in the facts of a task, wherever it stands and however it was typed."""

from collections import namedtuple
from dataclasses import dataclass

import pytest

from r3lib.identity import content, task_facts
from r3lib.tasks import Task

CELL = """
class Mine(Task):
    name, reflection_prompt = "mine", "Reflect."
    def verify(self, text, problem):
        return text.strip() == {gold!r}
"""


def typed(gold):
    """A task whose class was typed in a notebook cell: it has no file."""
    space = {"Task": Task, "__name__": "__main__"}
    exec(CELL.format(gold=gold), space)
    return space["Mine"]()


class Tolerant(Task):
    name, reflection_prompt = "tolerant", "Reflect."

    def __init__(self, tolerance, close=None):
        self.tolerance, self._cache = tolerance, {}
        self.close = close


def test_a_verify_that_was_edited_in_a_cell_is_another_task():
    assert task_facts(typed("7")) == task_facts(typed("7"))
    assert task_facts(typed("7")) != task_facts(typed("8"))


def test_options_and_functions_count_and_private_caches_do_not():
    used = Tolerant(0.1)
    used._cache["seen"] = 1
    assert task_facts(used) == task_facts(Tolerant(0.1))
    assert task_facts(Tolerant(0.1)) != task_facts(Tolerant(9.0))
    assert task_facts(Tolerant(1, lambda: True)) != task_facts(Tolerant(1, lambda: False))
    made = [(lambda text, gold=gold: text == gold) for gold in "78"]
    assert task_facts(Tolerant(1, made[0])) != task_facts(Tolerant(1, made[1]))


@dataclass(frozen=True, slots=True)
class Slotted:
    id: str
    gold: str


@pytest.mark.parametrize("kind", [Slotted, namedtuple("Named", ["id", "gold"])])
def test_a_gold_answer_counts_in_problems_of_any_kind(kind):
    assert content(kind("p", "8")) == {"id": "p", "gold": "8"}
