"""Attention over a prefix tree: the kv cache, and what transformers calls in each layer.

A query attends to one row of each level. Each level by itself gives o_l, the attention to its row,
and z_l, the logarithm of the sum of its exponential scores. The exact attention to all levels is

    sum_l o_l exp(z_l)  /  sum_l exp(z_l)
"""

from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface

from ..errors import R3Error
from .prefix_tree import PrefixTree, QueryGrid, Step
from .support import USE_VLLM

NAME = "r3_tree"  # of `attend` among transformers' attention functions
MAX_SCORES = 2**24  # attention scores computed at once, 64 MiB; more queries take turns
cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # sums in fp32


class Queries:
    """A `QueryGrid` on the model's device."""

    def __init__(self, grid: QueryGrid, device):
        self.rows = grid.rows
        self.slots = grid.slots
        self.keys = int(grid.visible.max())
        self.hides = int(grid.visible.min()) < self.keys
        self.full = len(grid.place) == len(grid.visible) * grid.slots  # in their order: no gaps
        self.place = to_device(grid.place, device)
        self.visible = to_device(grid.visible, device)
        self._mask = None, None

    def mask(self, group: int, dtype: torch.dtype, part: slice | None = None) -> Tensor | None:
        """What is added to the scores, [rows, 1, queries or 1, keys]; of some queries with `part`.

        None where every query sees all keys.

        `group`: heads that share their keys, which stand side by side as queries.
        """
        if not self.hides:
            return None
        if part is None and self._mask[0] == (group, dtype):  # the same for every layer
            return self._mask[1]
        visible = self.visible
        if visible.shape[1] > 1:
            visible = visible.repeat_interleave(group, 1)[:, part or slice(None)]
        hidden = torch.arange(self.keys, device=visible.device) >= visible[:, None, :, None]
        mask = hidden.to(dtype) * -1e30
        if part is None:
            self._mask = (group, dtype), mask
        return mask


class TreeCache:
    """The kv cache of a tree whose contexts grow to at most `longest` tokens.

    `levels[l][layer]` is [keys, values], each [rows, kv heads, width, head size].
    """

    def __init__(self, tree: PrefixTree, longest: int, device):
        self.tree = tree
        self.longest = longest
        self.device = device
        self.levels: list[dict[int, list[Tensor]]] = []
        self.dropped: list[list[tuple]] | None = None  # by level: (rows, their keys and values)

    def begin(self, step: Step) -> None:
        """Set which rows the queries of the next forward pass belong and attend to."""
        self._add_levels()
        self.queries = [Queries(grid, self.device) for grid in step.grids]
        own = step.grids[-1]
        if own.slots == 1 and (step.columns == step.columns[0]).all():  # written faster
            self.rows, self.columns = own.rows, int(step.columns[0])
        else:
            self.rows = to_device(step.rows, self.device)
            self.columns = to_device(step.columns, self.device)

    def _add_levels(self) -> None:
        """Have a place for each level of the tree."""
        while len(self.levels) < len(self.tree.levels):
            self.levels.append({})
            if self.dropped is not None:
                self.dropped.append([])

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Write a layer's keys and values [queries, kv heads, head size] into the last level."""
        cached, level = self.levels[-1], self.tree.levels[-1]
        if layer not in cached:
            shape = len(level.parent), key.shape[1], level.width
            cached[layer] = [x.new_zeros(*shape, x.shape[2]) for x in (key, value)]
        for slab, x in zip(cached[layer], (key, value)):
            slab[self.rows, :, self.columns] = x

    def keep(self, rows: np.ndarray) -> None:
        """Keep `rows` of the last level and what they attend to, moved to the front.

        The others are put aside where `dropped` is a list.
        """
        before = [(level.names, level.length.max()) for level in self.tree.levels]
        kept = self.tree.keep(rows)
        for number, (names, used) in enumerate(before):
            if len(kept[number]) == len(names):
                continue
            if self.dropped is not None:
                self._put_aside(number, np.delete(np.arange(len(names)), kept[number]), names, used)
            index = to_device(kept[number], self.device)
            for slab in sum(self.levels[number].values(), []):
                slab[: len(index), :, :used] = slab[index, :, :used]

    def _put_aside(self, number: int, rows: np.ndarray, names: np.ndarray, used: int) -> None:
        """Copy `rows` of a level, of which `used` tokens are filled."""
        index = to_device(rows, self.device)
        pairs = self.levels[number].items()
        copies = {layer: [slab[index, :, :used] for slab in pair] for layer, pair in pairs}
        self.dropped[number].append((names[rows], copies))

    def revive(self, rows: np.ndarray, lengths: np.ndarray, width: int) -> None:
        """See `PrefixTree.revive`: bring back what was put aside."""
        self._add_levels()
        names = [level.names for level in self.tree.levels]
        revived = self.tree.revive(rows, lengths, width)
        for number, level in enumerate(self.tree.levels):
            sources = [(names[number], self.levels[number]), *self.dropped[number]]
            for layer in self.levels[number]:
                pairs = [(place, kept[layer]) for place, kept in sources]
                self.levels[number][layer] = gathered(revived[number], pairs, level.width)
            self.dropped[number] = []


