"""Google Colab: what `r3 badges` stamps into the notebooks, and what the stamped cell does there and elsewhere."""

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import peft.import_utils
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from r3lib import badges, cli, colab, pipeline
from r3lib.errors import R3Error
from r3lib.study import open_studies
from r3lib.tasks.function_calling_records import BFCL_INSTALL

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY, REVISION = badges.origin()
ON_COLAB = {"torch": "2.11.0+cu128", "ipykernel": "6.17.1", "jupyter-client": "7.4.9", "pandas": "2.2.2"}
PARAMETERS = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": ['results = "results"']}


def notebook(*cells):
    return json.dumps({"cells": [{"cell_type": "markdown", "metadata": {}, "source": ["# T"]}, *cells], "metadata": {}})


def session_cell():
    """The source of the cell that prepares a session, from a notebook."""
    [cell] = [cell for cell in nbformat.read(NOTEBOOKS[0], 4).cells if cell.id.endswith("-colab")]
    return cell.source


@pytest.fixture
def asked(monkeypatch):
    """A Colab session whose Drive can be mounted and whose pip does nothing but note what it is asked."""
    asked = types.SimpleNamespace(pip=[], git=[], constraints="")

    def run(command, **_):
        if "--constraint" in command:
            asked.constraints = Path(command[command.index("--constraint") + 1]).read_text()
        kind, arguments = ("git", command[1:]) if command[0] == "git" else ("pip", command[4:])
        getattr(asked, kind).append(arguments)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(colab, "version", ON_COLAB.get)
    monkeypatch.setattr(colab, "loaded", ON_COLAB.get)
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    mount = types.SimpleNamespace(mount=lambda place: (Path(place) / "MyDrive").mkdir(parents=True))
    monkeypatch.setitem(sys.modules, "google.colab.drive", mount)
    return asked


@pytest.fixture
def drive(monkeypatch, tmp_path):
    """The folder where Drive is mounted: nothing is mounted yet."""
    monkeypatch.setattr(colab, "DRIVE", tmp_path / "drive")
    return tmp_path / "drive"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebooks_are_as_r3_badges_would_write_them(path):
    text = path.read_text(encoding="utf-8")
    assert text == badges.stamp(text, path.name, REPOSITORY, REVISION), "run `r3 badges`"
    assert json.loads(text)["metadata"]["accelerator"] == "GPU"  # what Colab connects to
    first = nbformat.reads(text, 4).cells[0].source
    name = REPOSITORY.removeprefix("https://github.com/")
    assert first.endswith(f"(https://colab.research.google.com/github/{name}/blob/{REVISION}/notebooks/{path.name})")


def test_stamping_adds_two_cells_and_changes_no_other():
    before = json.loads(notebook(PARAMETERS, PARAMETERS | {"metadata": {}}))["cells"]
    after = json.loads(badges.stamp(notebook(*before[1:]), "00_a.ipynb", REPOSITORY, REVISION))["cells"]
    assert [after[1], after[2], after[4]] == before and len(after) == 5


def test_a_new_version_takes_the_place_of_the_old_one():
    old = badges.stamp(notebook(PARAMETERS), "00_a.ipynb", "https://github.com/old/name", "v0.0.1")
    new = badges.stamp(old, "00_a.ipynb", "https://github.com/new/name", "v0.0.2")
    assert new == badges.stamp(notebook(PARAMETERS), "00_a.ipynb", "https://github.com/new/name", "v0.0.2")
    assert "old/name" in old and "old/name" not in new and "v0.0.1" not in new


def test_r3_badges_stamps_a_folder_and_then_leaves_it_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(badges, "NOTEBOOKS", tmp_path)
    (tmp_path / "00_a.ipynb").write_text(notebook(PARAMETERS))
    assert cli.main(["badges"]) == 0 and capsys.readouterr().out == "stamped  00_a.ipynb\n"
    assert cli.main(["badges"]) == 0 and capsys.readouterr().out == "same  00_a.ipynb\n"


def test_what_cannot_be_stamped_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(badges, "NOTEBOOKS", tmp_path)
    assert cli.main(["badges"]) == 2 and "no notebooks in" in capsys.readouterr().err
    (tmp_path / "06_b.ipynb").write_text(notebook())
    assert cli.main(["badges"]) == 2
    assert capsys.readouterr().err.startswith("r3: error: 06_b.ipynb has no cell tagged `parameters`: add one")
    project = '[project]\nversion = "1"\nurls = { Repository = "https://git.example/a/b" }'
    (tmp_path / "pyproject.toml").write_text(project)
    with pytest.raises(R3Error, match="'https://git.example/a/b' in pyproject.toml: Colab needs https://github.com/"):
        badges.origin(tmp_path / "pyproject.toml")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_papermills_parameters_still_come_before_whatever_uses_them(path):
    given = {"profile": "smoke", "results": "elsewhere"}
    pipeline.check_parameters(path, given)
    cells = parameterize_notebook(load_notebook_node(str(path)), given).cells
    tags = [cell.metadata.tags for cell in cells if cell.cell_type == "code"]
    assert tags[:3] == [["parameters"], ["injected-parameters"], ["colab"]] and not any(tags[3:])


