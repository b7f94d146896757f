"""The command `r3`: arguments reach the functions, errors are one line, help is quick."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from r3lib import cli, doctor, pipeline
from r3lib.errors import R3Error
from r3lib.files import claimed

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def asked(monkeypatch):
    """The arguments with which `reproduce` was called."""
    seen = {}
    names = ("profile", "task", "start", "only", "fresh", "overrides", "results")
    monkeypatch.setattr(pipeline, "reproduce", lambda *a, **k: seen.update(dict(zip(names, a, strict=True)) | k))
    return seen


def test_reproduce_has_the_default_profile_and_results(asked):
    assert cli.main(["reproduce"]) == 0
    assert asked == {
        "profile": "nano", "task": "all", "start": None, "only": None, "fresh": False, "overrides": {},
        "results": Path("results"), "verbose": False,
    }  # fmt: skip


def test_reproduce_passes_every_argument_on(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = "reproduce --profile smoke --task countdown --from 03 --fresh --set seeds=3 beta=0.1 --set model=a=b"
    assert cli.main([*line.split(), "--results", "here"]) == 0
    assert (asked["profile"], asked["task"], asked["start"], asked["fresh"]) == ("smoke", "countdown", "03", True)
    assert asked["overrides"] == {"seeds": "3", "beta": "0.1", "model": "a=b"}
    assert asked["results"] == str(tmp_path / "here")


def test_set_without_a_value_is_one_line_and_exit_2(asked, capsys):
    assert cli.main(["reproduce", "--set", "seeds"]) == 2
    assert capsys.readouterr().err == "r3: error: --set 'seeds': write KEY=VALUE, for example --set seeds=3\n"
    assert not asked


def test_stated_error_is_one_line_and_exit_2(monkeypatch, capsys):
    def refuse(*_, **__):
        raise R3Error("this is wrong: do that")

    monkeypatch.setattr(pipeline, "reproduce", refuse)
    assert cli.main(["reproduce"]) == 2
    assert capsys.readouterr().err == "r3: error: this is wrong: do that\n"


def test_interrupt_exits_130_and_says_that_a_rerun_resumes(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "reproduce", interrupt)
    assert cli.main(["reproduce"]) == 130
    assert "without --fresh, goes on from what is finished" in capsys.readouterr().err


def test_doctor_gives_its_exit_code(monkeypatch):
    monkeypatch.setattr(doctor, "report", lambda profile, *_: {"smoke": 1, "nano": 0}[profile])
    assert cli.main(["doctor"]) == 0 and cli.main(["doctor", "--profile", "smoke"]) == 1


def test_doctor_estimates_with_overrides_and_for_another_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(doctor, "report", lambda *given: asked.append(given) or 0)
    cli.main(["doctor", "--profile", "colab", "--task", "countdown", "--set", "seeds=2", "--gpu-memory", "15"])
    assert asked == [("colab", "countdown", {"seeds": "2"}, 15.0)]


def test_report_of_a_run_that_never_was_is_one_line(tmp_path, capsys):
    assert cli.main(["report", "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("r3: error: ") and "r3 reproduce --profile nano" in error and error.count("\n") == 1
    assert cli.main(["report", "--results", str(tmp_path), "--set", "name=variant"]) == 2
    assert str(Path(tmp_path.name, "variant")) in capsys.readouterr().err


def test_base_model_passes_seed_steps_and_folder(monkeypatch, tmp_path):
    calls, done = [], subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(subprocess, "run", lambda command: calls.append(command) or done)
    assert cli.main(["base-model", "--out", str(tmp_path), "--seed", "7", "--steps", "12"]) == 0
    assert cli.main(["base-model"]) == 0
    script = [sys.executable, str(ROOT / "data" / "base_model" / "pretrain.py")]
    given = ["--out", str(tmp_path), "--seed", "7", "--steps", "12"]
    assert calls == [[*script, *given], script] and Path(script[1]).is_file()


@pytest.fixture
def study(monkeypatch, tmp_path):
    """What was asked of which study."""
    calls = []

    class Spy:
        def __init__(self, profile, task, results, **overrides):
            assert not overrides  # they are in the profile
            self.made, self.results = (profile.name, task, profile.seeds), tmp_path / "results"

        def __getattr__(self, stage):
            return lambda *given, part: calls.append((*self.made, stage, given, part)) or "path"

    monkeypatch.setattr("r3lib.study.Study", Spy)
    return calls


def test_sample_asks_for_a_share_or_for_the_whole(study, capsys):
    assert cli.main("sample baseline --task countdown --shard 1/4 --profile smoke --set seeds=3".split()) == 0
    assert cli.main("sample evaluate --task countdown --shard 0/2 --seed 5".split()) == 0
    assert cli.main("sample mine --task countdown".split()) == 0
    assert study == [
        ("smoke", "countdown", 3, "baseline", (), (1, 4)),
        ("nano", "countdown", 1, "evaluate", (5,), (0, 2)),
        ("nano", "countdown", 1, "mine", (), None),
    ]
    assert cli.main(["sample", "mine", "--profile", "qwen"]) == 0  # which is of one task
    assert study.pop()[:2] == ("qwen", "data/arithmetic.py:Arithmetic")
    assert cli.main(["sample", "mine"]) == 2 and "add --task" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["report --task all", "doctor --results here", "base-model --set a=b"])
def test_an_option_that_a_command_would_not_read_is_refused(line, capsys):
    with pytest.raises(SystemExit):
        cli.main(line.split())
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["mine", "baseline"])
def test_only_an_evaluation_has_a_seed(study, stage, capsys):
    assert cli.main(["sample", stage, "--task", "countdown", "--seed", "1"]) == 2
    assert f"r3 sample {stage} has no --seed" in capsys.readouterr().err and not study


def test_shares_run_side_by_side_but_not_beside_a_whole_run(study, tmp_path, capsys):
    line = "sample mine --task countdown --shard 0/2".split()
    with claimed(tmp_path / "results", shared=True):
        assert cli.main(line) == 0
    with claimed(tmp_path / "results"):
        assert cli.main(line) == 2
    assert "is running in" in capsys.readouterr().err and len(study) == 1


@pytest.mark.parametrize("share", ["4/4", "1", "a/2", "-1/2"])
def test_a_share_that_is_none_is_refused(share, capsys):
    with pytest.raises(SystemExit):
        cli.main(["sample", "mine", "--task", "countdown", f"--shard={share}"])
    assert "write I/N with I from 0 to N - 1" in capsys.readouterr().err


def test_the_page_on_the_command_line_has_every_command_with_its_own_options():
    page = (ROOT / "docs" / "command-line.md").read_text()
    [commands] = [action for action in cli.parser()._actions if action.choices]
    for name, command in commands.choices.items():
        [row] = [line for line in page.splitlines() if line.startswith(f"| `r3 {name}")]
        options = {word for action in command._actions for word in action.option_strings}
        row = row.replace("those of a study", "--profile --task --set --results")
        assert {"-h", "--help", *re.findall(r"--[a-z-]+", row)} == options, name


def test_help_loads_nothing_heavy_and_names_every_command():
    code = "import sys; from r3lib.cli import parser; print(parser().format_help()); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert all(name in done.stdout for name in ("reproduce", "doctor", "report", "base-model"))
    assert not any(f"'{heavy}'" in done.stdout for heavy in ("torch", "papermill", "pandas", "matplotlib"))


@pytest.mark.skipif(not shutil.which("make"), reason="reads the Makefile with make")
def test_make_hands_a_profile_with_a_space_over_as_one_word():
    for target in ("reproduce", "doctor"):
        made = ["make", "-n", target, "PROFILE=a b.yaml", "TASK=countdown"]
        lines = subprocess.run(made, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        (line,) = [line for line in lines if "--profile" in line]
        words = shlex.split(line.removeprefix("@"))
        assert words[words.index("--profile") + 1] == "a b.yaml"


def test_module_and_command_are_the_same():
    done = subprocess.run([sys.executable, "-m", "r3lib", "reproduce", "--set", "x"], cwd=ROOT, capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith(b"r3: error: --set 'x'")
