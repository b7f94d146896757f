"""Attention over a prefix tree: the kv cache, and what transformers calls in each layer.

A query attends to one row of each level. For level l, let m_l be its highest score, w_l the sum of
exp(score - m_l) and o_l the values weighted by these. With m = max m_l the exact attention is

    sum_l o_l exp(m_l - m)  /  sum_l w_l exp(m_l - m)

Scores are in powers of two: exp2 is several times faster than exp on a CPU.
"""

from contextlib import contextmanager
from functools import cached_property
from math import e, log2

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface

from ..errors import R3Error
from .prefix_tree import PrefixTree, QueryGrid, Step
from .support import USE_VLLM

NAME = "r3_tree"  # of `attend` among transformers' attention functions
MAX_SCORES = 2**24  # attention scores computed at once, 64 MiB; more queries take turns


class Queries:
    """A `QueryGrid` on the model's device."""

    def __init__(self, grid: QueryGrid, device):
        self.rows = grid.rows
        self.slots = grid.slots
        self.keys = int(grid.visible.max())
        self.place = to_device(grid.place, device)
        self.visible = to_device(grid.visible[:, :, None, None, None], device)

    @cached_property
    def mask(self) -> Tensor:
        """The attention mask of the whole grid, the same for every layer."""
        return attention_mask(self.visible, self.keys)


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
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    tree.store(module.layer_idx, key, value)
    with torch.autocast(query.device.type, enabled=False):  # a trainer's would go back to 16 bits
        parts = [
            attend_level(query, *cached[module.layer_idx], queries, scaling)
            for cached, queries in zip(tree.levels, tree.queries)
        ]
    return join(torch.stack(parts)).to(query.dtype)[None], None


def attend_level(
    query: Tensor, keys: Tensor, values: Tensor, queries: Queries, scaling: float
) -> Tensor:
    """o, m and w of `query` [queries, heads, size] at one level, as [queries, heads, size + 2]."""
    keys, values = (slab[queries.rows, :, : queries.keys].float() for slab in (keys, values))
    rows, kv_heads = keys.shape[:2]
    heads, size = query.shape[1:]
    grid = query.new_zeros(rows * queries.slots, heads, size).index_copy_(0, queries.place, query)
    grid = grid.float()  # 16 bits round scores, or overflow
    grid = grid.view(rows, queries.slots, kv_heads, heads // kv_heads, size)
    slots = max(1, MAX_SCORES // (rows * heads * queries.keys))
    if slots >= queries.slots:
        parts = weigh(grid, keys, values, queries.mask, scaling)
    else:
        visible = queries.visible.expand(-1, queries.slots, -1, -1, -1)
        turns = zip(grid.split(slots, 1), visible.split(slots, 1))
        masked = ((some, attention_mask(seen, queries.keys)) for some, seen in turns)
        parts = torch.cat([weigh(some, keys, values, mask, scaling) for some, mask in masked], 1)
    return parts.reshape(rows * queries.slots, heads, -1)[queries.place]


def attention_mask(visible: Tensor, keys: int) -> Tensor:
    """What is added to the scores of `keys` keys: 0 for the first `visible`, -1e30 for the rest."""
    return (torch.arange(keys, device=visible.device) >= visible) * -1e30


def weigh(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """o, m and w as [rows, slots, kv heads, group, size + 2].

    `query` is [rows, slots, kv heads, group, size], `keys` and `values` are
    [rows, kv heads, keys, size].
    """
    scores = torch.einsum("nskgd,nktd->nskgt", query, keys)
    scores = torch.add(mask, scores, alpha=scaling * log2(e))
    highest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(highest).exp2_()
    mixed = torch.einsum("nskgt,nktd->nskgd", weights, values)
    return torch.cat([mixed, highest, weights.sum(-1, keepdim=True)], -1)


def join(parts: Tensor) -> Tensor:
    """[queries, heads, size] from the levels' o, m and w [levels, queries, heads, size + 2]."""
    mixed, highest, weight = parts[..., :-2], parts[..., -2:-1], parts[..., -1:]
    share = (highest - highest.amax(0)).exp2()
    return (mixed * share).sum(0) / (weight * share).sum(0)


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
