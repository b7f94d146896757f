"""The seam between the method and whatever samples text from a policy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from ..errors import R3Error


@dataclass(frozen=True)
class SamplingParams:
    """How to sample: at most `max_tokens` tokens, at `temperature` (0 is greedy)."""

    max_tokens: int
    temperature: float = 1.0


@dataclass(frozen=True)
class Completion:
    """Sampled token ids, one log-probability each, and whether an end-of-turn token closed them.

    `ids` ends with that token exactly when `finished`. `logprobs` are natural logarithms under the
    policy at the sampling temperature (at temperature 1 when greedy).
    """

    ids: list[int]
    logprobs: list[float]
    finished: bool


class PromptLengthError(R3Error):
    """The prompt at `place` does not fit: it has `length` tokens, and `longest` are left for it."""

    def __init__(self, place: int, length: int, longest: int, max_tokens: int):
        super().__init__(
            f"prompt {place} has {length} tokens, not 1 to {longest}: shorten it or leave it out, "
            f"or lower max_tokens={max_tokens}"
        )
        self.place = place


class Engine(Protocol):
    """Anything that samples completions for token-id prompts.

    Two things are optional. `model_name` names its model in results. `identity()` gives facts by
    name, as JSON has them, equal exactly for engines that sample the same: so no folder mixes the
    results of two.
    """

    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        sampling: SamplingParams,
        seeds: list[int] | None = None,
    ) -> list[list[Completion]]:
        """Return `n` completions for each prompt, in the prompts' order.

        `seeds` holds one seed a prompt (default: its position). A completion depends on its prompt,
        its seed and its index among the `n` only, not on the other prompts of the call.
        """


@runtime_checkable
class RemoteEngine(Engine, Protocol):
    """An engine in another process: it samples from the adapter that `sync` named last.

    The trainer sets its `end_ids`, the tokens that end a completion.
    """

    def sync(self, adapter: Path | None) -> None:
        """From now on sample with the LoRA adapter that PEFT saved in folder `adapter`, or none."""


def identity(engine: Engine) -> dict:
    """What tells the engine's policy from others; of an engine that does not say it, its class."""
    if hasattr(engine, "identity"):
        return engine.identity()
    return {"engine": type(engine).__name__}


def check(prompts, n: int, sampling: SamplingParams, seeds, longest: int) -> None:
    """R3Error for what cannot be sampled; a prompt of `longest` leaves room for max_tokens."""
    if min(n, sampling.max_tokens) < 1 or sampling.temperature < 0:
        raise R3Error(
            f"n={n}, {sampling}: n and max_tokens must be at least 1, temperature at least 0"
        )
    if len(seeds) != len(prompts) or min(seeds, default=0) < 0:
        raise R3Error(
            f"{len(seeds)} seeds for {len(prompts)} prompts: give each prompt one, from 0 up"
        )
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= longest:
            raise PromptLengthError(i, len(prompt), longest, sampling.max_tokens)
