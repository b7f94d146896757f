"""The tree of shared prefixes behind a batch: what several rows share is computed and stored once.

Prompts of a batch begin alike: the n samples of one prompt, the retries after one failed attempt.
Below are five rows, sampled from three distinct prompts of 8, 9 and 7 tokens that share 6:

    level 0: prefixes      level 1: rest of each prompt     level 2: sampled tokens

    0 |P P P P P P| --+--  0 |a a .| --------------------+--  0 |x x x . .|
                      |                                  +--  1 |x x x . .|
                      +--  1 |b b b| --------------------+--  2 |x x x . .|
                      |                                  +--  3 |x x x . .|
                      +--  2 |c . .| -----------------------  4 |x x x . .|

    parent     -           0  0  0                          0  0  1  1  2
    start      0           6  6  6                          8  8  9  9  7
    length     6           2  3  1                          3  3  3  3  3
    width      6           3                                5

A row's context is its path from the root: row 3 attends to P P P P P P, b b b and its own x x x.
`start` is the position id of a row's first token. In the kv cache a level has one array of keys and
one of values a layer, [rows, kv heads, width, head size]; padding (.) is never attended to.

A forward pass takes its tokens packed, without padding: [queries]. At each level the queries that
attend to the same row are lined up, [rows, slots], so that its keys are read once for all of them.
In the next decode step, which has one query for each row of level 2, that is

    |q0 q1 q2 q3 q4|       |q0 q1| |q2 q3| |q4 . |          |q0| |q1| |q2| |q3| |q4|

Prompts that share nothing are batched apart: their first level is level 1, starting at 0.
"""

from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

MIN_SHARED = 16  # tokens: a shorter shared prefix is not worth a level
MIN_KEPT = 0.75  # a prompt that would shorten a group's prefix to less than this part stays out


@dataclass(frozen=True)
class Row:
    """One completion of a batch: sample number `sample` of prompt number `prompt`."""

    prompt: int
    sample: int
    ids: tuple[int, ...]
    shared: int  # the first tokens of `ids` that form a row of level 0; 0: there is no such level


@dataclass
class Group:
    """Prompts that begin with the same `shared` tokens."""

    shared: int
    prompts: list[tuple[int, ...]]

    def longest_rest(self) -> int:
        """Tokens of the longest prompt after the shared ones."""
        return max(map(len, self.prompts)) - self.shared


@dataclass(frozen=True)
class QueryGrid:
    """How packed queries are lined up over a level's rows, in a grid [rows, slots]."""

    rows: slice
    slots: int
    place: np.ndarray  # [queries]: each query's index in the flattened grid
    visible: np.ndarray  # [rows, slots], or [rows, 1] for all slots: a query sees that many keys


@dataclass(frozen=True)
class Step:
    """What one forward pass needs to know about its tokens, [queries]."""

    position_ids: np.ndarray
    rows: np.ndarray  # the row of the last level that a token belongs to
    columns: np.ndarray  # the token's place in that row
    last: np.ndarray  # [rows]: index of each row's last query, whose logits count
    grids: list[QueryGrid]  # one a level


class Level:
    """Rows that go on from rows `parent` of the level above; arrays are [rows]."""

    def __init__(self, parent: list[int], above: "Level | None", width: int):
        self.parent = np.array(parent)
        self.length = np.zeros_like(self.parent)
        self.start = np.zeros_like(self.parent)
        if above is not None:
            self.start = (above.start + above.length)[self.parent]
        self.width = width
        self.names = np.arange(len(self.parent))  # the rows' numbers before any were dropped
        self.note()

    def note(self) -> None:
        """Remember the rows as they are, for when some have been dropped (see `revive`)."""
        self.whole = SimpleNamespace(parent=self.parent, start=self.start, length=self.length)

    def line_up(self, rows: np.ndarray, causal: bool) -> QueryGrid:
        """The grid of queries that attend to `rows` [queries], ascending.

        With `causal` the queries are the rows' next tokens: each also sees itself and those before.
        """
        row = rows - rows[0]
        counts = np.bincount(row)
        slots = int(counts.max())
        slot = np.arange(len(row)) - (counts.cumsum() - counts)[row]
        span = slice(int(rows[0]), int(rows[0]) + len(counts))
        visible = self.length[span, None]
        if causal:
            visible = visible + np.minimum(np.arange(slots) + 1, counts[:, None])
        return QueryGrid(span, slots, row * slots + slot, visible)


