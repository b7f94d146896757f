"""The R3 trainer on CPU: its groups, its masks, its rewards, what it trains, what it writes, what it refuses."""

import json
import os
import shutil
import warnings
from functools import cached_property
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import (
    CoinTask,
    ConstantTask,
    ScriptedEngine,
    coin_failures,
    small_config,
    small_lora,
)
from transformers import TrainerCallback, TrainerState, TrainingArguments
from trl import GRPOTrainer

from r3lib.chat import Chat
from r3lib.errors import R3Error
from r3lib.trainer import R3Metrics, R3Trainer, last_checkpoint, metrics_file, rollout, training_order, verified

METRICS = [
    "task", "step", "seed", "reward", "zero_variance_share", "kl", "entropy", "grad_norm", "tokens",
    "reflection_tokens", "retry_success", "truncated_share", "seconds_sampling", "seconds_learning",
]  # fmt: skip


class Watched(R3Trainer):
    """Keeps the inputs of every learning forward, and the log-probs that it gives them."""

    def _compute_loss(self, model, inputs):
        with torch.no_grad():
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            width = inputs["completion_ids"].size(1)
            logps, *_ = self._get_per_token_logps_and_entropies(model, ids, mask, width)
        self.__dict__.setdefault("seen", []).append((inputs, logps))
        return super()._compute_loss(model, inputs)


def make(model, tokenizer, folder, task=None, failures=4, engine=None, lora=None, callbacks=None, **changes):
    task = task or CoinTask(count=3, largest=20)
    return Watched(
        model=model, args=small_config(folder, **changes), task=task,
        failures=coin_failures(tokenizer, failures, task), peft_config=lora, processing_class=tokenizer,
        engine=engine, callbacks=callbacks,
    )  # fmt: skip


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def roll_once(trainer):
    """One real rollout of the first step's failures: (its output, the engine's two calls)."""
    size = trainer.args.num_generations
    prompts = [row["prompt"] for row in trainer.train_dataset.select(range(2)) for _ in range(size)]
    return rollout(prompts, trainer), trainer._engine.calls[-2:]


# groups and their order


def test_every_failure_is_met_once_before_any_is_met_twice():
    order = training_order(7, 40, seed=3)
    assert len(order) == 40
    for start in range(0, 35, 7):
        assert sorted(order[start : start + 7]) == list(range(7))
    assert order[:7] != order[7:14], "each pass is shuffled anew"


def test_a_longer_run_starts_like_a_shorter_one_and_the_seed_matters():
    assert training_order(9, 50, seed=1)[:20] == training_order(9, 20, seed=1)
    assert training_order(9, 20, seed=1) != training_order(9, 20, seed=2)


def test_training_covers_the_failures_in_that_order(tiny, tokenizer, tmp_path):
    engine = ScriptedEngine(tokenizer)
    trainer = make(tiny(), tokenizer, tmp_path, failures=5, engine=engine, max_steps=5)
    trainer.train()
    asked = [tuple(prompt) for prompts, *_ in engine.calls[::2] for prompt in prompts]
    index = {tuple(trainer.runner().reflection_prompt(f)): i for i, f in enumerate(trainer.failures)}
    assert [index[prompt] for prompt in asked] == training_order(5, 10, trainer.args.seed)


def test_a_group_is_g_reflections_on_one_failure_with_one_retry_each(tiny, tokenizer, tmp_path):
    trainer = make(tiny(), tokenizer, tmp_path, engine=ScriptedEngine(tokenizer), retry_temperature=0.0)
    output, ((asked, sampling, groups), (retried, retry_sampling, retries)) = roll_once(trainer)
    assert [len(group) for group in groups] == [4, 4] and [len(r) for r in retries] == [1] * 8
    assert output["prompt_ids"] == [p for p in asked for _ in range(4)]
    assert (sampling.max_tokens, sampling.temperature) == (12, 1.0)
    assert (retry_sampling.max_tokens, retry_sampling.temperature) == (6, 0.0)
    chat, task = Chat(tokenizer), trainer.task
    failures = [trainer.failures[index] for index in trainer.order[:2]]
    again = [f"{task.retry_prompt}\n{task.messages(f.problem)[0]['content']}" for f in failures]
    flat = [(p, c, turn) for p, group, turn in zip(asked, groups, again) for c in group]
    assert retried == [chat.follow(p, c.ids, turn) for p, c, turn in flat]


