"""The Countdown task: reach a target from given numbers, each used exactly once."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations_with_replacement
from math import comb, gcd
from pathlib import Path
from random import Random

from ..errors import R3Error
from ..verifiers import countdown as verifier
from ..verifiers.verdict import Verdict
from . import styles
from .base import Task
from .splits import GENERATED, check_request, split_by_hash

HUB_DATASET = "Jiayi-Pan/Countdown-Tasks-3to4"
BATCH = 1000  # rows of it that are read at once
COUNTED = 5000  # most sets of numbers whose problems are counted (0.1 s for 1,540 of three)


@dataclass(frozen=True)
class CountdownProblem:
    """Numbers in the order in which they are shown, and the target."""

    nums: tuple[int, ...]
    target: int

    @property
    def id(self) -> str:
        """Canonical: the same for every order of the numbers."""
        return "-".join(map(str, sorted(self.nums))) + f"={self.target}"


def split_of(problem: CountdownProblem) -> str:
    """Assign a problem to a split, whatever the order of its numbers."""
    return split_by_hash(problem.id)


class CountdownTask(Task):
    """Countdown as the paper has it (its Table 2), from the hub's data set or a seeded generator.

    `source` is "generator", "hub" or a local folder or file of the data set
    `Jiayi-Pan/Countdown-Tasks-3to4`. The generator draws `count` numbers (one of the given counts)
    from 1 to `largest` and a target from 1 to `largest_target` that they reach; a problem belongs
    to one split whatever the order of its numbers.
    """

    name = "countdown"
    reflection_prompt = (
        "You tried solving the problem and got the wrong answer. Reflect on what went wrong and "
        "write a short explanation that will help you do better next time."
    )
    reasons = ("no_answer", "invalid_expression", "wrong_numbers", "missed_target")

    def __init__(self, source="generator", count=(3, 4), largest=99, largest_target=100):
        self.source = source
        self.count = (count,) if isinstance(count, int) else tuple(count)
        self.largest, self.largest_target = largest, largest_target
        counts = bool(self.count) and min(self.count) >= 2 and max(self.count) <= 4
        if not counts or largest < 2 or largest_target < 1:
            raise R3Error(
                f"countdown options count={count}, largest={largest}, "
                f"largest_target={largest_target}: use counts of 2 to 4, largest >= 2 "
                "and largest_target >= 1"
            )

    def messages(self, problem: CountdownProblem) -> list[dict]:
        """The paper's prompt, and where to put the answer."""
        content = (
            f"Using the numbers {list(problem.nums)}, create an equation that equals "
            f"{problem.target}. You can use basic arithmetic operations (+, -, *, /) one or "
            "multiple times but each number can only be used once. Give the equation in <answer> "
            "</answer> tags."
        )
        return [{"role": "user", "content": content}]

    def verify(self, text: str, problem: CountdownProblem) -> Verdict:
        """See `r3lib.verifiers.countdown.verify`."""
        return verifier.verify(text, problem.nums, problem.target)

    def style(self, reflection: str) -> str:
        """See `r3lib.tasks.styles.countdown`."""
        return styles.countdown(reflection)

    def files(self) -> list[Path]:
        """The local copy that `source` names, if it names one."""
        return [path] if (path := Path(str(self.source))).exists() else []

    def problems(self, split: str, n: int, seed: int) -> list[CountdownProblem]:
        """Return `n` distinct problems; raises R3Error when the source has fewer in that split."""
        check_request(split, n, GENERATED)
        if self.source == "generator":
            return self._generate(split, n, seed)
        return self._read(split, n, seed)

    def _generate(self, split: str, n: int, seed: int) -> list[CountdownProblem]:
        found: dict[str, CountdownProblem] = {}
        there = self._count(split)
        for index in range(200 * n + 2000 if there is None or there >= n else 0):
            problem = self.draw(Random(f"{seed}/{index}"))
            if split_of(problem) == split:
                found.setdefault(problem.id, problem)
            if len(found) == n:
                return list(found.values())
        most = len(found) if there is None else there
        raise R3Error(
            f"countdown {split} holds only about {most} distinct problems with numbers up to "
            f"{self.largest}, {n} were asked for: ask for fewer, or raise largest or largest_target"
        )

    def _count(self, split: str) -> int | None:
        """The distinct problems of `split`, None where counting would take more than a moment."""
        sets = sum(comb(self.largest + k - 1, k) for k in self.count)
        if max(self.count) > 3 or sets > COUNTED:
            return None
        numbers, targets = range(1, self.largest + 1), range(1, self.largest_target + 1)
        drawn = (nums for k in self.count for nums in combinations_with_replacement(numbers, k))
        problems = (CountdownProblem(nums, t) for nums in drawn for t in reachable(nums))
        return sum(p.target in targets and split_of(p) == split for p in problems)

    def draw(self, random: Random) -> CountdownProblem:
        """Draw one problem, of any split."""
        while True:
            nums = tuple(random.randint(1, self.largest) for _ in range(random.choice(self.count)))
            targets = [t for t in reachable(tuple(sorted(nums))) if 1 <= t <= self.largest_target]
            if targets:
                return CountdownProblem(nums, random.choice(targets))

    def _read(self, split: str, n: int, seed: int) -> list[CountdownProblem]:
        # no corpus was made from this source
        parts = {"train", "pretrain"} if split == "train" else {split}
        found: dict[str, CountdownProblem] = {}
        skipped = []
        for row, nums, target in read_rows(self.source, seed):
            problem = _whole(nums, target)
            if problem and (problem.id in found or split_of(problem) not in parts):
                continue
            # slow, so only of rows that are taken
            if problem and target in reachable(tuple(sorted(nums))):
                found[problem.id] = problem
            else:
                skipped.append(f"row {row}: nums={nums}, target={target}")
            if len(found) == n:
                break
        if skipped:
            said = "%s: skipped %d rows with no solvable problem of whole numbers, e.g. %s"
            logging.getLogger(__name__).warning(said, self.source, len(skipped), skipped[0])
        if len(found) < n:
            there = f"{self.source} has {len(found)} {split} problems"
            raise R3Error(f"{there}, {n} were asked for: ask for fewer")
        return list(found.values())


