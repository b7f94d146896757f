"""Countdown problems: seeded, distinct, solvable, never in two splits; and what is said about bad sources."""

import json
import re
from fractions import Fraction
from itertools import combinations, permutations

import datasets
import pandas as pd
import pytest

from r3lib.errors import R3Error
from r3lib.tasks import CountdownProblem, CountdownTask, Task, countdown, load_task
from r3lib.tasks.countdown import HUB_DATASET, reachable, split_of
from r3lib.tasks.sources import GENERATED as SPLITS

SMALL = dict(count=3, largest=12, largest_target=40)
ROWS = [((4, 6, 9), 19), ((2, 3, 7), 42), ((1, 5, 8), 12), ((4, 6, 9), 33), ((3, 3, 8, 8), 24)]


def reaches(values, target):
    """Brute force, independent of the package: combine any two values until one is left."""
    if len(values) == 1:
        return values[0] == target
    for i, j in combinations(range(len(values)), 2):
        a, b = values[i], values[j]
        rest = [v for k, v in enumerate(values) if k not in (i, j)]
        results = {a + b, a - b, b - a, a * b} | ({a / b} if b else set()) | ({b / a} if a else set())
        if any(reaches([*rest, r], target) for r in results):
            return True
    return False


def canonical(problem):
    return (*sorted(problem.nums), problem.target)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Keep what `datasets` caches inside the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write(tmp_path, cache):
    """A function that writes rows as a data set folder and returns its path."""

    def write(rows, kind="parquet", columns=("nums", "target")):
        folder = tmp_path / kind
        folder.mkdir()
        rows = [dict(zip(columns, (list(nums), target))) for nums, target in rows]
        if kind == "parquet":
            pd.DataFrame(rows).to_parquet(folder / "train.parquet")
        else:
            (folder / "train.json").write_text("\n".join(map(json.dumps, rows)))
        return str(folder)

    return write


@pytest.mark.parametrize("split", SPLITS)
def test_problems_are_a_function_of_split_count_and_seed(split):
    task = load_task("countdown", **SMALL)
    first = task.problems(split, 30, 7)
    assert first == load_task("countdown", **SMALL).problems(split, 30, 7)
    assert first != task.problems(split, 30, 8)
    assert first[:10] == task.problems(split, 10, 7)
    assert len({canonical(p) for p in first}) == len({p.id for p in first}) == 30


@pytest.mark.parametrize(
    "options, n",
    [
        (dict(count=3, largest=20, largest_target=99), 150),
        (dict(count=4, largest=13, largest_target=50), 12),
        (dict(count=(3, 4), largest=99, largest_target=999), 12),
    ],
)
def test_every_problem_can_be_solved_and_keeps_to_its_ranges(options, n):
    for problem in CountdownTask(**options).problems("train", n, 0):
        assert reaches([Fraction(x) for x in problem.nums], problem.target)
        assert 1 <= min(problem.nums) and max(problem.nums) <= options["largest"]
        assert 1 <= problem.target <= options["largest_target"]


def test_three_and_four_numbers_both_occur():
    counts = {len(p.nums) for p in CountdownTask(largest=20).problems("train", 20, 0)}
    assert counts == {3, 4}


def test_reachable_is_all_that_brute_force_reaches():
    for nums in [(1, 2, 3), (4, 4, 4), (3, 7, 13), (0, 5, 5), (8, 8, 3, 3), (7,)]:
        values = [Fraction(x) for x in nums]
        assert [t for t in range(-80, 80) if reaches(values, t)] == [
            t for t in reachable(tuple(sorted(nums))) if -80 <= t < 80
        ]


def test_no_problem_stands_in_two_splits_in_any_order_of_its_numbers():
    task = CountdownTask(count=3, largest=12, largest_target=40)
    found = {split: {canonical(p) for p in task.problems(split, 80, 1)} for split in SPLITS}
    assert all(not found[a] & found[b] for a, b in combinations(SPLITS, 2))
    assert not found["validation"] & found["test"]
    for problem in task.problems("test", 40, 2):
        shuffles = [CountdownProblem(nums, problem.target) for nums in permutations(problem.nums)]
        assert {p.id for p in shuffles} == {problem.id} and {split_of(p) for p in shuffles} == {"test"}


