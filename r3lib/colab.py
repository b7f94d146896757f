"""What a notebook's first cell does on Google Colab: install what is missing, and find a place for the results.

It runs before anything is installed, so it imports nothing but the standard library.
"""

import re
import subprocess
import sys
import tomllib
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from .errors import R3Error

ROOT = Path(__file__).resolve().parent.parent
DRIVE = Path("/content/drive")
RUNTIME = "2026.07"  # the newest of Colab's runtime versions whose Python (3.12) is one that we support
KEPT = ("torch", "ipykernel", "jupyter-client", "jupyterlab", "nbclient", "nbformat")  # what Colab itself runs on
DATA = ("bfcl-eval==2026.3.23",)  # the profile's function-calling problems; not the code, which pins much else
REMOVED = ("torchao",)  # Colab's is too old for peft, which then refuses every LoRA; nothing here uses it


def start(results: str, drive: bool = False) -> str:
    """Prepare this session; return the folder of the results, on Google Drive if it is mounted.

    `drive` mounts it. Raises R3Error if pip fails, and if the session must be restarted to see what pip replaced.
    """
    if drive:
        import_module("google.colab.drive").mount(str(DRIVE))
    install()
    if not (DRIVE / "MyDrive").is_dir():
        print(f"results go to {ROOT / results} and end with the session; start(..., drive=True) keeps them")
        return results
    kept = DRIVE / "MyDrive" / "r3" / results
    print(f"results go to {kept}; a later session goes on from there")
    return str(kept)


def install() -> None:
    """Install this checkout with the versions of pyproject.toml, except for KEPT. Raises R3Error, see `start`."""
    wanted = requirements()
    print("installing; the first time takes some minutes")
    pip("install", "--no-deps", "--editable", str(ROOT))
    with TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(f"{name}=={version(name)}" for name in KEPT if version(name)))
        pip("install", "--constraint", str(constraints), *wanted.values())
    pip("install", "--no-deps", *DATA)
    pip("uninstall", "--yes", *REMOVED)
    if stale := [name for name in wanted if loaded(name) not in (None, version(name))]:
        raise R3Error(f"new versions of {', '.join(stale)}: choose Runtime > Restart session, then Runtime > Run all")


def requirements() -> dict[str, str]:
    """What pip installs here: {name: requirement} of the package and of its extra `gpu`, without KEPT."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["gpu"]
    named = {re.match(r"[\w.-]+", line)[0]: line for line in lines}
    return {name: line for name, line in named.items() if name not in KEPT}


def pip(*arguments: str) -> None:
    """Run pip quietly. Raises R3Error with what pip says went wrong."""
    done = subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], capture_output=True, text=True)
    if done.returncode:
        why = "; ".join(line[7:] for line in done.stderr.splitlines() if line.startswith("ERROR: "))
        mend = f"choose Runtime > Change runtime type > Runtime version {RUNTIME} and run again"
        raise R3Error(f"pip {arguments[0]} failed ({why}): {mend}")


def on_colab() -> bool:
    """Whether this Python is Colab's."""
    return bool(find_spec("google") and find_spec("google.colab"))


def version(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def loaded(name: str) -> str | None:
    """The version of a package that this session has imported, or None."""
    module = sys.modules.get(name.replace("-", "_"))
    return module and getattr(module, "__version__", None)
