"""The rollout of a training step: reflections on failures, a retry after each, rewards, masks.

`rollout` is TRL's experimental `rollout_func`, `verified` the reward function that goes with it.
"""

import time
from dataclasses import dataclass
from random import Random

from .engines.base import Completion, SamplingParams
from .sampler import Failure, RolloutSampler, judge
from .verifiers.verdict import Verdict


@dataclass(frozen=True)
class Reflection:
    """A reflection on a failure: one row of a step."""

    failure: Failure
    prompt_ids: list[int]  # task, failed attempt, the request to reflect
    completion: Completion
    retry_seed: int


@dataclass(frozen=True)
class Retry:
    """The retry after a reflection, and the verdict on it."""

    prompt_ids: list[int]  # the reflection's prompt, the reflection, the request to try again
    completion: Completion
    verdict: Verdict


def rollout(prompts: list, trainer) -> dict:
    """TRL's `rollout_func`: G reflections a failure, one retry each, in the order of `prompts`.

    `prompts` come repeated G times, contiguous. Returns ids of prompt and completion, log-probs,
    the rewards, and for the masks with a retry `env_mask` (1 = trained).
    """
    started = time.perf_counter()
    args, runner = trainer.args, trainer.sampler()
    places = [prompt[0]["place"] for prompt in prompts[:: args.num_generations]]
    failures = failures_for(places, trainer)
    seeds = [Random(f"{args.seed}/{place}").getrandbits(32) for place in places]
    reflections = reflect(failures, seeds, runner, args)
    retries = retry(reflections, runner, args)
    rewards = rewards_for(reflections, retries, args.truncation_penalty)
    trainer.r3_metrics = metrics_of(reflections, retries, time.perf_counter() - started)
    output = {"prompt_ids": [r.prompt_ids for r in reflections], "reward": rewards}
    if args.log_completions:
        output |= columns_to_log(reflections, retries, trainer.processing_class)
    return output | completions_under(args.mask, reflections, retries)


def training_order(size: int, wanted: int, seed: int) -> list[int]:
    """`wanted` indices below `size`: seeded permutations, one after the other."""
    order: list[int] = []
    while len(order) < wanted:
        order += Random(f"{seed}/order/{len(order)}").sample(range(size), size)
    return order[:wanted]


def failures_for(places: list[int], trainer) -> list[Failure]:
    """The failure at each place of the training order, one a group."""
    return [trainer.failures[trainer.order[place]] for place in places]


def reflect(failures: list[Failure], seeds: list[int], runner: RolloutSampler, args) -> list[Reflection]:
    """G reflections on each failure, group by group; each failure has its seed."""
    prompts = [runner.reflection_prompt(failure) for failure in failures]
    sampling = SamplingParams(args.max_completion_length, args.temperature)
    groups = runner.engine.generate(prompts, args.num_generations, sampling, seeds)
    return [
        Reflection(failure, prompt, completion, Random(f"{seed}/{sample}").getrandbits(32))
        for failure, prompt, seed, group in zip(failures, prompts, seeds, groups)
        for sample, completion in enumerate(group)
    ]


def retry(reflections: list[Reflection], runner: RolloutSampler, args) -> list[Retry]:
    """One judged retry after each reflection, in the same conversation."""
    prompts = [runner.retry_prompt(r.failure, r.completion.ids) for r in reflections]
    seeds = [r.retry_seed for r in reflections]
    sampling = SamplingParams(args.max_retry_length, args.retry_temperature)
    sampled = [group[0] for group in runner.engine.generate(prompts, 1, sampling, seeds)]
    verdicts = [
        judge(runner.task, runner.chat.text(completion.ids), r.failure.problem)
        for r, completion in zip(reflections, sampled)
    ]
    return [Retry(*parts) for parts in zip(prompts, sampled, verdicts)]


def rewards_for(
    reflections: list[Reflection], retries: list[Retry], penalty: float
) -> list[float]:
    """1 for a retry that is right, else 0 (its score, if it is graded); less `penalty` where the
    reflection was cut off."""
    cut = [not r.completion.finished for r in reflections]
    return [r.verdict.reward - penalty * was_cut for r, was_cut in zip(retries, cut)]


def metrics_of(
    reflections: list[Reflection], retries: list[Retry], seconds: float
) -> dict[str, float]:
    """What a rollout adds to the step's line in metrics.jsonl: rates in 0..1, a mean, seconds."""
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
