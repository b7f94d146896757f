"""Stamp each notebook for Google Colab: a badge that opens it there, and the cell that prepares the session."""

import json
import tomllib
from pathlib import Path

from .colab import RUNTIME
from .config import ROOT
from .errors import R3Error
from .store import write_atomic

NOTEBOOKS = ROOT / "notebooks"
TAG = "colab"
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})"
CELL = """\
# On Google Colab: fetch the repository, install what is missing, choose where results go. Elsewhere: nothing.
import sys

if "google.colab" in sys.modules:
    import os
    import subprocess

    home = "/content/r3-{revision}"
    if not os.path.isdir(home):
        clone = "git clone --quiet --depth=1 --config=advice.detachedHead=false --branch={revision}".split()
        subprocess.run([*clone, "{repository}", home], check=True)
    os.chdir(home)
    sys.path.insert(0, home)
    from r3lib.colab import start

    results = start(results, drive=False)  # True: keep results on your Google Drive, where they outlive the session"""


def write_badges(say=print) -> None:
    """Stamp every notebook and say which changed. Raises R3Error: there are none; see `origin` and `stamp`."""
    paths = sorted(NOTEBOOKS.glob("*.ipynb"))
    if not paths:
        raise R3Error(f"no notebooks in {NOTEBOOKS}: run r3 from a source checkout (pip install -e .)")
    repository, revision = origin()
    for path in paths:
        before = path.read_text(encoding="utf-8")
        after = stamp(before, path.name, repository, revision)
        if after != before:
            write_atomic(path, after)
        say(f"{'same' if after == before else 'stamped'}  {path.name}")


def origin(pyproject: Path = ROOT / "pyproject.toml") -> tuple[str, str]:
    """The repository's URL and the tag of this version, from pyproject.toml. Raises R3Error if not on GitHub."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    repository = project["urls"]["Repository"].rstrip("/").removesuffix(".git")
    if not repository.startswith("https://github.com/"):
        raise R3Error(f"Repository = {repository!r} in pyproject.toml: Colab needs https://github.com/OWNER/NAME")
    return repository, f"v{project['version']}"


def stamp(text: str, name: str, repository: str, revision: str) -> str:
    """The notebook `text` (JSON) with its badge first and the session's cell after the parameters.

    Stamping again changes nothing. Raises R3Error for a notebook without a cell tagged `parameters`.
    """
    notebook = json.loads(text)
    cells = [cell for cell in notebook["cells"] if TAG not in _tags(cell)]
    place = next((i for i, cell in enumerate(cells, 1) if "parameters" in _tags(cell)), None)
    if place is None:
        raise R3Error(f"{name} has no cell tagged `parameters`: add one that sets `results`")
    github = repository.removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{github}/blob/{revision}/notebooks/{name}"
    badge = _cell("markdown", f"{name[:2]}-badge", BADGE.format(link=link))
    session = _cell("code", f"{name[:2]}-colab", CELL.format(repository=repository, revision=revision))
    notebook["cells"] = [badge, *cells[:place], session, *cells[place:]]
    runtime = {"provenance": [], "runtime_attributes": {"runtime_version": RUNTIME}}
    notebook["metadata"] = dict(sorted((notebook["metadata"] | {"accelerator": "GPU", "colab": runtime}).items()))
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def _tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def _cell(kind: str, identity: str, source: str) -> dict:
    cell = {"cell_type": kind, "id": identity, "metadata": {"tags": [TAG]}, "source": source.splitlines(keepends=True)}
    return dict(sorted((cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})).items()))