def test_the_splits_share_problems_as_stated():
    drawn = [
        split_of(CountdownProblem((a, b, c), t))
        for a in range(9)
        for b in range(a)
        for c in range(b)
        for t in range(60)
    ]
    shares = {split: drawn.count(split) / len(drawn) for split in SPLITS}
    assert shares == pytest.approx({"pretrain": 0.60, "train": 0.20, "validation": 0.05, "test": 0.15}, abs=0.02)


def test_asking_for_more_than_there_are_says_how_many_there_are():
    task = CountdownTask(count=2, largest=4, largest_target=5)
    targets = {(a, b): reachable((a, b)) for a in range(1, 5) for b in range(a, 5)}
    all_of_them = [CountdownProblem(nums, t) for nums in targets for t in targets[nums] if 1 <= t <= 5]
    there = [split_of(problem) for problem in all_of_them].count("train")
    assert len(task.problems("train", there, 0)) == there
    with pytest.raises(R3Error, match=f"only about {there} distinct problems, 400 were asked for: ask for fewer, or"):
        task.problems("train", 400, 0)


@pytest.mark.parametrize(
    "split, n, said", [("tset", 3, "'tset': use one of pretrain, train"), ("test", 0, "n=0"), ("test", -2, "n=-2")]
)
def test_an_unknown_split_and_an_empty_request_are_refused(split, n, said):
    with pytest.raises(R3Error, match=said):
        CountdownTask(**SMALL).problems(split, n, 0)


@pytest.mark.parametrize("bad", [dict(count=5), dict(count=1), dict(count=()), dict(largest=1), dict(largest_target=0)])
def test_options_that_admit_no_problem_are_refused(bad):
    with pytest.raises(R3Error, match="use counts of 2 to 4"):
        load_task("countdown", **bad)


def test_a_misspelt_task_is_told_the_nearest_name():
    with pytest.raises(R3Error, match="unknown task 'countdwon': did you mean 'countdown'"):
        load_task("countdwon")
    with pytest.raises(R3Error, match="unknown task 'zzz': known: .*countdown"):
        load_task("zzz")


def test_an_unknown_option_is_named():
    with pytest.raises(R3Error, match="task 'countdown': .*'bigest'"):
        load_task("countdown", bigest=20)


def test_the_prompts_are_the_papers():
    task = load_task("countdown")
    (message,) = task.messages(CountdownProblem((4, 73, 4, 23), 76))
    assert message["role"] == "user"
    assert message["content"].startswith(
        "Using the numbers [4, 73, 4, 23], create an equation that equals 76. You can use basic arithmetic "
        "operations (+, -, *, /) one or multiple times but each number can only be used once."
    )
    assert task.reflection_prompt == (
        "You tried solving the problem and got the wrong answer. Reflect on what went wrong and write a short "
        "explanation that will help you do better next time."
    )


def test_a_worked_example_is_right_and_no_test_problem():
    plain, task = load_task("countdown"), load_task("countdown", example=True)
    problem = CountdownProblem((4, 73, 4, 23), 76)
    (before,), (message,) = plain.messages(problem), task.messages(problem)
    added = message["content"].removeprefix(before["content"])
    *nums, target = map(int, re.findall(r"\d+", added.partition(" is ")[0]))
    shown = CountdownProblem(tuple(nums), target)
    assert task.verify(added.removesuffix("."), shown).ok
    assert split_of(shown) not in ("test", "validation")


def test_the_task_judges_with_the_verifier_and_knows_its_reasons():
    task, problem = load_task("countdown"), CountdownProblem((4, 6, 9), 19)
    assert task.verify("<answer>4 + 6 + 9</answer>", problem).ok
    wrong = ["4 + 6", "<answer>4 +</answer>", "<answer>10 + 9</answer>", "<answer>4 * 6 + 9</answer>"]
    assert tuple(task.verify(text, problem).reason for text in wrong) == task.reasons


def test_a_task_of_ones_own_that_lacks_a_method_is_told_which():
    task = Task()
    for call in (lambda: task.problems("train", 1, 0), lambda: task.messages(None), lambda: task.verify("", None)):
        with pytest.raises(TypeError, match="task Task does not define (problems|messages|verify)"):
            call()


@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_a_local_folder_of_the_data_set_is_read(write, kind):
    source = write(ROWS, kind)
    available = [p for p in (CountdownProblem(nums, target) for nums, target in ROWS) if split_of(p) == "train"]
    read = CountdownTask(source=source).problems("train", len(available), 0)
    assert sorted(p.id for p in read) == sorted(p.id for p in available)
    assert all(isinstance(p.nums, tuple) for p in read)


