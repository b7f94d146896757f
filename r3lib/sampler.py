"""The sampler: first tries, reflections and second tries of one policy on one task."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from random import Random

from .chat import Chat
from .conditions import Condition
from .engines.base import Completion, Engine, PromptLengthError, SamplingParams
from .errors import R3Error
from .identity import check_problems, check_task
from .verifiers.verdict import Verdict


@dataclass(frozen=True)
class Limits:
    """Most tokens of an attempt, a reflection and a retry, under the names of `R3Config`."""

    max_attempt_length: int = 256
    max_completion_length: int = 256
    max_retry_length: int = 256


@dataclass(frozen=True)
class Failure:
    """A failed attempt as token ids, with the number of samples that gave it."""

    problem: object
    prompt_ids: list[int]
    attempt_ids: list[int]
    attempt: str
    reason: str
    count: int = 1


@dataclass(frozen=True)
class Reflection:
    """A reflection on a failure; `prompt_ids`: task, failed attempt, the request to reflect."""

    failure: Failure
    prompt_ids: list[int]
    completion: Completion


@dataclass(frozen=True)
class Retry:
    """The retry after a reflection, and the verdict on it.

    `prompt_ids`: the reflection's prompt, the reflection, the request to try again.
    """

    prompt_ids: list[int]
    completion: Completion
    verdict: Verdict


@dataclass(frozen=True)
class RolloutSampler:
    """Who samples, on what task, within which limits."""

    engine: Engine
    chat: Chat
    task: object
    limits: Limits = Limits()
    reflection_temperature: float = 1.0

    def keeping(self):
        """A block in which a conversation that goes on is not computed again; see the engine."""
        return getattr(self.engine, "keeping", nullcontext)()

    def first_tries(
        self, problems: Sequence, samples=1, temperature=0.0, seed=0
    ) -> list[list[Completion]]:
        """`samples` answers a problem; each depends on problem, seed and index alone."""
        prompts = [self.chat.start(self.task, problem) for problem in problems]
        sampling = SamplingParams(self.limits.max_attempt_length, temperature)
        seeds = seeds_for(problems, seed, "attempt")
        return self._generate(problems, prompts, samples, sampling, seeds)

    def reflect(
        self, failures: Sequence[Failure], seeds: list[int], n=1, temperature: float | None = None
    ) -> list[Reflection]:
        """`n` reflections on each failure, group by group; each failure has its own seed.

        `temperature` None: `reflection_temperature`.
        """
        if temperature is None:
            temperature = self.reflection_temperature
        prompts = [self.reflection_prompt(failure) for failure in failures]
        sampling = SamplingParams(self.limits.max_completion_length, temperature)
        groups = self._generate([f.problem for f in failures], prompts, n, sampling, seeds)
        return [
            Reflection(failure, prompt, completion)
            for failure, prompt, group in zip(failures, prompts, groups)
            for completion in group
        ]

    def retry(
        self, reflections: list[Reflection], seeds: list[int], temperature=0.0
    ) -> list[Retry]:
        """One judged retry after each reflection, in the same conversation."""
        prompts = [self.retry_prompt(r.failure, r.completion.ids) for r in reflections]
        sampling = SamplingParams(self.limits.max_retry_length, temperature)
        # greedy retries of equal prompts are equal: one for all
        keys = range(len(prompts)) if temperature else [tuple(ids) for ids in prompts]
        first = dict(zip(reversed(keys), reversed(range(len(prompts)))))
        asked = sorted(first.values())
        turns, seeds = [prompts[i] for i in asked], [seeds[i] for i in asked]
        problems = [reflections[i].failure.problem for i in asked]
        found = dict(zip(asked, self._generate(problems, turns, 1, sampling, seeds)))
        sampled = [found[first[key]][0] for key in keys]
        verdicts = [
            judge(self.task, self.chat.text(completion.ids), r.failure.problem)
            for r, completion in zip(reflections, sampled)
        ]
        return [Retry(*parts) for parts in zip(prompts, sampled, verdicts)]

    def second_tries(
        self, condition: Condition, failures: Sequence[Failure], seed=0, reflections=None
    ) -> list[tuple[list[int] | None, Completion]]:
        """(reflection as token ids or None, retry) for each failure under `condition`.

        `reflections` are the policy's own, one a failure, which the condition with another's deals
        out anew; they are sampled when not given.
        """
        given = self.reflections_under(condition, failures, seed, reflections)
        prompts = [self.second_prompt(condition, *pair) for pair in zip(failures, given)]
        sampling = SamplingParams(self.limits.max_retry_length, condition.temperature)
        problems = [f.problem for f in failures]
        seeds = seeds_for(problems, seed, condition.name)
        groups = self._generate(problems, prompts, 1, sampling, seeds)
        return [(reflection, group[0]) for reflection, group in zip(given, groups)]

    def own_reflections(self, failures: Sequence[Failure], seed=0) -> list[list[int]]:
        """The policy's reflection on each failure, as token ids."""
        seeds = seeds_for([f.problem for f in failures], seed, "reflection")
        return [r.completion.ids for r in self.reflect(failures, seeds)]

    def reflections_under(
        self, condition: Condition, failures: Sequence[Failure], seed=0, own=None
    ) -> list[list[int] | None]:
        """The reflection before each second try, as token ids; `own`: see `second_tries`."""
        if condition.reflection == "none":
            return [None] * len(failures)
        if condition.reflection == "fixed":
            return [self.chat.written(self.task.generic_reflection)] * len(failures)
        if own is None:
            own = self.own_reflections(failures, seed)
        return deranged(own, seed) if condition.reflection == "other" else own

    def _generate(self, problems, prompts, n, sampling, seeds) -> list[list[Completion]]:
        """The engine's; R3Error, naming it, for a problem whose prompt is too long."""
        try:
            return self.engine.generate(prompts, n, sampling, seeds)
        except PromptLengthError as error:
            limits = "max_attempt_length, max_completion_length or max_retry_length"
            raise R3Error(f"problem {problems[error.place].id!r}: {error} ({limits})") from error

    def reflection_prompt(self, failure: Failure) -> list[int]:
        """Task, failed attempt, the request to reflect."""
        request = self.task.reflection_prompt
        return self.chat.follow(failure.prompt_ids, failure.attempt_ids, request)

    def retry_prompt(self, failure: Failure, reflection: list[int]) -> list[int]:
        """Task, failed attempt, reflection, the request to try again with the question."""
        again = self.task.second_turn(self.task.retry_prompt, failure.problem)
        return self.chat.follow(self.reflection_prompt(failure), reflection, again)

    def second_prompt(
        self, condition: Condition, failure: Failure, reflection: list[int] | None = None
    ) -> list[int]:
        """What a second try under `condition` is sampled from."""
        if not condition.told:
            return failure.prompt_ids
        if reflection is not None:
            return self.retry_prompt(failure, reflection)
        told = self.task.blind_retry_prompt
        again = self.task.second_turn(told, failure.problem)
        return self.chat.follow(failure.prompt_ids, failure.attempt_ids, again)


