"""The plan: counts against the real thing, what grows with what, refusals whose advice helps, and measured peaks."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from conftest import BASE_MODEL, TINY, tiny_model
from peft import LoraConfig, get_peft_model

from r3lib import plan, train, weights
from r3lib.config import load_profile
from r3lib.plan import GIB, NF4, TOLERANCE, Device, Lengths, Plan, plan_of, refusal, shape_of

ROOT = Path(__file__).resolve().parents[1]
QWEN = {  # Qwen2.5-1.5B
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A folder that holds nothing but the config of Qwen2.5-1.5B."""
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "config.json").write_text(json.dumps(QWEN))
    return str(folder)


@pytest.fixture(scope="module")
def t4(qwen):
    """A function of overrides: the plan of the profile colab for the 15 GiB of a T4."""
    shape = shape_of(qwen)
    return lambda name="colab", **overrides: Plan(
        load_profile(name, model=qwen, **overrides), shape, Lengths(), Device("GPU", 15 * GIB)
    )


def test_a_config_alone_gives_the_parameters_of_a_known_model(qwen):
    shape = shape_of(qwen)
    assert shape.parameters == 1_543_714_304 and shape.layers == 28 and (shape.query, shape.kv) == (1536, 256)
    biases_and_norms = 28 * (1536 + 2 * 256 + 2 * 1536) + 1536
    assert shape.parameters - shape.linear == 151936 * 1536 + biases_and_norms  # NF4 leaves embeddings, biases, norms


@pytest.mark.parametrize("architecture", TINY)
def test_lora_has_as_many_parameters_as_peft_gives_it(architecture, tmp_path):
    model = tiny_model(architecture, 2000)
    model.config.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    assert shape.parameters == model.num_parameters()
    lora = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert 16 * shape.ports == sum(p.numel() for p in lora.parameters() if p.requires_grad)


@pytest.mark.skipif(not find_spec("bitsandbytes"), reason="run `pip install bitsandbytes==0.50.2`")
def test_a_quantised_model_has_the_planned_bytes():
    shape, model = shape_of(str(BASE_MODEL)), weights.load(BASE_MODEL, "nf4")
    packed = sum(p.numel() for p in model.parameters() if p.element_size() == 1)
    assert packed == shape.linear / 2  # two weights a byte
    assert sum(p.numel() for p in model.parameters() if p.element_size() > 1) == shape.parameters - shape.linear
    constants = sum(p.quant_state.absmax.numel() for p in model.parameters() if hasattr(p, "quant_state"))
    assert packed + constants == pytest.approx(shape.linear * NF4, rel=0.01)  # a byte for each block of 64


def test_shipped_profiles_of_the_embedded_model_run_on_four_gib(monkeypatch):
    for name in ("smoke", "nano"):
        for loose in (1.0, plan.LOOSE):
            monkeypatch.setattr(plan, "device_of", lambda gpu_memory, loose=loose: Device("RAM", 4 * GIB, loose))
            made = plan_of(load_profile(name))
            assert made.lengths.measured and {made.state(phase) for phase in made.memory()} == {"ok"}
            assert refusal(load_profile(name)) == ""


@pytest.mark.parametrize(
    "key, phase, part", [("micro_batch", "learning", "activations"), ("sample_batch", "sampling", "KV cache")]
)
def test_more_rows_need_more_memory_in_their_own_phase(t4, key, phase, part):
    sizes = [t4(**{key: rows}).memory() for rows in (1, 4, 16, 64)]
    grown = [size[phase][part] for size in sizes]
    assert grown == sorted(set(grown)) and len({sum(s[p].values()) for s in sizes for p in s if p != phase}) == 1


@pytest.mark.parametrize("key", ["attempt_tokens", "reflection_tokens", "retry_tokens", "lora_rank", "group_size"])
def test_longer_turns_and_larger_adapters_need_more(t4, key):
    few, many = t4(), t4(**{key: 2 * getattr(t4().profile, key)})
    assert sum(many.disk().values()) >= sum(few.disk().values())
    assert many.need("sampling") > few.need("sampling") or sum(many.tokens().values()) > sum(few.tokens().values())