def read_rows(source: str, seed: int) -> Iterator[tuple[int, list[int], int]]:
    """The data set's rows (number, `nums`, `target`), of the hub or a path, in a seeded order."""
    from datasets import load_dataset

    path = Path(source)
    try:
        if path.is_file():
            data = load_dataset(str(path.parent), data_files=path.name, split="train")
        else:
            data = load_dataset(HUB_DATASET if source == "hub" else source, split="train")
    except Exception as error:
        raise R3Error(
            f"cannot read Countdown problems from {source!r} ({type(error).__name__}): "
            'check the path or the network, or use source="generator"'
        ) from error
    if not {"nums", "target"} <= set(data.column_names):
        raise R3Error(
            f"{source!r} has columns {data.column_names}: Countdown needs `nums` (list of int) and "
            "`target` (int)"
        )
    data = data.select_columns(["nums", "target"])
    order = Random(f"{seed}").sample(range(len(data)), len(data))
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        some = data[rows]
        yield from zip(rows, some["nums"], some["target"])


def _whole(nums, target) -> CountdownProblem | None:
    """The problem of a row of whole numbers; None of any other."""
    whole = isinstance(target, int) and bool(nums) and all(isinstance(x, int) for x in nums)
    return CountdownProblem(tuple(nums), target) if whole else None


# room for all 1,540 of three numbers up to 20; one of four numbers takes some 20 kB
@lru_cache(maxsize=2048)
def reachable(nums: tuple[int, ...]) -> tuple[int, ...]:
    """All whole numbers that sorted `nums` reach with + - * /, each used exactly once; exact."""
    return tuple(sorted({n // d for n, d in _fractions(nums) if n % d == 0}))


@lru_cache(maxsize=8192)
def _reduced(nums: tuple[int, ...]) -> frozenset[tuple[int, int]]:
    """The values of `nums` as (numerator, denominator), each value once."""
    divisors = ((n, d, gcd(n, d) if d > 0 else -gcd(n, d)) for n, d in _fractions(nums))
    return frozenset((n // g, d // g) for n, d, g in divisors)


def _fractions(nums: tuple[int, ...]) -> set[tuple[int, int]]:
    """The values of `nums` as plain pairs, several times faster than `Fraction`."""
    if len(nums) == 1:
        return {(nums[0], 1)}
    pairs = set()
    for mask in range(1, 2 ** (len(nums) - 1)):
        left = tuple(x for i, x in enumerate(nums) if mask >> i & 1)
        right = tuple(x for i, x in enumerate(nums) if not mask >> i & 1)
        for a, b in _reduced(left):
            for c, d in _reduced(right):
                x, y, both = a * d, c * b, b * d
                pairs |= {(x + y, both), (x - y, both), (y - x, both), (a * c, both)}
                pairs |= {(x, y)} if y else set()
                pairs |= {(y, x)} if x else set()
    return pairs
