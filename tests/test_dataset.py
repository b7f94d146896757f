"""A data set and a verifier function are all that a TRL user has to bring."""

import logging
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CoinTask, ScriptedEngine, small_config, small_lora
from datasets import Dataset
from transformers import AutoProcessor, GPT2Config, GPT2LMHeadModel
from trl.trainer import grpo_trainer

from r3lib import (
    Chat,
    Limits,
    Policy,
    R3Trainer,
    RolloutSampler,
    TransformersEngine,
    mine_failures,
    run_episodes,
)
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


def make(model, tokenizer, folder, rows=None, verifier=parity, engine="scripted", lora="small", given=(), **changes):
    return R3Trainer(
        model, small_config(folder, max_attempt_length=8, **changes), verifier=verifier,
        train_dataset=Dataset.from_list(ROWS) if rows is None else rows,
        peft_config=small_lora() if lora else None, processing_class=tokenizer,
        engine=ScriptedEngine(tokenizer) if engine == "scripted" else engine, **dict(given),
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
    with pytest.raises(R3Error, match="failures of another training: task.rows was"):
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


@pytest.mark.parametrize(
    "verdict",
    [(True, "correct"), (False, "ok"), (True, "ok", 7.0), (False, "late", -0.1), (False, 7), (False, "")],
)
def test_training_and_tables_cannot_differ_on_a_verdict(verdict):
    """Training rewards `ok` or the score, tables count the reason."""
    with pytest.raises(ValueError, match="Verdict.* the (reason|score) is"):
        Verdict(*verdict)


@pytest.mark.parametrize("value", [None, "yes", 1.5, -1, float("nan")])
def test_what_is_no_verdict_names_the_row(value, tiny, tokenizer, tmp_path):
    with pytest.raises(R3Error, match="dataset: verify raised .* on problem '0'"):
        make(tiny(), tokenizer, tmp_path, verifier=lambda text, row: value)


@pytest.mark.parametrize(("rows", "words"), [
    (pd.DataFrame(ROWS), "is a DataFrame: give df.to_dict"),
    ({"train": ROWS, "test": ROWS}, "is a mapping of train, test: give one of them"),
    ([], "the data set has no rows"),
    ([{"prompt": " "}], "row 0: prompt is .* give text"),
])  # fmt: skip
def test_rows_in_another_form_say_how_to_give_them(tiny, tokenizer, tmp_path, rows, words):
    with pytest.raises(R3Error, match=words):
        make(tiny(), tokenizer, tmp_path, rows=rows)


def test_a_verifier_that_changes_its_row_changes_a_copy(tiny, tokenizer, tmp_path):
    def verify(text, row):
        row["gold"] = 0
        return parity(text, row)

    rows = [dict(row) for row in ROWS]
    make(tiny(), tokenizer, tmp_path, rows=rows, verifier=verify)
    assert rows == ROWS


def test_a_row_that_is_too_long_is_named(tiny, tokenizer, tmp_path):
    rows = [*ROWS, {"prompt": "and " * 1500, "id": "the-long-one", "gold": 1}]
    with pytest.raises(R3Error, match=r"problem 'the-long-one': prompt \d has .*lower max_tokens=8 .max_attempt"):
        make(tiny(), tokenizer, tmp_path, rows=rows, engine=None)


def test_a_verifier_that_counts_resumes_what_it_began(tiny, tokenizer, tmp_path):
    class Counts:
        calls = 0

        def __call__(self, text, row):
            self.calls += 1
            return parity(text, row)

    kept = {"save_strategy": "steps", "save_steps": 1}
    verifier = Counts()
    make(tiny(), tokenizer, tmp_path, verifier=verifier, max_steps=1, **kept).train()
    assert verifier.calls
    trainer = make(tiny(), tokenizer, tmp_path, verifier=Counts(), max_steps=2, **kept)
    trainer.resume_or_train()
    assert trainer.state.global_step == 2


def test_damaged_failures_are_named(tiny, tokenizer, tmp_path):
    make(tiny(), tokenizer, tmp_path)
    [path] = (tmp_path / "failures").glob("*.parquet")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(R3Error, match="shard-000000.parquet is damaged .*: delete it and run again"):
        make(tiny(), tokenizer, tmp_path)


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


def test_a_model_and_a_tokenizer_by_name_are_loaded_as_trl_loads_them(
    tiny, tokenizer, tmp_path, monkeypatch, caplog
):
    tiny().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    asked, load = {}, grpo_trainer.create_model_from_path
    load_tokenizer = AutoProcessor.from_pretrained

    def model_of(path, **options):
        asked["model"] = dict(options)
        return load(path, **options)

    def tokenizer_of(path, **options):
        asked["tokenizer"] = dict(options)
        return load_tokenizer(path, **options)

    monkeypatch.setattr(grpo_trainer, "create_model_from_path", model_of)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", tokenizer_of)
    settings = {"model_init_kwargs": {"revision": "v1"}, "trust_remote_code": True}
    with caplog.at_level(logging.WARNING):
        trainer = make(str(tmp_path / "model"), None, tmp_path / "run", engine=ScriptedEngine(tokenizer), **settings)
    assert {o["revision"] for o in asked.values()} == {"v1"} and len(asked) == 2
    assert all(options["trust_remote_code"] for options in asked.values())
    assert trainer.failures and "model_init_kwargs" not in caplog.text


def test_what_is_mined_with_a_fresh_adapter_is_what_the_untrained_model_gets_wrong(
    tiny, tokenizer, tmp_path, monkeypatch
):
    """The second trainer takes the failures of the first, and samples nothing."""
    model, task = tiny(), DatasetTask(ROWS, parity)
    sampler = RolloutSampler(TransformersEngine(model, tokenizer), Chat(tokenizer), task, Limits(8))
    expected = [f.attempt_ids for f in mine_failures(sampler, task.problems("train"), 1, 0.0)]
    first = make(model, tokenizer, tmp_path, engine=None)
    assert expected and [f.attempt_ids for f in first.failures] == expected
    monkeypatch.setattr(TransformersEngine, "generate", None)
    second = make(tiny(), tokenizer, tmp_path, engine=None)
    assert [f.attempt_ids for f in second.failures] == expected


def test_a_model_that_cannot_be_trained_is_refused_before_anything_is_mined(tokenizer, tmp_path):
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=512, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5)
    )
    engine = ScriptedEngine(tokenizer)
    with pytest.raises(R3Error, match="gpt2 has positions that count the padding"):
        make(model, tokenizer, tmp_path, engine=engine, lora=None)
    assert engine.calls == []


