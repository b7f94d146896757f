"""The stage cache: what is kept, why anything runs again, and what a kill or a full disk leaves behind."""

import errno
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from r3lib import artifacts, files
from r3lib.artifacts import Recorder
from r3lib.errors import R3Error

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_fresh_run(monkeypatch):
    monkeypatch.setenv("R3_FRESH", "")


class Bench:
    """A stage that writes its number of builds, and the lines that it said."""

    def __init__(self, folder):
        self.target, self.source = folder / "out" / "table.csv", folder / "source.txt"
        self.source.write_text("one")
        self.builds, self.said = 0, []

    def run(self, config=None):
        return artifacts.stage(self.target, config or {"n": 1}, [self.source], self.build, self.said.append)

    def build(self, work):
        self.builds += 1
        (work / self.target.name).write_text(f"build {self.builds}\n")


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_second_run_is_cached_and_leaves_the_file_alone(bench):
    assert bench.run().read_text() == "build 1\n"
    assert bench.run().read_text() == "build 1\n"
    assert bench.said == ["running table.csv: not there yet", "cached  table.csv"]
    assert sorted(p.name for p in bench.target.parent.iterdir()) == ["table.csv", "table.csv.stage.json"]


def test_changed_config_says_which_key_changed_and_how(bench):
    bench.run({"steps": 40, "task": {"count": 3}})
    bench.run({"steps": 20, "task": {"count": 3}})
    assert bench.said[-1] == "running table.csv: config changed: steps 40 -> 20" and bench.builds == 2


def test_changed_input_is_named(bench):
    bench.run()
    bench.source.write_text("two")
    bench.run()
    assert bench.said[-1] == "running table.csv: input changed: ../source.txt"


@pytest.mark.parametrize("damage", [lambda p: p.write_text("bui"), lambda p: p.unlink()])
def test_truncated_or_missing_file_is_computed_again_and_named(bench, damage):
    bench.run()
    damage(bench.target)
    assert bench.run().read_text() == "build 2\n"
    assert bench.said[-1] == "running table.csv: file missing or damaged: table.csv"


def test_truncated_marker_is_computed_again(bench):
    bench.run()
    marker = bench.target.with_name("table.csv.stage.json")
    for text in (marker.read_text()[:50], "{}", "null"):
        marker.write_text(text)
        bench.run()
        assert bench.said[-1] == "running table.csv: file missing or damaged: table.csv.stage.json"


def test_folder_is_replaced_as_a_whole_and_checked_file_by_file(tmp_path):
    said = []

    def run(name):
        def build(work):
            (work / "adapter").mkdir(exist_ok=True)
            (work / "adapter" / name).write_text(name)

        return artifacts.stage(tmp_path / "adapter", {"name": name}, [], build, log=said.append)

    run("old")
    assert [p.name for p in run("new").iterdir()] == ["new"]
    (tmp_path / "adapter" / "new").write_text("changed by hand")
    run("new")
    assert said[-1] == "running adapter: file missing or damaged: new"


def test_missing_input_is_named_before_anything_is_built(bench):
    bench.source.unlink()
    with pytest.raises(R3Error, match=r"source.txt is missing: run the step"):
        bench.run()
    assert bench.builds == 0


def test_stage_that_makes_nothing_keeps_the_old_result(bench):
    bench.run()
    with pytest.raises(R3Error, match="table.csv is missing"):
        artifacts.stage(bench.target, {"n": 2}, [bench.source], lambda work: None, log=bench.said.append)
    assert bench.target.read_text() == "build 1\n"
    bench.run()
    assert bench.said[-1] == "cached  table.csv"


def test_fresh_run_computes_once_and_then_counts_as_cached(bench, monkeypatch):
    bench.run()
    monkeypatch.setenv("R3_FRESH", "run 1")
    bench.run(), bench.run()
    assert bench.builds == 2 and bench.said[1:] == ["running table.csv: fresh run", "cached  table.csv"]
    monkeypatch.setenv("R3_FRESH", "run 2")
    bench.run()
    assert bench.builds == 3
    monkeypatch.delenv("R3_FRESH")
    bench.run()
    assert bench.builds == 3


def test_fresh_run_does_not_take_over_shards_of_a_killed_one(tmp_path, monkeypatch):
    seen = []

    def build(work):
        seen.append(len(list(work.glob("[!.]*"))))
        (work / "shard").write_text("old")
        if len(seen) == 1:
            raise KeyboardInterrupt
        (work / "t").write_text("done")

    with pytest.raises(KeyboardInterrupt):
        artifacts.stage(tmp_path / "t", {}, [], build)
    monkeypatch.setenv("R3_FRESH", "run 3")
    artifacts.stage(tmp_path / "t", {}, [], build)
    assert seen == [0, 0]


