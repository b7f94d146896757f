"""Results that are made once: a cache that says why it runs, and the manifest of what was drawn."""

import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from glob import escape, glob
from pathlib import Path
from typing import TYPE_CHECKING

from .chat import DATE
from .errors import R3Error
from .files import LOCK, claimed, sha256, write_atomic
from .provenance import machine

if TYPE_CHECKING:
    import pandas as pd
    from IPython.display import Image
    from matplotlib.figure import Figure

STARTED = time.time()
UNCOUNTED = (".stage.json", ".md")  # endings of files that decide nothing: markers, model cards


def stage(target: Path, config: dict, inputs: Iterable[Path], build: Callable, log=print) -> Path:
    """Make `target` (file or folder) unless the same config and inputs have made it before.

    `build(work: Path)` writes `work/<target.name>`; `work` survives a kill, so that a build can
    resume, until `target` is made, of whatever settings. The marker `<target>.stage.json` comes
    last. R3Error: an input or the output is missing, or another run is making `target`.
    """
    wanted = _wanted(config, inputs, target)
    marker = _marker(target)
    run = os.environ.get("R3_FRESH", "")
    why = _why(marker, wanted, run)
    if why is None:
        log(f"cached  {target.name}")
        return target
    work = work_folder(target, config, inputs)
    if os.environ.get("RANK", "0") != "0":  # of several processes one keeps the books
        work.mkdir(parents=True, exist_ok=True)
        build(work)
        return _made_by_main(target, marker, wanted)
    if run and work.exists() and not (work / f".{run}").exists():
        _remove([work])  # which an earlier run left
    others = _others(target, work)
    if others:
        why += " (unfinished work of other settings goes once this is made)"
    with claimed(work):
        unfinished = any(path.name != LOCK for path in work.iterdir()) and not run
        log(f"running {target.name}: {'goes on where it stopped' if unfinished else why}")
        started = time.time()
        if run:
            (work / f".{run}").touch()
        if "WORLD_SIZE" in os.environ:
            marker.unlink(missing_ok=True)  # for which the other processes then wait
        build(work)
        _put_in_place(target, work, {**wanted, "run": run}, started)
    _remove(others)
    return target


