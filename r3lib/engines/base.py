"""The seam between the method and whatever samples text from a policy."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Sampling:
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


class Engine(Protocol):
    """Anything that samples completions for token-id prompts."""

    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seeds: list[int] | None = None
    ) -> list[list[Completion]]:
        """Return `n` completions for each prompt, in the prompts' order.

        `seeds` holds one seed a prompt (default: its position). A completion depends on its prompt,
        its seed and its index among the `n` only, not on the other prompts of the call.
        """
