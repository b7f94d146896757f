"""Sample from a transformers causal LM: prefill shared prefixes once, decode all rows together.

`prefix_tree` draws how rows share keys and values; `tree_attention` computes attention over them.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import chain

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from tqdm import tqdm

from ..chat import Chat
from ..errors import R3Error
from ..identity import model_facts
from .base import Completion, SamplingParams, check
from .prefix_tree import PrefixTree, Row, common_prefix, cut, distinct, plan_batches
from .support import USE_VLLM, check_length, check_model
from .tree_attention import TreeCache, tree_attention

PREFILL_TOKENS = 2048  # tokens in a forward pass of the prefill
CHECK_EVERY = 4  # decode steps between looks at which rows have ended: each waits for the device
COMPACT_BELOW = 0.75  # part of the rows still running below which the ended ones leave the batch


class TransformersEngine:
    """Engine over a decoder-only transformers model or PeftModel, `batch_size` rows at a time.

    A completion ends at the first of `end_ids`, by default those of
    `Chat(tokenizer, model.generation_config)`; give those of your `Chat` if it has other arguments.
    Forward passes run in the context that `within` makes, a trainer's autocast for example.
    """

    def __init__(
        self, model, tokenizer, batch_size: int = 256, progress: bool = False, end_ids=None,
        within=nullcontext,
    ):  # fmt: skip
        check_model(model)
        self.model = model
        self.model_name = model.config._name_or_path
        self.batch_size = batch_size
        self.progress = progress
        self.end_ids = end_ids or Chat(tokenizer, model.generation_config).end_ids
        self._within = within
        self._kept: list[Batch] | None = None  # those of the last call; None: they are not kept

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Within the block a call goes on where the one before it ended, if its prompts do.

        Keys and values of a conversation are then computed once, and take memory until the block
        ends. The weights must not change in it.
        """
        self._kept = []
        try:
            yield
        finally:
            self._kept = None

    def identity(self) -> dict:
        """See `Engine`: the model's architecture, weights and adapters."""
        return model_facts(self.model)

    @torch.no_grad()
    def generate(
        self, prompts, n: int, sampling: SamplingParams, seeds=None
    ) -> list[list[Completion]]:
        """See `Engine`. R3Error: bad n, sampling, seeds or prompt; a model not served."""
        if seeds is None:
            seeds = range(len(prompts))
        context = self.model.config.get_text_config().max_position_embeddings
        check(prompts, n, sampling, seeds, context - sampling.max_tokens)
        completions = [[None] * n for _ in prompts]
        with (
            tree_attention(self.model),
            self._within(),
            merged(self.model),
            tqdm(total=n * len(prompts), unit="row", disable=not self.progress) as bar,
        ):
            for batch, logits in self._begun(prompts, n, sampling.max_tokens):
                rows = batch.rows
                draws = uniform_draws(rows, seeds, sampling.max_tokens)
                ids, logprobs = self._sample_batch(batch, logits, draws, sampling, bar)
                for row, row_ids, row_logprobs in zip(rows, ids.tolist(), logprobs.tolist()):
                    completion = self._completion(row_ids, row_logprobs)
                    completions[row.prompt][row.sample] = completion
        return completions

    def _begun(self, prompts, n: int, max_tokens: int) -> Iterator[tuple["Batch", Tensor]]:
        """The batches of a call after their prefill, with the logits [rows, vocabulary]."""
        followed = follow(self._kept, prompts) if self._kept and n == 1 else None
        if followed is not None:
            for batch, (numbers, rows) in zip(self._kept, followed):
                if rows:
                    yield batch, batch.go_on(numbers, rows, max_tokens)
            self._kept = [b for b, (_, rows) in zip(self._kept, followed) if rows]
            return
        begun = []
        for rows in plan_batches(prompts, n, self.batch_size):
            batch = Batch(self.model, rows, max_tokens, keep=self._kept is not None)
            begun.append(batch)
            yield batch, batch.prefill(max_tokens)
            if self._kept is None:
                begun.clear()
        if self._kept is not None:
            self._kept = begun

    def _sample_batch(
        self, batch: "Batch", logits: Tensor, draws: Tensor, sampling, bar
    ) -> tuple[Tensor, Tensor]:
        """Ids and log-probs, [rows, max_tokens]; what follows a row's end token is noise."""
        draws = draws.to(logits.device)
        ids = torch.full_like(draws, -1, dtype=torch.long)
        logprobs = torch.zeros_like(draws)
        running = torch.arange(len(draws), device=logits.device)
        computed = torch.zeros_like(running)  # tokens of each row that went through the model
        for step in range(sampling.max_tokens):
            tokens, chosen = sample(logits, draws[running, step], sampling.temperature)
            ids[running, step] = tokens
            logprobs[running, step] = chosen
            if (step + 1) % CHECK_EVERY == 0:
                going = self._unfinished(ids[running])
                if len(going) < COMPACT_BELOW * len(running):
                    bar.update(len(running) - len(going))
                    running, tokens = running[going], tokens[going]
                    if len(running) == 0:
                        break
                    batch.keep(going)
            if step + 1 < sampling.max_tokens:
                logits = batch.decode(tokens)
                computed[running] += 1
        bar.update(len(running))
        batch.sampled([row[:count] for row, count in zip(ids.tolist(), computed.tolist())])
        return ids, logprobs

    def _unfinished(self, ids: Tensor) -> Tensor:
        """Indices of the rows of `ids` without an end token; waits for the device."""
        ends = torch.tensor([*self.end_ids], device=ids.device)
        return (~torch.isin(ids, ends).any(1)).nonzero().squeeze(1)

    def _completion(self, ids: list[int], logprobs: list[float]) -> Completion:
        """A row's tokens up to its first end token, with it."""
        for length, token in enumerate(ids, 1):
            if token in self.end_ids:
                return Completion(ids[:length], logprobs[:length], finished=True)
        return Completion(ids, logprobs, finished=False)


