"""The whole path, for real: `r3 reproduce --profile smoke` runs every notebook, keeps its promises, repeats itself."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest

from r3lib.conditions import CONDITIONS
from r3lib.config import load_profile
from r3lib.episodes import Episode
from r3lib.evaluate import ACCURACY, COMPARISONS
from r3lib.files import sha256

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
TASKS = ("countdown", "function_calling")
METRICS = {
    "task", "step", "seed", "reward", "zero_variance_share", "reflection_tokens", "kl", "entropy", "grad_norm",
    "tokens", "seconds_sampling", "seconds_learning", "retry_success", "truncated_share",
    "peak_memory_gib",
}  # fmt: skip


def command(results, *arguments):
    return [sys.executable, "-m", "r3lib", "reproduce", "--profile", "smoke", "--results", str(results), *arguments]


def reproduce(results, *arguments):
    """Run the command to its end; return the folder of its results."""
    done = subprocess.run(command(results, *arguments), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return results / "smoke"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return reproduce(tmp_path_factory.mktemp("first"))


def printed(folder):
    """What the cells of every executed notebook printed."""
    notebooks = [json.loads(path.read_text()) for path in sorted((folder / "executed").glob("*.ipynb"))]
    outputs = [out for nb in notebooks for cell in nb["cells"] for out in cell.get("outputs", [])]
    return "".join("".join(out["text"]) for out in outputs if out["output_type"] == "stream")


def tables(folder):
    return {path.name: path.read_text() for path in (folder / "tables").glob("*.csv")}


def of_countdown(folder):
    """What a run with `--task countdown` makes of each table: no other task, no policy from one, no Holm over all."""
    made = {}
    for path in (folder / "tables").glob("*.csv"):
        frame = pd.read_csv(path, dtype=str)
        mine = frame.task.eq("countdown") if "task" in frame else frame.index >= 0
        other = frame.apply(lambda column: column.str.contains("_from_", na=False)).any(axis=1)
        made[path.name] = frame[mine & ~other].drop(columns="p_holm", errors="ignore").to_csv(index=False)
    return made


def test_tables_and_metrics_have_the_columns_that_others_rely_on(smoke):
    accuracy = pd.read_csv(smoke / "tables" / "accuracy.csv")
    assert list(accuracy) == ACCURACY
    for task in TASKS:
        whole = accuracy[(accuracy.task == task) & (accuracy.split == "test") & (accuracy.seed == "all")]
        assert set(whole.condition) == {c.name for c in CONDITIONS}
        trained_on = dict(whole.fillna("").groupby("policy").train_task.first())
        (other,) = set(TASKS) - {task}
        assert trained_on == {"vanilla": "", "r3": task, f"r3_from_{other}": other}
        first = whole[whole.condition == "first_try"].set_index("policy")
        for row in whole[whole.condition != "first_try"].itertuples():
            assert row.n == first.n[row.policy] - first.k[row.policy] and row.lo <= row.rate == row.k / row.n <= row.hi
    assert list(pd.read_csv(smoke / "tables" / "comparisons.csv")) == [*COMPARISONS, "p_holm"]
    metrics = pd.read_json(smoke / "metrics.jsonl", lines=True)
    assert set(metrics) == METRICS and list(zip(metrics.task, metrics.step)) == [(t, i) for t in TASKS for i in (1, 2)]


def test_episodes_agree_with_the_accuracy_table(smoke):
    episodes = pd.concat(map(pd.read_parquet, (smoke / "episodes").glob("*.parquet")))
    assert list(episodes) == [field.name for field in fields(Episode)]
    accuracy = pd.read_csv(smoke / "tables" / "accuracy.csv")
    for row in accuracy[(accuracy.seed == "all") & (accuracy.split == "test")].itertuples():
        same = (episodes.task == row.task) & (episodes.policy == row.policy)
        cell = episodes[same & (episodes.condition == row.condition)]
        reason = cell.attempt_reason if row.condition == "first_try" else cell.retry_reason
        assert (row.n, row.k) == (len(cell), (reason == "ok").sum())
    assert (episodes[episodes.condition != "first_try"].attempt_reason != "ok").all()


def test_every_figure_and_table_is_in_the_manifest_with_its_own_hash(smoke):
    artefacts = json.loads((smoke / "manifest.json").read_text())["artefacts"]
    made = [*(smoke / "tables").glob("*.csv"), *(smoke / "figures").iterdir()]
    assert len(made) > 20 and "layout not applied" not in printed(smoke)
    for path in made:
        entry = artefacts[path.relative_to(smoke).as_posix()]
        assert entry["sha256"] == sha256(path) and entry["notebook"] and entry["cell"]
    assert {path.suffix for path in (smoke / "figures").iterdir()} == {".png", ".svg", ".csv"}
    assert len({path.stem for path in (smoke / "figures").iterdir()}) * 3 == len([*(smoke / "figures").iterdir()])


def test_the_report_needs_no_other_file(smoke):
    page = (smoke / "report.html").read_text()
    assert "this run (smoke)" in page and "34.9%" in page  # our row beside the paper's
    assert page.count("data:image/png;base64,") == len([*(smoke / "figures").glob("*.png")])
    assert 'src="http' not in page and 'href="http' not in page.replace("https://arxiv.org", "")


def test_a_second_run_takes_everything_from_the_cache_and_changes_nothing(smoke):
    before, stages = tables(smoke), {p: p.stat().st_mtime_ns for p in smoke.rglob("*.stage.json")}
    reproduce(smoke.parent, "--from", "02")
    assert "cached  countdown-r3-0" in printed(smoke) and "running " not in printed(smoke)
    assert tables(smoke) == before and len(stages) == 5 * len(TASKS)  # a baseline, failures, adapter, two evaluations
    assert {p: p.stat().st_mtime_ns for p in smoke.rglob("*.stage.json")} == stages


def test_a_fresh_run_computes_again_what_is_cached_to_the_same_tables(smoke, tmp_path):
    shutil.copytree(smoke, tmp_path / "smoke")
    folder = reproduce(tmp_path, "--fresh", "--only", "03", "--task", "countdown")
    assert "countdown.parquet: fresh run" in printed(folder) and "countdown-r3-0: fresh run" in printed(folder)
    assert of_countdown(folder) == of_countdown(smoke)


def test_a_killed_run_goes_on_where_it_stopped_to_the_tables_of_another_run(smoke, tmp_path):
    """Killed with all its kernels, as soon as the first checkpoint of the training is there."""
    begun = command(tmp_path, "--from", "03", "--task", "countdown")
    run = subprocess.Popen(begun, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.time() + 240
    while not [*tmp_path.glob("smoke/adapters/.work-*/checkpoint-1/trainer_state.json")]:
        assert run.poll() is None and time.time() < deadline
        time.sleep(0.05)
    for pid in kernels_below(run.pid) + [run.pid]:
        os.kill(pid, signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "smoke" / "report.html").exists()
    folder = reproduce(tmp_path, "--from", "03", "--task", "countdown")
    assert "cached  countdown.parquet" in printed(folder)
    made, whole = of_countdown(folder), of_countdown(smoke)
    assert {"accuracy.csv", "training.csv"} <= made.keys() and made == {name: whole[name] for name in made}
    assert load_profile("smoke").training["max_steps"] == len((folder / "metrics.jsonl").read_text().splitlines())


def kernels_below(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
