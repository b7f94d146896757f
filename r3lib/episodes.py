"""Episodes: attempt, verdict, and a second try under a condition; and the failures that training starts from."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from random import Random

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .chat import Chat
from .engines.base import Completion, Engine, Sampling, identity
from .errors import R3Error
from .identity import (
    check_problems,
    check_task,
    content,
    differences,
    digest,
    read_note,
    task_facts,
    write_note,
)
from .verifiers.verdict import Verdict

SCHEMA_VERSION, SHARD = 1, 1024  # problems in a shard


class Condition(StrEnum):
    """What happens after a failed first try; the same words stand in code, tables, legends and prose."""

    first_try = "first_try"
    resample = "resample"  # asked afresh, blind, at temperature 1
    retry = "retry"  # told that it failed, no reflection, greedy
    retry_sampled = "retry_sampled"  # the same at temperature 1
    generic_reflection = "generic_reflection"  # one fixed sentence in place of the reflection
    shuffled_reflection = "shuffled_reflection"  # a reflection written for another problem
    reflect_retry = "reflect_retry"  # the method


SECOND_TRIES = tuple(c for c in Condition if c is not Condition.first_try)
SAMPLED = (Condition.resample, Condition.retry_sampled)


@dataclass(frozen=True)
class Episode:
    """One row of every results file. `*_tokens` count tokens; second-try fields are None in `first_try` rows."""

    task: str
    split: str
    problem_id: str
    policy: str
    seed: int
    condition: str
    sample: int
    prompt: str
    attempt: str
    attempt_reason: str
    reflection: str | None
    retry: str | None
    retry_reason: str | None
    attempt_tokens: int
    reflection_tokens: int | None
    retry_tokens: int | None
    model: str
    adapter: str
    schema_version: int = SCHEMA_VERSION


UNTRAINED = "vanilla"  # the policy that R3 starts from


@dataclass(frozen=True)
class Policy:
    """Who answers: the names that go into the results, and the seed of its training."""

    name: str = UNTRAINED
    seed: int = 0
    model: str = "base_model"
    adapter: str = ""


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


FAILURE = ["problem_id", "attempt", "reason", "count", "attempt_ids"]  # columns of a table of mined failures
NAME = pa.dictionary(pa.int32(), pa.string())
KEPT = {"problem_id": NAME, "attempt_ids": pa.list_(pa.int32()), "reason": NAME, "count": pa.int32()}
KEPT = pa.schema(KEPT)  # of them in memory


@dataclass(frozen=True)
class Runner:
    """Everything that an episode needs: who samples, on what, within which limits."""

    engine: Engine
    chat: Chat
    task: object
    limits: Limits = Limits()
    reflection_temperature: float = 0.0
    retry_turn: str = "restate"  # see `Task.second_turn`; the same for every condition that goes on in the chat

    def first_tries(self, problems: Sequence, samples=1, temperature=0.0, seed=0) -> list[list[Completion]]:
        """Answer every problem `samples` times; a completion depends on problem, seed and index alone."""
        prompts = [self.chat.start(self.task, p) for p in problems]
        return self.engine.generate(
            prompts, samples, Sampling(self.limits.attempt, temperature), seeds_for(problems, seed, "attempt")
        )

    def reflections(self, failures: Sequence[Failure], seed=0) -> list[list[int]]:
        """One reflection a failure (token ids)."""
        asked = [self.reflection_prompt(f) for f in failures]
        sampling = Sampling(self.limits.reflection, self.reflection_temperature)
        seeds = seeds_for([f.problem for f in failures], seed, "reflection")
        return [c[0].ids for c in self.engine.generate(asked, 1, sampling, seeds)]

    def reflection_prompt(self, failure: Failure) -> list[int]:
        """Task, failed attempt, the request to reflect."""
        return self.chat.follow(failure.prompt_ids, failure.attempt_ids, self.task.reflection_prompt)

    def retry_prompt(self, failure: Failure, reflection: list[int]) -> list[int]:
        """Task, failed attempt, reflection, the request to try again with the question."""
        again = self.task.second_turn(self.task.retry_prompt, failure.problem, self.retry_turn)
        return self.chat.follow(self.reflection_prompt(failure), reflection, again)

    def second_tries(self, condition: Condition, failures: Sequence[Failure], seed=0, reflections=None):
        """Return (reflection ids or None, retry completion) for each failure under `condition`.

        `reflections` are those of `reflect_retry`, which `shuffled_reflection` deals out anew; they are
        sampled when not given.
        """
        given = [None] * len(failures)
        if condition is Condition.generic_reflection:
            given = [self.chat.tokenizer.encode(self.task.generic_reflection, add_special_tokens=False)] * len(failures)
        elif condition in (Condition.reflect_retry, Condition.shuffled_reflection):
            given = reflections if reflections is not None else self.reflections(failures, seed)
            if condition is Condition.shuffled_reflection:
                given = deranged(given, seed)
        prompts = [self._second_prompt(condition, f, g) for f, g in zip(failures, given)]
        temperature = 1.0 if condition in SAMPLED else 0.0
        sampling = Sampling(self.limits.retry, temperature)
        seeds = seeds_for([f.problem for f in failures], seed, condition)
        return list(zip(given, (c[0] for c in self.engine.generate(prompts, 1, sampling, seeds))))

    def _second_prompt(self, condition, failure, reflection) -> list[int]:
        if condition is Condition.resample:
            return failure.prompt_ids
        if condition in (Condition.retry, Condition.retry_sampled):
            again = self.task.second_turn(self.task.blind_retry_prompt, failure.problem, self.retry_turn)
            return self.chat.follow(failure.prompt_ids, failure.attempt_ids, again)
        return self.retry_prompt(failure, reflection)


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


def failures_of(problems, tries: list[list[Completion]], runner: Runner) -> list[Failure]:
    """The failing (problem, attempt) pairs, each distinct attempt once with its count (paper: section on data)."""
    found: dict[tuple, Failure] = {}
    for problem, completions in zip(problems, tries):
        prompt = runner.chat.start(runner.task, problem)
        for completion in completions:
            text = runner.chat.text(completion.ids)
            verdict = judge(runner.task, text, problem)
            key = (problem.id, tuple(completion.ids))
            if key in found:
                found[key] = Failure(**{**vars(found[key]), "count": found[key].count + 1})
            elif not verdict.ok:
                found[key] = Failure(problem, prompt, completion.ids, text, verdict.reason)
    return list(found.values())


def mine_failures(runner: Runner, problems: Sequence, k: int = 64, temperature: float = 1.0, seed=0) -> list[Failure]:
    """Sample `k` answers a problem and keep the failing ones, deduplicated (paper: k = 64).

    `k=1, temperature=0` mines greedily: the problems that the model gets wrong with its best answer.
    R3Error: two problems have one id, an id is no string, the task has no name, `verify` raises.
    """
    check_task(runner.task)
    check_problems(problems)
    return failures_of(problems, runner.first_tries(problems, k, temperature, seed), runner)


class MinedFailures(Sequence):
    """The failures in a table with the columns FAILURE, each made when it is asked for, from its problem and tokens.

    What is kept is four bytes a token and a few a row: as a list of `Failure`, a million takes tens of gigabytes.
    """

    def __init__(self, path: Path, problems: Sequence, chat: Chat, task):
        check_problems(problems)
        self._problems, self._chat, self._task = {p.id: p for p in problems}, chat, task
        file = pq.ParquetFile(path, read_dictionary=["problem_id", "reason"])
        batches = file.iter_batches(4096, columns=KEPT.names)  # whose 64-bit tokens are never in memory at once
        small = [pa.record_batch([b[f.name].cast(f.type) for f in KEPT], schema=KEPT) for b in batches]
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
        return Failure(problem, self._chat.start(self._task, problem), ids, self._chat.text(ids), reason, count)


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


def check_failures(failures: Sequence[Failure], runner: Runner, context: int | None) -> None:
    """R3Error for the first failure of another chat or task, or too long for `context` tokens.

    Of `MinedFailures`, made from chat and task, the longest of each problem stands for the others.
    """
    mined, prompts, turns = isinstance(failures, MinedFailures), {}, {}
    for place in failures.longest_of_each() if mined else range(len(failures)):
        failure = failures[place]
        problem, name = failure.problem, f"failures[{place}] (problem {failure.problem.id!r})"
        if id(problem) not in prompts:
            prompts[id(problem)] = runner.chat.start(runner.task, problem)
            again = runner.task.second_turn(runner.task.retry_prompt, problem, runner.retry_turn)
            turns[id(problem)] = len(runner.chat.follow([], [], again))
        if prompts[id(problem)] != list(failure.prompt_ids):
            raise R3Error(
                f"{name} was mined with another tokenizer or task: mine it with this model"
            )
        asked = len(runner.reflection_prompt(failure)) + runner.limits.reflection
        needed = asked + turns[id(problem)] + runner.limits.retry
        if context and needed > context:
            raise R3Error(
                f"{name} needs up to {needed} tokens with its reflection and retry, the model's "
                f"context has {context}: leave it out, or lower max_completion_length or max_retry_length"
            )


def run_episodes(
    runner: Runner,
    problems: Sequence,
    policy: Policy,
    out: Path,
    split: str = "test",
    conditions: Sequence[Condition] = tuple(Condition),
    seed: int = 0,
    shard: int = SHARD,
    say=lambda line: None,
    part: tuple[int, int] = (0, 1),
) -> pd.DataFrame:
    """Run `problems` through the first try and each second-try condition; write shards to `out`; return all rows.

    Shards that are already in `out` are kept, so that a killed run loses at most one; R3Error,
    naming what differs, when they are of another run (see `decisive`). `part` (i, n): every n-th
    shard from the i-th on, for n processes that fill one folder together. `seed` seeds the
    sampling; `policy.seed` is the training seed written into the rows.
    """
    if unknown := [c for c in conditions if c not in tuple(Condition)]:
        raise R3Error(f"unknown condition {unknown[0]!r}: known: {', '.join(Condition)}")
    check_task(runner.task)
    check_problems(problems)
    _claim(out, decisive(runner, problems, policy, split, conditions, seed, shard))
    run = f"{policy.name} seed {policy.seed}"
    in_shards(out, problems, lambda some: frame(_episodes(runner, some, policy, split, conditions, seed, say)),
              shard, part, lambda done: say(f"{run}: {done} problems"))  # fmt: skip
    return read_episodes(out) if any(out.glob("*.parquet")) else frame([])


def in_shards(out: Path, problems: Sequence, make, shard=SHARD, part=(0, 1), say=lambda line: None) -> None:
    """Write `make(problems of a shard)` (a DataFrame) as a file of `out`, for each shard of `part` that is missing."""
    if not problems:
        raise R3Error("no problems to run: ask for at least 1")
    check_problems(problems)
    out.mkdir(parents=True, exist_ok=True)
    for start in range(shard * part[0], len(problems), shard * part[1]):
        path = out / f"shard-{start:06d}.parquet"
        if not path.exists():
            aside = path.with_suffix(f".{os.getpid()}.tmp")
            make(problems[start : start + shard]).to_parquet(aside)
            aside.rename(path)
        say(f"{min(start + shard, len(problems))}/{len(problems)}")


def decisive(runner: Runner, problems, policy: Policy, split, conditions, seed, shard) -> dict:
    """All that decides the rows of a run, by name; a hash of what is long (prompts, weights)."""
    task, chat = runner.task, runner.chat
    facts = {
        "split": split,
        "conditions": [str(c) for c in conditions],
        "seed": seed,
        "shard": shard,
    }
    facts |= {f"policy.{name}": value for name, value in asdict(policy).items()} | task_facts(task)
    facts |= {f"limits.{name}": value for name, value in asdict(runner.limits).items()}
    facts |= {
        "reflection_temperature": runner.reflection_temperature,
        "retry_turn": runner.retry_turn,
    }
    told = (task.retry_prompt, task.blind_retry_prompt)
    again = ([task.second_turn(words, p, runner.retry_turn) for words in told] for p in problems)
    facts["problem ids"] = digest(p.id for p in problems)
    facts["problems' values"] = digest(content(p) for p in problems)
    facts["prompts (problems, tokenizer, template)"] = digest(chat.start(task, p) for p in problems)
    facts["second turns"] = digest(
        [*again, chat.follow([], [], task.reflection_prompt), sorted(chat.end_ids)]
    )
    return facts | identity(runner.engine)


def _claim(out: Path, facts: dict) -> None:
    """Note in `out` whose shards it holds; R3Error if they are of another run."""
    note = out / "run.json"
    if not note.exists() and any(out.glob("shard-*.parquet")):
        raise R3Error(
            f"{out} holds episodes but no run.json that says of what: give an empty folder"
        )
    differing = differences(read_note(note), facts) if note.exists() else ""
    if differing:
        raise R3Error(
            f"{out} holds episodes of another run: {differing}: give an empty folder, or the same"
        )
    write_note(note, facts)


def read_episodes(folder: Path) -> pd.DataFrame:
    """All episodes in the parquet files of `folder`; R3Error when there is none or one is damaged."""
    paths = sorted(Path(folder).glob("*.parquet"))
    if not paths:
        raise R3Error(f"no episodes in {folder}: run the notebook that writes them first (r3 reproduce)")
    parts = []
    for path in paths:
        try:
            parts.append(pd.read_parquet(path))
        except Exception as error:
            raise R3Error(f"{path} is damaged ({type(error).__name__}): delete it and run again") from error
    return pd.concat(parts, ignore_index=True)


def frame(rows: list[Episode]) -> pd.DataFrame:
    """Episodes as a DataFrame with the columns of the schema and nullable counts."""
    table = pd.DataFrame([asdict(r) for r in rows], columns=[f.name for f in fields(Episode)])
    counts = ["seed", "sample", "attempt_tokens", "reflection_tokens", "retry_tokens", "schema_version"]
    return table.astype({name: "Int64" for name in counts})


def _episodes(runner, problems, policy, split, conditions, seed, say) -> list[Episode]:
    tries = runner.first_tries(problems, seed=seed)
    rows = [_first_row(runner, p, c[0], policy, split) for p, c in zip(problems, tries)]
    failures = failures_of(problems, tries, runner)
    first = {row.problem_id: row for row in rows}
    wanted = [c for c in SECOND_TRIES if c in conditions]
    if len(failures) == 1 and Condition.shuffled_reflection in wanted:
        wanted.remove(Condition.shuffled_reflection)
        say(f"{failures[0].problem.id}: shuffled_reflection left out, the shard has no other failure to swap with")
    reflections = None
    if {Condition.reflect_retry, Condition.shuffled_reflection} & set(wanted) and failures:
        reflections = runner.reflections(failures, seed)
    for condition in wanted if failures else []:
        tried = runner.second_tries(condition, failures, seed, reflections)
        for failure, (reflection, retry) in zip(failures, tried):
            rows.append(_second_row(runner, first[failure.problem.id], failure, condition, reflection, retry))
    return [row for row in rows if row.condition in conditions]


def _first_row(runner, problem, completion, policy, split) -> Episode:
    text = runner.chat.text(completion.ids)
    return Episode(
        runner.task.name, split, problem.id, policy.name, policy.seed, Condition.first_try.value, 0,
        runner.chat.shown(runner.task, problem), text, judge(runner.task, text, problem).reason,
        None, None, None, len(completion.ids), None, None, policy.model, policy.adapter,
    )  # fmt: skip


def _second_row(runner, first: Episode, failure, condition, reflection, retry) -> Episode:
    text = runner.chat.text(retry.ids)
    return Episode(
        **{
            **asdict(first),
            "condition": condition.value,
            "reflection": None if reflection is None else runner.chat.text(reflection),
            "retry": text,
            "retry_reason": judge(runner.task, text, failure.problem).reason,
            "reflection_tokens": None if reflection is None else len(reflection),
            "retry_tokens": len(retry.ids),
        }
    )
