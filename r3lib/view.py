"""One failure as the model sees it: its conversation under a condition, a group of reflections."""

from dataclasses import dataclass

import pandas as pd

from .conditions import FIRST_TRY, Condition, condition
from .errors import R3Error
from .rollout import group_seed
from .sampler import Failure, Reflection, Retry, RolloutSampler

Turns = list[tuple[str, list[int]]]  # (role, token ids)


@dataclass(frozen=True)
class Group:
    """G reflections on one failure, as text, with the retry after each, its reward and verdict."""

    failure: Failure
    reflections: list[str]
    retries: list[str]
    verdicts: list[str]
    rewards: list[float]
    turns: list[Turns]  # the conversation with each reflection

    @property
    def advantages(self) -> list[float]:
        """Reward minus the group's mean, over its standard deviation (GRPO); 0 without variance."""
        rewards = pd.Series(self.rewards)
        return ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).tolist()

    def table(self) -> pd.DataFrame:
        """A row a reflection: reflection, retry, verdict, reward, advantage."""
        columns = {
            "reflection": self.reflections,
            "retry": self.retries,
            "verdict": self.verdicts,
            "reward": self.rewards,
            "advantage": self.advantages,
        }
        return pd.DataFrame(columns).round(2)

    def masked(self, index: int) -> tuple[list[int], list[int], list[str]]:
        """(ids, mask, roles) of the conversation with reflection `index`, one of each a token.

        The mask is 1 on the reflection alone. Roles: task, attempt, request, reflection, retry.
        """
        ids = [token for _, turn in self.turns[index] for token in turn]
        roles = [role for role, turn in self.turns[index] for _ in turn]
        return ids, [int(role == "reflection") for role in roles], roles


def sample_group(
    sampler: RolloutSampler,
    failure: Failure,
    n: int,
    seed: int = 0,
    place: int = 0,
    temperature: float = 1.0,
    retry_temperature: float = 0.0,
) -> Group:
    """`n` reflections on `failure`, sampled together, and a retry after each.

    They are those that a training with `seed` samples for the failure at `place` of its order.
    """
    reflections = sampler.reflect([failure], [group_seed(seed, place)], n, temperature)
    retries = sampler.retry(reflections, list(range(n)), retry_temperature)
    text = sampler.chat.text
    return Group(
        failure=failure,
        reflections=[text(reflection.completion.ids) for reflection in reflections],
        retries=[text(retry.completion.ids) for retry in retries],
        verdicts=[retry.verdict.reason for retry in retries],
        rewards=[retry.verdict.reward for retry in retries],
        turns=[_turns_of(*pair) for pair in zip(reflections, retries)],
    )


def _turns_of(reflection: Reflection, retry: Retry) -> Turns:
    ids = reflection.completion.ids
    turns = _told_turns(reflection.failure, retry.prompt_ids, reflection.prompt_ids, ids)
    return [*turns, ("retry", retry.completion.ids)]


def conversation_of(
    sampler: RolloutSampler,
    asked,
    under: Condition | str = FIRST_TRY,
    other: Failure | None = None,
) -> str:
    """What the model is given under a condition, as text, with a line `[role]` before each turn.

    `asked` is a problem, or a `Failure` for a condition that tells of the failed try. Where the
    condition has a reflection, the policy's own on `asked` is sampled; where it is another's, that
    on `other`. R3Error: the one or the other is missing.
    """
    under = condition(under)
    decode = sampler.chat.tokenizer.decode
    turns = _turns_under(sampler, asked, under, other)
    return "\n".join(f"[{role}]\n{decode(ids)}" for role, ids in turns)


def _turns_under(sampler: RolloutSampler, asked, under: Condition, other) -> Turns:
    if not under.told:
        problem = asked.problem if isinstance(asked, Failure) else asked
        return [("task", sampler.chat.start(sampler.task, problem))]
    if not isinstance(asked, Failure):
        raise R3Error(f"{under} goes on after a failed try: give a Failure, not a problem")
    failures = [asked] if other is None else [asked, other]
    reflection = sampler.reflections_under(under, failures)[0]
    prompt = sampler.second_prompt(under, asked, reflection)
    if reflection is None:
        return _told_turns(asked, prompt)
    return _told_turns(asked, prompt, sampler.reflection_prompt(asked), reflection)


def _told_turns(failure: Failure, prompt, reflection_prompt=(), reflection=()) -> Turns:
    """The turns of `prompt`, which asks for a retry of `failure`, with or without a reflection."""
    attempted = len(failure.prompt_ids) + len(failure.attempt_ids)
    turns = [("task", failure.prompt_ids), ("attempt", failure.attempt_ids)]
    if not reflection_prompt:
        return [*turns, ("request", prompt[attempted:])]
    reflected = len(reflection_prompt) + len(reflection)
    return [
        *turns,
        ("request", prompt[attempted : len(reflection_prompt)]),
        ("reflection", list(reflection)),
        ("request", prompt[reflected:]),
    ]
