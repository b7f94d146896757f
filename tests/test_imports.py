"""The layers of r3lib: the contracts in pyproject.toml hold, and a wrong import breaks one."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import r3lib

ROOT = Path(__file__).parents[1]
LINT = "from importlinter.cli import lint_imports; exit(lint_imports(no_cache=True, no_logo=True))"


def lint(folder):
    """Check the contracts on the package in `folder`; return the exit status and the report."""
    command = [sys.executable, "-c", LINT]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_no_import_points_upwards_or_in_a_circle_and_verifiers_are_pure():
    status, report = lint(ROOT)
    assert status == 0, report


@pytest.mark.parametrize(
    "module, line, contract",
    [
        ("tasks/base.py", "from ..study import Study", "An import never points upwards"),
        ("errors.py", "from .chat import Chat", "in a circle"),
        ("verifiers/verdict.py", "import torch", "are pure"),
        ("stats.py", "import time", "are pure"),
    ],
)
def test_a_wrong_import_breaks_a_contract(module, line, contract, tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "r3lib", tmp_path / "r3lib")
    with (tmp_path / "r3lib" / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    status, report = lint(tmp_path)
    assert status == 1
    assert any(contract in words and "BROKEN" in words for words in report.splitlines()), report


def test_public_names_are_shown_by_dir_and_known_to_editors_before_any_is_imported():
    [block] = [node for node in ast.parse(Path(r3lib.__file__).read_text()).body
               if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"]  # fmt: skip
    known = {alias.name: line.module for line in block.body for alias in line.names}
    assert known == r3lib.PUBLIC and known.keys() <= set(dir(r3lib))
