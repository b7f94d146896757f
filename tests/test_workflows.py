"""The GitHub workflows: safe, and made of commands that exist."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from r3lib.cli import parser
from r3lib.config import load_profile

ROOT = Path(__file__).resolve().parents[1]
FILES = (ROOT / ".github" / "workflows").glob("*.yml")
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in FILES}
JOBS = {f"{name}/{key}": job for name in WORKFLOWS for key, job in WORKFLOWS[name]["jobs"].items()}
STEPS = [step for job in JOBS.values() for step in job["steps"]]
SCRIPTS = [step["run"] for step in STEPS if "run" in step]
GPU = WORKFLOWS["reproduce-gpu"]["jobs"]["reproduce"]
BUILTIN = {"while", "done"}


def bash(script, **env):
    """Run a step's script as GitHub does with `shell: bash`."""
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_every_job_may_do_little_ends_in_time_and_uses_a_fixed_major_of_each_action():
    for workflow in WORKFLOWS.values():
        assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]["group"]
        assert workflow["defaults"]["run"]["shell"] == "bash"
    assert all(job["timeout-minutes"] <= 360 for job in JOBS.values())
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
        installed = Path(sys.executable).parent / Path(first).name
        known = first in BUILTIN or shutil.which(first)
        assert known or (first.startswith(".venv/bin/") and installed.exists()), first
    assert all((ROOT / path).is_file() for path in re.findall(r"\bbash (\S+)", script))


def test_the_inputs_of_a_gpu_run_reach_r3():
    [step] = [step for step in GPU["steps"] if step.get("name") == "Reproduce"]
    env = {"PROFILE": "smoke", "TASK": "countdown", "MAKEFLAGS": "n --no-print-directory"}
    asked = bash(step["run"], **env, SEEDS="3", SETTINGS="max_steps=4 beta=0.1")
    words = "--profile smoke --task countdown --set seeds=3 --set max_steps=4 --set beta=0.1"
    words = words.split()
    assert shlex.split(asked.splitlines()[-1])[2:] == words
    asked = bash(step["run"], **env, SEEDS="", SETTINGS="")
    assert shlex.split(asked.splitlines()[-1])[2:] == words[:4]
    example = WORKFLOWS["reproduce-gpu"][True]["workflow_dispatch"]["inputs"]["set"]["description"]
    pairs = dict(pair.split("=", 1) for pair in example.split("for example ")[1].split())
    assert load_profile("colab", **pairs).servers == "http://host:8000"
    names = set(WORKFLOWS["reproduce-gpu"][True]["workflow_dispatch"]["inputs"])  # True is `on`
    assert names == set(re.findall(r"inputs\.(\w+)", f"{GPU['env']} {GPU['runs-on']}"))