def test_a_t4_holds_the_colab_profile_with_its_weights_in_four_bits(t4):
    parts = t4().memory()["sampling"]
    assert {t4().state(phase) for phase in t4().memory()} == {"ok"}
    assert parts["weights"] / GIB == pytest.approx(1.09, abs=0.01)  # linear 0.63, one unpacked 0.03, embeddings 0.43
    assert t4(quantization="none").memory()["sampling"]["weights"] == 2 * 1_543_714_304


@pytest.mark.parametrize(
    "overrides, phase, setting",
    [
        ({"micro_batch": 64, "mask": "retry", "attempt_tokens": 8192}, "learning", "micro_batch"),
        ({"sample_batch": 1024, "test_problems": 2000}, "sampling", "sample_batch"),
    ],
)
def test_a_refusal_names_the_setting_and_its_advice_fits(t4, overrides, phase, setting):
    made = t4(**overrides)
    assert made.state(phase) == "fail" and made.mend(phase).startswith(f"set {setting}=")
    advice = dict(word.split("=") for word in made.mend(phase).split()[1:])
    mended = t4(**overrides | advice)
    assert mended.need(phase) <= 15 * GIB < 15 * GIB * TOLERANCE < made.need(phase)
    assert t4(**overrides | {setting: 2 * int(advice[setting])}).need(phase) > 15 * GIB  # it gave up no more


def test_weights_that_do_not_fit_are_to_be_packed_and_a_model_too_large_is_named(t4):
    small = replace(t4(quantization="none"), device=Device("GPU", 3 * GIB))
    assert small.state("learning") == "fail" and "quantization=nf4" in small.mend("learning")
    tiny = replace(small, device=Device("GPU", 1 * GIB))
    assert re.fullmatch(r"use a smaller model, or GPU of \d+ GiB", tiny.mend("learning"))


def test_a_server_of_our_own_shares_the_gpu_and_one_elsewhere_does_not(t4):
    own, elsewhere = t4("paper"), t4("paper", servers="http://host:8000")
    assert own.memory()["learning"]["vLLM server"] == pytest.approx(0.92 * 15 * GIB)
    assert elsewhere.memory().keys() == {"learning"} and "vLLM server" not in elsewhere.memory()["learning"]
    assert own.state("learning") == "fail" and "--gpu-memory-utilization 0." in own.mend("learning")
    share = re.search(r"--gpu-memory-utilization [.\d]+", own.mend("learning"))[0]
    assert t4("paper", vllm_options=share).state("learning") == "ok"


def test_a_run_that_does_not_fit_is_refused_and_one_without_a_config_or_spread_over_gpus_is_not(monkeypatch, capsys):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"total": GIB}))
    words = r"learning needs [\d.]+ of 1.0 GiB RAM: set micro_batch=\d+"
    assert re.fullmatch(words, refusal(load_profile("nano")))
    assert train.main(["--profile", "nano", "--task", "countdown"]) == 2
    assert re.search(words, capsys.readouterr().err)
    assert refusal(load_profile("colab")) == ""  # its config is on the hub, which no test reaches
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert refusal(load_profile("nano")) == ""


def test_expected_tokens_count_every_policy_and_condition(t4):
    p = replace(t4().profile, train_problems=10, mine_samples=2, attempt_tokens=3, test_problems=5, seeds=2, steps=4,
                failures_per_step=6, group_size=2, reflection_tokens=7, retry_tokens=11)  # fmt: skip
    tokens = replace(t4(), profile=p).tokens()
    assert tokens["mining"] == 2 * 10 * 2 * 3  # tasks, problems, samples, tokens
    assert tokens["evaluation"] == 2 * (1 + 2 * 2) * 5 * (3 + 7 + 6 * 11)  # policies: untrained, two seeds on two tasks
    assert tokens["training"] == 2 * 2 * 4 * 12 * (7 + 11) and tokens["learned"] == 2 * 2 * 4 * 12 * 7


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
@pytest.mark.parametrize("profile, overrides", [("smoke", []), ("nano", ["sample_batch=64"])])
def test_a_measured_peak_is_within_a_quarter_of_the_plan(profile, overrides):
    command = [sys.executable, "benchmarks/memory.py", profile, *(["--set", *overrides] if overrides else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.75 <= float(re.search(r"ratio ([\d.]+)", done.stdout)[1]) <= 1.25
