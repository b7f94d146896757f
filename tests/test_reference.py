"""The reference run that the repository keeps: whole, and what README says of it is what its tables say."""

import json
import re
import runpy
from pathlib import Path

import pandas as pd
import pytest

from r3lib.conditions import CONDITIONS
from r3lib.config import load_profile
from r3lib.episodes import read_episodes
from r3lib.evaluate import accuracy_table, by_part, comparisons_table
from r3lib.files import sha256
from r3lib.report import percent
from r3lib.stats import wilson
from r3lib.tasks import load_task

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "results" / "reference"
QWEN = ROOT / "results" / "reference-qwen"
CONSTANT = {"constant/2e-4-0": 32, "constant/2e-4-1": 56, "constant/1e-4-0": 36}  # failures a step
TASKS = ("countdown", "function_calling")
CONDITIONS_BY_NAME = [condition.name for condition in CONDITIONS]


@pytest.fixture(scope="module")
def accuracy():
    table = pd.read_csv(REFERENCE / "tables" / "accuracy.csv")
    return table[table.seed == "all"].set_index(["split", "task", "policy", "condition"]).sort_index()


@pytest.fixture(scope="module")
def episodes():
    return read_episodes(REFERENCE / "episodes")


@pytest.mark.parametrize("run, figure", [("reference", "countdown"), ("reference-qwen", "arithmetic")])
def test_its_files_are_those_of_its_manifest(run, figure):
    folder = ROOT / "results" / run
    artefacts = json.loads((folder / "manifest.json").read_text())["artefacts"]
    assert {"tables/accuracy.csv", f"figures/{figure}_conditions.svg"} <= artefacts.keys()
    assert {name: sha256(folder / name) for name in artefacts} == {n: a["sha256"] for n, a in artefacts.items()}


def test_no_step_of_it_was_clipped_as_its_profile_says():
    metrics = pd.read_json(REFERENCE / "metrics.jsonl", lines=True)
    assert metrics.grad_norm.max() < load_profile("nano").training["max_grad_norm"]


def test_its_tables_follow_from_its_episodes(episodes, accuracy):
    parts = [by_part(rows, load_task(task).part) for task, rows in episodes.groupby("task")]
    again = pd.concat([accuracy_table(episodes), accuracy_table(pd.concat(parts))])
    again = again[again.seed == "all"].set_index(accuracy.index.names).loc[accuracy.index]
    columns = ["n", "k", "rate", "lo", "hi"]
    pd.testing.assert_frame_equal(again[columns], accuracy[columns], check_dtype=False)
    kept = pd.read_csv(REFERENCE / "tables" / "comparisons.csv")
    pd.testing.assert_frame_equal(comparisons_table(episodes), kept, check_dtype=False)


def test_it_answers_with_three_seeds_on_2000_problems_of_each_task(episodes):
    first = episodes[episodes.condition == "first_try"]
    counts = first.groupby(["task", "policy", "seed"]).problem_id.nunique()
    assert (counts == 2000).all() and counts.groupby(["task", "policy"]).size().to_dict() == {
        (task, policy): 1 if policy == "vanilla" else 3
        for task, other in (TASKS, TASKS[::-1])
        for policy in ("vanilla", "r3", f"r3_from_{other}")
    }


@pytest.mark.parametrize("task", TASKS)
def test_the_page_of_results_gives_its_rates(accuracy, task):
    page, cells = (ROOT / "docs" / "results.md").read_text(), accuracy.loc["test", task]
    for condition in CONDITIONS:
        both = [cells.loc[(policy, condition.name)] for policy in ("vanilla", "r3")]
        row = " | ".join([f"`{condition}`", *(percent(c.rate, c.lo, c.hi) for c in both)])
        assert f"| {row} |" in page
    for policy in ("vanilla", "r3"):
        assert f"{cells.loc[(policy, 'reflect_retry')].n:,}" in page


