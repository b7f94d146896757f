"""The R3 trainer on CPU: its groups, its masks, its rewards, what it trains, what it writes, what it refuses."""

import json
import os
import re
import warnings
from dataclasses import replace
from functools import cached_property
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import (
    BASE_MODEL,
    CoinTask,
    ConstantTask,
    ScriptedEngine,
    coin_failures,
    small_config,
    small_lora,
    tiny_model,
)
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    Qwen3MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from trl import GRPOConfig, GRPOTrainer

from r3lib.card import plain_name
from r3lib.chat import Chat
from r3lib.checkpoints import RUN_NOTE, last_checkpoint
from r3lib.engines import transformers as transformers_engine
from r3lib.engines.transformers import TransformersEngine
from r3lib.errors import R3Error
from r3lib.files import claimed
from r3lib.rollout import rollout, training_order, verified
from r3lib.settings import settings_facts
from r3lib.trainer import TRAINING, R3Trainer
from r3lib.training_log import R3Metrics, metrics_file

METRICS = [
    "task", "step", "seed", "reward", "zero_variance_share", "kl", "entropy", "grad_norm", "tokens",
    "reflection_tokens", "retry_success", "truncated_share", "seconds_sampling", "seconds_learning",
    "peak_memory_gib",
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


def repeatable(folder):
    """The metrics without what depends on the machine."""
    rows = metrics(folder)
    return [{k: v for k, v in r.items() if "seconds" not in k and "memory" not in k} for r in rows]


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
    index = {tuple(trainer.sampler().reflection_prompt(f)): i for i, f in enumerate(trainer.failures)}
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


def test_a_row_of_the_data_set_is_a_place_and_a_name(tiny, tokenizer, tmp_path):
    trainer = make(tiny(), tokenizer, tmp_path, engine=ScriptedEngine(tokenizer), max_steps=50)
    assert trainer.train_dataset.data.nbytes < 40 * 100
    for place, (row, index) in enumerate(zip(trainer.train_dataset, training_order(4, 100, trainer.args.seed))):
        assert row == {"prompt": [{"role": "user", "content": f"failure {index}", "place": place}]}


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
    engine = ScriptedEngine(tokenizer)
    trainer = make(tiny(), tokenizer, tmp_path, task, failures=2, engine=engine, max_steps=1, seed=1)
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


def test_a_gradient_that_is_not_finite_ends_the_run_and_spoils_no_checkpoint(tiny, tokenizer, tmp_path):
    trainer = make(tiny(), tokenizer, tmp_path, max_steps=3, save_steps=1, save_strategy="steps")
    weight = next(p for p in trainer.model.parameters() if p.requires_grad)
    weight.register_hook(lambda slope: slope * float("nan") if trainer.state.global_step == 1 else slope)
    with pytest.raises(R3Error, match="step 2: the gradient is not finite.*checkpoint-1 is sound.*lower learning_rate"):
        trainer.train()
    assert [row["step"] for row in metrics(tmp_path)] == [1]
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-1"


def test_under_autocast_passes_share_one_block_and_verdicts_are_outside(model, tokenizer, tmp_path, monkeypatch):
    """Else each pass casts the adapters' weights again, or a user's own torch verifier is rounded."""
    decoding, judging = [], []
    decode, verify = transformers_engine.Batch.decode, CoinTask.verify

    def decode_and_note(*given):
        decoding.append(torch.is_autocast_enabled("cpu"))
        return decode(*given)

    def verify_and_note(*given):
        judging.append(torch.is_autocast_enabled("cpu"))
        return verify(*given)

    monkeypatch.setattr(transformers_engine.Batch, "decode", decode_and_note)
    monkeypatch.setattr(CoinTask, "verify", verify_and_note)
    make(model, tokenizer, tmp_path, lora=small_lora(), bf16=True).train()
    assert set(decoding) == {True} and set(judging) == {False}


def test_cudnn_attention_whose_backward_gives_nan_is_not_used(tiny, tokenizer, tmp_path):
    torch.backends.cuda.enable_cudnn_sdp(True)
    make(tiny(), tokenizer, tmp_path)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


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


@pytest.mark.parametrize("bf16, joined", [(False, True), (True, False)])
def test_an_adapter_is_part_of_the_weights_only_while_fp32_is_sampled(
    model, tokenizer, tmp_path, monkeypatch, bf16, joined
):
    """Not under accelerate's autocast, which would round most of it away and stands around the model's forward."""
    trainer, seen = make(model, tokenizer, tmp_path, lora=small_lora(), bf16=bf16), []
    layer = next(module for module in trainer.model.modules() if isinstance(module, LoraLayer))
    layer.register_forward_pre_hook(lambda *_: seen.append((torch.is_grad_enabled(), layer.merged)))
    trainer.train()
    assert {merged for learning, merged in seen if not learning} >= {joined}
    assert not any(merged for learning, merged in seen if learning or not joined)


@pytest.mark.parametrize(
    "changes, lora, dtype",
    [
        ({"bf16": True}, {}, torch.bfloat16),
        ({"bf16": True, "gradient_checkpointing": True}, {}, torch.float32),
        ({"bf16": True}, {"use_dora": True}, torch.float32),
        ({"bf16": True}, {"trainable_token_indices": [5, 7]}, torch.bfloat16),
        ({}, {}, torch.float32),
    ],
)
def test_plain_lora_casts_nothing_to_fp32_that_autocast_casts_back(
    tiny, tokenizer, tmp_path, changes, lora, dtype
):
    base, seen = tiny().bfloat16() if changes else tiny(), set()
    trainer = make(base, tokenizer, tmp_path, lora=small_lora(**lora), **changes)
    adapter = next(module for name, module in trainer.model.named_modules() if name.endswith("q_proj.lora_A.default"))
    adapter.register_forward_pre_hook(lambda _, given: seen.add(given[0].dtype) if torch.is_grad_enabled() else None)
    trainer.train()
    assert seen == {dtype}
    assert all(m.cast_input_dtype_enabled for m in trainer.model.modules() if isinstance(m, LoraLayer))


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
        runs.append(repeatable(tmp_path / name))
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
    assert all(row["peak_memory_gib"] > 0.1 for row in rows)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[1]["kl"] >= 0


def test_the_metrics_of_r3_reach_every_logger(tiny, tokenizer, tmp_path):
    """They are in the trainer's own log, from which TensorBoard and others take what they show."""
    trainer = make(tiny(), tokenizer, tmp_path, engine=ScriptedEngine(tokenizer))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "frac_reward_zero_std" in entry]
    names = ("retry_success", "truncated_share", "reflection_tokens", "seconds_learning")
    for row, entry in zip(metrics(tmp_path), logged, strict=True):
        assert all(row[name] == entry[name] for name in names)