def test_a_row_of_the_data_set_is_a_place_and_a_name_and_trl_logs_the_name(tiny, tokenizer, tmp_path):
    trainer = make(tiny(), tokenizer, tmp_path, engine=ScriptedEngine(tokenizer), max_steps=50)
    assert trainer.train_dataset.data.nbytes < 40 * 100
    for place, (row, index) in enumerate(zip(trainer.train_dataset, training_order(4, 100, trainer.args.seed))):
        assert row == {"prompt": [{"role": "user", "content": f"failure {index}", "place": place}]}
    trainer = make(tiny(), tokenizer, tmp_path, engine=ScriptedEngine(tokenizer), max_steps=1, log_completions=True)
    trainer.train()
    [logged] = (tmp_path / "completions").glob("*.parquet")
    assert [p[0]["content"] for p in pd.read_parquet(logged).prompt[::4]] == [f"failure {i}" for i in trainer.order]


# rewards and advantages


def test_the_reward_of_a_reflection_is_the_verdict_on_its_retry(tiny, tokenizer, tmp_path):
    trainer = make(tiny(), tokenizer, tmp_path, engine=ScriptedEngine(tokenizer))
    output, (_, (_, _, retries)) = roll_once(trainer)
    texts = [tokenizer.decode(r[0].ids, skip_special_tokens=True) for r in retries]
    expected = [float(trainer.task.verify(text, None).ok) for text in texts]
    assert len(set(expected)) == 2 and output["reward"] == expected
    assert verified(completions=[], reward=expected, anything=1) == expected


def test_a_reflection_that_is_cut_off_costs_the_penalty(tiny, tokenizer, tmp_path):
    free, charged = (
        make(tiny(), tokenizer, tmp_path, engine=ScriptedEngine(tokenizer), truncation_penalty=penalty)
        for penalty in (0.0, 0.25)
    )
    plain, ((_, _, groups), _) = roll_once(free)
    output, _ = roll_once(charged)
    cut = [not c.finished for group in groups for c in group]
    assert 0 < sum(cut) < len(cut)
    assert output["reward"] == [reward - 0.25 * c for reward, c in zip(plain["reward"], cut)]
    assert charged.r3_metrics["truncated_share"] == sum(cut) / len(cut)
    assert charged.r3_metrics["retry_success"] == sum(plain["reward"]) / len(cut)


def test_rewards_become_advantages_normalised_inside_the_group(tiny, tokenizer, tmp_path):
    trainer = make(tiny(), tokenizer, tmp_path, engine=ScriptedEngine(tokenizer), max_steps=1)
    trainer.train()
    rewards = torch.tensor([r for r in trainer._logs["rewards"]["verified"]]).view(2, 4)
    centred = rewards - rewards.mean(1, keepdim=True)
    expected = centred / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(torch.tensor([*trainer._logs["advantages"]]).view(2, 4), expected)
    row = metrics(tmp_path)[0]
    assert row["reward"] == pytest.approx(float(rewards.mean()))


class OneSidedTask(CoinTask):
    """The first failure's retries always agree; the others toss coins."""

    def verify(self, text, problem):
        return super().verify("" if problem is self.agreeing else text, problem)


def test_a_group_whose_retries_agree_has_advantage_zero(tiny, tokenizer, tmp_path):
    task = OneSidedTask(count=3, largest=20)
    trainer = make(tiny(), tokenizer, tmp_path, task, failures=2, engine=ScriptedEngine(tokenizer), max_steps=1)
    task.agreeing = trainer.failures[0].problem
    trainer.train()
    first = trainer.order[0]
    groups = torch.tensor([*trainer._logs["advantages"]]).view(2, 4)
    assert (groups[first] == 0).all() and (groups[1 - first] != 0).all()
    assert metrics(tmp_path)[0]["zero_variance_share"] == 0.5


@pytest.mark.parametrize(("ok", "rate"), [(False, "0%"), (True, "100%")])
def test_no_variance_anywhere_warns_once_and_trains_on(tiny, tokenizer, tmp_path, ok, rate):
    model, task = tiny(), ConstantTask(ok)
    before = {n: p.clone() for n, p in model.named_parameters()}
    trainer = make(model, tokenizer, tmp_path, task, engine=ScriptedEngine(tokenizer), max_steps=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    messages = [str(w.message) for w in caught if "variance" in str(w.message)]
    assert len(messages) == 1 and f"retry success {rate}" in messages[0] and "num_generations" in messages[0]
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]
    assert all(row["zero_variance_share"] == 1.0 and row["grad_norm"] == 0.0 for row in metrics(tmp_path))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


# masks


