"""What the notebooks' Colab cell calls: install the pinned packages beside what Colab runs on.

It runs before anything is installed, so it imports nothing but the standard library.
"""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from .errors import R3Error

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("torch", "ipykernel", "jupyter-client", "jupyterlab", "nbclient", "nbformat")  # Colab's own
DATA = "bfcl-eval==2026.3.23"  # the function-calling problems; not the code, which pins much else
REMOVED = "torchao"  # Colab's is too old: peft refuses every LoRA beside it; nothing here uses it


def install() -> None:
    """Install this checkout with the versions of pyproject.toml, except for KEPT; takes minutes.

    Raises R3Error if the session must be restarted to see what pip replaced.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["gpu"]
    wanted = {re.match(r"[\w.-]+", line)[0]: line for line in lines}
    wanted = {name: line for name, line in wanted.items() if name not in KEPT}
    here = {d.name.lower().replace("_", "-"): d.version for d in metadata.distributions()}
    pip("install", "--no-deps", "--editable", str(ROOT))
    pip("install", *wanted.values(), *[f"{name}=={here[name]}" for name in KEPT if name in here])
    pip("install", "--no-deps", DATA)
    pip("uninstall", "--yes", REMOVED)
    if stale := [name for name in wanted if loaded(name) not in (None, metadata.version(name))]:
        fix = "choose Runtime > Restart session, then Runtime > Run all"
        raise R3Error(f"pip replaced {', '.join(stale)}, which this session has loaded: {fix}")


def pip(*arguments: str) -> None:
    """Run pip quietly; its errors show in the notebook, and end the cell."""
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


def on_colab() -> bool:
    """Whether this Python is Colab's."""
    return bool(find_spec("google") and find_spec("google.colab"))


def loaded(name: str) -> str | None:
    """The version of a package that this session has imported, or None."""
    return getattr(sys.modules.get(name.replace("-", "_")), "__version__", None)
