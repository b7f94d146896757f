"""Failures mined by the trainer itself, from a data set and a verifier; kept beside its checkpoints."""

import logging
from pathlib import Path

import pandas as pd
from accelerate import PartialState

from .chat import Chat
from .engines.base import identity
from .engines.transformers import TransformersEngine
from .episodes import in_shards, read_episodes
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
from .sampler import FAILURE, Failure, Limits, RolloutSampler, mine_failures
from .tasks.dataset import DatasetTask

logger = logging.getLogger(__name__)


def mine_for_training(model, tokenizer, task: DatasetTask, args, engine=None) -> list[Failure]:
    """Answer every row of the data set with `model` and return the failures (paper: section on data).

    `mine_samples` answers a row, of at most `max_attempt_length` tokens. Several processes share the
    rows. What is mined is kept in `output_dir/failures`: the same training takes it from there, and
    another one (other weights, rows, verifier or settings) is refused with what differs.
    """
    state, folder = PartialState(), Path(args.output_dir) / "failures"
    chat = Chat(tokenizer, model.generation_config, args.chat_template_kwargs)
    if engine is None:
        model.to(args.device)
        engine = TransformersEngine(model, tokenizer, args.sample_batch, end_ids=chat.end_ids)
    sampler = RolloutSampler(engine, chat, task, Limits(attempt=args.max_attempt_length))
    check_task(task)
    problems = task.problems("train")
    check_problems(problems)
    _claim(folder, _facts(sampler, problems, args))

    def mined(some: list) -> pd.DataFrame:
        failures = mine_failures(sampler, some, args.mine_samples, args.mine_temperature, args.seed)
        rows = [[f.problem.id, f.attempt, f.reason, f.count, f.attempt_ids] for f in failures]
        return pd.DataFrame(rows, columns=FAILURE)

    in_shards(folder, problems, mined, part=(state.process_index, state.num_processes))
    state.wait_for_everyone()
    failures = _failures(read_episodes(folder), problems, chat, task)
    logger.warning(f"mined {len(failures)} failures on {len(problems)} rows, kept in {folder}")
    return failures


def _facts(sampler: RolloutSampler, problems, args) -> dict:
    settings = ["mine_samples", "mine_temperature", "max_attempt_length", "seed"]
    facts = {name: getattr(args, name) for name in settings}
    facts |= task_facts(sampler.task) | identity(sampler.engine)
    facts["rows"] = digest(content(problem) for problem in problems)
    facts["prompts"] = digest(sampler.chat.start(sampler.task, problem) for problem in problems)
    return facts


def _claim(folder: Path, facts: dict) -> None:
    note = folder / "run.json"
    differing = differences(read_note(note), facts) if note.exists() else ""
    if differing:
        raise R3Error(
            f"{folder} holds failures of another training: {differing}: give another output_dir, or "
            "delete that folder"
        )
    if PartialState().is_main_process:
        write_note(note, facts)


def _failures(rows: pd.DataFrame, problems, chat: Chat, task: DatasetTask) -> list[Failure]:
    by_id = {problem.id: problem for problem in problems}
    failures = []
    for row in rows.itertuples():
        problem = by_id[row.problem_id]
        prompt, ids = chat.start(task, problem), [int(token) for token in row.attempt_ids]
        failures.append(Failure(problem, prompt, ids, row.attempt, row.reason, int(row.count)))
    return failures