def test_what_trl_takes_and_r3_cannot_use_is_refused_by_name(tiny, tokenizer, tmp_path):
    with pytest.raises(R3Error, match="reward_funcs: .* give verifier"):
        make(tiny(), tokenizer, tmp_path, given={"reward_funcs": [len]})
    with pytest.raises(R3Error, match="eval_dataset: .* run_episodes"):
        make(tiny(), tokenizer, tmp_path, given={"eval_dataset": ROWS})
    with pytest.raises(R3Error, match="args is missing: give an R3Config"):
        R3Trainer(tiny(), verifier=parity, train_dataset=ROWS)


def test_an_optimizer_of_ones_own_takes_the_steps(tiny, tokenizer, tmp_path):
    model = tiny()
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(still, lambda step: 1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make(model, tokenizer, tmp_path, lora=None, given={"optimizers": (still, schedule)}).train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_data_set_task_alone_is_mined_and_asks_for_reflections_in_its_own_words(tiny, tokenizer, tmp_path):
    task, engine = DatasetTask(ROWS, parity, reflection_prompt="Which step was wrong?"), ScriptedEngine(tokenizer)
    trainer = R3Trainer(
        tiny(), small_config(tmp_path, max_attempt_length=8), task=task, engine=engine,
        peft_config=small_lora(), processing_class=tokenizer,
    )  # fmt: skip
    assert 0 < len(trainer.failures) < len(ROWS)
    asked = tokenizer.decode(trainer.sampler().reflection_prompt(trainer.failures[0]))
    assert "Which step was wrong?" in asked
    trainer.train()
    held_out = DatasetTask(ROWS[:3], parity).problems("test")
    rows = run_episodes(trainer.sampler(), held_out, Policy("r3"), tmp_path / "held-out")
    assert set(rows.problem_id) == {"0", "1", "2"}
    with pytest.raises(R3Error, match="what to train on is missing"):
        R3Trainer(tiny(), small_config(tmp_path), task=CoinTask(), engine=engine, processing_class=tokenizer)


def test_half_of_the_pair_both_ways_at_once_and_nothing_are_refused(tiny, tokenizer, tmp_path):
    args = small_config(tmp_path)
    with pytest.raises(R3Error, match="what to train on is missing"):
        R3Trainer(tiny(), args)
    with pytest.raises(R3Error, match="together, or task and failures, or a DatasetTask"):
        R3Trainer(tiny(), args, verifier=parity)
    with pytest.raises(R3Error, match="the one pair or the other"):
        R3Trainer(tiny(), args, task=DatasetTask(ROWS, parity), verifier=parity, train_dataset=ROWS)


def test_failures_without_a_note_of_what_they_are_of_are_refused(tiny, tokenizer, tmp_path):
    make(tiny(), tokenizer, tmp_path)
    (tmp_path / "failures" / "run.json").unlink()
    with pytest.raises(R3Error, match="failures of another training: there is no run.json"):
        make(tiny(), tokenizer, tmp_path)
