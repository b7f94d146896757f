"""Episodes: a first try, and second tries on its failure under each condition, as table rows."""

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import get_args

import pandas as pd

from .card import plain_name
from .conditions import CONDITIONS, FIRST_TRY, Condition, Reflects, condition
from .engines.base import identity
from .engines.prefix_tree import cut
from .errors import R3Error
from .identity import check_problems, check_task, claim, content, digest, task_facts
from .sampler import RolloutSampler, failures_of, judge

SCHEMA_VERSION = 1
SHARD = 256  # problems
COUNTS = ("seed", "sample", "attempt_tokens", "reflection_tokens", "retry_tokens", "schema_version")
UNTRAINED = "vanilla"  # the policy that R3 starts from


@dataclass(frozen=True)
class Episode:
    """One row of every results file; what belongs to a second try is None in `first_try` rows."""

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
    reflection: str | None = None
    retry: str | None = None
    retry_reason: str | None = None
    attempt_tokens: int = 0
    reflection_tokens: int | None = None
    retry_tokens: int | None = None
    model: str = ""
    adapter: str = ""
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Policy:
    """Who answers: the names that go into the results, and the seed of its training.

    `model` "": the name that the engine knows its model by.
    """

    name: str = UNTRAINED
    seed: int = 0
    model: str = ""
    adapter: str = ""


def run_episodes(
    sampler: RolloutSampler,
    problems: Sequence,
    policy: Policy,
    out: Path,
    split: str = "test",
    conditions: Sequence[Condition | str] = CONDITIONS,
    seed: int = 0,
    shard: int = SHARD,
    log: Callable[[str], None] = lambda line: None,
    part: tuple[int, int] = (0, 1),
) -> pd.DataFrame:
    """Run `problems` through the first try and each second-try condition; return all rows.

    They are written to `out` in shards. Shards that are there already are kept, so that a killed
    run loses at most one; R3Error, naming what differs, when they are of another run (see
    `decisive`), or when two conditions have one name. `part` (i, n): every n-th shard from the i-th
    on, for n processes that fill one folder together. `seed` seeds the sampling; `policy.seed` is
    the training seed written into the rows. `log` is called with a line after each shard.
    """
    out = Path(out)
    conditions = [condition(name) for name in conditions]
    names = [FIRST_TRY.name, *(one.name for one in conditions if one != FIRST_TRY)]
    if len(set(names)) < len(names):
        raise R3Error(f"two conditions have one name in {names}: give each a name of its own")
    check_task(sampler.task)
    check_problems(problems)
    facts = decisive(sampler, problems, policy, split, conditions, seed, shard)
    note = out / "run.json"
    used = note.exists() or any(out.glob("shard-*.parquet"))
    claim(note, facts, used, "episodes of another run", "give an empty folder, or the same run")
    model = policy.model or plain_name(getattr(sampler.engine, "model_name", ""))
    policy = replace(policy, model=model)

    def make(some: Sequence) -> pd.DataFrame:
        return frame(_episodes(sampler, some, policy, split, conditions, seed, log))

    who = f"{policy.name} seed {policy.seed}"
    in_shards(out, problems, make, shard, part, lambda done: log(f"{who}: {done} problems"))
    return read_episodes(out) if any(out.glob("*.parquet")) else frame([])


def in_shards(
    out: Path, problems: Sequence, make, shard=SHARD, part=(0, 1), log=lambda line: None
) -> None:
    """Write `make(problems of a shard)`, a DataFrame, for each shard of `part` that is missing."""
    if not problems:
        raise R3Error("no problems to run: ask for at least 1")
    out.mkdir(parents=True, exist_ok=True)
    if shard * part[0] >= len(problems):
        log(f"share {part[0]}/{part[1]} is empty: lower shard_size, which is {shard} problems")
    for start in range(shard * part[0], len(problems), shard * part[1]):
        path = out / f"shard-{start:06d}.parquet"
        if not path.exists():
            aside = path.with_suffix(f".{os.getpid()}.tmp")
            make(problems[start : start + shard]).to_parquet(aside)
            aside.rename(path)
        log(f"{min(start + shard, len(problems))}/{len(problems)}")


