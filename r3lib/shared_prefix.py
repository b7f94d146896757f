"""Log-probs of groups of completions, with the prompt of a group computed once.

The rows of a group begin with one prompt. They become one row: the prompt, then each distinct
completion, which sees the prompt and itself but not its neighbours.

    rows of a group         packed                     who sees whom
                                                         P P P a a a b b
    P P P a a a             P P P a a a b b            P x
    P P P b b               positions:                 P x x
    P P P b b               0 1 2 3 4 5 3 4            P x x x
                                                       a x x x x
                                                       a x x x x x
                                                       a x x x x x x
                                                       b x x x       x
                                                       b x x x       x x

The values are those of separate rows but for rounding, and so are the gradients: a completion that
occurs twice is computed once and its values are taken twice. `check_packing` compares both.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

PROMPT, PADDING = 0, -1  # segments of a packed row; completions are 1, 2, ...
MOST_TOKENS = 2048  # of a packed row, about: its mask grows with their square
CHUNKS = 4  # parts of a batch, of groups of like length, that are computed one after the other
# how far packed rows may be from separate ones, in fp32 and in 16 bits, by rounding alone
MOST_OFF = {True: 1e-3, False: 0.1}  # mean absolute difference of log-probs, in nats
LEAST_COSINE = {True: 0.9999, False: 0.97}  # of the two gradients


@dataclass
class Packed:
    """Groups as packed rows; `source` and `targets` are [tokens], the scored tokens.

    `source` is the place, in the flattened `input_ids`, of the token before each target; `place`
    [rows, width of a completion] is that of each row's tokens among the targets, or `tokens`, one
    beyond them, for padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    source: Tensor
    targets: Tensor
    place: Tensor

    def attention_mask(self, dtype: torch.dtype) -> Tensor:
        """What is added to attention scores, [groups, 1, width, width]."""
        query, key = self.segments[:, :, None], self.segments[:, None, :]
        width = self.segments.size(1)
        before = torch.ones(width, width, dtype=torch.bool, device=query.device).tril()
        seen = ((query == key) | (key == PROMPT)) & before
        hidden = torch.finfo(dtype).min
        scores = torch.zeros(seen.shape, dtype=dtype, device=query.device)
        return scores.masked_fill(~seen, hidden)[:, None]


@dataclass(frozen=True)
class Group:
    """A prompt, its distinct completions, and which of them each of its rows has: {row: index}."""

    prompt: tuple[int, ...]
    completions: list[tuple[int, ...]]
    of_row: dict[int, int]

    def tokens(self) -> int:
        """Tokens of the packed row."""
        return len(self.prompt) + sum(map(len, self.completions))


def groups_of(
    input_ids: Tensor, attention_mask: Tensor, kept: int, rows: list[int], hidden: int
) -> list[Group]:
    """The groups that `rows` form, shortest first; the last `kept` columns are completions.

    `hidden`: the model's size, for `shares`.
    """
    found: dict[tuple, Group] = {}
    ids, seen = input_ids.tolist(), attention_mask.tolist()
    first = input_ids.size(1) - kept
    for row in rows:
        prompt = tuple(i for i, s in zip(ids[row][:first], seen[row][:first]) if s)
        completion = tuple(i for i, s in zip(ids[row][first:], seen[row][first:]) if s)
        group = found.setdefault(prompt, Group(prompt, [], {}))
        if completion not in group.completions:
            group.completions.append(completion)
        group.of_row[row] = group.completions.index(completion)
    return sorted((part for g in found.values() for part in shares(g, hidden)), key=Group.tokens)