@contextmanager
def tree_attention(model):
    """Within the block `model` is in eval mode and attends over the `TreeCache` given as `tree`."""
    training, attention = model.training, model.config._attn_implementation
    AttentionInterface.register(NAME, attend)
    try:
        model.eval().set_attn_implementation(NAME)
        yield
    finally:
        model.train(training).set_attn_implementation(attention)


def attend(module, query, key, value, _, scaling=None, tree=None, sliding_window=None,
           softcap=None, s_aux=None, **__):  # fmt: skip
    """One layer's attention, on [1, heads, queries, head size], as transformers calls it."""
    layer = type(module).__name__
    if tree is None:
        raise R3Error(f"{layer} keeps what the engine hands it: {USE_VLLM}")
    window = sliding_window or tree.longest
    if softcap is not None or s_aux is not None or window < tree.longest:
        raise R3Error(f"{layer}: soft caps, sinks, short windows are not supported: use vLLM")
    if query.shape[-1] != value.shape[-1]:
        raise R3Error(f"{layer}: values of another size than keys are not supported: {USE_VLLM}")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    # under autocast rotary positions leave queries and keys in fp32
    query, key, value = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    tree.store(module.layer_idx, key, value)
    dtype = query.dtype
    if query.device.type != "cpu":  # 16 bits would round scores, or overflow
        query = query.float()
    with torch.autocast(query.device.type, enabled=False):  # a trainer's would go back to 16 bits
        parts = [
            attend_level(query, *cached[module.layer_idx], queries, scaling)
            for cached, queries in zip(tree.levels, tree.queries)
        ]
    return join(parts, dtype)[None], None


def attend_level(
    query: Tensor, keys: Tensor, values: Tensor, queries: Queries, scaling: float
) -> tuple[Tensor, Tensor]:
    """o and z of `query` [queries, heads, size] at one level: [queries, heads, size or 1]."""
    keys, values = (slab[queries.rows, :, : queries.keys] for slab in (keys, values))
    rows, kv_heads = keys.shape[:2]
    heads, size = query.shape[1:]
    group = heads // kv_heads
    grid = query
    if not queries.full:
        grid = query.new_zeros(rows * queries.slots, heads, size)
        grid.index_copy_(0, queries.place, query)
    grid = grid.view(rows, queries.slots, kv_heads, group, size).transpose(1, 2)
    grid = grid.reshape(rows, kv_heads, queries.slots * group, size)
    attention = cpu_attention if query.device.type == "cpu" else plain_attention
    most = max(1, MAX_SCORES // (rows * kv_heads * queries.keys))
    count = grid.shape[2]
    spans = [slice(first, first + most) for first in range(0, count, most)]
    parts = []
    for span in spans:
        hidden = queries.mask(group, query.dtype, span if len(spans) > 1 else None)
        parts.append(attention(grid[:, :, span], keys, values, attn_mask=hidden, scale=scaling))
    mixed, total = parts[0]
    if len(parts) > 1:
        mixed, total = (torch.cat(some, 2) for some in zip(*parts))
    mixed, total = (
        x.view(rows, kv_heads, queries.slots, group, -1).transpose(1, 2).reshape(-1, heads, y)
        for x, y in ((mixed, size), (total, 1))
    )
    return (mixed, total) if queries.full else (mixed[queries.place], total[queries.place])


def plain_attention(query, keys, values, attn_mask, scale) -> tuple[Tensor, Tensor]:
    """Attention in fp32, that of `query`, and the logarithm of its denominator."""
    scores = (query * scale) @ keys.float().transpose(2, 3)
    if attn_mask is not None:
        scores += attn_mask
    return scores.softmax(-1) @ values.float(), scores.logsumexp(-1)


def join(parts: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    """The attention to all levels [queries, heads, size], from the o and z of each."""
    totals = torch.stack([total for _, total in parts])
    shares = totals.softmax(0)
    return sum(mixed * share for (mixed, _), share in zip(parts, shares)).to(dtype)


def gathered(rows: np.ndarray, sources: list[tuple], width: int) -> list[Tensor]:
    """Keys and values of `rows` in slabs of `width`, from sources (names of rows, their slabs)."""
    size = len(rows)
    made = [slab.new_zeros(size, slab.size(1), width, slab.size(3)) for slab in sources[0][1]]
    for names, pair in sources:
        _, to, here = np.intersect1d(rows, names, return_indices=True)
        to, here = (to_device(index, made[0].device) for index in (to, here))
        for new, slab in zip(made, pair):
            used = min(width, slab.size(2))
            new[to, :, :used] = slab[here, :, :used]
    return made


def to_device(array: np.ndarray, device) -> Tensor:
    """`array` as a tensor on `device`, without waiting for the copy."""
    return torch.from_numpy(array).to(device, non_blocking=True)