class PrefixTree:
    """The levels of a batch; only the last one grows."""

    def __init__(self):
        self.levels: list[Level] = []

    def add_level(self, parent: list[int], width: int) -> None:
        """Add an empty level, one row an entry of `parent`, with room for `width` tokens a row."""
        above = self.levels[-1] if self.levels else None
        if above is not None:
            above.note()  # its rows have their tokens
        self.levels.append(Level(parent, above, width))

    def append(self, rows: np.ndarray) -> Step:
        """Append a token to the last level at each of `rows` [queries], ascending."""
        level = self.levels[-1]
        own = level.line_up(rows, causal=True)
        columns = level.length[rows] + own.place % own.slots
        counts = np.bincount(rows - rows[0])
        step = Step(level.start[rows] + columns, rows, columns, counts.cumsum() - 1, [own])
        for below, above in zip(self.levels[:0:-1], self.levels[-2::-1]):
            rows = below.parent[rows]
            step.grids.insert(0, above.line_up(rows, causal=False))
        level.length[own.rows] += counts
        return step

    def keep(self, rows: np.ndarray) -> list[np.ndarray]:
        """Drop all but `rows` (ascending) of the last level and their ancestors, and renumber.

        Returns the kept rows of each level by their old numbers.
        """
        kept = []
        for level in reversed(self.levels):
            kept.insert(0, rows)
            level.start = level.start[rows]
            level.length = level.length[rows]
            level.names = level.names[rows]
            rows, level.parent = np.unique(level.parent[rows], return_inverse=True)
        return kept

    def revive(self, rows: np.ndarray, lengths: np.ndarray, width: int) -> list[np.ndarray]:
        """Make `rows` of the last level, dropped ones too, and their ancestors all that there is.

        `rows` are numbers before any were dropped, ascending; of each the first `lengths` tokens
        stay, in `width`. Returns the rows of each level by these numbers; they get new ones.
        """
        revived = []
        for level in reversed(self.levels):
            revived.insert(0, rows)
            level.names = np.arange(len(rows))
            level.start = level.whole.start[rows]
            level.length = level.whole.length[rows]
            parent = level.whole.parent[rows]
            rows, level.parent = np.unique(parent, return_inverse=True)
            level.note()
        last = self.levels[-1]
        last.length, last.width = lengths, width
        return revived


def plan_batches(prompts: list[list[int]], n: int, batch_size: int) -> list[list[Row]]:
    """Cut n samples of each prompt into batches of rows: equal beginnings together, short first."""
    numbers = defaultdict(list)
    for number, ids in enumerate(prompts):
        numbers[tuple(ids)].append(number)
    groups = sorted(group_by_prefix(sorted(numbers)), key=Group.longest_rest)
    rows = [
        Row(number, sample, ids, group.shared)
        for group in groups
        for ids in group.prompts
        for number in numbers[ids]
        for sample in range(n)
    ]
    alone = [row for row in rows if row.shared == 0]
    sharing = [row for row in rows if row.shared > 0]
    return cut(alone, batch_size) + cut(sharing, batch_size)


def group_by_prefix(prompts: list[tuple[int, ...]]) -> list[Group]:
    """Group sorted, distinct `prompts` by how they begin; a group of one shares 0 tokens."""
    groups = [Group(0, [ids]) for ids in prompts[:1]]
    for ids in prompts[1:]:
        group = groups[-1]
        common = common_prefix(group.prompts[-1], ids)
        if group.shared:
            common = min(common, group.shared)
        if common >= max(MIN_SHARED, MIN_KEPT * group.shared):
            group.shared = common
            group.prompts.append(ids)
        else:
            groups.append(Group(0, [ids]))
    return groups


def common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Tokens with which both begin, leaving each at least one if it has any."""
    most = max(0, min(len(a), len(b)) - 1)
    return next((i for i in range(most) if a[i] != b[i]), most)


def cut(rows: list, size: int) -> list[list]:
    """`rows` in pieces of `size`, the last one shorter."""
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def distinct(items: list) -> tuple[list, list[int]]:
    """The distinct items in order of appearance, and each item's index among them."""
    index = {item: i for i, item in enumerate(dict.fromkeys(items))}
    return list(index), [index[item] for item in items]