@pytest.mark.parametrize("mask", ["reflection", "reflection+retry", "retry"])
def test_the_mask_marks_exactly_its_own_tokens(tiny, tokenizer, tmp_path, mask):
    trainer = make(tiny(), tokenizer, tmp_path, engine=ScriptedEngine(tokenizer), mask=mask)
    output, ((_, _, groups), (retry_prompts, _, retries)) = roll_once(trainer)
    reflections = [c for group in groups for c in group]
    assert {c.finished for c in reflections} == {True, False}, "cut-off reflections must be among them"
    if mask == "reflection":
        assert "env_mask" not in output
        assert output["completion_ids"] == [c.ids for c in reflections]
        assert output["logprobs"] == [c.logprobs for c in reflections]
        return
    for i, (reflection, [retry]) in enumerate(zip(reflections, retries)):
        ids, marks, logprobs = (output[key][i] for key in ("completion_ids", "env_mask", "logprobs"))
        own = reflection if mask == "reflection+retry" else SimpleNamespace(ids=[], logprobs=[])
        assert len(ids) == len(marks) == len(logprobs)
        assert output["prompt_ids"][i] + ids == retry_prompts[i] + retry.ids
        assert [t for t, m in zip(ids, marks) if m] == own.ids + retry.ids
        assert [p for p, m in zip(logprobs, marks) if m] == own.logprobs + retry.logprobs
        assert marks[-len(retry.ids) :] == [1] * len(retry.ids)


@pytest.mark.parametrize("mask", ["reflection+retry", "retry"])
def test_the_mask_reaches_the_loss(tiny, tokenizer, tmp_path, mask):
    engine = ScriptedEngine(tokenizer)
    trainer = make(tiny(), tokenizer, tmp_path, engine=engine, mask=mask, max_steps=1)
    trainer.train()
    (_, _, groups), (_, _, retries) = engine.calls
    own = [c.ids if mask == "reflection+retry" else [] for group in groups for c in group]
    expected = sorted(o + r[0].ids for o, r in zip(own, retries))
    [(inputs, _)] = trainer.seen
    marks = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    assert sorted(ids[m].tolist() for ids, m in zip(inputs["completion_ids"], marks)) == expected


# what is trained, on which policy


def test_trimmed_chunks_give_the_log_probs_entropies_and_gradients_of_the_padded_batch(model, tokenizer, tmp_path):
    trainer = make(model, tokenizer, tmp_path, engine=ScriptedEngine(tokenizer))
    random, rows = Random(3), [(5, 9), (17, 1), (11, 20), (17, 2), (3, 12), (8, 20), (9, 4)]  # prompt, completion
    ids = torch.zeros(7, 37, dtype=torch.long)
    for row, (prompt, completion) in zip(ids, rows):
        text = [random.randrange(5, 800) for _ in range(prompt + completion)]
        row[17 - prompt : 17 + completion] = torch.tensor(text)
    mask, results = (ids > 0).long(), []
    for owner in (GRPOTrainer, R3Trainer):
        trainer.model.zero_grad()
        compute = owner._get_per_token_logps_and_entropies
        logps, entropies, _ = compute(trainer, trainer.model, ids, mask, 20, compute_entropy=True)
        kept = mask[:, 17:].bool()
        (logps[kept].sum() + entropies[kept].mean()).backward()
        gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
        assert logps.shape == entropies.shape == (7, 20)
        results.append((logps[kept], entropies[kept], gradient / gradient.norm()))
    for theirs, ours in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_training_moves_every_lora_b_and_trains_in_fp32(model, tokenizer, tmp_path):
    trainer = make(model, tokenizer, tmp_path, lora=small_lora())
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n and p.dtype == torch.float32 for n, p in trained.items())
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    raised = [n for n in trained if "lora_B" in n]
    assert len(raised) == 7 * model.config.num_hidden_layers, "7 linear maps a layer"
    assert all(trained[n].abs().max() > 0 for n in raised)
    assert all(torch.equal(p, frozen[n]) for n, p in trainer.model.named_parameters() if n in frozen)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs_are_those_of_the_learning_forward(model, tokenizer, tmp_path, temperature):
    trainer = make(model, tokenizer, tmp_path, lora=small_lora(), temperature=temperature)
    trainer.train()
    assert len(trainer.seen) == 2, "also after the first update, on the weights it left"
    for inputs, logps in trainer.seen:
        kept = inputs["completion_mask"].bool()
        torch.testing.assert_close(inputs["sampling_per_token_logps"][kept], logps[kept], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_under_autocast_with_checkpointing_fp32_adapters_learn_what_was_sampled(
    model, tokenizer, tmp_path, precision
):
    trainer = make(model, tokenizer, tmp_path, lora=small_lora(), gradient_checkpointing=True, **{precision: True})
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in before.values()} == {torch.float32}
    trainer.train()
    assert all(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if "lora_B" in n)
    for inputs, logps in trainer.seen:
        kept = inputs["completion_mask"].bool()
        torch.testing.assert_close(inputs["sampling_per_token_logps"][kept], logps[kept], atol=0.1, rtol=0.1)


