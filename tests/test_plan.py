"""The plan: counts against the real thing, what grows with what, refusals whose advice helps, and measured peaks."""

import json
import re
import subprocess
import sys
import types
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from conftest import BASE_MODEL, TINY, tiny_model
from peft import LoraConfig, get_peft_model

from r3lib import pipeline, plan, train, weights
from r3lib.config import load_profile
from r3lib.errors import R3Error
from r3lib.plan import GIB, NF4, TOLERANCE, Device, Lengths, Plan, doubts, plan_of, server_options, shape_of

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
            assert doubts(load_profile(name)) == []


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
        ({"micro_batch": 64, "mask": "retry", "retry_temperature": 1.0, "attempt_tokens": 8192}, "learning",
         "micro_batch"),
        ({"sample_batch": 1024, "test_problems": 2000}, "sampling", "sample_batch"),
    ],
)  # fmt: skip
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
    own, elsewhere = t4("paper", vllm_options="--gpu-memory-utilization=0.92"), t4("paper", servers="http://host:8000")
    context = plan.LIBRARIES["GPU"]  # which vLLM does not count to its share
    assert own.memory()["learning"]["vLLM server"] == pytest.approx(0.92 * 15 * GIB + context)
    assert elsewhere.memory().keys() == {"learning"} and "vLLM server" not in elsewhere.memory()["learning"]
    assert own.state("learning") == "fail" and own.mend("learning") == "set vllm_options="
    assert t4("paper").state("learning") == "ok"


def test_a_server_on_a_cpu_holds_its_weights_in_the_trainers_precision(t4):
    parts = replace(t4("paper"), device=Device("RAM", 64 * GIB)).memory()["learning"]
    assert parts["vLLM server"] == plan.LIBRARIES["RAM"] + parts["weights"] + plan.SERVER_CACHE


def trainer(made):
    """What a plan with a vLLM server needs besides it."""
    return made.need("learning") - made.memory()["learning"]["vLLM server"]


@pytest.mark.parametrize(
    ("name", "gib", "share"),
    [("colab", 14.56, 0.57), ("colab", 22, 0.71), ("colab", 39.4, 0.84), ("paper", 39.4, 0.8), ("paper", 79.2, 0.9)],
)
def test_a_servers_share_leaves_the_trainer_a_quarter_more_than_planned(t4, name, gib, share):
    made = replace(t4(name, engine="vllm", quantization="none"), device=Device("GPU", gib * GIB))
    assert made.server_share == share and made.state("learning") == "ok"
    left = gib * GIB - made.memory()["learning"]["vLLM server"] - TOLERANCE * trainer(made)
    assert 0 <= left < 0.01 * gib * GIB  # vLLM would not start with more than is free
    assert share * gib * GIB >= made.server_least


def test_where_memory_is_short_the_server_gets_the_least_and_the_trainer_what_is_left(t4):
    made = replace(t4("colab", engine="vllm", quantization="none"), device=Device("GPU", 10 * GIB))
    assert 0 <= 10 * GIB * made.server_share - made.server_least < 0.1 * GIB
    assert made.state("learning") == "ok" and made.need("learning") + (TOLERANCE - 1) * trainer(made) > 10 * GIB
    small = replace(made, device=Device("GPU", 8 * GIB))
    assert small.state("learning") == "fail"
    advice = r"use a smaller model, or GPU of (\d+) GiB, or start vLLM on another machine and set servers="
    enough = int(re.fullmatch(advice, small.mend("learning"))[1])
    states = [replace(made, device=Device("GPU", gib * GIB)).state("learning") for gib in (enough - 1, enough)]
    assert states[0] != "ok" == states[1]


def test_a_servers_share_is_exact_and_the_plan_of_the_trainer_is_not(t4):
    room = trainer(t4("paper")) + plan.LIBRARIES["GPU"]
    states = []
    for part in (1.01, 0.9, 0.75):  # of what the trainer needs
        share = 1 - (room * part) / (15 * GIB)
        states.append(t4("paper", vllm_options=f"--gpu-memory-utilization {share}").state("learning"))
    assert states == ["ok", "warn", "fail"]


