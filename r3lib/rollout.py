"""The rollout of a training step: reflections on failures, a retry after each, rewards, masks.

`rollout` is TRL's experimental `rollout_func`, `verified` the reward function that goes with it.
"""

import time
from dataclasses import dataclass
from random import Random

import torch

from .engines.prefix_tree import cut
from .sampler import Failure, Reflection, Retry


@dataclass(frozen=True)
class Group:
    """The reflections on one failure, the retry after each, and its reward."""

    reflections: list[Reflection]
    retries: list[Retry]
    rewards: list[float]

    def has_variance(self) -> bool:
        """Whether the retries differ: else a group teaches at most to stay below the limit."""
        return len({retry.verdict.reward for retry in self.retries}) > 1


def rollout(prompts: list, trainer) -> dict:
    """TRL's `rollout_func`: G reflections a failure, one retry each, in the order of `prompts`.

    `prompts` come repeated G times, contiguous. Returns ids of prompt and completion, log-probs,
    the rewards, and for the masks with a retry `env_mask` (1 = trained). With `dynamic_sampling`
    failures whose group has no variance are replaced by others.
    """
    started = time.perf_counter()
    args = trainer.args
    places = [prompt[0]["place"] for prompt in prompts[:: args.num_generations]]
    groups = sample_groups(places, 0, trainer)
    drawn = list(groups)
    for turn in range(1, args.dynamic_sampling):
        even = [number for number, group in enumerate(groups) if not group.has_variance()]
        if not even:
            break
        others = sample_groups([places[number] for number in even], turn, trainer)
        drawn += others
        for number, group in zip(even, others):
            groups[number] = group
    metrics = metrics_of(drawn, trainer.accelerator)
    if args.dynamic_sampling == 1:
        del metrics["groups_drawn"]
    trainer.r3_metrics = metrics | {"seconds_sampling": time.perf_counter() - started}
    reflections = [r for group in groups for r in group.reflections]
    retries = [r for group in groups for r in group.retries]
    rewards = [reward for group in groups for reward in group.rewards]
    output = {"prompt_ids": [r.prompt_ids for r in reflections], "reward": rewards}
    if args.log_completions:
        output |= columns_to_log(reflections, retries, trainer.processing_class)
    return output | completions_under(args.mask, reflections, retries)


