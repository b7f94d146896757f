"""The GitHub workflows: safe, and made of commands that exist; the steps of test.yml run in a fresh clone."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

from r3lib.cli import parser
from r3lib.engines.vllm_server import INSTALL

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
JOBS = {f"{name}/{key}": job for name, workflow in WORKFLOWS.items() for key, job in workflow["jobs"].items()}
STEPS = [step for job in JOBS.values() for step in job["steps"]]
SCRIPTS = [step["run"] for step in STEPS if "run" in step]
GPU = WORKFLOWS["reproduce-gpu"]["jobs"]["reproduce"]
BUILTIN = {"while", "done"}


def bash(script, folder, **env):
    """Run a step's script as GitHub does with `shell: bash`."""
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=folder, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def gpu_step(name):
    [step] = [step for step in GPU["steps"] if step.get("name") == name]
    return step


def test_every_job_may_do_little_ends_in_time_and_uses_a_fixed_major_of_each_action():
    assert {f"{name}/{key}" for name in WORKFLOWS for key in WORKFLOWS[name]["jobs"]} == {
        "test/test", "reproduce-gpu/reproduce", "reproduce-gpu/publish",
    }  # fmt: skip
    for workflow in WORKFLOWS.values():
        assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]["group"]
        assert workflow["defaults"]["run"]["shell"] == "bash"
    assert all(job["timeout-minutes"] <= 360 for job in JOBS.values())  # what GitHub's own runners allow
    assert [name for name, job in JOBS.items() if "permissions" in job] == ["reproduce-gpu/publish"]
    for step in STEPS:
        assert "run" in step or re.fullmatch(r"actions/[\w/-]+@v\d+", step["uses"])


def test_no_script_has_expressions_pasted_in():
    """Inputs reach a script through its environment: pasted in, they would be run."""
    assert not [script for script in SCRIPTS if "${{" in script]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.split("\n")[0][:40])
def test_every_command_of_a_script_exists(script):
    assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0
    makefile = (ROOT / "Makefile").read_text()
    for line in re.findall(r"\bmake ([^|;\n]+)", script):
        for target in (word for word in shlex.split(line) if "=" not in word):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for arguments in re.findall(r"\.venv/bin/r3 ([^|;\n]+)", script):
        parser().parse_args(shlex.split(arguments))
    assigned = re.compile(r"\w+\+?=")
    for first in (line.split()[0] for line in script.splitlines() if not assigned.match(line)):
        installed = first.startswith(".venv/bin/") and (Path(sys.executable).parent / Path(first).name).exists()
        assert installed or first in BUILTIN or shutil.which(first), first
    assert all((ROOT / path).is_file() for path in re.findall(r"\bbash (\S+)", script))


def test_the_inputs_of_a_gpu_run_reach_r3():
    env = {"PROFILE": "smoke", "TASK": "countdown", "MAKEFLAGS": "n --no-print-directory"}
    script = gpu_step("Reproduce")["run"]
    asked = shlex.split(bash(script, ROOT, **env, SEEDS="3", SETTINGS="steps=4 beta=0.1").splitlines()[-1])
    plain = [".venv/bin/r3", "reproduce", "--profile", "smoke", "--task", "countdown"]
    assert asked == [*plain, *"--set seeds=3 --set steps=4 --set beta=0.1".split()]
    asked = bash(script, ROOT, **env, SEEDS="", SETTINGS="").splitlines()[-1]
    assert shlex.split(asked) == plain
    asked = bash(gpu_step("The machine can run the profile")["run"], ROOT, **env, SEEDS="3", SETTINGS="steps=4")
    doctor = "r3 doctor --profile smoke --task countdown --set seeds=3 --set steps=4"
    assert " ".join(shlex.split(asked.splitlines()[-1])).endswith(doctor)
    names = set(WORKFLOWS["reproduce-gpu"][True]["workflow_dispatch"]["inputs"])  # yaml reads `on` as True
    assert names == set(re.findall(r"inputs\.(\w+)", f"{GPU['env']} {GPU['runs-on']}"))


@pytest.mark.parametrize(
    "profile, settings, wanted",
    [
        ("colab", "", False),
        ("colab", "engine=vllm quantization=none", True),
        ("paper", "", True),
        ("paper", " seeds=3 servers=http://host:8000?a=b ", False),
        ("paper", "engine=transformers", False),
    ],
)
def test_a_gpu_runner_gets_vllm_only_for_a_server_of_our_own(tmp_path, profile, settings, wanted):
    script = gpu_step("vLLM, where the profile samples from a server of our own")["run"]
    assert INSTALL in script
    (tmp_path / "python3").write_text(f'#!/bin/sh\nmkdir -p "$3/bin"; ln -s {shutil.which("echo")} "$3/bin/pip"\n')
    (tmp_path / "python3").chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\ncd {ROOT} && exec {sys.executable} "$@"\n')
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    said = bash(script, tmp_path, PROFILE=profile, SETTINGS=settings, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert said == ("install vllm==0.32.0\n" if wanted else "")


@pytest.fixture
def clone(tmp_path):
    """A fresh clone whose .venv is new but finds the packages of the one that runs this test."""
    folder = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    venv.create(folder / ".venv", symlinks=True)
    scripts, [site] = folder / ".venv" / "bin", (folder / ".venv").glob("lib/python*/site-packages")
    (site / "linked.pth").write_text(f"{folder}\n{sysconfig.get_path('purelib')}\n")
    (scripts / "ruff").symlink_to(Path(sys.executable).parent / "ruff")
    (scripts / "r3").write_text(f"#!{scripts}/python\nimport sys\nfrom r3lib.cli import main\nsys.exit(main())\n")
    (tmp_path / "no_root").mkdir()
    (tmp_path / "no_root" / "apt-get").write_text("#!/bin/sh\nexit 1\n")
    for script in (scripts / "r3", tmp_path / "no_root" / "apt-get"):
        script.chmod(0o755)
    (folder / ".venv-vllm").mkdir()
    for environment in (".venv", ".venv-vllm"):
        (folder / environment / ".installed").touch()
    return folder


@pytest.mark.slow
def test_the_steps_of_test_yml_run_in_a_fresh_clone(clone):
    """What is committed suffices: lint is clean, the tests can be collected, a smoke run could start.

    Nothing is installed (`make` finds a linked environment and an empty one), tests and smoke run are left out (they
    run elsewhere), and apt-get is refused.
    """
    env = {"PYTHON": f"{sys.version_info.major}.{sys.version_info.minor}", "PYTEST_ADDOPTS": "--collect-only -q"}
    env |= {"PATH": f"{clone.parent}/no_root:{os.environ['PATH']}"}
    job = JOBS["test/test"]
    steps = [step for step in job["steps"] if "run" in step and step["name"] != "Smoke"]
    said = "".join(bash(step["run"], clone, **env) for step in steps)
    assert "fail" not in bash("make doctor PROFILE=smoke", clone, **env)
    assert "All checks passed" in said and re.search(r"\d+ tests collected", said)