def test_readme_gives_its_rates(accuracy):
    readme = (ROOT / "README.md").read_text()
    for condition in CONDITIONS:
        cells = [accuracy.loc[("test", task, policy, condition.name)] for task in TASKS for policy in ("vanilla", "r3")]
        row = " | ".join([f"`{condition}`", *(percent(c.rate, c.lo, c.hi) for c in cells)])
        assert f"| {row} |" in readme


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("b", ["vanilla/reflect_retry", "r3/resample", "r3/retry_sampled"])
def test_readme_gives_its_main_differences(task, b):
    table = pd.read_csv(REFERENCE / "tables" / "comparisons.csv").set_index(["task", "a", "b"])
    row = table.loc[(task, "r3/reflect_retry", b)]
    written = f"{100 * row['diff']:+.1f} [{100 * row.lo:+.1f}, {100 * row.hi:+.1f}]"
    for page in ("README.md", "docs/results.md"):
        assert written in (ROOT / page).read_text()


@pytest.mark.parametrize("part", ["combinations", "phrasings", "tools"])
def test_the_page_of_results_gives_the_rates_of_each_part(accuracy, part):
    cells = accuracy.loc[f"test/{part}", "function_calling"]
    both = [cells.loc[(policy, "reflect_retry")] for policy in ("vanilla", "r3")]
    row = " | ".join(percent(c.rate, c.lo, c.hi) for c in both)
    assert f"| {row} |" in (ROOT / "docs" / "results.md").read_text()


def test_the_page_gives_the_share_of_right_arithmetic_before_and_after():
    page = (ROOT / "docs" / "results.md").read_text()
    for task in TASKS:
        table = pd.read_csv(REFERENCE / "tables" / f"{task}_arithmetic.csv").set_index(["policy", "seed"])
        before, after = (100 * table.loc[(policy, "all"), "share"] for policy in ("vanilla", "r3"))
        assert f"from {before:.1f}% to {after:.1f}%" in page


def test_the_page_gives_the_reflections_of_countdown_that_are_cut_off(episodes):
    page = (ROOT / "docs" / "results.md").read_text()
    rows = episodes[(episodes.condition == "reflect_retry") & (episodes.policy == "r3")]
    limit = load_profile("nano").sampling["max_completion_length"]
    cut = (rows.reflection_tokens >= limit).map({True: "ok", False: "short"})
    shares = accuracy_table(rows.assign(retry_reason=cut))
    shares = shares.set_index(["task", shares.seed.astype(str)])
    said = percent(*shares.loc[("countdown", "all"), ["rate", "lo", "hi"]])
    first, second, third = (f"{100 * shares.loc[('countdown', str(seed)), 'rate']:.1f}" for seed in range(3))
    assert f"{said} of Countdown ({first}, {second} and {third}%" in page
    assert shares.loc[("function_calling", "all"), "k"] == 0
    saved = (rows.retry_reason == "ok")[rows.task == "countdown"].groupby(cut).mean().mul(100).round(1)
    said = f"of second tries after such a reflection {saved['ok']}% succeed, after the others {saved['short']}%"
    assert said in page


@pytest.mark.parametrize("run", ["qwen-attempts/1", "qwen-attempts/3"])
def test_the_page_of_results_gives_the_rates_of_the_attempts_that_failed(run):
    run, page = ROOT / "results" / run, (ROOT / "docs" / "results.md").read_text()
    again = accuracy_table(read_episodes(run / "episodes"))
    kept = pd.read_csv(run / "tables" / "accuracy.csv", dtype={"seed": str}, keep_default_na=False)
    kept = kept[kept.split == "test"].reset_index(drop=True)
    columns = ["policy", "condition", "n", "k", "rate", "lo", "hi"]
    pd.testing.assert_frame_equal(again[columns], kept[columns], check_dtype=False)
    cells = kept[kept.seed == "all"].set_index(["condition", "policy"])
    for condition in sorted({name for name, _ in cells.index} - {"first_try"}):
        both = [cells.loc[(condition, policy)] for policy in ("vanilla", "r3")]
        assert " | ".join([f"| `{condition}`", *(percent(c.rate, c.lo, c.hi) for c in both)]) in page


def test_readme_gives_the_rates_of_the_run_on_real_weights():
    table = pd.read_csv(QWEN / "tables" / "accuracy.csv", dtype={"seed": str})
    cells = table[(table.seed == "all") & (table.split == "test")].set_index(["condition", "policy"])
    for condition in CONDITIONS_BY_NAME:
        both = [cells.loc[(condition, policy)] for policy in ("vanilla", "r3")]
        row = " | ".join([f"| `{condition}`", *(percent(c.rate, c.lo, c.hi) for c in both)])
        assert f"{row} |\n" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("folder, groups", [("", 42), *CONSTANT.items()])
