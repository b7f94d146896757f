"""What tasks share about where problems come from: splits, requests, data sets."""

import hashlib
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path

from ..errors import R3Error

# shares of the generated problems; the embedded model saw "pretrain" only
GENERATED = {"pretrain": 0.60, "train": 0.20, "validation": 0.05, "test": 0.15}


def split_by_hash(text: str, shares: dict[str, float] = GENERATED) -> str:
    """Assign `text` to one of the splits in `shares` by its hash."""
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) / 2**32
    return next(split for split, end in zip(shares, accumulate(shares.values())) if place < end)


def check_request(split: str, n: int, splits: Iterable[str]) -> None:
    """Raise R3Error for an unknown split, or less than one problem."""
    if split not in splits:
        raise R3Error(f"unknown split {split!r}: use one of {', '.join(splits)}")
    if n < 1:
        raise R3Error(f"n={n} asks for no problem: ask for at least 1")


def draw_distinct(draw: Callable[[int], object], n: int, what: str, fix: str = "") -> list:
    """Return the first `n` distinct problems of draw(0), draw(1) ...; None draws none.

    Raises R3Error, with what else to do, where many draws in a row bring nothing new.
    """
    found, newest, index = {}, 0, 0
    while len(found) < n:
        problem = draw(index)
        if problem is not None and problem.id not in found:
            found[problem.id] = problem
            newest = index
        if index - newest > 2000 + 20 * len(found):
            raise too_few(f"{what} holds only about {len(found)} distinct problems", n, fix)
        index += 1
    return list(found.values())


def too_few(there: str, n: int, fix: str = "") -> R3Error:
    """Return the error that only what is `there` can be given of `n` problems."""
    return R3Error(f"{there}, {n} were asked for: ask for fewer{fix}")


def load_table(source: str, hub: str, what: str, fix: str):
    """Load a data set with `datasets`: `hub` if `source` is "hub", else a local folder or file.

    Raises R3Error, with `fix`, where `what` cannot be read.
    """
    from datasets import load_dataset

    path = Path(source)
    try:
        if path.is_file():
            kind = path.suffix.lstrip(".").replace("jsonl", "json")
            return load_dataset(kind, data_files=str(path), split="train")
        return load_dataset(hub if source == "hub" else source, split="train")
    except Exception as error:
        why = f"cannot read {what} from {source!r} ({type(error).__name__})"
        raise R3Error(f"{why}: {fix}") from error
