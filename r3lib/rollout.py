"""The rollout of a training step: reflections on failures, a retry after each, rewards, masks.

`rollout` is TRL's experimental `rollout_func`, `verified` the reward function that goes with it.
"""

import time
from random import Random

from .sampler import Failure, Reflection, Retry


def rollout(prompts: list, trainer) -> dict:
    """TRL's `rollout_func`: G reflections a failure, one retry each, in the order of `prompts`.

    `prompts` come repeated G times, contiguous. Returns ids of prompt and completion, log-probs,
    the rewards, and for the masks with a retry `env_mask` (1 = trained).
    """
    started = time.perf_counter()
    args = trainer.args
    sampler = trainer.sampler()
    size = args.num_generations
    places = [prompt[0]["place"] for prompt in prompts[::size]]
    failures = failures_for(places, trainer)
    seeds = [group_seed(args.seed, place) for place in places]
    reflections = sampler.reflect(failures, seeds, size)
    retry_seeds = [Random(f"{s}/{k}").getrandbits(32) for s in seeds for k in range(size)]
    retries = sampler.retry(reflections, retry_seeds, args.retry_temperature)
    rewards = rewards_for(reflections, retries, args.truncation_penalty)
    trainer.r3_metrics = metrics_of(reflections, retries, time.perf_counter() - started)
    output = {"prompt_ids": [r.prompt_ids for r in reflections], "reward": rewards}
    if args.log_completions:
        output |= columns_to_log(reflections, retries, trainer.processing_class)
    return output | completions_under(args.mask, reflections, retries)


def group_seed(seed: int, place: int) -> int:
    """The sampling seed of the group at `place` of the order of a training with `seed`."""
    return Random(f"{seed}/{place}").getrandbits(32)


def training_order(size: int, wanted: int, seed: int) -> list[int]:
    """`wanted` indices below `size`: seeded permutations, one after the other."""
    order: list[int] = []
    while len(order) < wanted:
        order += Random(f"{seed}/order/{len(order)}").sample(range(size), size)
    return order[:wanted]


def failures_for(places: list[int], trainer) -> list[Failure]:
    """The failure at each place of the training order, one a group."""
    return [trainer.failures[trainer.order[place]] for place in places]


def rewards_for(
    reflections: list[Reflection], retries: list[Retry], penalty: float
) -> list[float]:
    """The reward of each retry (1 or 0, or its score), less `penalty` for a cut-off reflection."""
    cut = [not r.completion.finished for r in reflections]
    return [r.verdict.reward - penalty * was_cut for r, was_cut in zip(retries, cut)]


def metrics_of(
    reflections: list[Reflection], retries: list[Retry], seconds: float
) -> dict[str, float]:
    """What a rollout adds to the step's log: rates in 0..1, a mean, seconds."""
    rows = len(reflections)
    return {
        "retry_success": sum(r.verdict.ok for r in retries) / rows,
        "truncated_share": sum(not r.completion.finished for r in reflections) / rows,
        "reflection_tokens": sum(len(r.completion.ids) for r in reflections) / rows,
        "seconds_sampling": seconds,
    }


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
