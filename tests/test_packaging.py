"""The package's files agree: pins, the two ways to install, imports, commands."""

import ast
import re
import shlex
import socket
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import pytest_socket
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
CARD = """jupyterlab papermill torch transformers trl peft bitsandbytes vllm matplotlib
pandas""".split()


def pins(requirements):
    """Requirement strings as {name: version specifier}."""
    lines = [line.split("#")[0].strip() for line in requirements]
    return dict(re.fullmatch(r"([A-Za-z0-9_-]+)(.*)", line).groups() for line in lines)


def test_conda_and_pip_users_get_the_same_versions_of_the_ten_packages_and_this_one():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    [from_pip] = [part["pip"] for part in conda["dependencies"] if isinstance(part, dict)]
    project = pins(PROJECT["dependencies"]) | pins(EXTRAS["gpu"]) | pins(EXTRAS["vllm"])
    environment = pins(line for line in from_pip if not line.startswith("-"))
    assert environment == {name: project[name] for name in CARD}
    assert "-e ." in from_pip and "python=3.11" in conda["dependencies"]


def imported(path):
    """Top-level names that a module imports outside its functions."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_everything_that_the_library_imports_is_declared():
    declared = {name.lower() for name in pins(PROJECT["dependencies"])}
    owners = packages_distributions()
    own = set(sys.stdlib_module_names) | {"r3lib"}
    for path in (ROOT / "r3lib").rglob("*.py"):
        for name in set(imported(path)) - own:
            names = {owner.lower().replace("_", "-") for owner in owners.get(name, [])}
            assert declared & names, f"{path.name} imports {name}"


def dry_run(*arguments):
    command = ["make", "--no-print-directory", "--dry-run", "--always-make", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_make_reproduce_installs_then_passes_profile_task_and_settings():
    arguments = ["PROFILE=smoke", "TASK=countdown", "SET=seeds=3 max_steps=4"]
    lines = dry_run("reproduce", *arguments).splitlines()
    words = "reproduce --profile smoke --task countdown --set seeds=3 --set max_steps=4".split()
    assert shlex.split(lines[-1])[1:] == words
    torch = next(line for line in PROJECT["dependencies"] if line.startswith("torch=="))
    assert any(line.endswith(f"pip install {torch}") for line in lines)
    assert next(i for i, line in enumerate(lines) if torch in line) < lines.index(
        ".venv/bin/python -m pip install -e '.[dev]'"
    )


def test_an_unsupported_python_is_refused_in_one_line(tmp_path):
    for name in ("python3.11", "python3.12", "python3"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    command = ["make", "install", f"VENV={tmp_path / 'venv'}"]
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(command, cwd=ROOT, env=path, capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "venv").exists()
    [line, *_] = done.stderr.splitlines()
    assert line == "r3 needs Python 3.11 or 3.12: install one and run make again"


@pytest.mark.filterwarnings("ignore:A test tried to use socket")
def test_tests_cannot_reach_the_network():
    with socket.socket() as outside, pytest.raises(pytest_socket.SocketConnectBlockedError):
        outside.connect(("192.0.2.1", 80))
