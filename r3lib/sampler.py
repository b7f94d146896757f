"""The sampler: first tries, reflections and second tries by one sampler, and the failures that are mined."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .chat import Chat
from .conditions import Condition
from .engines.base import Completion, Engine, SamplingParams
from .errors import R3Error
from .identity import check_problems, check_task, content, digest
from .verifiers.verdict import Verdict


@dataclass(frozen=True)
class Limits:
    """Token limits of the three turns."""

    attempt: int = 32
    reflection: int = 160
    retry: int = 32


@dataclass(frozen=True)
class Failure:
    """A failed attempt as token ids, with the number of samples that gave it."""

    problem: object
    prompt_ids: list[int]
    attempt_ids: list[int]
    attempt: str
    reason: str
    count: int = 1


FAILURE = [
    "problem_id",
    "attempt",
    "reason",
    "count",
    "attempt_ids",
]  # columns of a table of mined failures
NAME = pa.dictionary(pa.int32(), pa.string())
KEPT = {
    "problem_id": NAME,
    "attempt_ids": pa.list_(pa.int32()),
    "reason": NAME,
    "count": pa.int32(),
}
KEPT = pa.schema(KEPT)  # of them in memory


@dataclass(frozen=True)
class RolloutSampler:
    """Everything that an episode needs: who samples, on what, within which limits."""

    engine: Engine
    chat: Chat
    task: object
    limits: Limits = Limits()
    reflection_temperature: float = 0.0
    retry_turn: str = (
        "restate"  # see `Task.second_turn`; the same for every condition that goes on in the chat
    )

    def first_tries(
        self, problems: Sequence, samples=1, temperature=0.0, seed=0
    ) -> list[list[Completion]]:
        """Answer every problem `samples` times; a completion depends on problem, seed and index alone."""
        prompts = [self.chat.start(self.task, p) for p in problems]
        return self.engine.generate(
            prompts,
            samples,
            SamplingParams(self.limits.attempt, temperature),
            seeds_for(problems, seed, "attempt"),
        )

    def reflections(self, failures: Sequence[Failure], seed=0) -> list[list[int]]:
        """One reflection a failure (token ids)."""
        asked = [self.reflection_prompt(f) for f in failures]
        sampling = SamplingParams(self.limits.reflection, self.reflection_temperature)
        seeds = seeds_for([f.problem for f in failures], seed, "reflection")
        return [c[0].ids for c in self.engine.generate(asked, 1, sampling, seeds)]

    def reflection_prompt(self, failure: Failure) -> list[int]:
        """Task, failed attempt, the request to reflect."""
        return self.chat.follow(
            failure.prompt_ids, failure.attempt_ids, self.task.reflection_prompt
        )

    def retry_prompt(self, failure: Failure, reflection: list[int]) -> list[int]:
        """Task, failed attempt, reflection, the request to try again with the question."""
        again = self.task.second_turn(self.task.retry_prompt, failure.problem, self.retry_turn)
        return self.chat.follow(self.reflection_prompt(failure), reflection, again)

    def second_tries(
        self, condition: Condition, failures: Sequence[Failure], seed=0, reflections=None
    ):
        """Return (reflection ids or None, retry completion) for each failure under `condition`.

        `reflections` are the policy's own, one a failure, which the condition with another's deals
        out anew; they are sampled when not given.
        """
        given = self._given(condition, failures, seed, reflections)
        prompts = [self._second_prompt(condition, f, g) for f, g in zip(failures, given)]
        sampling = SamplingParams(self.limits.retry, condition.temperature)
        seeds = seeds_for([f.problem for f in failures], seed, condition.name)
        retries = self.engine.generate(prompts, 1, sampling, seeds)
        return [(reflection, tries[0]) for reflection, tries in zip(given, retries)]

    def _given(self, condition: Condition, failures, seed, reflections) -> list[list[int] | None]:
        """The reflection before each second try, as token ids."""
        if condition.reflection == "none":
            return [None] * len(failures)
        if condition.reflection == "fixed":
            return [self.chat.written(self.task.generic_reflection)] * len(failures)
        own = self.reflections(failures, seed) if reflections is None else reflections
        return deranged(own, seed) if condition.reflection == "other" else own

    def _second_prompt(self, condition: Condition, failure: Failure, reflection) -> list[int]:
        if not condition.told:
            return failure.prompt_ids
        if reflection is not None:
            return self.retry_prompt(failure, reflection)
        again = self.task.second_turn(
            self.task.blind_retry_prompt, failure.problem, self.retry_turn
        )
        return self.chat.follow(failure.prompt_ids, failure.attempt_ids, again)


def seeds_for(problems: Sequence, seed: int, purpose: str) -> list[int]:
    """One sampling seed a problem, from its id, the run's seed and the purpose."""
    return [Random(f"{seed}/{purpose}/{p.id}").getrandbits(32) for p in problems]


def deranged(items: list, seed: int) -> list:
    """`items` in another order, none in its own place; R3Error when there is no other."""
    if len(items) < 2:
        raise R3Error("shuffled_reflection needs at least 2 failures: ask for more problems")
    order = Random(f"{seed}/shuffle").sample(range(len(items)), len(items))
    place = {a: b for a, b in zip(order, order[1:] + order[:1])}
    return [items[place[i]] for i in range(len(items))]


