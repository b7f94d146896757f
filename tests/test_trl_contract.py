"""What `r3lib/trainer.py` relies on in TRL, observed on the installed TRL: an upgrade that breaks it fails here."""

import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CoinTask, ScriptedEngine, coin_failures, small_config, small_lora, tiny_model
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback, TrainerState
from trl import GRPOConfig, GRPOTrainer

from r3lib.errors import R3Error
from r3lib.r3_config import R3Config
from r3lib.rollout import rollout
from r3lib.settings import FREE, HONOURED, REFUSED, default_of, settings_facts
from r3lib.trainer import R3Trainer
from r3lib.training_log import METRICS

REFLECTION = [[30, 31, 32], [40, 41], [50, 51, 52, 1], [60, 1]]  # completions of a group, two of them finished


class Notes(TrainerCallback):
    """Gradients just before each optimizer step, and every log line."""

    def __init__(self):
        self.gradients, self.logs = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append(dict(logs))


def train(tokenizer, folder, steps=2, env_mask=None, rewards=(0.0, 1.0, 0.0, 1.0), **changes):
    """A plain GRPO run of 2 groups of 4 a step, in 2 learning forwards; returns all that its hooks were given."""
    seen = SimpleNamespace(prompts=[], steps=[], kwargs=[], notes=Notes())

    def spy(prompts, trainer):
        seen.prompts.append(prompts)
        seen.steps.append(trainer.state.global_step)
        ids = [REFLECTION[i % 4] for i in range(len(prompts))]
        output = {"prompt_ids": [[20, 21, 22]] * len(ids), "completion_ids": ids, "logprobs": None}
        output["reward"] = [rewards[i % 4] for i in range(len(ids))]
        output["owner"] = [f"rollout {i}" for i in range(len(ids))]
        return output | ({"env_mask": [env_mask(row) for row in ids]} if env_mask else {})

    def reward(completions, reward, **kwargs):
        seen.kwargs.append(kwargs)
        return reward

    rows = [{"prompt": [{"role": "user", "content": "?", "failure": i}], "owner": "dataset"} for i in range(2 * steps)]
    settings = dict(
        output_dir=str(folder), max_steps=steps, num_generations=4, per_device_train_batch_size=4, beta=0.0,
        gradient_accumulation_steps=2, max_completion_length=8, shuffle_dataset=False, bf16=False, use_cpu=True,
        gradient_checkpointing=False, logging_steps=1, save_strategy="no", loss_type="dr_grpo", max_grad_norm=0.0,
        disable_tqdm=True, report_to="none",
    )  # fmt: skip
    seen.trainer = GRPOTrainer(
        model=tiny_model("llama", len(tokenizer)), args=GRPOConfig(**(settings | changes)), reward_funcs=reward,
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer, rollout_func=spy, callbacks=[seen.notes],
    )  # fmt: skip
    seen.trainer.train()
    return seen


@pytest.fixture(scope="module")
def plain(tokenizer, tmp_path_factory):
    return train(tokenizer, tmp_path_factory.mktemp("plain"))


def test_prompts_arrive_repeated_and_contiguous_a_whole_step_at_once(plain):
    indices = [[prompt[0]["failure"] for prompt in prompts] for prompts in plain.prompts]
    assert indices == [[0] * 4 + [1] * 4, [2] * 4 + [3] * 4]


def test_a_custom_key_survives_inside_a_message(plain):
    assert plain.prompts[0][4] == [{"role": "user", "content": "?", "failure": 1}]


def test_one_rollout_a_step_sees_the_step_about_to_be_taken(plain):
    assert plain.steps == [0, 1] and plain.trainer._step == 4


def test_extra_keys_reach_the_reward_and_overwrite_the_dataset_column(plain):
    assert plain.kwargs[0]["owner"] == [f"rollout {i}" for i in range(8)]


def test_rows_are_logged_in_the_order_of_the_rollout(plain):
    assert [*plain.trainer._logs["rewards"]["reward"]][:8] == [0.0, 1.0, 0.0, 1.0] * 2


def test_the_logs_hold_every_metric_that_we_write(plain):
    assert set(METRICS.values()) - {"kl"} <= plain.notes.logs[0].keys()


def test_tokens_count_prompt_and_completion(plain):
    assert plain.notes.logs[0]["num_tokens"] == 8 * 3 + 2 * sum(map(len, REFLECTION))