def test_a_resumed_run_drops_the_lines_of_steps_it_takes_again(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path / "run"), seed=0)
    history = [{"step": step, "frac_reward_zero_std": 0.0} for step in (1, 2)]
    metrics_file(args).parent.mkdir()
    metrics_file(args).write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "rew')
    callback = R3Metrics(SimpleNamespace(task=CoinTask()))
    callback.on_train_begin(args, TrainerState(global_step=2, log_history=history), None)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("name, left", [  # bytes of it, None: the file is missing
    *product(["trainer_state.json", "adapter_model.safetensors", "optimizer.pt"], [None, 12]), ("rng_state.pth", 12),
])  # fmt: skip
def test_a_checkpoint_that_is_not_whole_is_passed_over_and_nothing_is_deleted(tmp_path, caplog, name, left):
    for step in (2, 10):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text('{"global_step": 2}')
        save_file({"a": torch.zeros(9)}, checkpoint / "adapter_model.safetensors")
        for name_of_part in ("optimizer.pt", "rng_state.pth", "training_args.bin"):
            torch.save({}, checkpoint / name_of_part)
    assert last_checkpoint(str(tmp_path)) == str(checkpoint)
    damaged = checkpoint / name
    os.remove(damaged) if left is None else damaged.write_bytes(damaged.read_bytes()[:left])
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    assert checkpoint.exists() and ("passed over" in caplog.text) == (name != "trainer_state.json")


