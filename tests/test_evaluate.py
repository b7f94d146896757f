"""The tables of the study on hand-made episodes, whose answers can be counted on paper."""

import pandas as pd
import pytest

from r3lib.conditions import Condition
from r3lib.episodes import Episode, frame
from r3lib.errors import R3Error
from r3lib.evaluate import accuracy_table, by_part, comparisons_table, paper_view
from r3lib.stats import mcnemar, wilson

SECOND = ("resample", "retry", "retry_sampled", "generic_reflection", "shuffled_reflection", "reflect_retry")


def row(policy, seed, problem, condition, attempt, retry=None, split="test", task="countdown"):
    reflects = retry is not None and "reflect" in condition
    return Episode(
        task, split, problem, policy, seed, condition, 0, "task", "attempt", attempt,
        "I was wrong." if reflects else None, retry and "answer", retry,
        5, 4 if reflects else None, retry and 5, "nano", "",
    )  # fmt: skip


def policy_rows(policy, seed, problems, solved, rescued):
    """First tries on problems p0, p1, ...; `rescued[condition]` lists the failures that it repairs."""
    rows = []
    for i in range(problems):
        first = "ok" if i in solved else "missed_target"
        rows.append(row(policy, seed, f"p{i}", "first_try", first))
        for condition in SECOND if i not in solved else ():
            retry = "ok" if i in rescued.get(condition, ()) else "wrong_numbers"
            rows.append(row(policy, seed, f"p{i}", condition, first, retry))
    return rows


@pytest.fixture
def study():
    """20 problems: vanilla solves 10 and rescues 2 of 10; two trained seeds solve 10 and 12, rescue 6 and 5."""
    rows = policy_rows("r3", 0, 20, range(10), {"reflect_retry": range(10, 16), "retry": [10]})
    rows += policy_rows("r3", 1, 20, range(12), {"reflect_retry": range(12, 17), "retry": [12, 13]})
    rows += policy_rows("vanilla", 0, 20, range(10), {"reflect_retry": [10, 11], "resample": [12, 13, 14]})
    return frame(rows)


def cell(table, policy, condition, seed):
    chosen = table[(table.policy == policy) & (table.condition == condition) & (table.seed == seed)]
    assert len(chosen) == 1
    return chosen.iloc[0]


def test_accuracy_has_the_settled_columns_and_a_row_a_seed_and_one_for_all(study):
    table = accuracy_table(study)
    assert " ".join(table.columns) == "task policy train_task condition split seed n k rate lo hi"
    assert len(table) == 7 * (2 + 3)
    assert list(table[(table.policy == "r3") & (table.condition == "retry")].seed) == [0, 1, "all"]
    assert list(dict.fromkeys(table.condition)) == ["first_try", *SECOND]
    assert list(dict.fromkeys(table.policy)) == ["vanilla", "r3"]


def test_second_tries_count_the_failures_of_the_same_policy_and_seed(study):
    table = accuracy_table(study)
    for policy, seed, n, k in (("vanilla", 0, 10, 2), ("r3", 0, 10, 6), ("r3", 1, 8, 5), ("r3", "all", 18, 11)):
        found = cell(table, policy, "reflect_retry", seed)
        assert (found.n, found.k, found.rate) == (n, k, pytest.approx(k / n))
        assert 0 <= found.lo < found.rate < found.hi <= 1
    assert cell(table, "r3", "first_try", "all")[["n", "k"]].tolist() == [40, 22]


def test_one_seed_gets_wilsons_interval_and_seeds_on_the_same_problems_do_not_narrow_it_as_if_new(study):
    table = accuracy_table(study)
    one = cell(table, "vanilla", "first_try", "all")
    assert (one.lo, one.hi) == wilson(10, 20)
    pooled, naive = cell(table, "r3", "first_try", "all"), wilson(22, 40)
    assert pooled.hi - pooled.lo > 1.2 * (naive[1] - naive[0])


def test_train_task_is_empty_for_vanilla_and_can_be_another_task(study):
    assert dict(accuracy_table(study).groupby("policy").train_task.first()) == {"r3": "countdown", "vanilla": ""}
    moved = accuracy_table(study.replace({"policy": {"r3": "r3_from_function_calling"}}))
    tasks = dict(moved.groupby("policy").train_task.first())
    assert tasks == {"r3_from_function_calling": "function_calling", "vanilla": ""}


def test_parts_of_the_test_problems_become_splits_of_their_own(study):
    halves = by_part(study, lambda name: "odd" if int(name[1:]) % 2 else "")
    assert set(halves.split) == {"test/odd"} and 0 < len(halves) < len(study)
    assert set(accuracy_table(halves).split) == {"test/odd"}


def test_a_retry_that_was_never_judged_is_not_a_success():
    rows = frame([row("vanilla", 0, "p0", "first_try", "missed_target"), row("vanilla", 0, "p1", "first_try", "ok")])
    rows.loc[1, "condition"] = "retry"
    assert accuracy_table(rows).k.sum() == 0


def test_every_question_of_the_study_is_asked_once(study):
    table = comparisons_table(study)
    assert " ".join(table.columns) == "question task a b n seeds diff lo hi p p_holm"
    asked = set(zip(table.a, table.b))
    assert len(asked) == len(table) == 3 + 5 + 5
    assert {("r3/reflect_retry", f"r3/{c}") for c in SECOND[:-1]} <= asked
    assert {("vanilla/reflect_retry", f"vanilla/{c}") for c in SECOND[:-1]} <= asked
    assert {(f"r3/{c}", f"vanilla/{c}") for c in ("reflect_retry", "first_try", "both_tries")} <= asked


