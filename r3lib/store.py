"""Steps that run once: a stage cache that says why it runs, atomic writes, and the manifest of artefacts."""

import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import time
from contextlib import contextmanager
from glob import glob
from pathlib import Path

from .chat import DATE
from .errors import R3Error
from .provenance import machine

STARTED = time.time()
ROOM = 2**20  # bytes; with less than that free, a failed write is blamed on the disk
NO_EFFECT = (".pyc", ".md", ".pt")  # endings of files that change no result
SCRIPTS = (".py",)  # beside the weights of a model they change none either
LOCK = ".r3.lock"  # in a folder of results; holds the id of the process that took it last
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_hash(*paths: Path, without: tuple[str, ...] = ()) -> str:
    """Hex digest of files and of what folders hold, less what has no effect; "" when nothing is there.

    `without`: endings of further files that have none.
    """
    found = [f for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.is_file()]
    lines = [f"{f.name} {sha256(f)}" for f in found if f.suffix not in (*NO_EFFECT, *without)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else ""


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write aside, then rename: `path` holds the old or the new content, never a part. R3Error: disk full."""
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.tmp")
        aside.write_bytes(data.encode() if isinstance(data, str) else data)
        aside.replace(path)


def stage(target: Path, config: dict, inputs, build, version: int = 1, say=print) -> Path:
    """Make `target` (file or folder) unless the same config, `inputs` (paths) and version made it before.

    `build(work: Path)` writes `work/<target.name>`; `work` survives a kill, so that a build can resume. The
    marker `<target>.stage.json` comes last. R3Error: an input or the output is missing, the disk is full.
    """
    wanted = _wanted(config, inputs, target, version)
    marker, run = target.with_name(f"{target.name}.stage.json"), os.environ.get("R3_FRESH", "")
    say(f"running {target.name}: {why}" if (why := _why(marker, wanted, run)) else f"cached  {target.name}")
    if why is None:
        return target
    key = key_of(config, inputs, target, version)
    work, started = target.with_name(f".work-{target.name}-{key[:12]}"), time.time()
    main = os.environ.get("RANK", "0") == "0"  # of several processes one keeps the books
    with room_for(target):
        for other in target.parent.glob(f".work-{target.name}-*") if main else []:  # of another config or run
            if other != work or (run and not (work / f".{run}").exists()):
                shutil.rmtree(other)
        work.mkdir(parents=True, exist_ok=True)
        (work / f".{run}").touch() if run else None
        if main and "WORLD_SIZE" in os.environ:
            marker.unlink(missing_ok=True)  # for which the other processes then wait
        build(work)
    if not main:
        return _made_by_main(target, marker, key)
    record = {"key": key, **wanted, "files": _hashes(work / target.name, work), "run": run}
    record |= {"seconds": round(time.time() - started, 2), "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    marker.unlink(missing_ok=True)  # from here on a kill leaves no marker that claims too much
    shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    (work / target.name).rename(target)
    write_atomic(marker, json.dumps(record, indent=1))
    shutil.rmtree(work)
    return target


def _made_by_main(target: Path, marker: Path, key: str) -> Path:
    """Wait until the main process has put `target` into its place."""
    deadline = time.time() + 600
    while not (marker.exists() and json.loads(marker.read_text())["key"] == key):
        if time.time() > deadline:
            raise R3Error(f"{target} was not finished by the main process: see its log")
        time.sleep(0.2)
    return target


def up_to_date(target: Path, config: dict, inputs, version: int = 1) -> bool:
    """Whether `stage` would take `target` as it is."""
    marker, run = target.with_name(f"{target.name}.stage.json"), os.environ.get("R3_FRESH", "")
    return _why(marker, _wanted(config, inputs, target, version), run) is None


def key_of(config: dict, inputs, target: Path, version: int = 1) -> str:
    """Hex digest of all that decides what `stage` makes of these arguments."""
    return hashlib.sha256(json.dumps(_wanted(config, inputs, target, version), sort_keys=True).encode()).hexdigest()


def _wanted(config: dict, inputs, target: Path, version: int) -> dict:
    wanted = {"config": config, "inputs": _hashes(inputs, target.parent), "version": version}
    return json.loads(json.dumps(wanted, default=str))


def register(results: Path, path, notebook: str, cell: str, inputs=(), **extra) -> None:
    """Enter `path` (file, folder or list of them) into `results/manifest.json` with all that it came from."""
    manifest = results / "manifest.json"
    try:
        entries = json.loads(manifest.read_text())["artefacts"] if manifest.exists() else {}
    except (ValueError, KeyError) as error:
        raise R3Error(f"{manifest} is damaged: delete it and run again") from error
    made = machine() | {"prompt_date": DATE}
    origin = {"notebook": notebook, "cell": cell, "inputs": _hashes(inputs, results), **made}
    origin |= {"seconds": round(time.time() - STARTED, 1), "seeds": [], **extra}  # the notebook's seconds
    entries |= {name: {"sha256": digest, **origin} for name, digest in _hashes(path, results).items()}
    write_atomic(manifest, json.dumps({**made, "artefacts": entries}, indent=1, sort_keys=True))


def save_table(results: Path, frame, name: str, notebook, cell, inputs=(), images=(), **extra) -> Path:
    """Write a DataFrame to `results/tables/<name>.csv` (or beside its `images`) and register it with them."""
    path = (images[0].parent if images else results / "tables") / f"{name}.csv"
    write_atomic(path, frame.to_csv(index=False))
    seeds = sorted(frame["seed"].dropna().astype(str).unique()) if "seed" in frame else []
    register(results, [*images, path], notebook, cell, inputs, **({"seeds": seeds} | extra))
    return path


def save_figure(results: Path, figure, name: str, data, notebook, cell, inputs=(), **extra) -> Path:
    """Write a Figure as png and svg and its data as csv to `results/figures`; register; return the png."""
    from matplotlib import rc_context  # here: what saves tables only need not wait for matplotlib

    for path in (images := [results / "figures" / f"{name}.{kind}" for kind in ("png", "svg")]):
        image = io.BytesIO()
        with rc_context({"svg.hashsalt": name}):  # with no date: equal data, equal bytes
            figure.savefig(image, format=path.suffix[1:], dpi=160, bbox_inches="tight", metadata={"Date": None})
        write_atomic(path, image.getvalue())
    save_table(results, data, name, notebook, cell, inputs, images, **extra)
    return images[0]


@contextmanager
def claimed(folder: Path, shared: bool = False):
    """Make a `folder` of results and hold it for the block: alone, or `shared` with others that share.

    The lock ends with the process, however it ends. On a disk without locks there is none. Raises
    R3Error when the folder cannot be written, or another run holds it.
    """
    with _lock_file(folder) as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            why = f"process {file.read().strip() or 'unknown'} is running in {folder}"
            fix = "wait for it, or give this run another folder with --set name=..."
            raise R3Error(f"{why}: {fix}") from error
        except OSError:  # a disk that knows no locks
            pass
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _lock_file(folder: Path):
    """The open lock of `folder`, which is made; R3Error unless this process may write there."""
    with room_for(folder / LOCK):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return open(folder / LOCK, "a+")


@contextmanager
def room_for(path: Path):
    """Turn what a full disk, or one without write permission, raises in the block into one R3Error.

    Any library may raise what tells of a full disk; the R3Error of a denial names file or folder.
    """
    try:
        yield
    except Exception as error:  # torch and safetensors do not raise OSError
        if isinstance(error, OSError) and error.errno in DENIED and _is_beside(path, error.filename):
            what, why = error.filename or path, os.strerror(error.errno)
            mend = "give yourself permission to write there, or name another folder with --results"
            raise R3Error(f"cannot write {what} ({why}): {mend}") from error
        full = getattr(error, "errno", None) == errno.ENOSPC
        if not full and (isinstance(error, R3Error) or _free(path) >= ROOM):
            raise
        raise R3Error(f"no space left to write {path}: free disk space and run again; it resumes") from error


def _is_beside(path: Path, denied: str | None) -> bool:
    """Whether what was `denied` is the folder of `path`, above it or in it; also if not known."""
    if not isinstance(denied, str):
        return True
    folder, denied = path.absolute().parent, Path(denied).absolute()
    return denied.is_relative_to(folder) or folder.is_relative_to(denied)


def _free(path: Path) -> int:
    """Bytes free on the disk of `path` or of its nearest parent that exists."""
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def _hashes(paths, base: Path) -> dict[str, str]:
    """Digest of each file by its name relative to `base`; of folders, without hidden files and markers."""
    found = {}
    for path in [paths] if isinstance(paths, Path) else paths:
        if not path.exists():
            raise R3Error(f"{path} is missing: run the step that writes it first (r3 reproduce)")
        names = glob("**", root_dir=path, recursive=True) if path.is_dir() else [""]
        files = [path / name for name in sorted(names) if not name.endswith(".stage.json")]
        found |= {Path(os.path.relpath(f, base)).as_posix(): sha256(f) for f in files if f.is_file()}
    return found


def _why(marker: Path, wanted: dict, run: str) -> str | None:
    """Why a stage has to run; None when what it made is there, up to date and intact."""
    try:
        old = json.loads(marker.read_text())
    except (FileNotFoundError, ValueError):
        return f"file missing or damaged: {marker.name}" if marker.exists() else "not there yet"
    if run and old["run"] != run:
        return "fresh run"
    before, now = old["config"], wanted["config"]
    if changed := [k for k in sorted(before | now) if before.get(k) != now.get(k)]:
        return "config changed: " + ", ".join(f"{k} {before.get(k)} -> {now.get(k)}" for k in changed)
    if changed := dict(old["inputs"].items() ^ wanted["inputs"].items()):
        return f"input changed: {', '.join(sorted(changed))}"
    if old["version"] != wanted["version"]:
        return "version changed"
    kept = {marker.parent / name: digest for name, digest in old["files"].items()}
    lost = [file.name for file, digest in kept.items() if not file.is_file() or sha256(file) != digest]
    return f"file missing or damaged: {', '.join(lost)}" if lost else None
