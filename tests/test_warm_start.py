"""The supervised start: what it learns from, and that it writes a whole model, resumed or not."""

import json
from random import Random

import pytest
import torch
import warm_start as tool
from conftest import BASE_MODEL
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from r3lib.chat import Chat
from r3lib.errors import R3Error
from r3lib.study import Study
from r3lib.tasks import CountdownTask, FunctionCallingTask

TASKS = [CountdownTask(count=3, largest=20), FunctionCallingTask()]
SETTINGS = dict(steps=2, learning_rate=0.02, batch=8, seed=0, save_steps=1)


@pytest.fixture
def study(tiny, tokenizer, tmp_path):
    """A study of a tiny model in a folder."""
    tiny().save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return Study("smoke", "countdown", tmp_path, model=str(tmp_path / "tiny"))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_examples_are_joined_as_episodes_with_labels_on_own_turns_only(tokenizer, task):
    chat, corpus = Chat(tokenizer), tool.CORPORA[task.name]
    for index, example in enumerate(tool.examples(task, chat, 40, seed=0)):
        turns = corpus.conversation(task, Random(f"warm start/0/{index}"))
        whole = [{"role": role, "content": text} for role, text, _ in turns]
        text = tokenizer.apply_chat_template(whole, tokenize=False)
        assert tokenizer.decode(example["input_ids"]) == text
        pairs = zip(example["input_ids"], example["labels"], strict=True)
        learned = [i for i, label in pairs if label != -100]
        assert learned == [label for label in example["labels"] if label != -100]
        own = "".join(f"{text}<|end|>" for _, text, learn in turns if learn)
        assert tokenizer.decode(learned) == own


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_start_on_answers_alone_has_right_first_answers_and_nothing_else(tokenizer, task):
    chat = Chat(tokenizer)
    for example in tool.examples(task, chat, 20, seed=0, answers=True):
        pairs = zip(example["input_ids"], example["labels"], strict=True)
        learned = [i for i, label in pairs if label != -100]
        assert example["input_ids"][-len(learned) :] == learned  # after the question alone
        assert tokenizer.decode(example["input_ids"]).count("<|end|>") == 2
        assert task.reflection_prompt not in tokenizer.decode(example["input_ids"])


def test_two_steps_write_a_whole_model_that_any_profile_can_name(study, tmp_path):
    out = tool.warm_start(study, tmp_path / "started", **SETTINGS)
    before, after = (
        load_file(tmp_path / "tiny" / "model.safetensors"),
        load_file(out / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved and all("layers" in name for name in moved)  # merged: of the linear layers alone
    started = Study("smoke", "countdown", tmp_path, model=str(out))
    assert started.chat.end_ids == study.chat.end_ids and started.model_hash != study.model_hash
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32
    same = AutoTokenizer.from_pretrained(out)
    assert same.chat_template == study.tokenizer.chat_template
    assert same.pad_token == study.tokenizer.pad_token
    note = json.loads((out / "warm_start.json").read_text())
    assert note["model_hash"] == study.model_hash and (note["task"], note["steps"]) == (
        "countdown",
        2,
    )
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # as the umask has it
    assert not (out / "state").exists() and not list(tmp_path.glob(".*.tmp"))
    with pytest.raises(R3Error, match="started is there already: delete it, or give another --out"):
        tool.warm_start(study, out, **SETTINGS)


class Killed(TrainerCallback):
    def on_save(self, *_, **__):
        raise KeyboardInterrupt


def test_a_killed_warm_start_goes_on_to_the_same_weights_but_not_with_other_settings(
    study, tmp_path, monkeypatch
):
    whole = tool.warm_start(study, tmp_path / "whole", **SETTINGS)
    made = tool.trainer_of

    def killed(*given):
        trainer = made(*given)
        trainer.add_callback(Killed)
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(tool, "trainer_of", killed)
        with pytest.raises(KeyboardInterrupt):
            tool.warm_start(study, tmp_path / "resumed", **SETTINGS)
    with pytest.raises(R3Error, match="resumed.tmp is of a run with other settings: delete it"):
        tool.warm_start(study, tmp_path / "resumed", **SETTINGS | {"seed": 7})
    assert not (tmp_path / "resumed").exists()
    resumed = tool.warm_start(study, tmp_path / "resumed", **SETTINGS)
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_scripts_and_caches_beside_the_weights_are_no_part_of_the_model(tmp_path, tiny):
    """Editing data/base_model/pretrain.py must not make every cached result stale."""
    tiny().save_pretrained(tmp_path / "model")

    def digest():
        return Study("smoke", "countdown", tmp_path, model=str(tmp_path / "model")).model_hash

    before = digest()
    (tmp_path / "model" / "pretrain.py").write_text("...")
    (tmp_path / "model" / "__pycache__").mkdir()
    (tmp_path / "model" / "__pycache__" / "pretrain.cpython-311.pyc").write_text("...")
    assert digest() == before
    (tmp_path / "model" / "tokenizer.json").write_bytes(
        (BASE_MODEL / "tokenizer.json").read_bytes()
    )
    assert digest() != before
