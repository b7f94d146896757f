"""Sample from a transformers causal language model: a decode loop over a tree of keys and values.

A batch is a tree of levels: prefixes that several prompts share, the rest of each distinct prompt, the tokens
sampled for each row. A level holds its keys and values once, in slabs written in place; `attend` takes each
query along its path and joins the levels exactly. Inputs are packed; only slabs have padding, always masked.
"""

import numpy as np
import torch
from torch import Tensor, arange
from tqdm import tqdm
from transformers import AttentionInterface

from ..chat import Chat
from ..errors import R3Error
from ..identity import model_facts
from .base import Completion, Sampling, check

NOT_HERE = "R3's own engine does not sample it, use vLLM"
ATTENTION = "r3_tree"  # name of `attend` among transformers' attention functions
MIN_SHARED, PREFILL_TOKENS = 16, 2048  # shortest shared prefix that makes a level; tokens a prefill forward
MAX_SCORES = 2**24  # attention scores computed at once, 64 MiB: more queries take turns
CHECK_EVERY, COMPACT_BELOW = 4, 0.75  # steps between looks at who ended; live share below which rows move up


class TransformersEngine:
    """Engine over a decoder-only transformers model or PeftModel; decodes `batch_size` rows together.

    A completion ends at the first of `end_ids`, by default those of
    `Chat(tokenizer, model.generation_config)`; give those of your `Chat` if it has other arguments.
    """

    def __init__(
        self, model, tokenizer, batch_size: int = 256, progress: bool = False, end_ids=None
    ):
        check_model(model)
        self.model, self.batch_size, self.progress = model, batch_size, progress
        self.end_ids = end_ids or Chat(tokenizer, model.generation_config).end_ids

    def identity(self) -> dict:
        """See `IdentifiedEngine`: the model's architecture, weights and adapters."""
        return model_facts(self.model)

    @torch.no_grad()
    def generate(self, prompts, n: int, sampling: Sampling, seeds=None) -> list[list[Completion]]:
        """See `Engine`. R3Error: bad n, sampling, seeds or prompt, or an attention that we cannot replace."""
        seeds, most = range(len(prompts)) if seeds is None else seeds, sampling.max_tokens
        check(prompts, n, sampling, seeds, self.model.config.get_text_config().max_position_embeddings - most)
        results = [[None] * n for _ in prompts]
        training, attention = self.model.training, self.model.config._attn_implementation
        AttentionInterface.register(ATTENTION, attend)
        try:
            self.model.eval().set_attn_implementation(ATTENTION)
            with tqdm(total=n * len(prompts), unit="row", disable=not self.progress) as bar:
                for rows in batches(prompts, n, self.batch_size):
                    draw = [np.random.default_rng([seeds[i], k]).random(most, np.float32) for i, k, _ in rows]
                    draw, texts = torch.from_numpy(np.stack(draw)), [text for _, _, text in rows]
                    sampled = self._decode(Tree(self.model, texts, most), draw, sampling, bar.update)
                    for (i, k, _), ids, logprobs in zip(rows, *(tensor.tolist() for tensor in sampled)):
                        stop = next((at for at, token in enumerate(ids, 1) if token in self.end_ids), None)
                        results[i][k] = Completion(ids[:stop], logprobs[:stop], finished=stop is not None)
        finally:
            self.model.train(training).set_attn_implementation(attention)
        return results

    def _decode(self, tree: "Tree", draws: Tensor, sampling: Sampling, report) -> tuple[Tensor, Tensor]:
        """Return ids and log-probabilities [rows, max_tokens]; what follows a row's end token is noise."""
        logits, draws = tree.logits, draws.to(tree.logits.device)
        ids, logprobs = torch.full_like(draws, -1, dtype=torch.long), torch.zeros_like(draws)
        live, ends = arange(len(ids), device=ids.device), torch.tensor([*self.end_ids], device=ids.device)
        for step in range(sampling.max_tokens):
            token, logprob = choose(logits, draws[live, step], sampling.temperature)
            ids[live, step], logprobs[live, step] = token, logprob
            if step % CHECK_EVERY == CHECK_EVERY - 1:
                kept = (~torch.isin(ids[live], ends).any(1)).nonzero().squeeze(1)  # waits for the device
                if len(kept) < COMPACT_BELOW * len(live):
                    report(len(live) - len(kept))
                    live, token = live[kept], token[kept]
                    tree.keep(kept.cpu())
            if not len(live) or step == sampling.max_tokens - 1:
                break
            logits = tree.feed(arange(len(live)), token)
        report(len(live))
        return ids, logprobs


