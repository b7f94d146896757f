"""The vLLM engine and a real vLLM server, on the embedded model: `make test-vllm`.

R3_VLLM_PYTHON names an interpreter whose environment has vLLM. A server takes about a minute to start.
"""

import json
import os
import signal
import threading

import psutil
import pytest
import torch
from conftest import BASE_MODEL, CoinTask, base_model, coin_failures, small_config, small_lora
from peft import LoraConfig, get_peft_model

from r3lib.chat import Chat
from r3lib.engines import Sampling
from r3lib.engines.transformers import TransformersEngine
from r3lib.engines.vllm import VLLMEngine
from r3lib.engines.vllm_server import Server
from r3lib.errors import R3Error
from r3lib.tasks import CountdownTask
from r3lib.trainer import R3Trainer, metrics_file

PYTHON = os.environ.get("R3_VLLM_PYTHON")
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "64"]
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="R3_VLLM_PYTHON names no interpreter that has vLLM: make test-vllm"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(BASE_MODEL, PYTHON, rank=8, log=tmp_path_factory.mktemp("log") / "vllm.log", options=OPTIONS) as one:
        yield one


@pytest.fixture
def engine(server, tokenizer):
    return VLLMEngine([server], tokenizer, attempts=4)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """First prompts and reflection prompts of twelve problems."""
    chat, task = Chat(tokenizer), CountdownTask()
    failures = coin_failures(tokenizer, 12, task)
    asked = [chat.follow(f.prompt_ids, f.attempt_ids, task.reflection_prompt) for f in failures]
    return [f.prompt_ids for f in failures] + asked


def save_adapter(folder, seed):
    """A random adapter of the embedded model: the PeftModel, its folder."""
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(base_model(), config)
    adapted.save_pretrained(folder)
    return adapted.eval(), folder


def assert_equal(got, wanted):
    for one, other in zip(sum(got, []), sum(wanted, []), strict=True):
        assert one.ids == other.ids and one.finished == other.finished
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-3)


def teacher_forced(model, prompt, ids, temperature):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


def test_greedy_text_is_that_of_transformers_token_for_token(engine, model, tokenizer, prompts):
    got = engine.generate(prompts, 2, Sampling(40, 0.0))
    assert_equal(got, TransformersEngine(model, tokenizer).generate(prompts, 2, Sampling(40, 0.0)))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_end_at_end_tokens_and_log_probs_are_at_the_temperature(engine, model, prompts, temperature):
    got = engine.generate(prompts, 4, Sampling(12, temperature))
    flat = [(p, c) for p, group in zip(prompts, got) for c in group]
    assert {c.finished for _, c in flat} == {True, False}
    for prompt, c in flat:
        assert c.finished == (c.ids[-1] in engine.end_ids) and not set(c.ids[:-1]) & engine.end_ids
        assert c.finished or len(c.ids) == 12
        assert c.logprobs == pytest.approx(teacher_forced(model, prompt, c.ids, temperature), abs=2e-3)


def test_a_seed_repeats_its_samples_and_its_neighbour_has_others(engine, prompts):
    one, two, again = engine.generate([prompts[0]] * 3, 4, Sampling(12), seeds=[5, 6, 5])
    assert [c.ids for c in one] == [c.ids for c in again] != [c.ids for c in two]


def test_an_adapter_swap_changes_the_output_as_peft_says(engine, tokenizer, prompts, tmp_path):
    answers = []
    for seed in (1, 2):
        adapted, folder = save_adapter(tmp_path / str(seed), seed)
        engine.sync(folder)
        answers.append(engine.generate(prompts, 1, Sampling(24, 0.0)))
        assert_equal(answers[-1], TransformersEngine(adapted, tokenizer).generate(prompts, 1, Sampling(24, 0.0)))
    assert [c.ids for c in sum(answers[0], [])] != [c.ids for c in sum(answers[1], [])]
    assert [m["id"] for m in engine._models(engine.servers[0])][1:] == [engine.policy], "the first is unloaded"


def test_an_adapter_of_too_high_a_rank_is_refused(engine, tmp_path):
    get_peft_model(base_model(), small_lora(r=16)).save_pretrained(tmp_path)
    engine.attempts = 1
    with pytest.raises(R3Error, match="rank 16 is greater than max_lora_rank 8"):
        engine.sync(tmp_path)


def test_three_steps_of_r3(engine, model, tokenizer, tmp_path):
    task = CoinTask(count=3, largest=20)
    trainer = R3Trainer(
        model, small_config(tmp_path, max_steps=3), task, coin_failures(tokenizer, 4, task), small_lora(), tokenizer,
        engine,
    )  # fmt: skip
    trainer.train()
    rows = [json.loads(line) for line in metrics_file(trainer.args).read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["importance_ratio"] == pytest.approx(1.0, abs=1e-3) for row in rows), "on policy, up to rounding"
    assert any(row["grad_norm"] > 0 for row in rows)


def test_a_server_killed_in_mid_batch_loses_no_sample(server, engine, tokenizer, prompts, tmp_path):
    adapted, folder = save_adapter(tmp_path / "adapter", 3)
    engine.sync(folder)
    (victim,) = psutil.Process(server.process.pid).children()
    first = [victim.pid, *(child.pid for child in victim.children(recursive=True))]

    engine.workers = 4
    threading.Timer(0.3, os.kill, [victim.pid, signal.SIGKILL]).start()
    many = prompts * 8
    got = engine.generate(many, 1, Sampling(60, 0.0))
    assert server.starts == 2 and not any(psutil.pid_exists(pid) for pid in first)
    assert_equal(got, TransformersEngine(adapted, tokenizer).generate(many, 1, Sampling(60, 0.0)))
