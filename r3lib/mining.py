"""Mined failures: a table of them as a sequence, its checks, and how a trainer mines."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .chat import Chat
from .engines.base import identity
from .episodes import SHARD, in_shards
from .errors import R3Error
from .identity import check_problems, claim, content, digest, task_facts
from .sampler import Failure, RolloutSampler, mine_failures

logger = logging.getLogger(__name__)
FAILURE = ["problem_id", "attempt", "reason", "count", "attempt_ids"]  # columns of the table
NAME = pa.dictionary(pa.int32(), pa.string())
KEPT = pa.schema(  # of them in memory: four bytes a token, a few a row
    {"problem_id": NAME, "attempt_ids": pa.list_(pa.int32()), "reason": NAME, "count": pa.int32()}
)


def failures_table(failures: Sequence[Failure]) -> pd.DataFrame:
    """`failures` as a table with the columns FAILURE."""
    rows = [[f.problem.id, f.attempt, f.reason, f.count, f.attempt_ids] for f in failures]
    return pd.DataFrame(rows, columns=FAILURE)


class MinedFailures(Sequence):
    """The failures in a table with the columns FAILURE, each made when it is asked for.

    `path` is a parquet file, or a folder of them. As a list of `Failure`, a million takes tens of
    gigabytes.
    """

    def __init__(self, path: Path, problems: Sequence, chat: Chat, task):
        check_problems(problems)
        self._problems = {problem.id: problem for problem in problems}
        self._chat = chat
        self._task = task
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        tables = [_read(file) for file in files]
        self._rows = pa.concat_tables(
            [KEPT.empty_table(), *(table.cast(KEPT) for table in tables if len(table))]
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        name, ids, reason, count = (column[index].as_py() for column in self._rows.columns)
        problem = self._problems[name]
        prompt = self._chat.start(self._task, problem)
        return Failure(problem, prompt, ids, self._chat.text(ids), reason, count)

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
    return digest(
        [f.problem.id, list(f.prompt_ids), list(f.attempt_ids), content(f.problem)]
        for f in failures
    )


def check_failures(
    failures: Sequence[Failure], sampler: RolloutSampler, context: int | None
) -> None:
    """R3Error for the first failure of another chat or task, or too long for `context` tokens.

    Of `MinedFailures`, made from chat and task, the longest of each problem stands for the others.
    """
    mined = isinstance(failures, MinedFailures)
    limits = sampler.limits
    for place in failures.longest_of_each() if mined else range(len(failures)):
        failure = failures[place]
        name = f"failures[{place}] (problem {failure.problem.id!r})"
        if sampler.chat.start(sampler.task, failure.problem) != list(failure.prompt_ids):
            raise R3Error(
                f"{name} was mined with another tokenizer or task: mine it with this model"
            )
        turns = sampler.retry_prompt(failure, [])
        needed = len(turns) + limits.max_completion_length + limits.max_retry_length
        if context and needed > context:
            raise R3Error(
                f"{name} needs up to {needed} tokens with its reflection and retry, the model's "
                f"context has {context}: leave it out, or lower max_completion_length or "
                "max_retry_length"
            )


def _read(file: Path) -> pa.Table:
    try:
        return pq.read_table(file, columns=KEPT.names)
    except pa.ArrowInvalid as error:
        raise R3Error(f"{file} is damaged ({error}): delete it and run again") from error


def mine_for_training(sampler: RolloutSampler, args) -> MinedFailures:
    """Answer every row of the task; return the failures (paper: section on data).

    `mine_samples` answers a row. Several processes share the rows. What is mined is kept in
    `output_dir/failures`: the same training takes it from there, and another one (other weights,
    rows, verifier or settings) is refused with what differs.
    """
    from accelerate import PartialState

    state = PartialState()
    folder = Path(args.output_dir) / "failures"
    problems = sampler.task.problems("train")
    check_problems(problems)
    note = folder / "run.json"
    used = note.exists() or any(folder.glob("*.parquet"))
    fix = "give another output_dir, or delete that folder"
    claim(note, _facts(sampler, problems, args), used, "failures of another training", fix)

    def mined(some: list) -> pd.DataFrame:
        samples = args.mine_samples, args.mine_temperature, args.seed
        return failures_table(mine_failures(sampler, some, *samples))

    in_shards(folder, problems, mined, part=(state.process_index, state.num_processes))
    state.wait_for_everyone()
    failures = MinedFailures(folder, problems, sampler.chat, sampler.task)
    logger.warning(f"mined {len(failures)} failures on {len(problems)} rows, kept in {folder}")
    return failures


def _facts(sampler: RolloutSampler, problems, args) -> dict:
    settings = ["mine_samples", "mine_temperature", "max_attempt_length", "seed"]
    facts = {name: getattr(args, name) for name in settings}
    facts |= task_facts(sampler.task) | identity(sampler.engine)
    facts["shard"] = SHARD
    facts["rows"] = digest(content(problem) for problem in problems)
    facts["prompts"] = digest(sampler.chat.start(sampler.task, problem) for problem in problems)
    return facts