def test_elsewhere_the_cell_does_nothing(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("ran a command"))
    before, names = set(sys.modules), {"results": "results"}
    exec(session_cell(), names)
    assert set(names) - {"__builtins__"} == {"results", "sys"} and names["results"] == "results"
    assert set(sys.modules) == before and capsys.readouterr() == ("", "")


def test_on_colab_the_cell_clones_the_tag_once_and_places_the_results(asked, drive, monkeypatch):
    went = []
    monkeypatch.setattr("os.chdir", went.append)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (drive / "MyDrive").mkdir(parents=True)  # mounted by hand
    exec(session_cell(), names := {"results": "results"})
    home = f"/content/r3-{REVISION}"
    assert [line[-3:] for line in asked.git] == [[f"--branch={REVISION}", REPOSITORY, home]]
    assert went == [home] and sys.path[0] == home and names["results"] == str(drive / "MyDrive" / "r3" / "results")
    monkeypatch.setattr("os.path.isdir", lambda path: True)
    exec(session_cell(), names)
    assert len(asked.git) == 1


def test_a_bare_python_gets_as_far_as_pip_with_the_cell_of_a_real_tag(tmp_path):
    """The committed files of a tag suffice, and nothing but the standard library is needed before pip has run."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "origin")], check=True)
    subprocess.run(["git", "-C", str(tmp_path / "origin"), "tag", REVISION], check=True)
    cell = session_cell().replace(REPOSITORY, f"file://{tmp_path}/origin").replace("/content", str(tmp_path))
    script = f"""
import json, os, subprocess, sys
sys.modules["google.colab"] = sys
real, pip = subprocess.run, []
def run(command, **options):
    if command[0] == "git":
        return real(command, **options)
    pip.append(command[4:])
    return subprocess.CompletedProcess(command, 0, "", "")
subprocess.run = run
names = {{"results": "results"}}
exec({cell!r}, names)
print(json.dumps([pip, os.getcwd(), sys.modules["r3lib"].__file__, names["results"]]))
"""
    done = subprocess.run([sys.executable, "-ISc", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    pip, folder, module, results = json.loads(done.stdout.splitlines()[-1])
    home = tmp_path / f"r3-{REVISION}"
    assert (folder, module, results) == (str(home), str(home / "r3lib" / "__init__.py"), "results")
    assert pip[0] == ["install", "--no-deps", "--editable", str(home)] and len(pip) == 4


def test_colab_keeps_its_torch_and_its_kernel_and_gets_our_pins(asked, drive):
    colab.start("results")
    own, rest, data, gone = asked.pip
    assert " ".join(["pip", *data]) == BFCL_INSTALL  # the same version of the data as elsewhere
    assert own == ["install", "--no-deps", "--editable", str(ROOT)] and gone == ["uninstall", "--yes", "torchao"]
    names = {re.match(r"[\w-]+", line)[0] for line in rest[3:]}
    assert not names & set(colab.KEPT) and {"transformers", "trl", "peft", "bitsandbytes", "numpy"} <= names
    project = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{line}"' in project for line in rest[3:])
    assert asked.constraints.split() == ["torch==2.11.0+cu128", "ipykernel==6.17.1", "jupyter-client==7.4.9"]


def test_peft_refuses_the_torchao_that_colab_has(monkeypatch):
    """Why `install` removes it: when this fails, it need not any more."""
    monkeypatch.setattr(peft.import_utils.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(peft.import_utils.importlib_metadata, "version", lambda name: "0.10.0")
    with pytest.raises(ImportError, match="incompatible version of torchao"):
        peft.import_utils.is_torchao_available.__wrapped__()


def test_what_was_imported_before_pip_replaced_it_asks_for_a_restart(asked, drive, monkeypatch):
    monkeypatch.setattr(colab, "version", (ON_COLAB | {"pandas": "3.1.1"}).get)
    with pytest.raises(R3Error, match="new versions of pandas: choose Runtime > Restart session, then"):
        colab.start("results")
    monkeypatch.setattr(colab, "loaded", {}.get)  # the session after the restart
    assert colab.start("results") == "results"


def test_versions_are_those_of_the_installed_and_of_the_imported_package(monkeypatch):
    assert colab.version("no-such-package") is None and colab.loaded("no-such-package") is None
    monkeypatch.setitem(sys.modules, "no_such_package", types.SimpleNamespace(__version__="1.2"))
    assert colab.loaded("no-such-package") == "1.2" and colab.version("pytest") == pytest.__version__


def test_a_failing_pip_is_one_line_that_names_the_tested_runtime(asked, drive, monkeypatch):
    said = "WARNING: slow\nERROR: Package 'r3lib' requires a different Python: 3.13.9 not in '<3.13,>=3.11'\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said))
    with pytest.raises(R3Error) as error:
        colab.start("results")
    assert str(error.value) == (
        "pip install failed (Package 'r3lib' requires a different Python: 3.13.9 not in '<3.13,>=3.11'): "
        "choose Runtime > Change runtime type > Runtime version 2026.07 and run again"
    )


def test_results_go_to_drive_when_it_is_mounted_or_asked_for(asked, drive, capsys):
    assert colab.start("results") == "results" and not drive.exists()
    assert "drive=True) keeps them" in capsys.readouterr().out
    kept = colab.start("results", drive=True)
    assert kept == str(drive / "MyDrive" / "r3" / "results") == colab.start("results")
    assert open_studies("smoke", "countdown", results=kept)[0].results == Path(kept) / "smoke"