def sample_groups(places: list[int], turn: int, trainer) -> list[Group]:
    """The groups at `places` of the training order; of turns after 0, of failures in their place.

    Each depends on seed, place and turn alone, so that a resumed run draws the same.
    """
    size = len(places)
    engine = trainer.sampler(sync=False).engine
    if hasattr(engine, "keeping"):  # which takes memory until the retries end
        size = max(1, trainer.args.sample_batch // trainer.args.num_generations)
    blocks = [sample_block(some, turn, trainer) for some in cut(places, size)]
    return [group for block in blocks for group in block]


def sample_block(places: list[int], turn: int, trainer) -> list[Group]:
    """The groups at `places`, all sampled at once."""
    args, sampler = trainer.args, trainer.sampler(sync=False)  # TRL has
    size = args.num_generations
    failures = [failure_at(place, turn, trainer) for place in places]
    seeds = [group_seed(args.seed, place, turn) for place in places]
    retry_seeds = [Random(f"{s}/{k}").getrandbits(32) for s in seeds for k in range(size)]
    with sampler.keeping():
        reflections = sampler.reflect(failures, seeds, size)
        retries = sampler.retry(reflections, retry_seeds, args.retry_temperature)
    rewards = rewards_for(reflections, retries, args.truncation_penalty)
    parts = [cut(one, size) for one in (reflections, retries, rewards)]
    return [Group(*group) for group in zip(*parts)]


def group_seed(seed: int, place: int, turn: int = 0) -> int:
    """The sampling seed of the group at `place` of the order of a training with `seed`."""
    name = f"{seed}/{place}/{turn}" if turn else f"{seed}/{place}"
    return Random(name).getrandbits(32)


def training_order(size: int, wanted: int, seed: int) -> list[int]:
    """`wanted` indices below `size`: seeded permutations, one after the other."""
    order: list[int] = []
    while len(order) < wanted:
        order += Random(f"{seed}/order/{len(order)}").sample(range(size), size)
    return order[:wanted]


def failure_at(place: int, turn: int, trainer) -> Failure:
    """The failure at a place of the training order; of turns after 0, drawn from all."""
    if turn == 0:
        return trainer.failures[trainer.order[place]]
    draw = Random(f"{trainer.args.seed}/failure/{place}/{turn}")
    return trainer.failures[draw.randrange(len(trainer.failures))]


def rewards_for(
    reflections: list[Reflection], retries: list[Retry], penalty: float
) -> list[float]:
    """The reward of each retry (1 or 0, or its score), less `penalty` for a cut-off reflection."""
    cut = [not r.completion.finished for r in reflections]
    return [r.verdict.reward - penalty * was_cut for r, was_cut in zip(retries, cut)]


def metrics_of(drawn: list[Group], accelerator) -> dict[str, float]:
    """What a rollout adds to the step's log: rates in 0..1, a mean, and the groups drawn.

    Over all groups that were drawn, so that `dynamic_sampling` raises no rate, in all processes.
    """
    reflections = [r.completion for group in drawn for r in group.reflections]
    sums = [
        sum(retry.verdict.ok for group in drawn for retry in group.retries),
        sum(not reflection.finished for reflection in reflections),
        sum(len(reflection.ids) for reflection in reflections),
        len(drawn),
        len(reflections),
    ]
    sums = accelerator.reduce(torch.tensor(sums, device=accelerator.device)).tolist()
    names = ("retry_success", "truncated_share", "reflection_tokens")
    means = {name: total / sums[-1] for name, total in zip(names, sums)}
    return means | {"groups_drawn": sums[-2]}


def columns_to_log(
    reflections: list[Reflection], retries: list[Retry], tokenizer
) -> dict[str, list[str]]:
    """What `log_completions` shows beside TRL's own columns; see `verified`."""
    return {
        "conversation": [tokenizer.decode(r.prompt_ids) for r in reflections],
        "retry": [tokenizer.decode(r.completion.ids) for r in retries],
        "verdict": [r.verdict.reason for r in retries],
    }


def completions_under(
    mask: str, reflections: list[Reflection], retries: list[Retry]
) -> dict[str, list]:
    """Completion ids, log-probs and (for the masks beyond the reflection) `env_mask`, by row.

    With `mask="reflection"` the completion is the reflection alone. The other masks take
    reflection, turn and retry as the retry's prompt has them.
    """
    if mask == "reflection":
        return {
            "completion_ids": [r.completion.ids for r in reflections],
            "logprobs": [r.completion.logprobs for r in reflections],
        }
    output: dict[str, list] = {"completion_ids": [], "logprobs": [], "env_mask": []}
    for reflection, again in zip(reflections, retries):
        reflected, retried = reflection.completion, again.completion
        joined = again.prompt_ids[len(reflection.prompt_ids) :] + retried.ids
        kept = len(reflected.ids)
        if joined[:kept] != reflected.ids:  # `Chat.closed` has replaced its end
            kept -= 1
        turn = len(joined) - kept - len(retried.ids)
        trained = int(mask == "reflection+retry")
        output["completion_ids"].append(joined)
        output["logprobs"].append(reflected.logprobs[:kept] + [0.0] * turn + retried.logprobs)
        output["env_mask"].append([trained] * kept + [0] * turn + [1] * len(retried.ids))
    return output


def verified(
    completions, reward, prompts=(), conversation=None, log_extra=None, **columns
) -> list[float]:
    """TRL's reward function: the reward as `rollout` found it.

    With `log_completions` TRL's table gets the conversation as the prompt, and retry and verdict.
    """
    if conversation:
        for prompt, text in zip(prompts, conversation):
            prompt[0]["content"] = text
        for name in ("retry", "verdict"):
            log_extra(name, columns[name])
    return reward