SHARDS = """
import os, signal, sys
from pathlib import Path
from r3lib.artifacts import stage

def build(work):
    for name in "abc":
        if not (work / name).exists():
            print("shard", name, flush=True)
            (work / name).write_text(name)
        if name == sys.argv[2]:
            os.kill(os.getpid(), signal.SIGKILL)
    (work / "t").write_text("".join((work / n).read_text() for n in "abc"))

stage(Path(sys.argv[1]) / "t", {}, [], build)
"""


def test_killed_build_goes_on_from_its_own_shards(tmp_path):
    def run(kill_after):
        command = [sys.executable, "-c", SHARDS, str(tmp_path), kill_after]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    killed = run("b")
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "t").exists()
    assert run("never").stdout.split("\n")[1:-1] == ["shard c"]
    assert (tmp_path / "t").read_text() == "abc" and "cached" in run("never").stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t", "t.stage.json"]


def test_kill_between_the_result_and_its_marker_claims_nothing(bench, monkeypatch):
    bench.run()
    monkeypatch.setattr(artifacts, "write_atomic", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        bench.run({"n": 2})
    monkeypatch.undo()
    os.environ["R3_FRESH"] = ""
    assert bench.run({"n": 2}).read_text() == "build 3\n"
    assert bench.said[-1] == "running table.csv: not there yet"


def test_after_a_full_disk_the_next_run_resumes(tmp_path):
    def full(work):
        (work / "shard").write_text("1")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        artifacts.stage(tmp_path / "t", {}, [], full)
    artifacts.stage(tmp_path / "t", {}, [], lambda work: (work / "shard").rename(work / "t"))
    assert (tmp_path / "t").read_text() == "1"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_one_line_with_the_fix(tmp_path, monkeypatch, code):
    def denied(self, *_, **__):
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(R3Error, match=f"cannot write {tmp_path / 'new'} "), files.claimed(tmp_path / "new"):
        pass


HOLD = """
import sys, time
from pathlib import Path
from r3lib.files import claimed
with claimed(Path(sys.argv[1]), sys.argv[2] == "shared"):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def held(folder, how="alone"):
    """Another process that holds `folder`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), how], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_second_run_is_told_which_process_holds_the_folder_and_a_dead_one_holds_nothing(tmp_path):
    folder = tmp_path / "results" / "nano"
    with held(folder) as first:
        for shared in (False, True):
            with pytest.raises(R3Error) as error, files.claimed(folder, shared):
                pass
            words = str(error.value)
            assert str(folder) in words and f"process {first.pid} " in words and "--set name=" in words
        with files.claimed(tmp_path / "results" / "other"):
            pass
        first.kill()
        first.wait()
        with files.claimed(folder):
            assert (folder / files.LOCK).read_text() == str(os.getpid())


def test_processes_of_one_run_share_a_folder_and_keep_others_out(tmp_path):
    with held(tmp_path, "shared"), files.claimed(tmp_path, shared=True):
        with pytest.raises(R3Error, match="is running in"), files.claimed(tmp_path):
            pass
    with files.claimed(tmp_path):
        pass


def test_what_another_run_is_making_is_neither_made_twice_nor_removed(tmp_path):
    target, log = tmp_path / "episodes.parquet", []
    work = artifacts.work_folder(target, {"seed": 0}, [])
    work.mkdir()
    (work / "shard").touch()
    with held(work):
        for seed in (0, 1):  # the same settings, and others
            with pytest.raises(R3Error, match="is running in"):
                artifacts.stage(target, {"seed": seed}, [], lambda work: (work / target.name).touch(), log.append)
    assert (work / "shard").exists() and not target.exists() and log == []
    artifacts.stage(target, {"seed": 1}, [], lambda work: (work / target.name).touch(), log.append)
    assert target.exists() and not work.exists()
    assert log == [f"running {target.name}: not there yet (unfinished work of other settings goes once this is made)"]


def test_unfinished_work_outlives_a_build_of_other_settings_that_fails(tmp_path):
    target = tmp_path / "t"

    def killed(work):
        (work / "shard").touch()
        raise KeyboardInterrupt

    def fails(work):
        raise R3Error("target_modules=nope")

    for config, build, error in (({"steps": 8}, killed, KeyboardInterrupt), ({"steps": 4}, fails, R3Error)):
        with pytest.raises(error):
            artifacts.stage(target, config, [], build)
    assert (artifacts.work_folder(target, {"steps": 8}, []) / "shard").exists()


