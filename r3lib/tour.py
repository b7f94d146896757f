"""One failure through the loop, for notebook 00: a group of reflections, its rewards, the mask."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from .engines.base import Completion, SamplingParams
from .errors import R3Error
from .sampler import Failure, RolloutSampler, seeds_for


@dataclass(frozen=True)
class Group:
    """G reflections on one failure and the greedy retry after each; a reward, 0 or 1, for each."""

    failure: Failure
    asked: list[int]  # ids of task, attempt and the request to reflect
    reflections: list[Completion]
    retries: list[Completion]
    turns: list[list[int]]  # ids between a reflection and its retry
    verdicts: list[str]

    @property
    def rewards(self) -> list[float]:
        """1 where the retry is right, else 0."""
        return [float(reason == "ok") for reason in self.verdicts]

    @property
    def advantages(self) -> list[float]:
        """Reward minus the group's mean, over its standard deviation (GRPO); 0 without variance."""
        rewards = pd.Series(self.rewards)
        return ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).tolist()

    @property
    def shown(self) -> list[int]:
        """Indices of the first rewarded and the first unrewarded reflection, if there is one."""
        return [self.rewards.index(reward) for reward in (1.0, 0.0) if reward in self.rewards]

    def table(self, runner: RolloutSampler) -> pd.DataFrame:
        """A row a reflection: reflection, retry, verdict, reward, advantage."""
        columns = {
            "reflection": [runner.chat.text(reflection.ids) for reflection in self.reflections],
            "retry": [runner.chat.text(retry.ids) for retry in self.retries],
            "verdict": self.verdicts,
            "reward": self.rewards,
            "advantage": self.advantages,
        }
        return pd.DataFrame(columns).round(2)

    def masked(self, index: int) -> tuple[list[int], list[int], list[str]]:
        """(ids, mask, roles) of the conversation with reflection `index`, one of each a token."""
        failure, reflection = self.failure, self.reflections[index].ids
        request = self.asked[len(failure.prompt_ids) + len(failure.attempt_ids) :]
        parts = [("task", failure.prompt_ids), ("attempt", failure.attempt_ids)]
        parts += [("request", request), ("reflection", reflection)]
        parts += [("request", self.turns[index]), ("retry", self.retries[index].ids)]
        roles = [role for role, ids in parts for _ in ids]
        ids = [token for _, part in parts for token in part]
        return ids, [int(role == "reflection") for role in roles], roles


def sample_groups(runner: RolloutSampler, failures: Sequence[Failure], size: int, seed=0) -> list[Group]:
    """A group of `size` reflections at temperature 1 for each failure, all sampled together.

    Raises R3Error where there are no failures.
    """
    if not failures:
        raise R3Error("every first try is right: use a harder task to have failures")
    asked = [runner.reflection_prompt(failure) for failure in failures]
    seeds = seeds_for([failure.problem for failure in failures], seed, "tour")
    sampling = SamplingParams(runner.limits.reflection, 1.0)
    groups = runner.engine.generate(asked, size, sampling, seeds)
    prompts = [runner.retry_prompt(f, c.ids) for f, group in zip(failures, groups) for c in group]
    greedy = SamplingParams(runner.limits.retry, 0.0)
    answers = runner.engine.generate(prompts, 1, greedy, range(len(prompts)))
    retries = [answer[0] for answer in answers]
    found = []
    for i, (failure, group) in enumerate(zip(failures, groups)):
        own = slice(i * size, (i + 1) * size)
        starts = [len(asked[i]) + len(reflection.ids) for reflection in group]
        turns = [prompt[start:] for prompt, start in zip(prompts[own], starts)]
        said = [runner.chat.text(retry.ids) for retry in retries[own]]
        verdicts = [runner.task.verify(text, failure.problem).reason for text in said]
        found.append(Group(failure, asked[i], group, retries[own], turns, verdicts))
    return found


def first_with_variance(groups: Sequence[Group]) -> tuple[Group, str]:
    """The first group whose rewards differ, else the first; a sentence on the others."""
    chosen = next((group for group in groups if len(set(group.rewards)) > 1), None)
    flat = sum(len(set(group.rewards)) == 1 for group in groups)
    said = f"{flat} of {len(groups)} groups have no variance: their retries all agree."
    if chosen is None:
        return groups[0], f"{said} The first of them is shown, whose advantages are all 0."
    return chosen, f"{said} The first of the others is shown."