def test_without_any_checkpoint_there_is_nothing_to_resume(tmp_path):
    assert last_checkpoint(str(tmp_path)) is None
    assert last_checkpoint(str(tmp_path / "absent")) is None


def test_to_resume_where_there_is_nothing_is_one_helpful_line(tiny, tokenizer, tmp_path):
    with pytest.raises(R3Error, match="no complete checkpoint in .*: call train"):
        make(tiny(), tokenizer, tmp_path).train(resume_from_checkpoint=True)


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.step


def test_resume_or_train_goes_on_from_the_last_checkpoint(tiny, tokenizer, tmp_path):
    options = dict(lora=small_lora(), max_steps=3, save_strategy="steps", save_steps=1)
    make(tiny(), tokenizer, tmp_path, callbacks=[StopAfter(2)], **options).resume_or_train()
    (tmp_path / "checkpoint-9").mkdir()  # not complete
    engine = ScriptedEngine(tokenizer)
    make(tiny(), tokenizer, tmp_path, engine=engine, **options).train(resume_from_checkpoint=True)
    assert len(engine.calls) == 2, "one step, of two calls, was left"
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]


class Interrupt(TrainerCallback):
    """Ctrl-C once, in the middle of the third step."""

    def on_substep_end(self, args, state, control, **_):
        if state.global_step == 2 and not hasattr(self, "done"):
            self.done = True
            raise KeyboardInterrupt


