"""A training that is killed at any moment and resumed ends where the uninterrupted one ends."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import BASE_MODEL, CoinTask, base_model, coin_failures, small_config, small_lora
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback

from r3lib.trainer import R3Trainer

STEPS = 5
PROCESSES = multiprocessing.get_context("forkserver")  # forks from one process that has done nothing but imports
PROCESSES.set_forkserver_preload(["peft", "r3lib.trainer", "transformers.models.llama.modeling_llama"])
MOMENTS = {  # (hook, step at that time): what is on disk then
    "in the middle of step 4": ("on_substep_end", 3),  # checkpoint 2; step 3 is lost, step 4 half learned
    "between step 3's line and its checkpoint": ("on_log", 3),  # checkpoint 2, and a line for step 3
    "right after checkpoint 4": ("on_save", 4),
    "while checkpoint 4 is written": ("in_checkpoint", 4),  # checkpoint 4 without its state; 2 is whole
}


class Kill(TrainerCallback):
    """Ends the process as `kill -9` does."""

    def __init__(self, hook, step):
        self.step = step
        setattr(self, hook, self.strike)

    def strike(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder, moment):
    """The training; killed at `moment`."""
    torch.set_num_threads(1)
    tokenizer, task = AutoTokenizer.from_pretrained(BASE_MODEL), CoinTask(count=3, largest=20)
    hook, step = MOMENTS.get(moment, (None, 0))
    kill = [Kill(hook, step)] if hook and hook != "in_checkpoint" else []
    trainer = R3Trainer(
        model=base_model(), task=task, failures=coin_failures(tokenizer, 3, task), peft_config=small_lora(),
        args=small_config(
            folder, max_steps=STEPS, per_device_train_batch_size=4, save_strategy="steps", save_steps=2,
            max_grad_norm=0.5, beta=0.01, lr_scheduler_type="cosine", warmup_steps=2,
        ),
        processing_class=tokenizer, callbacks=kill,
    )  # fmt: skip
    if hook == "in_checkpoint":
        save = trainer._save_rng_state
        trainer._save_rng_state = lambda path: Kill("_", step).strike(None, trainer.state, None) or save(path)
    trainer.resume_or_train()
    trainer.save_model(f"{folder}/final")


def run(folder, moment=None):
    """Train in a process of its own; return its exit status."""
    process = PROCESSES.Process(target=main, args=(str(folder), moment))
    process.start()
    process.join()
    return process.exitcode


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "seconds" not in k and k != "peak_memory_gib"} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run(folder) == 0
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(0 < row["grad_norm"] for row in rows), "every step must learn, or equality would say nothing"
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_training_resumes_to_the_same_adapter(uninterrupted, tmp_path, moment):
    assert run(tmp_path, moment) == -signal.SIGKILL
    assert not (tmp_path / "final").exists()
    assert run(tmp_path) == 0
    ours, theirs = (load_file(Path(f) / "final" / "adapter_model.safetensors") for f in (tmp_path, uninterrupted))
    assert ours.keys() == theirs.keys() and ours
    worst = max(float((ours[n] - theirs[n]).abs().max()) for n in ours)
    print(f"\n{moment}: largest difference of an adapter entry {worst:.1e}")
    assert worst == 0.0
    assert metrics(tmp_path) == metrics(uninterrupted)