def test_the_trainings_on_real_weights_agree(folder, groups):
    run, page = QWEN / folder, (ROOT / "docs" / "results.md").read_text()
    paths = sorted((run if folder else run / "episodes").glob("arithmetic-r3-*.parquet"))
    trained = pd.concat(map(pd.read_parquet, paths))
    untrained = pd.read_parquet(QWEN / "episodes" / "arithmetic-vanilla-0.parquet")
    both = pd.concat([untrained[untrained.problem_id.isin(trained.problem_id)], trained])
    rates, differences = accuracy_table(both), comparisons_table(both)
    tables = run if folder else run / "tables"
    for name, again in ("accuracy", rates), ("comparisons", differences):
        kept = pd.read_csv(tables / f"{name}.csv", dtype={"seed": str, "seeds": str}, keep_default_na=False)
        kept = kept[kept.split == "test"].reset_index(drop=True) if "split" in kept else kept
        columns = [column for column in ("policy", "condition", "a", "b", "n", "lo", "hi") if column in kept]
        pd.testing.assert_frame_equal(again[columns], kept[columns], check_dtype=False)
    cells = rates.set_index(["condition", "policy", "seed"])
    columns = [("r3", "all")] if folder else [("vanilla", "all"), ("r3", "all"), ("r3", 0), ("r3", 1)]
    for condition in CONDITIONS_BY_NAME:
        row = " | ".join(percent(*cells.loc[(condition, *column), ["rate", "lo", "hi"]]) for column in columns)
        assert re.search(rf"^\| `{condition}` .*\| {re.escape(row)} \|", page, re.MULTILINE)
    differences = differences.set_index(["a", "b"])
    for b in ("vanilla/reflect_retry", "r3/resample", "r3/retry_sampled"):
        row = differences.loc[("r3/reflect_retry", b)]
        assert row.lo > 0.1 and (folder or row.n >= 300)
        assert f"{100 * row['diff']:+.1f} [{100 * row.lo:+.1f}, {100 * row.hi:+.1f}]" in page
    metrics = pd.read_json(run / "metrics.jsonl", lines=True)
    for _, steps in metrics.groupby("seed"):
        live = (groups * (1 - steps.zero_variance_share)).round()
        assert f"{live.sum():.0f} of {groups * len(steps)} groups" in page


TRAININGS = ["episodes/arithmetic-r3-0", "episodes/arithmetic-r3-1", "constant/2e-4-0/arithmetic-r3-0"]
TRAININGS += ["constant/2e-4-1/arithmetic-r3-1", "constant/1e-4-0/arithmetic-r3-0"]


@pytest.mark.parametrize("path", TRAININGS)
def test_the_page_gives_second_tries_by_the_form_of_the_first(path):
    rows = pd.read_parquet(QWEN / f"{path}.parquet")
    rows = rows[rows.condition == "reflect_retry"]
    for alone in (True, False):
        right = rows.retry_reason[(rows.attempt_reason == "wrong_number") == alone] == "ok"
        rate = percent(right.mean(), *wilson(right.sum(), len(right)))
        assert f" {right.sum()} of {len(right)}, {rate} |" in (ROOT / "docs" / "results.md").read_text()


def by_last_number(rows: pd.DataFrame) -> pd.DataFrame:
    """The episodes judged by the rule of benchmarks/room.py; second tries on the failures by that rule."""
    task = runpy.run_path(str(ROOT / "benchmarks" / "room.py"))["Roomy"]()
    problems = {problem.id: problem for problem in task.problems("test", 480, 0)}
    rows = rows.copy()
    for text, reason in ("attempt", "attempt_reason"), ("retry", "retry_reason"):
        told = rows[text].notna()
        pairs = zip(rows[text][told], rows.problem_id[told])
        rows.loc[told, reason] = [task.verify(answer, problems[name]).reason for answer, name in pairs]
    return rows[(rows.condition == "first_try") | (rows.attempt_reason != "ok")]