def test_a_share_too_small_for_the_servers_weights_is_refused(t4):
    made = t4("paper", vllm_options="--seed 1 --gpu_memory_utilization 0.1 --enforce-eager")
    assert made.state("learning") == "fail"
    assert re.fullmatch(r"4\.\d GiB for vLLM, whose share is 0.1 of 15.0 GiB GPU", made.share("learning"))
    assert made.mend("learning") == "set 'vllm_options=--seed 1 --enforce-eager'"
    packed = t4("paper", vllm_options="--quantization=bitsandbytes")
    assert t4("paper").server_least - packed.server_least == pytest.approx((2 - NF4) * packed.shape.linear)
    for wrong in ("much", "0", "1.5", ""):
        with pytest.raises(R3Error, match="write a share of the GPU, for example 0.4"):
            t4(vllm_options=f"--gpu-memory-utilization {wrong}".strip()).server_share  # noqa: B018


def on_a_gpu(monkeypatch, gib):
    monkeypatch.setattr(weights, "device", lambda: "cuda:0")
    monkeypatch.setattr(plan, "device_of", lambda gpu_memory=None: Device("GPU", gib * GIB))


def test_a_server_gets_its_share_as_an_argument_on_a_gpu_alone(qwen, monkeypatch):
    def options(text=""):
        return server_options(load_profile("paper", model=qwen, vllm_options=text))

    assert options("--seed 1") == "--seed 1"
    on_a_gpu(monkeypatch, 39.4)
    assert options() == "--gpu-memory-utilization 0.8 --max-model-len auto"
    assert options("--seed 1") == "--gpu-memory-utilization 0.8 --max-model-len auto --seed 1"
    given = "--gpu-memory-utilization 0.5 --max-model-len 8k"
    assert options(given) == given
    with pytest.raises(R3Error, match=r"engine=vllm needs 4.5 GiB for vLLM, whose share is 0.05 .*: set vllm_options="):
        options("--gpu-memory-utilization 0.05")
    assert server_options(load_profile("paper")) == ""  # without a config there is no plan, and vLLM decides


def test_what_may_not_fit_is_said_before_a_run(qwen, monkeypatch, capsys, tmp_path):
    on_a_gpu(monkeypatch, 39.4)
    share = "--gpu-memory-utilization 0.86"
    [found] = doubts(load_profile("paper", model=qwen, vllm_options=share))
    assert found[0] == "warn" and re.fullmatch(r"learning needs 40.3 of 39.4 GiB GPU: set vllm_options=", found[1])
    the_process_prints(monkeypatch, [found])
    pipeline.check_memory("paper", {})
    assert capsys.readouterr().err == f"r3: warning: {found[1]}\n"
    monkeypatch.setattr(train, "study_of", lambda options: types.SimpleNamespace(
        profile=load_profile("paper", model=qwen, vllm_options=share), mine=stop, results=tmp_path
    ))  # fmt: skip
    assert train.main(["--task", "countdown"]) == 2
    assert capsys.readouterr().err == f"r3: warning: {found[1]}\nr3: error: stopped\n"


def the_process_prints(monkeypatch, found):
    """What `pipeline.check_memory` is told of a machine that this one is not."""
    done = subprocess.CompletedProcess([], 0, json.dumps(found))
    monkeypatch.setattr(pipeline.subprocess, "run", lambda *_, **__: done)


def stop():
    raise R3Error("stopped")


def test_a_run_that_does_not_fit_is_refused_and_one_without_a_config_or_spread_over_gpus_is_not(monkeypatch, capsys):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"total": GIB}))
    words = r"learning needs [\d.]+ of 1.0 GiB RAM: set micro_batch=\d+"
    found = doubts(load_profile("nano"))
    assert found[0][0] == "fail" and re.fullmatch(words, found[0][1])
    the_process_prints(monkeypatch, found)
    with pytest.raises(R3Error, match=words):
        pipeline.check_memory("nano", {})
    assert train.main(["--profile", "nano", "--task", "countdown"]) == 2
    assert re.search(words, capsys.readouterr().err)
    assert doubts(load_profile("colab")) == []  # its config is on the hub, which no test reaches
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert doubts(load_profile("nano")) == []


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