def decisive(
    sampler: RolloutSampler, problems, policy: Policy, split, conditions, seed, shard
) -> dict:
    """All that decides the rows of a run, by name; a hash of what is long (prompts, weights)."""
    task, chat = sampler.task, sampler.chat
    facts = {"split": split, "seed": seed, "shard": shard}
    facts["conditions"] = [asdict(c) for c in conditions]
    facts |= {f"policy.{name}": value for name, value in asdict(policy).items()}
    facts |= {f"limits.{name}": value for name, value in asdict(sampler.limits).items()}
    facts["reflection_temperature"] = sampler.reflection_temperature
    facts |= task_facts(task)
    facts["problem ids"] = digest(p.id for p in problems)
    facts["problems' values"] = digest(content(p) for p in problems)
    facts["prompts (problems, tokenizer, template)"] = digest(chat.start(task, p) for p in problems)
    told = (task.retry_prompt, task.blind_retry_prompt)
    again = [[task.second_turn(words, p) for words in told] for p in problems]
    request = chat.follow([], [], task.reflection_prompt)
    facts["second turns"] = digest([*again, request, sorted(chat.end_ids)])
    return facts | identity(sampler.engine)


def read_episodes(folder: Path) -> pd.DataFrame:
    """All episodes in the parquet files of `folder`; R3Error when there is none or one damaged."""
    paths = sorted(Path(folder).glob("*.parquet"))
    if not paths:
        raise R3Error(
            f"no episodes in {folder}: run the notebook that writes them first (r3 reproduce)"
        )
    parts = []
    for path in paths:
        try:
            parts.append(pd.read_parquet(path))
        except Exception as error:
            raise R3Error(
                f"{path} is damaged ({type(error).__name__}): delete it and run again"
            ) from error
    return pd.concat(parts, ignore_index=True)


def frame(rows: list[Episode]) -> pd.DataFrame:
    """Episodes as a DataFrame with the columns of the schema and nullable counts."""
    table = pd.DataFrame([asdict(r) for r in rows], columns=[f.name for f in fields(Episode)])
    return table.astype(dict.fromkeys(COUNTS, "Int64"))


def _episodes(sampler, problems, policy, split, conditions, seed, log) -> list[Episode]:
    """The rows of one shard."""
    second = [one for one in conditions if one != FIRST_TRY]
    batch_size = getattr(sampler.engine, "batch_size", len(problems))
    one_batch = len(problems) <= batch_size  # else another's reflection may be in another one
    going_on = [one for one in second if one.reflection != "other" or one_batch]
    # each goes back on what the one before it said: its reflection, then that the try failed
    order = get_args(Reflects)
    going_on.sort(key=lambda one: (one.told, order.index(one.reflection)), reverse=True)
    with_reflection = any(one.reflection in ("own", "other") for one in second)
    first, failures, reflections, tried = {}, [], [], defaultdict(list)
    for some in cut(problems, batch_size):
        with sampler.keeping():
            tries = sampler.first_tries(some, seed=seed)
            failed = failures_of(some, tries, sampler)
            own = sampler.own_reflections(failed, seed) if with_reflection else []
            for one in going_on:
                if one.reflection != "other" or len(failed) > 1:
                    tried[one] += sampler.second_tries(one, failed, seed, own)
        for problem, answers in zip(some, tries):
            first[problem.id] = _first_row(sampler, problem, answers[0], policy, split)
        failures += failed
        reflections += own
    rows = list(first.values()) if FIRST_TRY in conditions else []
    for one in second:
        if one.reflection == "other" and len(failures) < 2:
            log(f"{one} left out: the shard has no two failures to swap the reflections of")
            continue
        if one not in tried:
            tried[one] = sampler.second_tries(one, failures, seed, reflections)
        for failure, again in zip(failures, tried[one]):
            rows.append(_second_row(sampler, first[failure.problem.id], failure, one, *again))
    return rows


def _first_row(sampler, problem, completion, policy, split) -> Episode:
    text = sampler.chat.text(completion.ids)
    return Episode(
        task=sampler.task.name,
        split=split,
        problem_id=problem.id,
        policy=policy.name,
        seed=policy.seed,
        condition=FIRST_TRY.name,
        sample=0,
        prompt=sampler.chat.shown(sampler.task, problem),
        attempt=text,
        attempt_reason=judge(sampler.task, text, problem).reason,
        attempt_tokens=len(completion.ids),
        model=policy.model,
        adapter=policy.adapter,
    )


def _second_row(sampler, first: Episode, failure, under: Condition, reflection, retry) -> Episode:
    text = sampler.chat.text(retry.ids)
    row = replace(
        first,
        condition=under.name,
        retry=text,
        retry_reason=judge(sampler.task, text, failure.problem).reason,
        retry_tokens=len(retry.ids),
    )
    if reflection is None:
        return row
    written = sampler.chat.text(reflection)
    return replace(row, reflection=written, reflection_tokens=len(reflection))
