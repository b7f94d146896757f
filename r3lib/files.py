"""Files: written whole or not at all, hashed, and a folder of results held by one run."""

import fcntl
import hashlib
import os
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

from .errors import R3Error

NO_EFFECT = (".pyc", ".md", ".pt")  # endings of files that change no result
SCRIPTS = (".py",)  # beside the weights of a model they change none either
LOCK = ".r3.lock"  # in a folder of results; holds the id of the process that took it last


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_hash(*paths: Path, without: tuple[str, ...] = ()) -> str:
    """Hex digest of files and what folders hold, less what has no effect; "": nothing is there.

    `without`: endings of further files that have none.
    """
    found = [f for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.is_file()]
    lines = [f"{f.name} {sha256(f)}" for f in found if f.suffix not in (*NO_EFFECT, *without)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else ""


def data_hash(paths: Iterable[Path | str]) -> str:
    """Hex digest of files, and of all that folders hold; "": none. R3Error: one is missing."""
    lines = []
    for path in map(Path, paths):
        if not path.exists():
            raise R3Error(f"{path}, which the task's files() names, is missing: correct it there")
        files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
        lines += [f"{file.relative_to(path.parent)} {sha256(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else ""


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write aside, then rename: `path` never holds a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.write_bytes(data.encode() if isinstance(data, str) else data)
    aside.replace(path)


@contextmanager
def claimed(folder: Path, shared: bool = False, lock: str = LOCK):
    """Make a `folder` of results and hold it for the block: alone, or `shared` with others.

    `lock`: the file by which it is held.

    The lock ends with the process, however it ends. On a disk without locks there is none. Raises
    R3Error when the folder cannot be written, or another run holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = open(folder / lock, "a+")
    except OSError as error:
        fix = "give yourself permission and room there, or name another folder with --results"
        raise R3Error(f"cannot write {folder} ({error.strerror}): {fix}") from error
    with held as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            why = f"process {file.read().strip() or 'unknown'} is running in {folder}"
            fix = "wait for it, or give this run another folder (--set name=..., output_dir)"
            raise R3Error(f"{why}: {fix}") from error
        except OSError:  # a disk that knows no locks
            pass
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
