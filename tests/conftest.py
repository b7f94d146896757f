"""Shared by the tests: the embedded model, tiny random ones, a task with coin-toss verdicts, a scripted engine."""

import os
import time
import zlib
from pathlib import Path
from random import Random

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the hub is refused at once, not after retries

import psutil
import pytest
import torch
from hypothesis import settings
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from r3lib.chat import Chat
from r3lib.engines.base import Completion
from r3lib.r3_config import R3Config
from r3lib.sampler import Failure
from r3lib.tasks import CountdownTask
from r3lib.verifiers.verdict import Verdict

LONGEST = ("test_reproduce.py", "test_smol.py", "test_lab.py", "test_workflows.py")
settings.register_profile("no_clock", deadline=None)  # a busy machine is slow, not wrong
settings.load_profile("no_clock")
BASE_MODEL = Path(__file__).resolve().parents[1] / "data" / "base_model"
TINY = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def pytest_collection_modifyitems(items):
    """The longest files come first, so that of two workers none waits long for the other."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def tokenizer():
    """The embedded model's tokenizer."""
    return AutoTokenizer.from_pretrained(BASE_MODEL)


@pytest.fixture
def model():
    """The embedded model, fresh, fp32."""
    return base_model()


@pytest.fixture
def tiny(tokenizer):
    """A function of an architecture's name: a random model of two layers with the embedded vocabulary."""
    return lambda architecture="llama": tiny_model(architecture, len(tokenizer))


def base_model():
    return AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32)


def tiny_model(architecture, vocabulary):
    config, causal_lm = TINY[architecture]
    torch.manual_seed(0)
    return causal_lm(
        config(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
            initializer_range=0.2, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip


class CoinTask(CountdownTask):
    """Countdown whose verdict is a checksum's parity, so that any model's retries have variance."""

    def verify(self, text, problem):
        ok = zlib.crc32(text.encode()) % 2 == 0
        return Verdict(ok, "ok" if ok else "missed_target")


class ConstantTask(CountdownTask):
    """Countdown whose every verdict is the same."""

    def __init__(self, ok):
        super().__init__(count=3, largest=20)
        self.verdict = Verdict(ok, "ok" if ok else "missed_target")

    def verify(self, text, problem):
        return self.verdict


class ScriptedEngine:
    """Completions of random tokens and ragged lengths, some cut off; keeps what it was asked and answered."""

    def __init__(self, tokenizer):
        self.end, self.size, self.calls = Chat(tokenizer).end_id, len(tokenizer), []

    def generate(self, prompts, n, sampling, seeds=None):
        rows = [[self._one(Random(f"{seed}/{k}"), sampling) for k in range(n)] for seed in seeds]
        self.calls.append((prompts, sampling, rows))
        return rows

    def _one(self, random, sampling):
        most, finished = random.randint(2, sampling.max_tokens), random.random() < 0.7
        ids = [random.randrange(20, self.size) for _ in range(most - finished)] + [self.end] * finished
        return Completion(ids, [-random.random() for _ in ids], finished)


def coin_failures(tokenizer, count, task=None):
    """`count` failed attempts at generated problems."""
    task, chat = task or CoinTask(count=3, largest=20), Chat(tokenizer)
    failures = []
    for problem in task.problems("train", count, seed=1):
        text = f"<answer>{problem.nums[0]} + {problem.nums[1]}</answer>"
        ids = tokenizer.encode(text, add_special_tokens=False) + [chat.end_id]
        failures.append(Failure(problem, chat.start(task, problem), ids, text, "wrong_numbers"))
    return failures


def small_config(folder, **changes):
    """A training of seconds: 2 failures x 4 reflections a step, no KL, no clipping."""
    settings = dict(
        output_dir=str(folder), max_steps=2, failures_per_step=2, num_generations=4, per_device_train_batch_size=8,
        max_completion_length=12, max_retry_length=6, learning_rate=2e-3, lr_scheduler_type="constant",
        warmup_steps=0, beta=0.0, loss_type="dr_grpo", max_grad_norm=0.0, save_strategy="no", use_cpu=True,
        retry_temperature=1.0, disable_tqdm=True, report_to="none",
    )  # fmt: skip
    return R3Config(**(settings | changes))


def small_lora(**changes):
    return LoraConfig(**(dict(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM") | changes))


def alive(pid):
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(found, seconds=30):
    """Whether all of `found` end within `seconds`."""
    deadline = time.monotonic() + seconds
    while any(map(alive, found)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, found))
