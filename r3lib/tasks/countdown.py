"""The Countdown task: reach a target from given numbers, each used exactly once."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from pathlib import Path
from random import Random

from ..errors import R3Error
from ..verifiers import countdown as verifier
from ..verifiers.verdict import Verdict
from .base import Task
from .sources import GENERATED, check_request, draw_distinct, load_table, split_by_hash, too_few
from .styles import style_of

EXAMPLE = (  # its problem, 2-6-17=46, is in the split that is never tested
    " For example, using the numbers [17, 2, 6], an equation that equals 46 is "
    "<answer> 2 * (17 + 6) </answer>."
)
MOST_NUMBERS = 6  # what six reach takes a second to compute, 60 times as long as five
HUB_DATASET = "Jiayi-Pan/Countdown-Tasks-3to4"


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
    to one split whatever the order of its numbers. With `example` the prompt ends with a worked
    example, which no test problem is.
    """

    name = "countdown"
    reflection_prompt = (
        "You tried solving the problem and got the wrong answer. Reflect on what went wrong and "
        "write a short explanation that will help you do better next time."
    )
    reasons = ("no_answer", "invalid_expression", "wrong_numbers", "missed_target")

    def __init__(
        self, source="generator", count=(3, 4), largest=99, largest_target=100, example=False
    ):
        self.source = source
        self.example = example
        self.count = (count,) if isinstance(count, int) else tuple(count)
        self.largest = largest
        self.largest_target = largest_target
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
        if self.example:
            content += EXAMPLE
        return [{"role": "user", "content": content}]

    def verify(self, text: str, problem: CountdownProblem) -> Verdict:
        """See `r3lib.verifiers.countdown.verify`."""
        return verifier.verify(text, problem.nums, problem.target)

    def style(self, reflection: str) -> str:
        """See `r3lib.tasks.styles`."""
        return style_of(reflection, "countdown")

    def files(self) -> list[Path]:
        """The local copy that `source` names, if it names one."""
        path = Path(str(self.source))
        return [path] if path.exists() else []

    def problems(self, split: str, n: int, seed: int) -> list[CountdownProblem]:
        """Return `n` distinct problems; raises R3Error when the source has fewer in that split."""
        check_request(split, n, GENERATED)
        if self.source == "generator":
            return self._generate(split, n, seed)
        return self._read(split, n, seed)

    def _generate(self, split: str, n: int, seed: int) -> list[CountdownProblem]:
        def drawn(index: int) -> CountdownProblem | None:
            problem = self.draw(Random(f"{seed}/{index}"))
            return problem if split_of(problem) == split else None

        what = f"countdown {split} with numbers up to {self.largest}"
        return draw_distinct(drawn, n, what, ", or raise largest or largest_target")

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
        for problem in read_rows(self.source, seed):
            if problem.id in found or split_of(problem) not in parts:
                continue
            # slow, so only of rows that are taken
            if problem.target in reachable(tuple(sorted(problem.nums))):
                found[problem.id] = problem
            else:
                skipped.append(problem)
            if len(found) == n:
                break
        if skipped:
            said = "%s: skipped %d rows with no solvable problem, e.g. %s"
            logging.getLogger(__name__).warning(said, self.source, len(skipped), skipped[0])
        if len(found) < n:
            raise too_few(f"{self.source} has {len(found)} {split} problems", n)
        return list(found.values())


def read_rows(source: str, seed: int) -> Iterator[CountdownProblem]:
    """The data set's rows, of the hub or a path, in a seeded order."""
    fix = 'check the path or the network, or use source="generator"'
    data = load_table(source, HUB_DATASET, "Countdown problems", fix)
    if not {"nums", "target"} <= set(data.column_names):
        raise R3Error(
            f"{source!r} has columns {data.column_names}: Countdown needs `nums` (list of int) and "
            "`target` (int)"
        )
    order = Random(f"{seed}").sample(range(len(data)), len(data))
    for place, row in zip(order, data.select(order)):
        nums, target = row["nums"], row["target"]
        if not (isinstance(nums, list) and all(isinstance(n, int) for n in [*nums, target])):
            raise R3Error(
                f"{source!r}, row {place}: nums={nums!r}, target={target!r}: give whole numbers"
            )
        if not 1 <= len(nums) <= MOST_NUMBERS:
            raise R3Error(
                f"{source!r}, row {place}: {len(nums)} numbers: give 1 to {MOST_NUMBERS}, of which "
                "it can be said what they reach"
            )
        yield CountdownProblem(tuple(nums), target)


# room for all 1,540 of three numbers up to 20; one of four numbers takes some 20 kB
@lru_cache(maxsize=2048)
def reachable(nums: tuple[int, ...]) -> tuple[int, ...]:
    """All whole numbers that sorted `nums` reach with + - * /, each used exactly once; exact."""
    return tuple(sorted({n // d for n, d in _fractions(nums) if n % d == 0}))


@lru_cache(maxsize=8192)
def _reduced(nums: tuple[int, ...]) -> frozenset[tuple[int, int]]:
    """The values of `nums` as (numerator, denominator), each value once."""
    reduced = set()
    for n, d in _fractions(nums):
        divisor = gcd(n, d) if d > 0 else -gcd(n, d)
        reduced.add((n // divisor, d // divisor))
    return frozenset(reduced)


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