def test_an_interrupted_trainer_goes_on_as_if_it_had_not_been(tiny, tokenizer, tmp_path):
    options = dict(lora=small_lora(), max_steps=4, per_device_train_batch_size=2, save_strategy="steps", save_steps=1)
    make(tiny(), tokenizer, tmp_path / "whole", **options).train()
    trainer = make(tiny(), tokenizer, tmp_path / "part", callbacks=[Interrupt()], **options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.resume_or_train()
    assert repeatable(tmp_path / "part") == repeatable(tmp_path / "whole")


def test_a_folder_in_which_another_process_trains_is_left_alone(tiny, tokenizer, tmp_path):
    trainer = make(tiny(), tokenizer, tmp_path, lora=small_lora())
    with claimed(tmp_path, lock=TRAINING), pytest.raises(R3Error, match="is running in .*output_dir"):
        trainer.train()
    trainer.train()


def test_weights_that_have_moved_are_no_start(tiny, tokenizer, tmp_path):
    trainer = make(
        tiny(), tokenizer, tmp_path, lora=small_lora(), max_steps=3, per_device_train_batch_size=2,
        callbacks=[Interrupt()],
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with pytest.raises(R3Error, match="has taken 2 steps already: .* build a new trainer"):
        trainer.resume_or_train()


# what it refuses


def test_no_failures_is_one_helpful_line(tiny, tokenizer, tmp_path):
    with pytest.raises(R3Error, match="no failures to train on: mine more"):
        R3Trainer(
            model=tiny(), args=small_config(tmp_path), task=CoinTask(), failures=[], processing_class=tokenizer
        )


def test_accumulation_follows_from_the_failures_of_a_step(tmp_path):
    config = small_config(tmp_path, failures_per_step=6, num_generations=4, per_device_train_batch_size=8)
    assert config.gradient_accumulation_steps == 3 and config.generation_batch_size == 24


REFUSED = [  # settings of TRL that R3 cannot honour: see test_trl_contract.py
    ({"mask": "answer"}, ["'answer'", "reflection+retry"]),
    ({"num_generations": 1}, ["num_generations=1", "2 or more"]),
    ({"failures_per_step": 3}, ["12 rows", "failures_per_step"]),
    ({"temperature": 0.0}, ["temperature=0.0", "0.01 or more"]),
    ({"gradient_accumulation_steps": 4}, ["steps=4", "is 1 here", "leave it unset"]),
    ({"logging_steps": 2}, ["logging_steps=2", "a line for every step"]),
    ({"mine_samples": 64}, ["mine_samples=64", "the same answer", "set mine_temperature"]),
    ({"scale_rewards": "bar"}, ["scale_rewards='bar'", "group, batch, none"]),
    ({"importance_sampling_level": "row"}, ["level='row'", "token, sequence"]),
    ({"vllm_importance_sampling_mode": "cut"}, ["mode='cut'", "token_truncate"]),
    ({"top_entropy_quantile": 7}, ["top_entropy_quantile=7", "from 0 to 1"]),
    ({"save_strategy": "epoch"}, ["save_strategy='epoch'", "steps, no"]),
    ({"save_steps": 0}, ["save_steps=0", "0.001 or more"]),
    ({"epsilon_high": 0.28}, ["epsilon_high=0.28", "nothing is clipped"]),
    ({"vespo_k_pos": 9.0}, ["vespo_k_pos=9.0", "a loss that R3 does not take"]),
]


@pytest.mark.parametrize(
    ("changes", "words"), REFUSED, ids=[next(iter(changes)) for changes, _ in REFUSED]
)
def test_an_impossible_configuration_is_one_helpful_line(tmp_path, changes, words):
    with pytest.raises(R3Error) as error:
        small_config(tmp_path, **changes)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_default_that_is_given_is_no_reason_to_refuse(tmp_path):
    config = small_config(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, num_iterations=1,
                          eval_strategy="no", top_k=0, generation_kwargs=None)  # fmt: skip
    assert config.gradient_accumulation_steps == 2


def test_a_grpo_config_is_refused_with_the_fix(tiny, tokenizer, tmp_path):
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(R3Error, match="args is a GRPOConfig: give an R3Config"):
        R3Trainer(tiny(), args, task=CoinTask(), failures=coin_failures(tokenizer, 2), processing_class=tokenizer)


# failures that are not this model's


def train_on(failures, tiny, tokenizer, folder, **changes):
    task = CoinTask(count=3, largest=20)
    return R3Trainer(
        tiny(), small_config(folder, **changes), task=task, failures=failures, peft_config=small_lora(),
        processing_class=tokenizer, engine=ScriptedEngine(tokenizer),
    )  # fmt: skip


@given(
    place=st.integers(0, 5),
    at=st.integers(0, 20),
    kind=st.sampled_from(["changed", "cut", "longer"]),
)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_foreign_failure_is_found_at_the_start_wherever_it_is(
    tiny, tokenizer, tmp_path, place, at, kind
):
    failures = coin_failures(tokenizer, 6)
    ids = list(failures[place].prompt_ids)
    at %= len(ids)
    if kind == "changed":
        ids[at] += 1
    elif kind == "cut":
        del ids[at]
    else:
        ids.insert(at, 30)
    failures[place] = replace(failures[place], prompt_ids=ids)
    name = re.escape(f"failures[{place}] (problem {failures[place].problem.id!r})")
    with pytest.raises(R3Error, match=f"{name} was mined with another tokenizer or task"):
        train_on(failures, tiny, tokenizer, tmp_path)


def test_a_failure_that_does_not_fit_into_the_context_is_found_at_the_start_and_named(
    tiny, tokenizer, tmp_path
):
    """The longest that fits is sampled; with one token more it is refused."""
    failures, model = coin_failures(tokenizer, 4), tiny()
    task, chat = CoinTask(count=3, largest=20), Chat(tokenizer)
    spare = model.config.max_position_embeddings
    for asked in (
        task.reflection_prompt,
        f"{task.retry_prompt}\n{task.question(failures[2].problem)}",
    ):
        spare -= len(chat.follow([], [], asked))
    spare -= len(failures[2].prompt_ids) + 12 + 6
    fits, long = (
        [*failures[:2], replace(failures[2], attempt_ids=[30] * n), failures[3]]
        for n in (spare, spare + 1)
    )
    engine = TransformersEngine(model, tokenizer)
    shared = {"peft_config": small_lora(), "processing_class": tokenizer, "engine": engine}
    trainer = R3Trainer(model, small_config(tmp_path), task=task, failures=fits, **shared)
    places = [place for place, index in enumerate(trainer.order) if index == 2][:1]
    rollout([trainer.train_dataset[place]["prompt"] for place in places for _ in range(4)], trainer)
    name = re.escape(f"failures[2] (problem {failures[2].problem.id!r})")
    with pytest.raises(R3Error, match=f"{name} needs up to 513 tokens .*has 512: leave it out"):
        train_on(long, tiny, tokenizer, tmp_path)


def test_a_verifier_that_raises_in_training_names_the_problem(tiny, tokenizer, tmp_path):
    class Breaking(CoinTask):
        def verify(self, text, problem):
            raise ZeroDivisionError("no digits")

    trainer = make(
        tiny(), tokenizer, tmp_path, Breaking(count=3, largest=20), engine=ScriptedEngine(tokenizer)
    )
    with pytest.raises(
        R3Error, match="countdown: verify raised ZeroDivisionError: no digits on problem '"
    ):
        trainer.train()


# resuming another training


def started(tiny, tokenizer, folder, steps=2, **changes):
    """A training that has left checkpoints 1 to `steps`; (its settings)."""
    options = (
        dict(max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=None) | changes
    )
    train = make(tiny(), tokenizer, folder, engine=ScriptedEngine(tokenizer), lora=small_lora(),
                 callbacks=[StopAfter(steps)], **options)  # fmt: skip
    train.resume_or_train()
    return options


def again(tiny, tokenizer, folder, options):
    """The trainer of a second process."""
    return make(
        tiny(), tokenizer, folder, engine=ScriptedEngine(tokenizer), lora=small_lora(), **options
    )


OTHER_TRAININGS = {
    "learning_rate": {"learning_rate": 1e-3},
    "mask": {"mask": "retry"},
    "failures": {"failures": 5},
    "task.largest": {"task": CoinTask(count=3, largest=19)},
    "task's class": {"task": ConstantTask(True)},
    "model's adapters": {"lora": small_lora(r=8)},
    "model's weights": {"model": "other"},
    "there is no r3_run.json": {},
}


# what a reader of the log and of an adapter's folder sees


@pytest.mark.parametrize("mask", ["reflection", "retry"])
def test_logged_completions_show_conversation_reflection_retry_and_verdict(
    tiny, tokenizer, tmp_path, mask, capsys
):
    engine = ScriptedEngine(tokenizer)
    trainer = make(
        tiny(), tokenizer, tmp_path, engine=engine, max_steps=1, log_completions=True, mask=mask
    )
    trainer.train()
    [path] = (tmp_path / "completions").glob("*.parquet")
    table, (asked, _, groups), (_, _, retries) = pd.read_parquet(path), *engine.calls
    assert [p[0]["content"] for p in table.prompt] == [
        tokenizer.decode(p) for p in asked for _ in range(4)
    ]
    assert list(table.retry) == [tokenizer.decode(r[0].ids) for r in retries]
    texts = [tokenizer.decode(r[0].ids, skip_special_tokens=True) for r in retries]
    assert list(table.verdict) == [trainer.task.verify(text, None).reason for text in texts]
    assert list(table.verified) == [float(reason == "ok") for reason in table.verdict]
    if mask == "reflection":
        shown = [
            tokenizer.decode(c.ids, skip_special_tokens=True) for group in groups for c in group
        ]
        assert [c[0]["content"] for c in table.completion] == shown
    assert "failure 2" not in capsys.readouterr().out


def test_a_saved_adapter_has_a_card_without_an_absolute_path(
    model, tokenizer, tmp_path
):
    trainer = make(model, tokenizer, tmp_path / "run", engine=ScriptedEngine(tokenizer), lora=small_lora(),
                   max_steps=1, save_strategy="steps", save_steps=1)  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    for folder in (tmp_path / "adapter", tmp_path / "run" / "checkpoint-1", tmp_path / "run"):
        card = (folder / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: peft\n") and f"# {folder.name}\n" in card
        assert all(
            word in card
            for word in ("base_model`", "countdown", "1 steps of GRPO", "4 failed")
        )
        assert all(
            word in card
            for word in ("learning_rate 0.002,", "lr_scheduler_type constant,", "trl 1.")
        )
        assert str(tmp_path) not in card and str(Path.cwd()) not in card
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == (plain_name(str(BASE_MODEL)))
    trainer.create_model_card("org/mine", "org/sums", tags="arithmetic")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert "# org/mine\n" in card.text and card.data.datasets == "org/sums"
    assert {"r3", "trl", "arithmetic"} <= set(card.data.tags)


def test_a_lora_config_serves_two_trainings(tiny, tokenizer, tmp_path):
    lora = small_lora()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The PEFT config")
        for name in "ab":
            make(tiny(), tokenizer, tmp_path / name, engine=ScriptedEngine(tokenizer), lora=lora)
    assert lora.base_model_name_or_path is None


def test_training_goes_on_from_the_adapter_of_a_peft_model(tiny, tokenizer, tmp_path):
    """At a learning rate of next to zero the adapter stays what was given, otherwise it moves."""
    torch.manual_seed(1)
    adapted = get_peft_model(tiny(), small_lora(init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "given")
    before = dict(adapted.named_parameters())
    failures = coin_failures(tokenizer, 4)
    for rate, still in ((1e-12, True), (1e-2, False)):
        model = PeftModel.from_pretrained(tiny(), tmp_path / "given", is_trainable=True)
        args = small_config(tmp_path / str(rate), max_steps=1, learning_rate=rate)
        task = CoinTask(count=3, largest=20)
        trainer = R3Trainer(model, args, task=task, failures=failures, processing_class=tokenizer)
        trainer.train()
        trained = {n: p for n, p in trainer.model.named_parameters() if "lora" in n}
        moved = max((p - before[n]).abs().max().item() for n, p in trained.items())
        assert (moved < 1e-6) == still


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_a_given_adapter_resumes_with_what_it_has_learned(tiny, tokenizer, tmp_path, beta):
    """With a KL term TRL keeps a copy of it as the reference, which is not what was trained."""
    get_peft_model(tiny(), small_lora(init_lora_weights=False)).save_pretrained(tmp_path / "given")

    def trained(folder, *callbacks):
        model = PeftModel.from_pretrained(tiny(), tmp_path / "given", is_trainable=True)
        trainer = make(
            model, tokenizer, folder, max_steps=3, beta=beta, save_strategy="steps", save_steps=1,
            callbacks=callbacks,
        )  # fmt: skip
        trainer.resume_or_train()
        return {n: p.clone() for n, p in trainer.model.named_parameters() if ".default." in n}

    begun = trained(tmp_path / "part", StopAfter(2))
    whole, resumed = trained(tmp_path / "whole"), trained(tmp_path / "part")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(begun[name], resumed[name]) for name in whole)
    assert repeatable(tmp_path / "part") == repeatable(tmp_path / "whole")


def test_a_models_name_is_what_was_given_or_has_no_absolute_path(tmp_path, monkeypatch):
    (tmp_path / "data" / "model").mkdir(parents=True)
    for name in ("org/model", "data/model", "./model", None):
        assert plain_name(name) == name
    assert plain_name(str(tmp_path / "data" / "model")) == "model"
    monkeypatch.chdir(tmp_path)
    assert plain_name(str(tmp_path / "data" / "model")) == "data/model"


# families and dtypes


EXPERTS = dict(vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
               num_key_value_heads=2, max_position_embeddings=512, eos_token_id=1, pad_token_id=0, bos_token_id=None,
               num_experts_per_tok=2, initializer_range=0.2)  # fmt: skip
EXPERTS = {
    "Qwen3-MoE": Qwen3MoeConfig(**EXPERTS, head_dim=8, num_experts=4, moe_intermediate_size=16),
    "Mixtral": MixtralConfig(**EXPERTS, num_local_experts=4),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_a_mixture_of_experts_learns_with_trls_auxiliary_loss(tokenizer, tmp_path, name):
    """The loss of every learning forward is that of TRL's own trainer, balancing included."""
    torch.manual_seed(0)
    trainer = make(AutoModelForCausalLM.from_config(EXPERTS[name]), tokenizer, tmp_path, max_steps=1,
                   engine=ScriptedEngine(tokenizer), router_aux_loss_coef=0.5, learning_rate=0.0)  # fmt: skip
    ours, compute = [], trainer.compute_loss
    trainer.compute_loss = lambda *given, **options: (
        ours.append(compute(*given, **options)) or ours[-1]
    )
    trainer.train()
    [(inputs, _)] = trainer.seen
    trainer._get_per_token_logps_and_entropies = (
        GRPOTrainer._get_per_token_logps_and_entropies.__get__(trainer)
    )
    theirs = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    assert trainer.aux_loss_enabled and abs(float(theirs.detach())) > 0.1
    torch.testing.assert_close(ours[0].float(), theirs.detach().float(), atol=1e-5, rtol=1e-4)


def test_what_is_trained_is_fp32_and_what_is_frozen_keeps_its_dtype(tiny, tokenizer, tmp_path):
    whole = make(tiny().bfloat16(), tokenizer, tmp_path, engine=ScriptedEngine(tokenizer))
    assert {p.dtype for p in whole.model.parameters()} == {torch.float32}
    adapted = make(
        tiny().bfloat16(), tokenizer, tmp_path, engine=ScriptedEngine(tokenizer), lora=small_lora()
    )
    dtypes = {p.requires_grad: p.dtype for p in adapted.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    adapted.train()


@pytest.mark.parametrize("bf16", [True, False])
def test_fp32_weights_beside_frozen_16_bit_ones_learn_under_autocast_and_are_refused_without(
    tiny, tokenizer, tmp_path, bf16
):
    model = tiny().bfloat16()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "layers.1" in name
    if not bf16:
        with pytest.raises(
            R3Error, match="set bf16=True, or load the model with dtype=torch.float32"
        ):
            make(model, tokenizer, tmp_path, bf16=False)
        return
    trainer = make(model, tokenizer, tmp_path, bf16=True, max_steps=1)
    before = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, model.model.layers[1].mlp.up_proj.weight)


def test_a_reference_that_cannot_be_made_is_refused(tiny, tokenizer, tmp_path):
    named = get_peft_model(tiny(), small_lora(), adapter_name="mine")
    for model, words in ((tiny(), "has none: set beta=0"), (named, "called mine: call it 'default'")):
        with pytest.raises(R3Error, match=words):
            make(model, tokenizer, tmp_path, beta=0.001)


def test_what_a_loading_needs_is_no_fact_of_the_training(tmp_path):
    given = {"dtype": "float32", "token": "secret", "device_map": None}
    facts = settings_facts(small_config(tmp_path, model_init_kwargs=given))
    assert facts["model_init_kwargs"] == {"dtype": "float32"}


def test_families_and_adapters_that_cannot_be_sampled_are_refused_before_anything_is_built(
    tiny, tokenizer, tmp_path
):
    t5 = T5ForConditionalGeneration(
        T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    )
    prompts = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    changed = LoraConfig(init_lora_weights="pissa", target_modules="all-linear")
    spread = tiny()
    spread.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    for model, adapter, words in (
        (t5, None, "t5 is an encoder-decoder"),
        (tiny(), prompts, "virtual tokens.*LoRA"),
        (tiny(), changed, "init_lora_weights='pissa' changes the model's own weights"),
        (spread, None, "llama is spread over 0, cpu: load it on one device"),
    ):
        with pytest.raises(R3Error, match=words):
            make(model, tokenizer, tmp_path, lora=adapter)


def test_a_longrope_model_learns_no_batch_that_is_wider_than_its_reach(tokenizer, tmp_path):
    trainer = make(
        tiny_model("llama", len(tokenizer)), tokenizer, tmp_path, engine=ScriptedEngine(tokenizer)
    )
    trainer._reach, trainer._packs = 20, False
    with pytest.raises(R3Error, match="tokens wide, beyond the 20 up to which"):
        trainer.train()


@pytest.mark.parametrize("name", OTHER_TRAININGS)
def test_checkpoints_of_another_training_are_not_resumed(tiny, tokenizer, tmp_path, name):
    options = started(tiny, tokenizer, tmp_path)
    model, given = tiny(), {"lora": small_lora(), **options, **OTHER_TRAININGS[name]}
    if given.pop("model", None):
        model.lm_head.weight.data[3, 3] += 0.1
    if not OTHER_TRAININGS[name]:
        (tmp_path / RUN_NOTE).unlink()
    other = make(model, tokenizer, tmp_path, engine=ScriptedEngine(tokenizer), **given)
    for start in (other.resume_or_train, other.train):
        with pytest.raises(
            R3Error, match="checkpoints of another training.*give another output_dir"
        ) as error:
            start()
        assert name in str(error.value)
    assert other._engine.calls == []


def test_how_it_logs_and_saves_may_change_at_a_resume(tiny, tokenizer, tmp_path):
    options = started(tiny, tokenizer, tmp_path)
    changed = options | dict(
        log_level="error", save_steps=2, save_total_limit=1, run_name="b", sample_batch=3,
        per_device_train_batch_size=4,
    )  # fmt: skip
    engine = ScriptedEngine(tokenizer)
    make(tiny(), tokenizer, tmp_path, engine=engine, lora=small_lora(), **changed).resume_or_train()
    assert len(engine.calls) == 4, "two steps, of two calls each, were left"


@pytest.mark.parametrize(("schedule", "warmup", "longer"), [("constant", 0, True), ("cosine", 0, False),
                                                             ("constant_with_warmup", 2, True),
                                                             ("constant_with_warmup", 0.5, False)])  # fmt: skip
def test_a_run_is_prolonged_where_the_schedule_does_not_look_at_its_length(
    tiny, tokenizer, tmp_path, schedule, warmup, longer
):
    shape = dict(lr_scheduler_type=schedule, warmup_steps=warmup)
    options = started(tiny, tokenizer, tmp_path / "short", max_steps=2, **shape) | {"max_steps": 4}
    prolonged = again(tiny, tokenizer, tmp_path / "short", options)
    if not longer:
        with pytest.raises(R3Error, match="max_steps was 2, is 4"):
            prolonged.resume_or_train()
        return
    prolonged.resume_or_train()
    started(tiny, tokenizer, tmp_path / "whole", steps=4, **shape)
    rows = [repeatable(tmp_path / name) for name in ("short", "whole")]
    assert rows[0] == rows[1] and len(rows[0]) == 4


def test_a_run_cannot_be_made_shorter_than_its_checkpoint(tiny, tokenizer, tmp_path):
    options = started(tiny, tokenizer, tmp_path) | {"max_steps": 1}
    with pytest.raises(R3Error, match="checkpoint-2 is beyond max_steps=1"):
        again(tiny, tokenizer, tmp_path, options).train()


def test_learned_positions_are_refused_since_padding_would_move_them(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_positions=512, n_embd=32, n_layer=2, n_head=4,
            initializer_range=0.5,
        )
    )
    with pytest.raises(R3Error, match="gpt2 has positions that count the padding"):
        make(model, tokenizer, tmp_path, engine=ScriptedEngine(tokenizer))


def test_truncation_is_masked_only_where_the_last_token_is_the_reflections(tmp_path):
    with pytest.raises(R3Error, match="mask_truncated_completions"):
        small_config(tmp_path, mask="reflection+retry", retry_temperature=1.0, mask_truncated_completions=True)