class Batch:
    """Forward passes of the model that extend a batch's prefix tree and kv cache.

    With `keep` its rows can go on after they have ended (see `follow`).
    """

    def __init__(self, model, rows: list[Row], max_tokens: int, keep: bool = False):
        self.model = model
        self.rows = rows
        self.longest = max(len(row.ids) for row in rows) + max_tokens
        check_length(model, self.longest)
        self.tree = PrefixTree()
        self.cache = TreeCache(self.tree, self.longest, model.device)
        self.texts: list[list[int]] = [[] for _ in rows]  # of each, what the last level holds
        self.after_prompt: Tensor | None = None  # kept logits [prompts, vocabulary]
        if keep:
            self.cache.dropped = []

    def prefill(self, max_tokens: int) -> Tensor:
        """Compute each shared prefix and prompt once; return the logits [rows, vocabulary]."""
        prompts, prompt_of_row = distinct([(row.ids, row.shared) for row in self.rows])
        prefixes, prefix_of_prompt = distinct([ids[:shared] for ids, shared in prompts])
        if self.rows[0].shared > 0:
            self._prefill_level(prefixes, [0] * len(prefixes))
        logits = self._prefill_level([ids[shared:] for ids, shared in prompts], prefix_of_prompt)
        if len(self.cache.levels[0]) < self.model.config.get_text_config().num_hidden_layers:
            kind = self.model.config.model_type
            raise R3Error(f"{kind}: its attention cannot be replaced: {USE_VLLM}")
        self.tree.add_level(prompt_of_row, max_tokens)
        if self.cache.dropped is not None:
            self.after_prompt, self.prompt_of_row = logits, prompt_of_row
        return logits[prompt_of_row]

    def sampled(self, ids: list[list[int]]) -> None:
        """Note the sampled tokens of each row that the kv cache holds."""
        self.texts = [text + more for text, more in zip(self.texts, ids)]

    def go_on(self, numbers: list[int], rows: list[Row], max_tokens: int) -> Tensor:
        """Let the rows with these numbers, ascending, go on as `rows`, whose `ids` they begin.

        `shared` tokens of each are there already: either less than all, or all and just the prompt.
        Returns the logits [rows, vocabulary].
        """
        begun = [len(self.rows[number].ids) for number in numbers]
        rest = [row.ids[row.shared :] for row in rows]
        lengths = np.array([row.shared - first for row, first in zip(rows, begun)])
        width = max(len(row.ids) - first for row, first in zip(rows, begun)) + max_tokens
        self.longest = max(len(row.ids) for row in rows) + max_tokens
        check_length(self.model, self.longest)
        self.cache.longest = self.longest
        self.cache.revive(np.array(numbers), lengths, width)
        self.texts = [[*row.ids[first : row.shared]] for row, first in zip(rows, begun)]
        prompts = [self.rows[number].ids for number in numbers]
        self.rows = [replace(row, ids=ids) for row, ids in zip(rows, prompts)]
        self.prompt_of_row = [self.prompt_of_row[number] for number in numbers]
        if not any(rest):  # asked afresh
            return self.after_prompt[self.prompt_of_row]
        logits = self._append(rest)
        self.texts = [text + [*more] for text, more in zip(self.texts, rest)]
        return logits

    def _prefill_level(self, texts: list[tuple], parent: list[int]) -> Tensor:
        """Add a level that holds `texts`; return the logits [texts, vocabulary] after each."""
        self.tree.add_level(parent, max(map(len, texts)))
        return self._append(texts)

    def _append(self, texts: list[tuple]) -> Tensor:
        """Append a text to each row of the last level; return the logits [texts, vocabulary]."""
        logits, done, width = [], 0, max(map(len, texts))
        for some in cut(texts, max(1, PREFILL_TOKENS // width)):
            rows = np.repeat(np.arange(done, done + len(some)), [len(text) for text in some])
            ids = torch.tensor([*chain(*some)])
            logits.append(self._forward(rows, ids))
            done += len(some)
        return torch.cat(logits)

    def decode(self, tokens: Tensor) -> Tensor:
        """Append one token [rows] to each row; return the logits [rows, vocabulary] after it."""
        return self._forward(np.arange(len(tokens)), tokens)

    def keep(self, rows: Tensor) -> None:
        """Drop all but `rows` (ascending)."""
        self.cache.keep(rows.cpu().numpy())

    def _forward(self, rows: np.ndarray, ids: Tensor) -> Tensor:
        """Append `ids` [queries] to the last level at `rows`; return logits [rows, vocabulary]."""
        step = self.tree.append(rows)
        self.cache.begin(step)
        device = self.model.device
        ids, position_ids, last = (
            x.to(device, non_blocking=True)
            for x in (ids, torch.from_numpy(step.position_ids), torch.from_numpy(step.last))
        )
        try:
            output = self.model(
                ids[None], position_ids=position_ids[None], use_cache=False, logits_to_keep=last,
                tree=self.cache,
            )  # fmt: skip
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            raise R3Error(f"{self.model.config.model_type}: {error}: {USE_VLLM}") from error
        return output.logits[0]


def follow(batches: list[Batch], prompts: list[list[int]]) -> list[tuple] | None:
    """For each batch (numbers of rows, those rows as they go on): a row for each of `prompts`.

    A prompt goes on from the row that has most of it. None if one of them begins with no row's
    prompt, if there are too few rows, or if some prompts, not all, are just those of the rows.
    """
    fresh = 0
    free = defaultdict(list)  # rows by their prompts: (batch, number)
    for place, batch in enumerate(batches):
        for number, row in enumerate(batch.rows):
            free[row.ids].append((place, number))
    sizes = sorted({len(ids) for ids in free}, reverse=True)
    found: list[dict[int, Row]] = [{} for _ in batches]
    for index, ids in enumerate(map(tuple, prompts)):
        known = next((ids[:size] for size in sizes if free.get(ids[:size])), None)
        if known is None:
            return None
        rest = ids[len(known) :]
        fresh += not rest
        common = [common_prefix(rest, [*batches[b].texts[n], -1]) for b, n in free[known]]
        best = max(range(len(common)), key=common.__getitem__)
        place, number = free[known].pop(best)
        found[place][number] = Row(index, 0, ids, len(known) + common[best])
    if 0 < fresh < len(prompts):
        return None
    return [(sorted(rows), [rows[number] for number in sorted(rows)]) for rows in found]


@contextmanager
def merged(model) -> Iterator[None]:
    """Within the block LoRA adapters are part of the weights, if `mergeable`: a sixth less time."""
    layers = mergeable(model)
    parameters = [p for layer in layers for p in layer.get_base_layer().parameters()]
    before = [parameter.data for parameter in parameters]
    try:
        for layer in layers:
            layer.merge(safe_merge=True)  # of copies
        yield
    finally:
        for parameter, data in zip(parameters, before):
            parameter.data = data
        for layer in layers:
            layer.merged_adapters.clear()


def mergeable(model) -> list[LoraLayer]:
    """The LoRA layers of `model`; none unless all are plain ones over fp32 weights of their own.

    Weights or products in 16 bits would round most of an adapter away.
    """
    users = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    in_16_bits = torch.is_autocast_enabled(model.device.type)
    in_16_bits |= "_original_forward" in vars(model)  # accelerate's, with an autocast around it
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        base, odd = layer.get_base_layer(), layer.lora_variant or any(layer.lora_bias.values())
        plain = type(base) is torch.nn.Linear and base.weight.dtype == torch.float32 and not odd
        if in_16_bits or not plain or users[id(base.weight)] > 1:
            return []
        if layer.merged or layer.disable_adapters:
            return []
    return layers


def uniform_draws(rows: list[Row], seeds, max_tokens: int) -> Tensor:
    """[rows, max_tokens] in [0, 1); a row's depend on its prompt's seed and its sample alone."""
    generators = [np.random.default_rng([seeds[row.prompt], row.sample]) for row in rows]
    return torch.from_numpy(np.stack([g.random(max_tokens, np.float32) for g in generators]))


def sample(logits: Tensor, draws: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """A token a row and its log-prob: inverse CDF at `draws`, or argmax at temperature 0."""
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature:
        cdf = logprobs.exp().cumsum(-1)
        tokens = torch.searchsorted(cdf, draws[:, None] * cdf[:, -1:], right=True)
    else:
        tokens = logits.argmax(-1, keepdim=True)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)
