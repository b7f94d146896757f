"""One failure as the model sees it: its conversation under a condition, a group of reflections."""

from dataclasses import dataclass

import pandas as pd

from .conditions import Condition
from .rollout import group_seed
from .sampler import Failure, Reflection, Retry, RolloutSampler


@dataclass(frozen=True)
class Group:
    """G reflections on one failure, as text, with the retry after each, its reward and verdict."""

    failure: Failure
    reflections: list[str]
    retries: list[str]
    verdicts: list[str]
    rewards: list[float]
    turns: list[list[tuple[str, list[int]]]]  # of each conversation: (role, token ids)

    @property
    def advantages(self) -> list[float]:
        """Reward minus the group's mean, over its standard deviation (GRPO); 0 without variance."""
        rewards = pd.Series(self.rewards)
        return ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).tolist()

    def table(self) -> pd.DataFrame:
        """A row a reflection: reflection, retry, verdict, reward, advantage."""
        columns = [self.reflections, self.retries, self.verdicts, self.rewards, self.advantages]
        names = ["reflection", "retry", "verdict", "reward", "advantage"]
        return pd.DataFrame(dict(zip(names, columns))).round(2)

    def masked(self, index: int) -> tuple[list[int], list[int], list[str]]:
        """(ids, mask, roles) of the conversation with reflection `index`, one of each a token.

        The mask is 1 on the reflection alone. Roles: task, attempt, request, reflection, retry.
        """
        ids = [token for _, turn in self.turns[index] for token in turn]
        roles = [role for role, turn in self.turns[index] for _ in turn]
        return ids, [int(role == "reflection") for role in roles], roles


def sample_group(
    sampler: RolloutSampler, failure: Failure, n: int, seed: int = 0, place: int = 0
) -> Group:
    """`n` reflections on `failure`, sampled together, and a greedy retry after each.

    The reflections are those that a training with `seed` samples for the failure at `place` of its
    order.
    """
    reflections = sampler.reflect([failure], [group_seed(seed, place)], n)
    retries = sampler.retry(reflections, seeds=list(range(n)))
    text = sampler.chat.text
    return Group(
        failure=failure,
        reflections=[text(reflection.completion.ids) for reflection in reflections],
        retries=[text(retry.completion.ids) for retry in retries],
        verdicts=[retry.verdict.reason for retry in retries],
        rewards=[retry.verdict.reward for retry in retries],
        turns=[_turns(*pair) for pair in zip(reflections, retries)],
    )


def _turns(reflection: Reflection, retry: Retry) -> list[tuple[str, list[int]]]:
    failure, written = reflection.failure, reflection.completion.ids
    attempted = len(failure.prompt_ids) + len(failure.attempt_ids)
    reflected = len(reflection.prompt_ids) + len(written)
    return [
        ("task", failure.prompt_ids),
        ("attempt", failure.attempt_ids),
        ("request", reflection.prompt_ids[attempted:]),
        ("reflection", written),
        ("request", retry.prompt_ids[reflected:]),
        ("retry", retry.completion.ids),
    ]


def conversation_of(
    sampler: RolloutSampler, failure: Failure, under: Condition, other: Failure | None = None
) -> str:
    """What a try at the problem of `failure` is sampled from under a condition, a line a turn.

    Where the condition has a reflection, the policy's own on `failure` is sampled; where it is
    another's, that on `other`.
    """
    failures = [failure] if other is None else [failure, other]
    reflection = sampler.reflections_under(under, failures)[0]
    decode = sampler.chat.tokenizer.decode
    text = decode(sampler.second_prompt(under, failure, reflection))
    for end in map(decode, sampler.chat.end_ids):
        text = text.replace(end, f"{end}\n")
    return text