def test_env_mask_multiplies_loss_and_token_count(plain, tokenizer, tmp_path):
    none = train(tokenizer, tmp_path, steps=1, env_mask=lambda ids: [0] * len(ids))
    assert all((g == 0).all() for g in none.notes.gradients[0].values())
    assert none.notes.logs[0]["num_tokens"] == 8 * 3
    every = train(tokenizer, tmp_path, steps=1, env_mask=lambda ids: [1] * len(ids))
    first = plain.notes.gradients[0]
    assert all(torch.equal(g, first[n]) for n, g in every.notes.gradients[0].items())
    assert every.notes.logs[0]["num_tokens"] == plain.notes.logs[0]["num_tokens"]


def test_groups_that_agree_carry_no_gradient_and_are_counted(tokenizer, tmp_path):
    run = train(tokenizer, tmp_path, steps=1, rewards=(1.0,) * 4)
    assert run.notes.logs[0]["frac_reward_zero_std"] == 1.0
    assert all((g == 0).all() for g in run.notes.gradients[0].values())


def test_dr_grpo_divides_by_a_constant_and_grpo_by_each_length(tokenizer, tmp_path):
    """Halving every completion's mask halves dr_grpo's scale but not grpo's: which is why a profile names one."""
    losses = {}
    for kind in ("dr_grpo", "grpo"):
        first = train(tokenizer, tmp_path, 1, lambda ids: [1] + [0] * (len(ids) - 1), loss_type=kind, learning_rate=0.0)
        losses[kind] = {n: g.norm() for n, g in first.notes.gradients[0].items()}
    ratios = torch.stack([losses["grpo"][n] / losses["dr_grpo"][n] for n in losses["grpo"]])
    torch.testing.assert_close(ratios, torch.full_like(ratios, 8.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("loss_type", "dapo", "grpo"),
        ("beta", 0.0, 0.001),
        ("use_bias_correction_kl", True, False),
        ("learning_rate", 1e-6, 5e-7),
        ("lr_scheduler_type", "linear", "cosine"),
        ("warmup_steps", 0, 0.03),
        ("shuffle_dataset", True, False),
        ("scale_rewards", "group", "group"),
        ("epsilon", 0.2, 0.2),  # without effect: see settings.py
        ("num_iterations", 1, 1),
        ("temperature", 1.0, 1.0),
        ("multi_objective_aggregation", "sum_then_normalize", "sum_then_normalize"),
        ("importance_sampling_level", "token", "token"),
    ],
)
def test_defaults(tmp_path, name, theirs, ours):
    trl = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert getattr(trl, name) == theirs, "TRL's default moved: look at R3Config again"
    assert getattr(R3Config(output_dir=str(tmp_path), use_cpu=True), name) == ours


def test_trl_would_train_in_bf16_with_checkpointing_even_on_cpu(tmp_path):
    trl = GRPOConfig(output_dir=str(tmp_path), use_cpu=True)
    ours = R3Config(output_dir=str(tmp_path), use_cpu=True)
    assert (trl.bf16, trl.gradient_checkpointing) == (True, True)
    assert (ours.bf16, ours.fp16, ours.gradient_checkpointing) == (False, False, False)


def test_trl_casts_the_adapters_of_a_quantized_model_and_we_cast_them_back(tiny, tokenizer, tmp_path):
    dtypes = {}
    for kind in ("trl", "r3"):
        model, task = tiny(), CoinTask(count=3, largest=20)
        model.is_loaded_in_4bit = True  # all that TRL looks at
        shared = dict(model=model, args=small_config(tmp_path), peft_config=small_lora(), processing_class=tokenizer)
        if kind == "trl":
            rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "?"}]}])
            trainer = GRPOTrainer(reward_funcs=lambda **_: [], train_dataset=rows, rollout_func=rollout, **shared)
        else:
            trainer = R3Trainer(task=task, failures=coin_failures(tokenizer, 2, task), **shared)
        dtypes[kind] = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    assert dtypes == {"trl": {torch.bfloat16}, "r3": {torch.float32}}


# settings