def test_differences_are_those_counted_by_hand(study):
    table = comparisons_table(study).set_index(["a", "b"])
    diff = table["diff"]
    assert diff["r3/reflect_retry", "vanilla/reflect_retry"] == pytest.approx(11 / 18 - 2 / 10)
    assert diff["r3/reflect_retry", "r3/retry"] == pytest.approx(8 / 18)
    assert diff["r3/first_try", "vanilla/first_try"] == pytest.approx(22 / 40 - 10 / 20)
    assert diff["r3/both_tries", "vanilla/both_tries"] == pytest.approx(33 / 40 - 12 / 20)
    assert diff["vanilla/reflect_retry", "vanilla/resample"] == pytest.approx(-1 / 10)
    assert table.loc[("r3/first_try", "vanilla/first_try"), ["n", "seeds"]].tolist() == [20, 2]
    assert table.loc[("r3/reflect_retry", "r3/retry"), ["n", "seeds"]].tolist() == [10, 2]
    assert ((table.lo <= diff) & (diff <= table.hi)).all()
    assert (table.p_holm >= table.p).all() and table.p_holm.max() <= 1


def test_the_training_question_of_a_condition_of_ones_own_is_asked(study):
    """Second tries, so each policy has failures of its own, all of which count."""
    study = study[~((study.policy == "vanilla") & (study.problem_id == "p15"))]
    warm = Condition("retry", training="Does training help a retry?")
    table = comparisons_table(study, ["first_try", warm]).set_index("question")
    row = table.loc["Does training help a retry?"]
    assert (row.a, row.b) == ("r3/retry", "vanilla/retry") and row["diff"] == pytest.approx(3 / 18)
    assert row.n == 10 and len(table) == 3
    only = comparisons_table(study, [warm])
    assert "Does training raise first-try accuracy?" not in set(only.question)


def test_one_seed_is_judged_by_mcnemars_exact_test(study):
    table = comparisons_table(study[~((study.policy == "r3") & (study.seed == 1))]).set_index(["a", "b"])
    ours = [1] * 6 + [0] * 4
    assert table.p["r3/reflect_retry", "r3/retry"] == mcnemar(ours, [1] + [0] * 9)
    assert table.p["vanilla/reflect_retry", "vanilla/resample"] == mcnemar([1, 1, 0, 0, 0], [0, 0, 1, 1, 1])


def test_rows_in_another_order_give_the_same_tables(study):
    shuffled = study.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(accuracy_table(study), accuracy_table(shuffled))
    pd.testing.assert_frame_equal(comparisons_table(study), comparisons_table(shuffled))


def test_only_the_failures_that_both_conditions_tried_are_compared(study):
    tried = ~((study.policy == "r3") & (study.condition == "retry") & (study.problem_id == "p15"))
    table = comparisons_table(study[tried]).set_index(["a", "b"])
    assert table["diff"]["r3/reflect_retry", "r3/retry"] == pytest.approx(9 / 16 - 3 / 16)


def test_a_strong_effect_is_clear_of_zero_and_none_is_not():
    rescued = {"reflect_retry": range(200, 320), "retry": range(200, 240), "resample": range(240, 360)}
    rows = [r for s in range(3) for r in policy_rows("r3", s, 400, range(200), rescued)]
    rows += policy_rows("vanilla", 0, 400, range(200), {"reflect_retry": range(200, 240)})
    table = comparisons_table(frame(rows)).set_index(["a", "b"])
    clear = table.loc[("r3/reflect_retry", "vanilla/reflect_retry")]
    assert clear["diff"] == pytest.approx(0.4) and clear.lo > 0.25 and clear.p_holm < 0.01
    none = table.loc[("r3/reflect_retry", "r3/resample")]
    assert none["diff"] == 0 and none.lo < -0.05 and none.hi > 0.05 and none.p > 0.9


def test_without_a_trained_policy_only_its_own_controls_are_asked(study):
    table = comparisons_table(study[study.policy == "vanilla"])
    assert set(table.a) == {"vanilla/reflect_retry"} and len(table) == 5
    first_only = study[study.condition == "first_try"]
    assert list(comparisons_table(first_only).a) == ["r3/first_try"]


def test_the_papers_columns_add_the_rescued_to_the_first_try(study):
    view = paper_view(accuracy_table(study)).set_index("column")
    assert list(view.index) == ["vanilla_first", "vanilla_second", "trained_first", "trained_second"]
    assert view.rate.tolist() == pytest.approx([0.5, 0.6, 22 / 40, 33 / 40])
    assert view.seeds.tolist() == [1, 1, 2, 2] and view.n.tolist() == [20, 20, 40, 40]
    assert (view.loc["trained_second", "lo"], view.loc["trained_second", "hi"]) == wilson(16, 20)
    assert (view.loc["vanilla_second", "lo"], view.loc["vanilla_second", "hi"]) == wilson(12, 20)


def test_the_papers_columns_survive_a_csv(study, tmp_path):
    accuracy_table(study).to_csv(tmp_path / "accuracy.csv", index=False)
    read = pd.read_csv(tmp_path / "accuracy.csv", keep_default_na=False)
    assert paper_view(read).rate.tolist() == paper_view(accuracy_table(study)).rate.tolist()


def test_a_half_finished_evaluation_is_refused(study):
    some = study[~((study.condition == "reflect_retry") & (study.problem_id == "p19"))]
    with pytest.raises(R3Error, match="vanilla: 9 of 10 failures"):
        paper_view(accuracy_table(some))
    with pytest.raises(R3Error, match="vanilla: 9 of 10 failures"):
        comparisons_table(some)


def test_bad_episodes_give_one_line_that_names_them(study):
    with pytest.raises(R3Error, match="no episodes"):
        accuracy_table(study[:0])
    with pytest.raises(R3Error, match="'test', 'train'"):
        comparisons_table(study.assign(split=["train", *study.split[1:]]))