def _put_in_place(target: Path, work: Path, wanted: dict, started: float) -> None:
    """Move what was built in `work` to `target`, with its marker."""
    marker = _marker(target)
    record = {**wanted, "files": _hashes(work / target.name, work)}
    record["seconds"] = round(time.time() - started, 2)
    record["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    marker.unlink(missing_ok=True)  # from here on a kill leaves no marker that claims too much
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    (work / target.name).rename(target)
    write_atomic(marker, json.dumps(record, indent=1))
    shutil.rmtree(work)


def up_to_date(target: Path, config: dict, inputs: Iterable[Path]) -> bool:
    """Whether `stage` would take `target` as it is."""
    run = os.environ.get("R3_FRESH", "")
    return _why(_marker(target), _wanted(config, inputs, target), run) is None


def key_of(config: dict, inputs: Iterable[Path], target: Path) -> str:
    """Hex digest of all that decides what `stage` makes of these arguments."""
    wanted = json.dumps(_wanted(config, inputs, target), sort_keys=True)
    return hashlib.sha256(wanted.encode()).hexdigest()


def work_folder(target: Path, config: dict, inputs: Iterable[Path]) -> Path:
    """Where `stage` builds `target`."""
    return target.with_name(f".work-{target.name}-{key_of(config, inputs, target)[:12]}")


class Recorder:
    """Saves a notebook's tables and figures in `results`, and in its manifest their origin.

    `inputs`: the files that they are drawn from, which the manifest names with their hashes.
    """

    def __init__(self, results: Path, notebook: str, inputs: Iterable[Path] = ()):
        self.results = results
        self.notebook = notebook
        self.inputs = list(inputs)
        entries = self._entries()
        kept = {name: made for name, made in entries.items() if made["notebook"] != notebook}
        if kept != entries:  # what an earlier run of it drew is not this one's
            self._write(kept)

    def table(self, frame: "pd.DataFrame", name: str, cell: str) -> "pd.DataFrame":
        """Save `frame` as tables/<name>.csv, made under the heading `cell`; return it."""
        path = self.results / "tables" / f"{name}.csv"
        write_atomic(path, frame.to_csv(index=False))
        self._register([path], cell, frame)
        return frame

    def figure(self, figure: "Figure", data: "pd.DataFrame", name: str, cell: str) -> "Image":
        """Save `figure` as figures/<name>.png, .svg, and its `data` as .csv; return the image."""
        from IPython.display import Image
        from matplotlib import rc_context

        base = self.results / "figures" / name
        for kind in ("png", "svg"):
            image = io.BytesIO()
            with rc_context({"svg.hashsalt": name}):  # with no date: equal data, equal bytes
                figure.savefig(
                    image, format=kind, dpi=160, bbox_inches="tight", metadata={"Date": None}
                )
            write_atomic(base.with_suffix(f".{kind}"), image.getvalue())
        write_atomic(base.with_suffix(".csv"), data.to_csv(index=False))
        self._register([base.with_suffix(f".{kind}") for kind in ("png", "svg", "csv")], cell, data)
        return Image(str(base.with_suffix(".png")))

    def _register(self, paths: list[Path], cell: str, data: "pd.DataFrame") -> None:
        """Enter `paths` into the manifest with all that they came from."""
        entries, made = self._entries(), machine() | {"prompt_date": DATE}
        seeds = data["seed"].dropna().astype(str).unique() if "seed" in data else []
        origin = {
            "notebook": self.notebook,
            "cell": cell,
            "inputs": _hashes(self.inputs, self.results),
            "seconds": round(time.time() - STARTED, 1),  # since the notebook began
            "seeds": sorted(seeds),
        }
        for name, digest in _hashes(paths, self.results).items():
            entries[name] = {"sha256": digest, **origin, **made}
        self._write(entries, **made)

    @property
    def _manifest(self) -> Path:
        return self.results / "manifest.json"

    def _entries(self) -> dict:
        """What the manifest has."""
        return manifest_entries(self._manifest) if self._manifest.exists() else {}

    def _write(self, entries: dict, **made) -> None:
        text = json.dumps({**made, "artefacts": entries}, indent=1, sort_keys=True)
        write_atomic(self._manifest, text)


def manifest_entries(manifest: Path) -> dict:
    """The origin of each table and figure by its name; R3Error: the file is damaged."""
    try:
        return json.loads(manifest.read_text(encoding="utf-8"))["artefacts"]
    except (ValueError, KeyError, TypeError) as error:
        raise R3Error(f"{manifest} is damaged: delete it and run again") from error


def _marker(target: Path) -> Path:
    return target.with_name(f"{target.name}.stage.json")


def _wanted(config: dict, inputs: Iterable[Path], target: Path) -> dict:
    wanted = {"config": config, "inputs": _hashes(inputs, target.parent)}
    return json.loads(json.dumps(wanted, default=str))


def _others(target: Path, work: Path) -> list[Path]:
    """What other settings have left unfinished; R3Error if another run is at it."""
    others = [p for p in target.parent.glob(f".work-{escape(target.name)}-*") if p != work]
    for other in others:
        with claimed(other):
            pass
    return others


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        with claimed(folder):
            shutil.rmtree(folder)


def _made_by_main(target: Path, marker: Path, wanted: dict) -> Path:
    """Wait until the main process has put `target` into its place."""
    deadline = time.time() + 600
    while _why(marker, wanted, "") is not None:
        if time.time() > deadline:
            raise R3Error(f"{target} was not finished by the main process: see its log")
        time.sleep(0.2)
    return target


def _hashes(paths: Path | Iterable[Path], base: Path) -> dict[str, str]:
    """Digest of each file by its name relative to `base`, less hidden ones, markers and cards."""
    found = {}
    for path in [paths] if isinstance(paths, Path) else paths:
        if not path.exists():
            raise R3Error(f"{path} is missing: run the step that writes it first (r3 reproduce)")
        names = glob("**", root_dir=path, recursive=True) if path.is_dir() else [""]
        for file in (path / name for name in sorted(names) if not name.endswith(UNCOUNTED)):
            if file.is_file():
                found[Path(os.path.relpath(file, base)).as_posix()] = sha256(file)
    return found


def _why(marker: Path, wanted: dict, run: str) -> str | None:
    """Why a stage has to run; None when what it made is there, up to date and intact."""
    try:
        old = json.loads(marker.read_text())
        _, inputs, files = old["config"], _counted(old["inputs"]), _counted(old["files"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return f"file missing or damaged: {marker.name}" if marker.exists() else "not there yet"
    if run and old.get("run") != run:
        return "fresh run"
    if old["config"] != wanted["config"]:
        return f"config changed: {_changes(old['config'], wanted['config'])}"
    changed = dict(inputs.items() ^ wanted["inputs"].items())
    if changed:
        return f"input changed: {', '.join(sorted(changed))}"
    for name, digest in files.items():
        file = marker.parent / name
        if not file.is_file() or sha256(file) != digest:
            return f"file missing or damaged: {file.name}"
    return None


def _counted(hashes: dict[str, str]) -> dict[str, str]:
    """Those of files that decide something."""
    return {name: digest for name, digest in hashes.items() if not name.endswith(UNCOUNTED)}


def _changes(before: dict, now: dict) -> str:
    """What changed in the settings; in a block of them, only the entries that did."""
    lines = []
    for key in sorted(key for key in before | now if before.get(key) != now.get(key)):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines.append(_changes(old, new))
        elif key == "code":
            lines.append("the code of task, sampler or trainer")
        else:
            lines.append(f"{key} {old} -> {new}")
    return "; ".join(lines)