def test_every_setting_of_trl_is_honoured_refused_or_free():
    """A TRL with a new setting, or without an old one, fails here: say in r3lib/settings.py which it is."""
    theirs = {field.name for field in fields(GRPOConfig)}
    assert HONOURED | set(REFUSED) | FREE - {"sample_batch"} == theirs
    assert not HONOURED & set(REFUSED) and not HONOURED & FREE and not set(REFUSED) & FREE


ANOTHER = {  # values that TRL takes, of settings whose type does not tell one
    "generation_kwargs": {"top_k": 3}, "cache_implementation": "static", "reward_weights": [2.0], "min_p": 0.1,
    "transformers_continuous_batching_config": {"a": 1}, "max_tool_calling_iterations": 2, "data_seed": 1,
    "num_generations_eval": 2, "vllm_structured_outputs_regex": "a", "vllm_server_base_url": "http://a",
    "vllm_max_model_length": 9, "eval_strategy": "steps", "metric_for_best_model": "loss", "vllm_mode": "server",
    "resume_from_checkpoint": "a", "pad_to_multiple_of": 8, "include_num_input_tokens_seen": "all", "top_k": 5,
    "train_sampling_strategy": "sequential", "torch_compile_backend": "inductor", "torch_compile_mode": "default",
    "vllm_model_impl": "transformers", "vllm_server_host": "b", "multi_objective_aggregation": "normalize_then_sum",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_each_refused_setting_is_refused_by_its_name_with_advice(tmp_path, name):
    default = next(default_of(field) for field in fields(R3Config) if field.name == name)
    value = (
        ANOTHER[name] if name in ANOTHER else 1.5 if type(default) in (int, float) else not default
    )
    with pytest.raises(R3Error, match=rf"^{name}=.* is not supported: \w") as error:
        small_config(tmp_path, **{name: value})
    assert "\n" not in str(error.value)


@given(st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_what_a_training_is_depends_on_each_honoured_setting_and_on_no_free_one(tmp_path, data):
    config = small_config(tmp_path, lr_scheduler_type="cosine")
    name = data.draw(
        st.sampled_from(sorted((HONOURED | FREE) & {field.name for field in fields(config)}))
    )
    facts = settings_facts(config)
    setattr(config, name, {"dtype": "float16"} if name == "model_init_kwargs" else "another value")
    assert (settings_facts(config) != facts) == (name in HONOURED)


# resuming


def r3(tiny, tokenizer, folder, rollout_func=rollout, **changes):
    task = CoinTask(count=3, largest=20)
    trainer = R3Trainer(
        model=tiny(), args=small_config(folder, save_strategy="steps", save_steps=1, **changes), task=task,
        failures=coin_failures(tokenizer, 4, task), peft_config=small_lora(), processing_class=tokenizer,
        engine=ScriptedEngine(tokenizer),
    )  # fmt: skip
    trainer.rollout_func = rollout_func
    return trainer


def test_resuming_restarts_the_step_counter_and_samples_the_next_failures(tiny, tokenizer, tmp_path):
    seen = []

    def spy(prompts, trainer):
        indices = [p[0]["place"] for p in prompts[::4]]
        seen.append((trainer._step, trainer.state.global_step, indices))
        return rollout(prompts, trainer)

    options = dict(max_steps=3, per_device_train_batch_size=4, save_total_limit=3)
    r3(tiny, tokenizer, tmp_path, spy, **options).train()
    whole, seen[:] = list(seen), []
    assert [step for step, *_ in whole] == [0, 2, 4]
    r3(tiny, tokenizer, tmp_path, spy, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [step for step, *_ in seen] == [0, 2], "TRL's own counter starts again"
    assert [rest for _, *rest in seen] == [rest for _, *rest in whole[1:]]


def test_a_checkpoint_is_complete_once_its_state_is_written(tiny, tokenizer, tmp_path, monkeypatch):
    """`last_checkpoint` takes a readable trainer_state.json for the mark of a complete checkpoint."""
    before, save = [], TrainerState.save_to_json

    def spy(state, path):
        before.append({p.name for p in Path(path).parent.iterdir()})
        save(state, path)

    monkeypatch.setattr(TrainerState, "save_to_json", spy)
    r3(tiny, tokenizer, tmp_path, max_steps=1).train()
    saved = {p.name for p in (tmp_path / "checkpoint-1").iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= before[0]
    assert saved - before[0] == {"trainer_state.json"}
    assert json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())["global_step"] == 1
