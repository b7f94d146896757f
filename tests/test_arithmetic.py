"""The task in data/arithmetic.py: problems, splits, verdicts."""

import pytest

from r3lib import load_task
from r3lib.config import ROOT
from r3lib.errors import R3Error

TASK = load_task(f"{ROOT / 'data' / 'arithmetic.py'}:Arithmetic")


def test_problems_are_distinct_the_same_every_time_and_in_one_split():
    drawn = {split: TASK.problems(split, 400, 0) for split in ("train", "validation", "test")}
    ids = [problem.id for problems in drawn.values() for problem in problems]
    assert len(set(ids)) == len(ids) == 1200
    assert TASK.problems("test", 100, 0) == drawn["test"][:100] != TASK.problems("test", 100, 1)


def test_kinds_come_in_equal_parts_and_values_follow_the_order_of_operations():
    kinds = [TASK.part(problem.id) for problem in TASK.problems("train", 900, 0)]
    assert all(250 < kinds.count(kind) < 350 for kind in set(kinds)) and len(set(kinds)) == 3
    values = {problem.id: problem.value for problem in TASK.problems("train", 900, 0)}
    first, left, second, sign, third, right, fourth = next(e for e in values if e.count("*") == 2).split()
    products = int(first) * int(second), int(third) * int(fourth)
    text = " ".join((first, left, second, sign, third, right, fourth))
    assert (left, right) == ("*", "*")
    assert values[text] == products[0] + (products[1] if sign == "+" else -products[1])


def test_an_unknown_split_and_more_than_there_are_are_refused():
    with pytest.raises(R3Error, match="unknown split 'tset'"):
        TASK.problems("tset", 4, 0)
    with pytest.raises(R3Error, match="ask for at least 1"):
        TASK.problems("test", 0, 0)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("-1234", "ok"),
        (" -1,234.\n", "ok"),
        ("1234", "wrong_number"),
        ("-12340", "wrong_number"),
        ("", "no_number"),
        ("I cannot.", "no_number"),
        ("The answer is -1234", "not_only_a_number"),
        ("3 * 4 - 1246 = -1234", "not_only_a_number"),
        ("-1234 or 5", "not_only_a_number"),
        ("--1234", "not_only_a_number"),
        ("\u22121234", "ok"),
        ("-12,34", "not_only_a_number"),
        ("9" * 5000, "not_only_a_number"),
    ],
)
def test_a_right_answer_is_the_number_alone(text, reason):
    problem = type(TASK.problems("test", 1, 0)[0])("3 * 4 - 1246", -1234)
    verdict = TASK.verify(text, problem)
    assert verdict.reason == reason and verdict.ok == (reason == "ok")


def test_style_says_whether_a_step_is_worked_out():
    assert TASK.style("8 * 9 = 72, and 72 - 5 = 67.") == "works it out"
    assert TASK.style("The product is -12.") == "works it out"
    assert TASK.style("I should read the problem with more care.") == "other"