def shares(group: Group, hidden: int) -> list[Group]:
    """The group, or parts of it of about one length, each with the prompt, if they cost less.

    A token costs some 24 hidden^2 operations a layer, and 4 hidden for each token of its packed
    row, seen or not: for a prompt of P tokens least with P + sqrt(P^2 + 6 hidden P) in a row.
    """
    prompt = len(group.prompt)
    rest = group.tokens() - prompt
    number = max(
        round(rest / max(1, isqrt(prompt * (prompt + 6 * hidden)))),
        -(-rest // max(1, MOST_TOKENS - prompt)),
    )
    if number < 2 or len(group.completions) < 2:
        return [group]
    parts = [Group(group.prompt, [], {}) for _ in group.completions[:number]]
    for index in sorted(range(len(group.completions)), key=lambda i: -len(group.completions[i])):
        part = min(parts, key=Group.tokens)
        rows = [row for row, of in group.of_row.items() if of == index]
        part.of_row.update(dict.fromkeys(rows, len(part.completions)))
        part.completions.append(group.completions[index])
    return parts


def pack(groups: list[Group], rows: list[int], kept: int, device) -> Packed:
    """The groups as packed rows; `rows` are all rows of the groups, in the order of the values."""
    ids, positions, segments, source, targets = [], [], [], [], []
    spans: dict[int, range] = {}
    width = max(map(Group.tokens, groups))
    for number, group in enumerate(groups):
        length = len(group.prompt)
        row_ids, row_positions, row_segments = list(group.prompt), list(range(length)), [0] * length
        begun = []
        for segment, completion in enumerate(group.completions, 1):
            start, size = number * width + len(row_ids), len(completion)
            begun.append(range(len(targets), len(targets) + size))
            source += [number * width + length - 1, *range(start, start + size - 1)][:size]
            targets += completion
            row_ids += completion
            row_positions += range(length, length + size)
            row_segments += [segment] * size
        ids.append(torch.tensor(row_ids))
        positions.append(torch.tensor(row_positions))
        segments.append(torch.tensor(row_segments))
        spans |= {row: begun[index] for row, index in group.of_row.items()}
    place = torch.full((len(rows), kept), len(targets))
    for number, row in enumerate(rows):
        span = spans[row]
        place[number, : len(span)] = torch.arange(span.start, span.stop)
    return Packed(
        pad_sequence(ids, batch_first=True).to(device),
        pad_sequence(positions, batch_first=True).to(device),
        pad_sequence(segments, batch_first=True, padding_value=PADDING).to(device),
        torch.tensor(source, dtype=torch.long, device=device),
        torch.tensor(targets, dtype=torch.long, device=device),
        place.to(device),
    )


def packed_values(
    model, backbone, input_ids: Tensor, attention_mask: Tensor, kept: int, rows: list[int],
    batch_size: int | None = None, evenly: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probs and entropies [rows of the batch, kept] of `rows`; zero for all other rows.

    `model` has TRL's fused head (that of a reference gives no entropies: zeros), `backbone` is the
    part of it that gives hidden states. Runs a quarter of the groups at a time, and at most about
    `batch_size` rows. `evenly`: as many times as other processes do, whatever their groups.
    """
    hidden = backbone.config.get_text_config().hidden_size
    if evenly:
        blocks = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        parts = [groups_of(input_ids, attention_mask, kept, block, hidden) for block in blocks]
    else:
        groups = groups_of(input_ids, attention_mask, kept, rows, hidden)
        size = -(-len(groups) // CHUNKS)
        if batch_size is not None:
            size = max(1, min(size, batch_size * len(groups) // len(rows)))
        parts = [groups[first : first + size] for first in range(0, len(groups), size)]
    order, logps, entropies = [], [], []
    for some in parts:
        own = [row for group in some for row in group.of_row]
        packed = pack(some, own, kept, input_ids.device)
        with only_at(backbone, packed.source):
            output = model(
                input_ids=packed.input_ids,
                attention_mask=packed.attention_mask(dtype_of(backbone)),
                position_ids=packed.position_ids,
                shift_labels=packed.targets[None],
                fused_lm_head=True,
            )
        order += own
        # apart: the head then has no gradient of the entropy to compute unless the loss has one
        values = output.log_probs[0]
        known = values.new_zeros(values.shape) if output.entropy is None else output.entropy[0]
        logps.append(F.pad(values, (0, 1))[packed.place])
        entropies.append(F.pad(known, (0, 1))[packed.place])
    index = torch.tensor(order, device=input_ids.device)
    zeros = logps[0].new_zeros(len(input_ids), kept)
    return tuple(zeros.index_copy(0, index, torch.cat(x)) for x in (logps, entropies))


def dtype_of(backbone) -> torch.dtype:
    """The dtype of the attention scores' mask."""
    if torch.is_autocast_enabled(backbone.device.type):
        return torch.get_autocast_dtype(backbone.device.type)
    return backbone.dtype


@contextmanager
def only_at(backbone, places: Tensor) -> Iterator[None]:
    """Within the block `backbone` returns its hidden states at `places` alone, [1, places, size].

    The head is then computed there and nowhere else.
    """

    def pick(_module, _args, output):
        states = output.last_hidden_state
        output.last_hidden_state = states.reshape(-1, states.size(-1))[places][None]
        return output

    handle = backbone.register_forward_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def unpackable(model) -> str | None:
    """What in the architecture of `model` keeps packed rows from being separate ones, or None."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        return f"it has layers of {', '.join(sorted(kinds))}"
    window = getattr(config, "sliding_window", None)
    named = getattr(config, "layer_types", None)
    if window and not named and window < config.max_position_embeddings:
        return f"it looks back only {window} tokens"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"{config._attn_implementation} takes no mask of blocks: load it with sdpa"
    return None


def difference(
    separate: Callable[[], Tensor], packed: Callable[[], Tensor], parameters: list, exact: bool
) -> str | None:
    """How the log-probs or gradients of `packed` differ from those of `separate`, or None.

    Each gives the same log-probs [rows, tokens] with a graph to `parameters`, which keep their
    `.grad` as it is. `exact`: all is computed in fp32.
    """
    logps, slopes = values_and_slopes(separate, parameters)
    try:
        other_logps, other_slopes = values_and_slopes(packed, parameters)
    except (RuntimeError, ValueError, TypeError) as error:
        return f"packed rows raise {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    off = (logps - other_logps).abs().mean().item()
    if not off <= MOST_OFF[exact]:  # also where one is nan
        return f"log-probs differ by {off:.2g} on average"
    products = torch.zeros(3, dtype=torch.double)
    for a, b in zip(slopes, other_slopes):
        if a is not None and b is not None:
            pairs = ((a, b), (a, a), (b, b))
            products += torch.stack([(x * y).double().sum().cpu() for x, y in pairs])
    dot, own, other = products.tolist()
    if own and not dot >= LEAST_COSINE[exact] * (own * other) ** 0.5:
        return f"gradients differ (cosine {dot / max((own * other) ** 0.5, 1e-30):.4f})"
    return None


def values_and_slopes(values: Callable[[], Tensor], parameters: list) -> tuple[Tensor, tuple]:
    """Log-probs, and the gradient of a sum of them at each of `parameters`, None where unused."""
    logps = values().float()
    places = torch.arange(logps.numel(), device=logps.device).view_as(logps)
    score = (logps * places.cos()).sum()  # any weights that differ from token to token
    return logps.detach(), torch.autograd.grad(score, parameters, allow_unused=True)


def whole_groups(batches: list[dict]) -> list[dict]:
    """A step's learning batches with the rows of each prompt side by side, those that teach first.

    Each batch is as TRL has it: tensors [rows, ...], and others for the whole step.
    """
    rows = sum(len(batch["advantages"]) for batch in batches)
    whole = {
        key: torch.cat([batch[key] for batch in batches]) if is_rows(key, batches) else value
        for key, value in batches[0].items()
    }
    group = whole["prompt_ids"].unique(dim=0, return_inverse=True)[1]
    teaching = whole["advantages"].reshape(rows, -1).any(1)
    idle = ~torch.zeros(rows, dtype=torch.bool, device=group.device).index_put(
        (group[teaching],), torch.tensor(True, device=group.device)
    )
    order = (group + rows * idle[group]).argsort(stable=True)
    parts = order.chunk(len(batches))
    return [
        {key: value[part] if is_rows(key, batches) else value for key, value in whole.items()}
        for part in parts
    ]


def is_rows(key: str, batches: list[dict]) -> bool:
    """Whether `key` holds a tensor with an entry for each row."""
    value = batches[0][key]
    return isinstance(value, Tensor) and value.dim() > 0