def check_model(model, adapter=None) -> None:
    """R3Error for a model, also with the PEFT config `adapter`, that cannot be sampled."""
    kind, adapter = model.config.model_type, adapter or getattr(model, "active_peft_config", None)
    if model.config.is_encoder_decoder:
        raise R3Error(f"{kind} is an encoder-decoder model: R3 needs a decoder-only one")
    if adapter is not None and adapter.is_prompt_learning:
        raise R3Error(f"{adapter.peft_type.value} puts virtual tokens before a prompt: use LoRA")
    if getattr(model.config.get_text_config(), "max_position_embeddings", None) is None:
        raise R3Error(f"{kind} names no max_position_embeddings: {NOT_HERE}")


def reach(model) -> int | None:
    """Tokens up to which each sees all before it, with one kind of positions; None: no limit.

    Beyond it `attention_chunk_size` (Llama 4) hides tokens, and longrope (Phi-3) moves positions.
    """
    config = model.config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    ropes = [ropes, *(value for value in ropes.values() if isinstance(value, dict))]
    limits = [
        r["original_max_position_embeddings"] for r in ropes if r.get("rope_type") == "longrope"
    ]
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        limits.append(config.attention_chunk_size)
    return min(limits, default=None)


def choose(logits: Tensor, draws: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """A token a row, its log-probability: inverse CDF at `draws` in [0, 1), or argmax at temperature 0."""
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature:
        cdf = logprobs.exp().cumsum(-1)
        token = torch.searchsorted(cdf, draws[:, None] * cdf[:, -1:], right=True)
    else:
        token = logits.argmax(-1, keepdim=True)
    return token.squeeze(1), logprobs.gather(1, token).squeeze(1)


def batches(prompts, n: int, size: int) -> list[list[tuple]]:
    """Cut prompts x n into batches of rows (prompt index, sample index, (ids, how many kin share))."""
    places = {}
    for i, prompt in enumerate(prompts):
        places.setdefault(tuple(prompt), []).append(i)
    runs = sorted(runs_of_kin(sorted(places)), key=lambda run: (run[0] > 0, max(map(len, run[1])) - run[0]))
    texts = [(ids, shared) for shared, kin in runs for ids in kin]
    rows = [(i, k, text) for text in texts for i in places[text[0]] for k in range(n)]
    lone = sum(shared == 0 for _, _, (_, shared) in rows)
    return [part[at : at + size] for part in (rows[:lone], rows[lone:]) for at in range(0, len(part), size)]


def runs_of_kin(prompts: list[tuple]) -> list[tuple[int, list[tuple]]]:
    """Split sorted prompts into runs: the length of the prefix that all share (0: too short), the run."""
    runs = []
    for ids in prompts:
        shared, kin = runs[-1] if runs else (0, [()])
        limit = min(shared or len(ids), len(ids) - 1, len(kin[-1]) - 1)
        common = next((at for at in range(limit) if ids[at] != kin[-1][at]), limit)
        if common >= max(MIN_SHARED, 0.75 * shared):
            runs[-1] = (common, [*kin, ids])
        else:
            runs.append((0, [ids]))
    return runs


def distinct(items: list) -> tuple[list, list[int]]:
    """The distinct items in order of appearance, and each item's place among them."""
    place = {item: i for i, item in enumerate(dict.fromkeys(items))}
    return list(place), [place[item] for item in items]


class Level:
    """Row i goes on from row `owner[i]` above, at position `start[i]`, with `filled[i]` tokens of `width`."""

    def __init__(self, owner: list[int], above: "Level | None", width: int):
        self.owner, self.size, self.width, self.slabs = torch.tensor(owner), len(owner), width, {}
        self.filled = torch.zeros_like(self.owner)
        self.start = (above.start + above.filled if above else self.filled)[self.owner]

    def look(self, row: Tensor, device, own: bool) -> Tensor:
        """Let queries see rows `row` (ascending), their own up to themselves; return places in these."""
        first, self.counts = int(row[0]), row.bincount()[row[0] :]
        rank = arange(len(row)) - (self.counts.cumsum(0) - self.counts)[row - first]
        self.rows, self.slots = slice(first, first + len(self.counts)), int(self.counts.max())
        self.slot = ((row - first) * self.slots + rank).to(device, non_blocking=True)
        seen = self.filled[self.rows, None] + (arange(self.slots) + 1 if own else 0)
        self.used, self.bias = int(seen.max()), None
        self.seen = seen[:, :, None, None, None].to(device, non_blocking=True)
        return self.filled[row] + rank

    def attend(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """[tokens, heads, size] to [tokens, heads, size + 2]: weighted values, top score (base 2), weight."""
        keys, values = (slab[self.rows, :, : self.used].float() for slab in self.slabs[layer])
        (rows, kv), (_, heads, size) = keys.shape[:2], query.shape
        query = query.new_zeros(rows * self.slots, heads, size).index_copy_(0, self.slot, query)
        query = query.float().view(
            rows, self.slots, kv, -1, size
        )  # 16 bits round scores, or overflow
        step = max(1, MAX_SCORES // (rows * heads * self.used))
        if step >= self.slots:
            if self.bias is None:
                self.bias = unseen(self.seen, self.used)  # the same for every layer
            packed = weigh(query, keys, values, self.bias, scaling)
        else:
            seen = self.seen.expand(-1, self.slots, -1, -1, -1).split(step, 1)
            parts = zip(query.split(step, 1), seen)
            parts = [weigh(q, keys, values, unseen(s, self.used), scaling) for q, s in parts]
            packed = torch.cat(parts, 1)
        return packed.reshape(rows * self.slots, heads, -1)[self.slot]


def unseen(seen: Tensor, used: int) -> Tensor:
    """What is added to the scores of `used` keys, of which a query sees the first `seen`."""
    return (arange(used, device=seen.device) >= seen) * -1e30


def weigh(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """[rows, queries, kv, group, size] to the same with size + 2; see `Level.attend`."""
    scores = torch.einsum("nskgd,nktd->nskgt", query, keys)
    scores = torch.add(bias, scores, alpha=scaling * float(np.log2(np.e)))
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp2_()  # on CPU several times faster than exp
    mixed = torch.einsum("nskgt,nktd->nskgd", weights, values)
    return torch.cat([mixed, top, weights.sum(-1, keepdim=True)], -1)


class Tree:
    """The levels of a batch's context, and the forward that extends the last of them."""

    def __init__(self, model, texts: list[tuple], room: int):
        """Prefill `texts` (ids, shared length), leave `room` tokens; `logits` [texts, vocabulary] result."""
        self.model, self.levels, self.longest = model, [], max(len(ids) for ids, _ in texts) + room
        if self.longest > (reach(model) or self.longest):
            raise R3Error(
                f"{model.config.model_type}: {self.longest} tokens reach beyond its first "
                f"{reach(model)}, where chunked attention or longrope begins: {NOT_HERE}"
            )
        texts, owner = distinct(texts)
        prefixes, above = distinct([ids[:shared] for ids, shared in texts])
        if prefixes != [()]:
            self._prefill(prefixes, [0] * len(prefixes))
        self.logits = self._prefill([ids[shared:] for ids, shared in texts], above)[owner]
        if len(self.levels[0].slabs) < model.config.get_text_config().num_hidden_layers:
            raise R3Error(f"{model.config.model_type}: its attention cannot be replaced: {NOT_HERE}")
        self.levels.append(Level(owner, self.levels[-1], room))

    def _prefill(self, texts: list[tuple], owner: list[int]) -> Tensor:
        """Add a level that holds `texts`; return the logits [texts, vocabulary] after each."""
        ids, lengths = [torch.tensor(text) for text in texts], torch.tensor([len(text) for text in texts])
        self.levels.append(Level(owner, self.levels[-1] if self.levels else None, int(lengths.max())))
        logits = []
        for rows in arange(len(ids)).split(max(1, PREFILL_TOKENS // self.levels[-1].width)):
            logits.append(self.feed(rows.repeat_interleave(lengths[rows]), torch.cat([ids[i] for i in rows])))
        return torch.cat(logits)

    def feed(self, row: Tensor, ids: Tensor) -> Tensor:
        """Append `ids` to the last level at rows `row` (ascending); return logits [rows, vocabulary]."""
        level, device, queries = self.levels[-1], self.model.device, row
        place = level.look(row, device, own=True)
        for lower, upper in zip(self.levels[:0:-1], self.levels[-2::-1]):
            queries = lower.owner[queries]
            upper.look(queries, device, own=False)
        level.filled[level.rows] += level.counts
        moved = ids[None], (level.start[row] + place)[None], level.counts.cumsum(0) - 1, row, place
        ids, at, last, *where = (tensor.to(device, non_blocking=True) for tensor in moved)
        self.where = (level.rows, int(place[0])) if level.slots == 1 else where  # a slice is written faster
        try:
            output = self.model(
                ids, position_ids=at, use_cache=False, logits_to_keep=last, tree=self
            )
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            raise R3Error(f"{self.model.config.model_type}: {error}: {NOT_HERE}") from error
        return output.logits[0]

    def keep(self, rows: Tensor) -> None:
        """Keep `rows` (ascending) of the last level and what they need above; move it to the slabs' front."""
        for level in reversed(self.levels):
            used = int(level.filled.max())
            for slab in sum(level.slabs.values(), []) if len(rows) < len(level.owner) else []:
                slab[: len(rows), :, :used] = slab[rows.to(slab.device), :, :used]
            level.start, level.filled = level.start[rows], level.filled[rows]
            rows, level.owner = level.owner[rows].unique(return_inverse=True)


def attend(module, query, key, value, _, scaling=None, tree=None, sliding_window=None, softcap=None,
           s_aux=None, **__):  # fmt: skip
    """Attention on [1, heads, tokens, size] for transformers: store keys and values, attend, join levels."""
    if tree is None:
        raise R3Error(f"{type(module).__name__} keeps what the engine hands it: {NOT_HERE}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is not None or s_aux is not None or (sliding_window or tree.longest) < tree.longest:
        raise R3Error(f"{type(module).__name__}: soft caps, sinks, short windows are not supported: use vLLM")
    query, *pair = (x[0].transpose(0, 1) for x in (query, key, value))
    level, layer = tree.levels[-1], module.layer_idx
    if layer not in level.slabs:
        level.slabs[layer] = [x.new_zeros(level.size, len(x[0]), level.width, x.shape[2]) for x in pair]
    for slab, x in zip(level.slabs[layer], pair):
        slab[tree.where[0], :, tree.where[1]] = x
    with torch.autocast(query.device.type, enabled=False):  # a trainer's model would go back to 16 bits
        parts = torch.stack([level.attend(layer, query, scaling) for level in tree.levels])
    mixed, top, weight = parts[..., :-2], parts[..., -2:-1], parts[..., -1:]
    share = (top - top.amax(0)).exp2()
    return ((mixed * share).sum(0) / (weight * share).sum(0)).to(query.dtype)[None], None