def test_the_page_gives_the_rates_if_the_last_number_counts():
    names = ["episodes/arithmetic-vanilla-0", *TRAININGS]
    page = (ROOT / "docs" / "results.md").read_text()
    judged = [by_last_number(pd.read_parquet(QWEN / f"{name}.parquet")) for name in names]
    tables = [accuracy_table(rows).query("seed == 'all'").set_index("condition") for rows in judged]
    for name in CONDITIONS_BY_NAME:
        row = [percent(*table.loc[name, ["rate", "lo", "hi"]]) for table in tables]
        assert " | ".join([f"| `{name}`", *row]) + " |\n" in page
    header = next(line for line in page.splitlines() if line.startswith("| the last number counts |"))
    counts = [int(table.loc["reflect_retry", "n"]) for table in tables]
    assert [int(n) for n in re.findall(r"\((\d+) failures\)", header)] == counts
    for b in ("retry", "retry_sampled", "generic_reflection"):
        rows = [comparisons_table(rows).set_index("b").filter(regex=f"/{b}$", axis=0).iloc[0] for rows in judged]
        row = [f"{100 * r['diff']:+.1f} [{100 * r.lo:+.1f}, {100 * r.hi:+.1f}]" for r in rows]
        assert " | ".join([f"| `reflect_retry` minus `{b}`", *row]) + " |\n" in page


def test_the_pages_give_the_rates_with_room_in_every_answer():
    paths = ("untrained-room.parquet", "constant/2e-4-0/room.parquet")
    table = accuracy_table(pd.concat(pd.read_parquet(QWEN / path) for path in paths))
    cells = table[table.seed == "all"].set_index(["condition", "policy"])
    for policy, title in ("vanilla", "untrained"), ("r3", "R3"):
        rates = [percent(*cells.loc[(name, policy), ["rate", "lo", "hi"]]) for name in CONDITIONS_BY_NAME]
        assert " | ".join([f"| {title}", *rates]) + " |\n" in (ROOT / "docs" / "results.md").read_text()


def test_the_pages_give_the_rate_of_the_untrained_model_that_may_work_it_out():
    rows = pd.read_parquet(QWEN / "untrained-steps.parquet")
    right = (rows.attempt_reason == "ok").sum()
    rate = percent(right / len(rows), *wilson(right, len(rows)))
    assert f"{right} of the {len(rows)} problems right" in (ROOT / "docs" / "results.md").read_text()
    assert all(rate in (ROOT / page).read_text() for page in ("README.md", "docs/results.md"))


BASELINES = [f"countdown-{size}-{prompt}" for size in ("0.5b", "1.5b") for prompt in ("zero-shot", "example")]
BASELINES.append("arithmetic-0.5b-steps")
BFCL = ["bfcl-0.5b", "bfcl-1.5b"]


@pytest.mark.parametrize("runs", [BASELINES, BFCL], ids=["words", "calls"])
def test_the_page_gives_the_rates_of_untrained_models(runs):
    folder, page = ROOT / "results" / "baselines", (ROOT / "docs" / "results.md").read_text()
    kept = pd.read_csv(folder / "accuracy.csv").set_index(["run", "condition"])
    tables = {}
    for run in runs:
        table = accuracy_table(pd.read_parquet(folder / f"{run}.parquet"))
        tables[run] = table[table.seed == "all"].set_index("condition")
        columns = ["n", "k", "rate", "lo", "hi"]
        pd.testing.assert_frame_equal(tables[run][columns], kept.loc[run, columns], check_dtype=False)
    for name in CONDITIONS_BY_NAME:
        cells = [percent(*tables[run].loc[name, ["rate", "lo", "hi"]]) for run in runs]
        assert " | ".join([f"| `{name}`", *cells]) + " |\n" in page
    failures = [str(int(tables[run].loc["reflect_retry", "n"])) for run in runs]
    assert f"| failures | {' | '.join(failures)} |\n" in page


@pytest.mark.parametrize("b", ["resample", "retry_sampled"])
@pytest.mark.parametrize("run", BASELINES + BFCL)
def test_the_page_gives_what_a_reflection_is_worth_to_untrained_models(run, b):
    table = comparisons_table(pd.read_parquet(ROOT / "results" / "baselines" / f"{run}.parquet"))
    row = table.set_index("b").loc[f"vanilla/{b}"]
    written = f"{100 * row['diff']:+.1f} [{100 * row.lo:+.1f}, {100 * row.hi:+.1f}]"
    assert written in (ROOT / "docs" / "results.md").read_text()
