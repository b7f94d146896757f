"""Which split a problem is in, and what may be asked of one."""

import hashlib
from collections.abc import Iterable
from itertools import accumulate

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
