"""Google Colab: badge and cell of every notebook, and what the cell does there and elsewhere."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from r3lib import colab
from r3lib.errors import R3Error
from r3lib.tasks.function_calling_records import BFCL_INSTALL

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TAG, REPOSITORY = f"v{PROJECT['version']}", PROJECT["urls"]["Repository"]
HERE = {"torch": "2.11.0+cu128", "ipykernel": "6.17.1", "jupyter-client": "7.4.9"}
HERE |= {"pandas": "2.2.2"}


def colab_cells(path):
    cells = nbformat.read(path, 4).cells
    return [cell for cell in cells if "colab" in cell.metadata.get("tags", [])]


def session_cell():
    return colab_cells(NOTEBOOKS[0])[1].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_opens_on_colab_at_this_version_with_the_same_cell(path):
    """After a new version or repository: replace the old one in notebooks/*.ipynb, with sed."""
    badge, cell = colab_cells(path)
    place = f"{REPOSITORY.removeprefix('https://github.com/')}/blob/{TAG}/notebooks/{path.name}"
    assert badge.source.endswith(f"(https://colab.research.google.com/github/{place})")
    assert cell.source == session_cell()
    for word in (f"--branch={TAG}", f'"{REPOSITORY}"', f"r3-{TAG}"):
        assert word in cell.source
    metadata = nbformat.read(path, 4).metadata
    assert metadata.accelerator == "GPU"
    assert metadata.colab.runtime_attributes.runtime_version == colab.RUNTIME
    given = parameterize_notebook(load_notebook_node(str(path)), {"profile": "smoke"}).cells
    tags = [cell.metadata.tags for cell in given if cell.cell_type == "code"]
    assert tags[:3] == [["parameters"], ["injected-parameters"], ["colab"]] and not any(tags[3:])


def test_elsewhere_the_cell_does_nothing(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("ran a command"))
    before, names = set(sys.modules), {}
    exec(session_cell(), names)
    assert set(names) - {"__builtins__"} == {"sys"} and set(sys.modules) == before
    assert capsys.readouterr() == ("", "")


def test_a_bare_colab_gets_as_far_as_pip_with_the_committed_files_alone(tmp_path):
    """Before pip has run only the standard library is needed; the repository is cloned once."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "origin")], check=True)
    subprocess.run(["git", "-C", str(tmp_path / "origin"), "tag", TAG], check=True)
    cell = session_cell().replace(REPOSITORY, f"file://{tmp_path}/origin")
    cell = cell.replace("/content", str(tmp_path))
    script = f"""
import json, os, subprocess, sys
sys.modules["google.colab"] = sys
real, pip, git = subprocess.run, [], []
def run(command, **options):
    if command[0] == "git":
        git.append(command)
        return real(command, **options)
    pip.append(command[4:])
    return subprocess.CompletedProcess(command, 0, "", "")
subprocess.run = run
exec({cell!r}, {{}})
exec({cell!r}, {{}})
print(json.dumps([len(git), pip, os.getcwd(), sys.modules["r3lib"].__file__]))
"""
    command = [sys.executable, "-ISc", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    clones, pip, folder, module = json.loads(done.stdout.splitlines()[-1])
    home = tmp_path / f"r3-{TAG}"
    assert (clones, folder, module) == (1, str(home), str(home / "r3lib" / "__init__.py"))
    assert pip[0] == ["install", "--no-deps", "--editable", str(home)] and len(pip) == 8


@pytest.fixture
def asked(monkeypatch):
    """A Colab session; the arguments that pip was given."""
    asked = []
    monkeypatch.setattr(colab, "pip", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(colab, "version", HERE.get)
    monkeypatch.setattr(colab, "loaded", HERE.get)
    return asked


def test_colab_keeps_its_torch_and_its_kernel_and_gets_our_pins(asked):
    colab.install()
    own, rest, data, gone = asked
    assert own == ("install", "--no-deps", "--editable", str(ROOT))
    assert gone == ("uninstall", "--yes", "torchao")
    assert " ".join(["pip", *data]) == BFCL_INSTALL  # the same version of the data as elsewhere
    kept = {"torch==2.11.0+cu128", "ipykernel==6.17.1", "jupyter-client==7.4.9"}
    lines = set(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["gpu"])
    assert kept <= set(rest) and set(rest[1:]) - kept <= lines
    names = {re.match(r"[\w-]+", line)[0] for line in set(rest[1:]) - kept}
    assert not names & set(colab.KEPT) and {"transformers", "trl", "peft", "bitsandbytes"} <= names


def test_what_was_imported_before_pip_replaced_it_asks_for_a_restart(asked, monkeypatch):
    monkeypatch.setattr(colab, "version", (HERE | {"pandas": "3.1.1"}).get)
    with pytest.raises(R3Error, match="pip replaced pandas, .*choose Runtime > Restart session"):
        colab.install()
    monkeypatch.setattr(colab, "loaded", {}.get)  # the session after the restart
    colab.install()


def test_a_failing_pip_is_one_line_that_names_the_tested_runtime(monkeypatch):
    said = "WARNING: slow\nERROR: Package 'r3lib' requires a different Python: 3.13.9\n"
    done = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(R3Error, match="different Python: 3.13.9.*Runtime version 2026.07"):
        colab.install()