def seeds_for(problems: Sequence, seed: int, purpose: str) -> list[int]:
    """One sampling seed a problem, from its id, the run's seed and the purpose."""
    return [Random(f"{seed}/{purpose}/{p.id}").getrandbits(32) for p in problems]


def deranged(items: list, seed: int) -> list:
    """`items` in another order, none in its own place; R3Error when there is no other."""
    if len(items) < 2:
        raise R3Error("another's reflection needs at least 2 failures: ask for more problems")
    order = Random(f"{seed}/shuffle").sample(range(len(items)), len(items))
    place = dict(zip(order, order[1:] + order[:1]))
    return [items[place[i]] for i in range(len(items))]


def judge(task, text: str, problem) -> Verdict:
    """The task's verdict on `text`; R3Error, naming the problem, if `verify` gives none."""
    where = f"on problem {problem.id!r}"
    try:
        verdict = task.verify(text, problem)
    except R3Error:
        raise
    except (Exception, SystemExit) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise R3Error(
            f"{task.name}: verify raised {said} {where}: make it return a Verdict"
        ) from error
    if not isinstance(verdict, Verdict):
        raise R3Error(
            f"{task.name}: verify returned {verdict!r} {where}: return Verdict(ok, reason)"
        )
    return verdict


def failures_of(problems, tries: list[list[Completion]], sampler: RolloutSampler) -> list[Failure]:
    """The failing attempts, each distinct one once with its count (paper: section on data)."""
    found: dict[tuple, Failure] = {}
    for problem, completions in zip(problems, tries):
        prompt = sampler.chat.start(sampler.task, problem)
        for completion in completions:
            key = (problem.id, tuple(completion.ids))
            if key in found:
                found[key] = replace(found[key], count=found[key].count + 1)
                continue
            text = sampler.chat.text(completion.ids)
            verdict = judge(sampler.task, text, problem)
            if not verdict.ok:
                found[key] = Failure(problem, prompt, completion.ids, text, verdict.reason)
    return list(found.values())


def mine_failures(
    sampler: RolloutSampler, problems: Sequence, k: int = 64, temperature: float = 1.0, seed=0
) -> list[Failure]:
    """Sample `k` answers a problem and keep the failing ones, deduplicated (paper: k = 64).

    `k=1, temperature=0` mines greedily: what the model gets wrong with its best answer. R3Error:
    two problems have one id, an id is no string, the task has no name, `verify` raises.
    """
    check_task(sampler.task)
    check_problems(problems)
    return failures_of(problems, sampler.first_tries(problems, k, temperature, seed), sampler)