def judge(task, text: str, problem) -> Verdict:
    """The task's verdict on `text`; R3Error, naming the problem, if `verify` gives none."""
    where = f"on problem {problem.id!r}"
    try:
        verdict = task.verify(text, problem)
    except R3Error:
        raise
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise R3Error(
            f"{task.name}: verify raised {said} {where}: make it return a Verdict"
        ) from error
    if not isinstance(verdict, Verdict) or not isinstance(verdict.ok, bool):
        raise R3Error(
            f"{task.name}: verify returned {verdict!r} {where}: return Verdict(ok, reason)"
        )
    return verdict


def failures_of(problems, tries: list[list[Completion]], sampler: RolloutSampler) -> list[Failure]:
    """The failing (problem, attempt) pairs, each distinct attempt once with its count (paper: section on data)."""
    found: dict[tuple, Failure] = {}
    for problem, completions in zip(problems, tries):
        prompt = sampler.chat.start(sampler.task, problem)
        for completion in completions:
            text = sampler.chat.text(completion.ids)
            verdict = judge(sampler.task, text, problem)
            key = (problem.id, tuple(completion.ids))
            if key in found:
                found[key] = Failure(**{**vars(found[key]), "count": found[key].count + 1})
            elif not verdict.ok:
                found[key] = Failure(problem, prompt, completion.ids, text, verdict.reason)
    return list(found.values())


def mine_failures(
    sampler: RolloutSampler, problems: Sequence, k: int = 64, temperature: float = 1.0, seed=0
) -> list[Failure]:
    """Sample `k` answers a problem and keep the failing ones, deduplicated (paper: k = 64).

    `k=1, temperature=0` mines greedily: the problems that the model gets wrong with its best answer.
    R3Error: two problems have one id, an id is no string, the task has no name, `verify` raises.
    """
    check_task(sampler.task)
    check_problems(problems)
    return failures_of(problems, sampler.first_tries(problems, k, temperature, seed), sampler)


class MinedFailures(Sequence):
    """The failures in a table with the columns FAILURE, each made when it is asked for, from its problem and tokens.

    What is kept is four bytes a token and a few a row: as a list of `Failure`, a million takes tens of gigabytes.
    """

    def __init__(self, path: Path, problems: Sequence, chat: Chat, task):
        check_problems(problems)
        self._problems, self._chat, self._task = {p.id: p for p in problems}, chat, task
        file = pq.ParquetFile(path, read_dictionary=["problem_id", "reason"])
        batches = file.iter_batches(
            4096, columns=KEPT.names
        )  # whose 64-bit tokens are never in memory at once
        small = [
            pa.record_batch([b[f.name].cast(f.type) for f in KEPT], schema=KEPT) for b in batches
        ]
        self._rows = pa.Table.from_batches(small, KEPT)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        name, ids, reason, count = (column[index].as_py() for column in self._rows.columns)
        if name not in self._problems:
            raise R3Error(
                f"failure {index} is of problem {name!r}, which is not among the problems"
            )
        problem = self._problems[name]
        return Failure(
            problem, self._chat.start(self._task, problem), ids, self._chat.text(ids), reason, count
        )

    def longest_of_each(self) -> list[int]:
        """The place of the failure with the longest attempt, for each problem."""
        tokens = pc.list_value_length(self._rows["attempt_ids"]).to_pandas()
        names = self._rows["problem_id"].cast(pa.string()).to_pandas()
        return tokens.groupby(names).idxmax().tolist()

    def digest(self) -> str:
        """Hash of all that training takes from the table and, once a problem, of the prompt."""
        batches = self._rows.select(["problem_id", "attempt_ids", "reason"]).to_batches(4096)
        prompts = (self[place].prompt_ids for place in self.longest_of_each())
        return digest([*(digest(batch.to_pylist()) for batch in batches), *prompts])


def failures_digest(failures: Sequence[Failure]) -> str:
    """Hash of the failures in their order: problems, prompts and attempts."""
    if isinstance(failures, MinedFailures):
        return failures.digest()
    kept = (
        [f.problem.id, list(f.prompt_ids), list(f.attempt_ids), content(f.problem)]
        for f in failures
    )
    return digest(kept)


def check_failures(
    failures: Sequence[Failure], sampler: RolloutSampler, context: int | None
) -> None:
    """R3Error for the first failure of another chat or task, or too long for `context` tokens.

    Of `MinedFailures`, made from chat and task, the longest of each problem stands for the others.
    """
    mined, prompts, turns = isinstance(failures, MinedFailures), {}, {}
    for place in failures.longest_of_each() if mined else range(len(failures)):
        failure = failures[place]
        problem, name = failure.problem, f"failures[{place}] (problem {failure.problem.id!r})"
        if id(problem) not in prompts:
            prompts[id(problem)] = sampler.chat.start(sampler.task, problem)
            again = sampler.task.second_turn(sampler.task.retry_prompt, problem, sampler.retry_turn)
            turns[id(problem)] = len(sampler.chat.follow([], [], again))
        if prompts[id(problem)] != list(failure.prompt_ids):
            raise R3Error(
                f"{name} was mined with another tokenizer or task: mine it with this model"
            )
        asked = len(sampler.reflection_prompt(failure)) + sampler.limits.reflection
        needed = asked + turns[id(problem)] + sampler.limits.retry
        if context and needed > context:
            raise R3Error(
                f"{name} needs up to {needed} tokens with its reflection and retry, the model's "
                f"context has {context}: leave it out, or lower max_completion_length or max_retry_length"
            )