def test_a_single_file_is_read_and_a_permuted_row_counts_once(write):
    source = write([((6, 9, 4), 19), ((4, 6, 9), 19), ((9, 4, 6), 19)]) + "/train.parquet"
    split = split_of(CountdownProblem((4, 6, 9), 19))
    assert [p.id for p in CountdownTask(source=source).problems(split, 1, 0)] == ["4-6-9=19"]
    with pytest.raises(R3Error, match=f"has 1 {split} problems, 2 were asked for"):
        CountdownTask(source=source).problems(split, 2, 0)


@pytest.mark.parametrize("row", [(("6", "9", "4"), 19), ((6, 9, 4), None), ((6, 9, 4.5), 19)])
def test_a_row_that_is_no_problem_is_named(write, row):
    source = write([row])
    with pytest.raises(R3Error, match="row 0: nums=.* target=.*: give whole numbers"):
        CountdownTask(source=source).problems("train", 1, 0)


def test_a_row_of_more_numbers_than_can_be_solved_is_named(write):
    source = write([((1, 2, 3, 4, 5, 6, 7, 8), 19)])
    with pytest.raises(R3Error, match="row 0: 8 numbers: give 1 to 6"):
        CountdownTask(source=source).problems("train", 1, 0)


def test_a_data_set_with_a_wrong_column_is_told_what_is_needed(write):
    source = write(ROWS, columns=("numbers", "target"))
    with pytest.raises(R3Error, match="has columns .*numbers.* Countdown needs `nums`"):
        CountdownTask(source=source).problems("train", 1, 0)


@pytest.fixture
def hub(monkeypatch):
    """A data set of 600 rows in place of the hub's: all of (a, b, c) with a + b - c, a third with 5,000 too much."""
    rows = [((a, b, c), a + b - c) for a in range(20, 30) for b in range(1, 7) for c in range(7, 17)]
    rows = [{"nums": list(nums), "target": target + 5000 * (i % 3 == 0)} for i, (nums, target) in enumerate(rows)]
    named = {HUB_DATASET: datasets.Dataset.from_list(rows)}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: named[name])
    return CountdownTask(source="hub")


def test_problems_of_the_hub_are_solvable_distinct_a_function_of_the_seed_and_in_one_split(hub):
    found = {split: hub.problems(split, n, 0) for split, n in {"train": 200, "validation": 8, "test": 30}.items()}
    for split, problems in found.items():
        assert problems == hub.problems(split, len(problems), 0) != hub.problems(split, len(problems), 1)
        assert problems[:5] == hub.problems(split, 5, 0)
        assert all(p.target in reachable(tuple(sorted(p.nums))) and p.target < 5000 for p in problems)
    ids = [p.id for problems in found.values() for p in problems]
    assert len(set(ids)) == len(ids) == 238


def test_of_the_hub_only_rows_that_are_drawn_are_solved(hub, monkeypatch):
    solved = []
    monkeypatch.setattr(countdown, "reachable", lambda nums: solved.append(nums) or reachable(nums))
    taken = hub.problems("test", 10, 0)
    assert 10 <= len(solved) < 30 and {tuple(sorted(p.nums)) for p in taken} <= set(solved)


def test_an_unsolvable_row_is_skipped_and_named_in_one_logged_line(write, caplog):
    source = write([*ROWS[:3], ((1, 1, 1), 50), *ROWS[3:]], kind="json")
    available = [CountdownProblem(nums, target) for nums, target in ROWS]
    available = {p.id for p in available if split_of(p) in ("train", "pretrain")}
    with pytest.raises(R3Error, match=f"has {len(available)} train problems, 9 were asked for"):
        CountdownTask(source=source).problems("train", 9, 0)
    [line] = [r.getMessage() for r in caplog.records if r.name == countdown.__name__]
    assert "skipped 1 rows with no solvable problem, e.g. CountdownProblem(nums=(1, 1, 1), target=50)" in line


def test_a_missing_path_is_one_line(tmp_path, cache):
    with pytest.raises(R3Error, match="cannot read Countdown problems from .*missing.*check the path") as error:
        CountdownTask(source=str(tmp_path / "missing")).problems("train", 1, 0)
    assert "\n" not in str(error.value)


def test_an_unreachable_hub_says_what_to_use_instead(monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(R3Error, match=r"from 'hub' \(ConnectionError\): .*source=\"generator\""):
        CountdownTask(source="hub").problems("train", 1, 0)
