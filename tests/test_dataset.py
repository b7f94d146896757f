"""A data set and a verifier function are all that a TRL user has to bring."""

import zlib

import numpy as np
import pandas as pd
import pytest
from conftest import ScriptedEngine, small_config, small_lora
from datasets import Dataset

from r3lib import R3Trainer
from r3lib.errors import R3Error
from r3lib.tasks.dataset import DatasetTask, as_verdict
from r3lib.verifiers.verdict import Verdict

ROWS = [
    {"prompt": [{"role": "user", "content": f"What is {a} + {a + 1}?"}], "gold": 2 * a + 1}
    for a in range(6)
]


def parity(text: str, row: dict) -> bool:
    """A verdict that random texts get about half the time."""
    return zlib.crc32(f"{text} {row['gold']}".encode()) % 2 == 0


def graded(text: str, row: dict) -> float:
    return min(len(text), 40) / 40


def make(model, tokenizer, folder, rows=None, verifier=parity, **changes):
    return R3Trainer(
        model, small_config(folder, max_attempt_length=8, **changes), verifier=verifier,
        train_dataset=Dataset.from_list(ROWS) if rows is None else rows,
        peft_config=small_lora(), processing_class=tokenizer, engine=ScriptedEngine(tokenizer),
    )  # fmt: skip


def test_the_trainer_mines_the_failures_of_a_data_set_and_trains_on_them(tiny, tokenizer, tmp_path):
    trainer = make(tiny(), tokenizer, tmp_path)
    assert 0 < len(trainer.failures) < len(ROWS)
    assert all(not parity(f.attempt, f.problem.values) for f in trainer.failures)
    trainer.train()
    assert len(pd.read_json(tmp_path / "metrics.jsonl", lines=True)) == 2


def test_what_was_mined_is_taken_again_and_other_rows_are_refused(tiny, tokenizer, tmp_path):
    first = make(tiny(), tokenizer, tmp_path)
    second = make(tiny(), tokenizer, tmp_path)
    assert second._engine.calls == []
    assert [f.attempt_ids for f in second.failures] == [f.attempt_ids for f in first.failures]
    with pytest.raises(R3Error, match="failures of another training: rows was"):
        make(tiny(), tokenizer, tmp_path, rows=ROWS[1:])
    with pytest.raises(R3Error, match="failures of another training: task.verifier was"):
        make(tiny(), tokenizer, tmp_path, verifier=graded)


def test_a_graded_verifier_rewards_by_degree(tiny, tokenizer, tmp_path):
    trainer = make(tiny(), tokenizer, tmp_path, verifier=graded, max_steps=1)
    trainer.train()
    rewards = [r for r in trainer._logs["rewards"]["verified"]]
    assert len(set(rewards)) > 2 and all(0 <= r <= 1 for r in rewards)


@pytest.mark.parametrize(
    ("value", "verdict", "reward"),
    [
        (True, Verdict(True, "ok"), 1.0),
        (np.bool_(False), Verdict(False, "wrong"), 0.0),
        (1, Verdict(True, "ok", 1.0), 1.0),
        (np.float32(0.5), Verdict(False, "wrong", 0.5), 0.5),
        (Verdict(False, "late"), Verdict(False, "late"), 0.0),
    ],
)
def test_verdicts_of_every_form(value, verdict, reward):
    assert as_verdict(value) == verdict and as_verdict(value).reward == reward


@pytest.mark.parametrize("value", [None, "yes", 1.5, -1, float("nan")])
def test_what_is_no_verdict_names_the_row(value, tiny, tokenizer, tmp_path):
    with pytest.raises(R3Error, match="dataset: verify raised .* on problem '0'"):
        make(tiny(), tokenizer, tmp_path, verifier=lambda text, row: value)


def test_a_text_is_a_question_and_other_prompts_are_refused():
    assert DatasetTask([{"prompt": "2 + 2?"}], parity).problems("train")[0].messages == [
        {"role": "user", "content": "2 + 2?"}
    ]
    for row in (
        {"question": "2?"},
        {"prompt": []},
        {"prompt": [{"role": "assistant", "content": "4"}]},
        {"prompt": 3},
    ):
        with pytest.raises(R3Error, match="row 0"):
            DatasetTask([row], parity).problems("train")


def test_half_of_the_pair_and_both_ways_at_once_are_refused(tiny, tokenizer, tmp_path):
    args = small_config(tmp_path)
    with pytest.raises(R3Error, match="go together"):
        R3Trainer(tiny(), args, verifier=parity)
    with pytest.raises(R3Error, match="the one pair or the other"):
        R3Trainer(tiny(), args, DatasetTask(ROWS, parity), verifier=parity, train_dataset=ROWS)


def test_failures_without_a_note_of_what_they_are_of_are_refused(tiny, tokenizer, tmp_path):
    make(tiny(), tokenizer, tmp_path)
    (tmp_path / "failures" / "run.json").unlink()
    with pytest.raises(R3Error, match="failures of another training: there is no run.json"):
        make(tiny(), tokenizer, tmp_path)
