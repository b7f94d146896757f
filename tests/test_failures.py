"""What the failure analysis says about episodes and reflections written by hand."""

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r3lib.episodes import Episode, frame
from r3lib.errors import R3Error
from r3lib.failures import (
    arithmetic_share,
    arithmetic_table,
    error_types,
    reflection_examples,
    reflection_rows,
    reflection_stats,
    repetition,
    transitions,
)
from r3lib.stats import wilson

REASONS = ("no_answer", "invalid_expression", "wrong_numbers", "missed_target")
WORKED = "Try 13 - 7 = 6, 14 - 6 = 8, no. Try 14 / 7 = 2, 13 + 2 = 15, yes."
WRONG = "Try 13 - 7 = 5, 14 - 6 = 8, no."
VAGUE = "I should be more careful."


def row(policy, seed, problem, condition, attempt, retry=None, reflection=None):
    count = None if reflection is None else len(reflection.split())
    return Episode(
        "countdown", "test", problem, policy, seed, condition, 0, "task " + problem, f"try of {policy}", attempt,
        reflection, retry and f"answer of {policy}", retry, 5, count, retry and 5, "nano", "",
    )  # fmt: skip


@pytest.fixture
def study():
    """Vanilla fails p0..p3, two trained seeds fail p2..p5; every failure has a reflection and a retry."""
    rows = []
    told = {
        "vanilla": [(VAGUE, "missed_target"), (VAGUE, "ok"), (WORKED, "ok"), (WRONG, "wrong_numbers")],
        "r3": [(WORKED, "ok"), (WORKED, "ok"), (WRONG, "ok"), (VAGUE, "missed_target")],
    }
    for policy, seed, failed in (("r3", 0, range(2, 6)), ("r3", 1, range(2, 6)), ("vanilla", 0, range(4))):
        for i in range(10):
            reason = "ok" if i not in failed else "wrong_numbers" if i == failed[0] else "missed_target"
            rows.append(row(policy, seed, f"p{i}", "first_try", reason))
            if i in failed:
                text, retry = told[policy][i - failed[0]]
                rows.append(row(policy, seed, f"p{i}", "reflect_retry", reason, retry, text))
                rows.append(row(policy, seed, f"p{i}", "shuffled_reflection", reason, "no_answer", "Alien."))
    return frame(rows)


def style(text):
    return "worked" if text.startswith("Try") else "vague"


def test_error_shares_count_all_first_tries_and_keep_reasons_that_never_occur(study):
    table = error_types(study, REASONS).set_index(["policy", "reason"])
    assert list(table.loc["vanilla"].index) == list(table.loc["r3"].index) == list(REASONS)
    assert table.loc[("vanilla", "missed_target"), ["seeds", "n", "k", "share"]].tolist() == [1, 10, 3, 0.3]
    assert table.loc[("r3", "wrong_numbers"), ["seeds", "n", "k", "share"]].tolist() == [2, 20, 2, 0.1]
    assert tuple(table.loc[("vanilla", "missed_target"), ["lo", "hi"]]) == wilson(3, 10)
    assert tuple(table.loc[("r3", "no_answer"), ["share", "lo", "hi"]]) == (0, *wilson(0, 10))


def test_a_reason_that_the_task_does_not_list_comes_after_those_that_it_lists(study):
    table = error_types(study, ["no_answer"]).set_index(["policy", "reason"])
    assert list(table.loc["r3"].index) == ["no_answer", "missed_target", "wrong_numbers"]
    assert table.n["vanilla", "missed_target"] == 10


def test_transitions_count_where_reflected_retries_end(study):
    table = transitions(study).set_index(["policy", "attempt_reason", "retry_reason"])
    assert table.n["vanilla", "missed_target", "ok"] == 2
    assert table.n["vanilla", "wrong_numbers", "missed_target"] == 1
    assert table.n["r3", "missed_target", "ok"] == 4
    assert table.n["r3", "missed_target", "wrong_numbers"] == 0
    assert table.share["r3", "missed_target", "ok"] == pytest.approx(4 / 6)
    assert table.groupby("policy").n.sum().to_dict() == {"vanilla": 4, "r3": 8}
    assert "no_answer" not in table.index.get_level_values("retry_reason")
    assert len(table) == 2 * 2 * 3


def test_reflections_of_the_method_alone_are_described(study):
    rows = reflection_rows(study, style)
    assert len(rows) == 12 and "Alien." not in set(rows.text)
    assert list(dict.fromkeys(rows.policy)) == ["vanilla", "r3"]


def test_style_shares_successes_and_lengths_before_and_after(study):
    table = reflection_stats(study, style, limit=100).set_index(["policy", "style"])
    assert table.loc[("vanilla", "all"), ["n", "share", "success"]].tolist() == [4, 1, 0.5]
    assert table.loc[("r3", "worked"), ["n", "share", "success"]].tolist() == [6, 0.75, 1]
    assert table.loc[("r3", "vague"), ["n", "share", "success"]].tolist() == [2, 0.25, 0]
    assert table.distinct["r3", "all"] == 6 / 8  # 3 texts in each of 2 seeds
    assert table.mean_tokens["vanilla", "vague"] == 5
    assert table.median_tokens["r3", "worked"] == len(WORKED.split())
    assert ((table.share_lo <= table.share) & (table.share <= table.share_hi)).all()
    assert ((table.success_lo <= table.success) & (table.success <= table.success_hi)).all()