def test_a_process_trains_on_one_gpu_however_many_it_sees(tmp_path, monkeypatch):
    setup = TrainingArguments._setup_devices.func

    def four(self):
        place = setup(self)
        self._n_gpu = 4
        return place

    seen = cached_property(four)
    seen.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", seen)
    assert TrainingArguments(str(tmp_path), use_cpu=True).n_gpu == 4 and small_config(tmp_path).n_gpu == 1


def test_one_seed_gives_one_trajectory(model, tokenizer, tmp_path):
    runs = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        trainer = make(model, tokenizer, tmp_path / name, lora=small_lora(), seed=seed)
        trainer.train()
        rows = metrics(tmp_path / name)
        runs.append([{k: v for k, v in row.items() if "seconds" not in k} for row in rows])
        model = trainer.model.unload()
    assert runs[0] == runs[1]
    assert [row["entropy"] for row in runs[0]] != [row["entropy"] for row in runs[2]]


# what it writes


def test_metrics_hold_one_complete_line_a_step(model, tokenizer, tmp_path):
    make(model, tokenizer, tmp_path, lora=small_lora(), beta=0.01, seed=3).train()
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2] and all(sorted(row) == sorted(METRICS) for row in rows)
    assert all(isinstance(value, int | float) for row in rows for name, value in row.items() if name != "task")
    assert all(row["task"] == "countdown" and row["seed"] == 3 and 1 <= row["reflection_tokens"] <= 12 for row in rows)
    assert all(row["seconds_sampling"] > 0 and row["seconds_learning"] > 0 for row in rows)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[1]["kl"] >= 0


def test_a_resumed_run_drops_the_lines_of_steps_it_takes_again(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path / "run"), seed=0)
    callback = R3Metrics(trainer=None)
    callback.on_train_begin(args, TrainerState(global_step=0), None)
    metrics_file(args).write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "rew')
    callback.on_train_begin(args, TrainerState(global_step=2), None)
    assert metrics_file(args).read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_an_unfinished_checkpoint_is_removed_and_the_one_before_it_used(tmp_path, damage):
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text('{"global_step": 2}')
    state = tmp_path / "checkpoint-10" / "trainer_state.json"
    os.remove(state) if damage == "missing" else state.write_text('{"global_')
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-10").exists()


def test_of_several_processes_the_main_one_removes_what_all_skip(tmp_path, monkeypatch):
    for step in (2, 9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
    for rank, left in (("1", 3), ("0", 1), ("1", 1)):
        monkeypatch.setenv("RANK", rank)
        assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
        assert len(list(tmp_path.iterdir())) == left


def test_a_process_goes_on_while_the_main_one_removes_a_checkpoint_under_its_eyes(tmp_path, monkeypatch):
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}" if step == 2 else "{")
    read = Path.read_text

    def late(path):
        if "checkpoint-10" in str(path):
            shutil.rmtree(path.parent)
        return read(path)

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(Path, "read_text", late)
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")


def test_without_any_checkpoint_there_is_nothing_to_resume(tmp_path):
    assert last_checkpoint(str(tmp_path)) is None
    assert last_checkpoint(str(tmp_path / "absent")) is None


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.step


def test_resume_or_train_goes_on_from_the_last_checkpoint(tiny, tokenizer, tmp_path):
    options = dict(lora=small_lora(), max_steps=3, save_strategy="steps", save_steps=1)
    make(tiny(), tokenizer, tmp_path, callbacks=[StopAfter(2)], **options).resume_or_train()
    engine = ScriptedEngine(tokenizer)
    make(tiny(), tokenizer, tmp_path, engine=engine, **options).resume_or_train()
    assert len(engine.calls) == 2, "one step, of two calls, was left"
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]


# what it refuses


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask": "answer"}, ["'answer'", "reflection+retry"]),
        ({"num_generations": 1}, ["group size 1", "at least 2"]),
        ({"failures_per_step": 3, "per_device_train_batch_size": 8}, ["12 rows", "failures_per_step"]),
        ({"use_vllm": True}, ["use_vllm"]),
    ],
)
def test_an_impossible_configuration_is_one_helpful_line(tmp_path, changes, words):
    with pytest.raises(R3Error) as error:
        small_config(tmp_path, **changes)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_no_failures_is_one_helpful_line(tiny, tokenizer, tmp_path):
    with pytest.raises(R3Error, match="no failures to train on: mine more"):
        R3Trainer(
            model=tiny(), args=small_config(tmp_path), task=CoinTask(), failures=[], processing_class=tokenizer
        )


def test_accumulation_follows_from_the_failures_of_a_step(tmp_path):
    config = small_config(tmp_path, failures_per_step=6, num_generations=4, per_device_train_batch_size=8)
    assert config.gradient_accumulation_steps == 3 and config.generation_batch_size == 24