def test_a_model_card_decides_nothing(tmp_path):
    def build(work):
        (work / "a").mkdir()
        (work / "a" / "README.md").write_text("card")
        (work / "a" / "weights").write_text("1")

    log = []
    artifacts.stage(tmp_path / "a", {}, [], build)
    (tmp_path / "a" / "README.md").write_text("card and note")
    artifacts.stage(tmp_path / "a", {}, [], build, log.append)
    assert log == ["cached  a"]


@pytest.mark.parametrize("name", ["a.md", "a.pt", "part/a.json"])
def test_every_file_that_a_task_reads_counts_with_its_place(tmp_path, name):
    folder = tmp_path / "data"
    path = folder / name
    path.parent.mkdir(parents=True)
    path.write_text("3 + 10")
    hashes = [files.data_hash([folder])]
    path.write_text("3 + 77")
    hashes.append(files.data_hash([str(folder)]))
    (folder / "other").mkdir()
    path.rename(folder / "other" / path.name)
    hashes.append(files.data_hash([folder]))
    assert len(set(hashes)) == 3
    with pytest.raises(R3Error, match="absent, which the task's files.. names, is missing"):
        files.data_hash([tmp_path / "absent"])


def test_a_disk_without_locks_is_used_without_one(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    with files.claimed(tmp_path), files.claimed(tmp_path):
        pass


def test_an_error_inside_the_block_frees_the_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.claimed(tmp_path):
        raise KeyboardInterrupt
    with files.claimed(tmp_path):
        pass


def test_failed_write_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_atomic(path, "old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"


def test_figure_is_saved_three_ways_and_the_manifest_says_where_it_came_from(tmp_path):
    source = tmp_path / "episodes.parquet"
    source.write_bytes(b"rows")
    data = pd.DataFrame({"seed": ["0", "1", "all"], "rate": [0.1, 0.2, 0.15]})
    figure = Figure()
    figure.subplots().plot(data.rate)
    image = Recorder(tmp_path, "04_evaluation", [source]).figure(figure, data, "rates", "Rates")
    artefacts = json.loads((tmp_path / "manifest.json").read_text())["artefacts"]
    assert sorted(artefacts) == ["figures/rates.csv", "figures/rates.png", "figures/rates.svg"]
    entry, png = artefacts["figures/rates.png"], tmp_path / "figures" / "rates.png"
    assert image.data == png.read_bytes() and entry["sha256"] == files.sha256(png)
    assert entry["inputs"] == {"episodes.parquet": files.sha256(source)}
    assert entry["notebook"] == "04_evaluation" and entry["cell"] == "Rates" and entry["seconds"] > 0
    assert entry["seeds"] == ["0", "1", "all"] and entry["packages"]["pandas"] == pd.__version__
    assert entry["hardware"]["cpus"] == os.cpu_count() and {"commit", "dirty"} <= entry.keys()


def test_equal_data_give_equal_images(tmp_path):
    def digests(name):
        figure = Figure()
        figure.subplots().plot([1, 2])
        Recorder(tmp_path / name, "nb").figure(figure, pd.DataFrame({"x": [1, 2]}), "f", "cell")
        return [files.sha256(tmp_path / name / "figures" / f"f.{kind}") for kind in ("png", "svg", "csv")]

    assert digests("a") == digests("b")


def test_registering_again_updates_one_entry_and_keeps_the_others(tmp_path):
    keep = Recorder(tmp_path, "nb")
    keep.table(pd.DataFrame({"a": [1]}), "one", "first")
    keep.table(pd.DataFrame({"a": [1]}), "two", "first")
    shown = keep.table(pd.DataFrame({"a": [2]}), "one", "second")
    artefacts = json.loads((tmp_path / "manifest.json").read_text())["artefacts"]
    assert {name: e["cell"] for name, e in artefacts.items()} == {"tables/one.csv": "second", "tables/two.csv": "first"}
    assert artefacts["tables/one.csv"]["sha256"] == files.sha256(tmp_path / "tables" / "one.csv")
    assert shown.a.tolist() == [2]


def test_what_an_earlier_run_of_a_notebook_drew_is_no_longer_its_own(tmp_path):
    for notebook, name in (("nb", "old"), ("other", "kept"), ("nb", "new")):
        Recorder(tmp_path, notebook).table(pd.DataFrame({"a": [1]}), name, "cell")
    artefacts = json.loads((tmp_path / "manifest.json").read_text())["artefacts"]
    assert artefacts.keys() == {"tables/kept.csv", "tables/new.csv"}


def test_damaged_manifest_is_reported_not_overwritten(tmp_path):
    (tmp_path / "manifest.json").write_text('{"artefacts": {')
    with pytest.raises(R3Error, match="manifest.json is damaged: delete it"):
        Recorder(tmp_path, "nb").table(pd.DataFrame({"a": [1]}), "one", "cell")