def test_reflections_as_long_as_the_limit_are_cut_off_and_judged_apart(study):
    limit = len(WORKED.split())
    table = reflection_stats(study, style, limit).set_index(["policy", "style"])
    assert table.loc[("r3", "all"), ["truncated", "success_cut", "success_uncut"]].tolist() == [0.5, 1, 0.5]
    assert table.loc[("vanilla", "all"), ["truncated", "success_cut"]].tolist() == [0.25, 1]
    assert table.truncated["vanilla", "vague"] == 0 and math.isnan(table.success_cut["vanilla", "vague"])
    assert tuple(table.loc[("vanilla", "all"), ["truncated_lo", "truncated_hi"]]) == wilson(1, 4)
    assert tuple(table.loc[("vanilla", "all"), ["success_uncut_lo", "success_uncut_hi"]]) == wilson(1, 3)
    longer = reflection_stats(study, style, limit + 1)
    assert (longer.truncated == 0).all() and longer.success_uncut.equals(longer.success)


def test_repetition_is_the_share_of_three_word_groups_seen_before():
    assert repetition("a b c a b c") == pytest.approx(1 / 4)
    assert repetition("no no no no no") == pytest.approx(2 / 3)
    assert repetition("all of these words differ") == 0
    assert repetition("too short") == repetition("") == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (WORKED, (4, 4)),
        (WRONG, (1, 2)),
        ("My equation gives 14 - 13 = 1, 7 * 1 = 7, not 15. It is 8 too small.", (2, 2)),
        ("seconds: 5 * 3600 = 18000, 45 * 60 = 2700, 18000 + 2700 = 20700", (3, 3)),
        ("2 * 3 = 9", (0, 1)),
        ("7 / 2 = 3", (0, 1)),
        ("7 / 0 = 0", (0, 1)),
        ("3 - 5 = -2", (1, 1)),
        ("3×4=12; 8 ÷ 2 = 4\n9 − 1 = 8", (3, 3)),
        ("(3 + 4 = 7)", (1, 1)),
    ],
)
def test_single_steps_are_checked_exactly(text, expected):
    assert arithmetic_share(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "9 - 2 * 3 = 3",
        "1 + 2 = 3 + 4",
        "1 + 2 = 3 = 3",
        "9 - (2 * 3) = 3",
        "(14 / 7) + 13 = 15",
        "7 / 2 = 3.5",
        "2.5 * 2 = 5",
        "5 * 3600 = 18,000",
        "x2 + 3 = 5",
        "4 - 2 apples = 2",
        "1 + 1 = " + "9" * 5000,
        "٣ + ٤ = ٧",
        "",
    ],
)
def test_chains_decimals_and_words_are_not_steps(text):
    assert arithmetic_share(text) == (0, 0)


def test_a_megabyte_of_symbols_is_read_quickly():
    for text in ("1 + 1 = 2, " * 90_000, "9" * 10**6, "(" * 10**6, "1 + " * 250_000, "a" * 10**6):
        start = time.perf_counter()
        arithmetic_share(text)
        assert time.perf_counter() - start < 10


@given(st.text(alphabet="0123456789+-*/=()., ab\n", max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_gives_a_count(text):
    right, total = arithmetic_share(text)
    assert 0 <= right <= total <= text.count("=")


@given(st.integers(0, 999), st.sampled_from("+-*"), st.integers(0, 999), st.integers(-3, 3))
def test_a_step_is_right_exactly_when_python_says_so(a, op, b, error):
    value = {"+": a + b, "-": a - b, "*": a * b}[op]
    assert arithmetic_share(f"I try {a} {op} {b} = {value + error}, yes.") == (int(error == 0), 1)


def test_right_steps_are_counted_for_each_seed_and_over_seeds(study):
    table = arithmetic_table(study).set_index(["policy", "seed"])
    assert list(table.index) == [("vanilla", 0), ("vanilla", "all"), ("r3", 0), ("r3", 1), ("r3", "all")]
    assert table.loc[("r3", "all"), ["n", "with_steps", "right", "steps"]].tolist() == [8, 6, 18, 20]
    assert table.share["vanilla", 0] == pytest.approx(5 / 6)
    assert ((table.lo <= table.share) & (table.share <= table.hi)).all()


def test_reflections_without_steps_have_no_share_rather_than_zero(study):
    vague = study.assign(reflection=study.reflection.where(study.reflection.isna(), VAGUE))
    assert arithmetic_table(vague).steps.sum() == 0
    assert all(math.isnan(x) for x in arithmetic_table(vague).share)


def test_examples_show_the_same_problem_before_and_after(study):
    table = reflection_examples(study, 5, seed=1)
    assert sorted(table.problem_id) == ["p2", "p3"]
    second = table.set_index("problem_id").loc["p2"]
    assert (second.reflection_before, second.reflection_after) == (WORKED, WORKED)
    assert (second.attempt_before, second.attempt_after) == ("try of vanilla", "try of r3")
    assert second.prompt == "task p2"
    assert len(reflection_examples(study, 1, seed=1)) == 1
    assert reflection_examples(study, 2, seed=1).equals(reflection_examples(study, 2, seed=1))


def test_missing_rows_are_named(study):
    with pytest.raises(R3Error, match="no reflect_retry rows"):
        transitions(study[study.condition == "first_try"])
