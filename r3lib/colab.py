"""What the notebooks' Colab cell calls: install the pinned packages beside what Colab runs on.

It runs before anything is installed, so it imports nothing but the standard library.
"""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from .errors import R3Error

ROOT = Path(__file__).resolve().parent.parent
RUNTIME = "2026.07"  # the newest of Colab's runtimes whose Python (3.12) is one that we support
KEPT = ("torch", "ipykernel", "jupyter-client", "jupyterlab", "nbclient", "nbformat")  # Colab's own
DATA = "bfcl-eval==2026.3.23"  # the function-calling problems; not the code, which pins much else
REMOVED = "torchao"  # Colab's is too old: peft refuses every LoRA beside it; nothing here uses it


def install() -> None:
    """Install this checkout with the versions of pyproject.toml, except for KEPT; takes minutes.

    Raises R3Error if pip fails, and if the session must be restarted to see what pip replaced.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["gpu"]
    wanted = {re.match(r"[\w.-]+", line)[0]: line for line in lines}
    kept = {name: f"{name}=={version(name)}" for name in KEPT if version(name)}
    wanted = {name: line for name, line in wanted.items() if name not in KEPT} | kept
    pip("install", "--no-deps", "--editable", str(ROOT))
    pip("install", *wanted.values())
    pip("install", "--no-deps", DATA)
    pip("uninstall", "--yes", REMOVED)
    stale = [name for name in wanted if loaded(name) not in (None, version(name))]
    if stale:
        fix = "choose Runtime > Restart session, then Runtime > Run all"
        raise R3Error(f"pip replaced {', '.join(stale)}, which this session has loaded: {fix}")


def pip(*arguments: str) -> None:
    """Run pip quietly. Raises R3Error with the end of what pip says went wrong."""
    command = [sys.executable, "-m", "pip", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = " ".join(done.stderr.split())[-300:]
        fix = f"choose Runtime > Change runtime type > Runtime version {RUNTIME} and run again"
        raise R3Error(f"pip {arguments[0]} failed ({why}): {fix}")


def version(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def loaded(name: str) -> str | None:
    """The version of a package that this session has imported, or None."""
    return getattr(sys.modules.get(name.replace("-", "_")), "__version__", None)
