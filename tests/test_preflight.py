"""The memory estimate: counts against real models, and what grows with what."""

import json
from importlib.util import find_spec

import pytest
import torch
from conftest import BASE_MODEL, TINY, tiny_model
from peft import LoraConfig, get_peft_model

from r3lib import preflight, provenance, weights
from r3lib.config import load_profile
from r3lib.errors import R3Error
from r3lib.preflight import NF4, estimate, parts, read_config, sizes
from r3lib.shared_prefix import MOST_TOKENS

QWEN = {  # Qwen2.5-1.5B
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def qwen(tmp_path):
    """A folder that holds nothing but the config of Qwen2.5-1.5B."""
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen" / "config.json").write_text(json.dumps(QWEN))
    return str(tmp_path / "qwen")


def weight_count(config):
    return sizes(config)["linear"] + sizes(config)["embeddings"]


def test_a_config_alone_gives_nearly_the_parameters_of_a_known_model():
    assert weight_count(QWEN) == pytest.approx(1_543_714_304, rel=1e-3)


@pytest.mark.parametrize("architecture", TINY)
def test_weights_and_lora_are_counted_as_transformers_and_peft_make_them(architecture, tmp_path):
    model = tiny_model(architecture, 2000)
    model.config.save_pretrained(tmp_path)
    config = read_config(str(tmp_path))
    assert weight_count(config) == pytest.approx(model.num_parameters(), rel=0.01)
    lora = get_peft_model(
        model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    counted = 16 * sizes(config)["lora_dims"]
    trained = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert trained <= counted <= 1.5 * trained  # an upper bound: Phi-3 joins projections


@pytest.mark.skipif(not find_spec("bitsandbytes"), reason="run `pip install bitsandbytes==0.50.2`")
def test_nf4_packs_the_linear_weights_and_nothing_else():
    model = weights.load(BASE_MODEL, "nf4")
    packed = sum(p.numel() for p in model.parameters() if p.element_size() == 1)
    constants = sum(
        p.quant_state.absmax.numel() for p in model.parameters() if hasattr(p, "quant_state")
    )
    linear = sizes(read_config("base_model"))["linear"]
    assert packed == linear / 2 and packed + constants == pytest.approx(linear * NF4, rel=0.01)


@pytest.mark.parametrize(
    "key, part",
    [
        ("per_device_train_batch_size", "activations"),
        ("sample_batch", "KV cache"),
        ("lora.r", "adapters"),
    ],
)
def test_a_setting_moves_its_own_part_alone(key, part):
    found = [parts(load_profile("colab", **{key: rows}), QWEN, gpu=True) for rows in (4, 8, 16)]
    grown = [each.pop(part) for each in found]
    assert grown == sorted(set(grown))
    others = [{name: size for name, size in each.items() if name != "logits"} for each in found]
    assert others[0] == others[1] == others[2]


def test_a_packed_row_is_as_long_as_in_training():
    assert preflight.PACKED == MOST_TOKENS
    long, short = load_profile("paper"), load_profile("paper", max_completion_length=64)
    assert parts(long, QWEN, gpu=False)["activations"] > 4 * parts(short, QWEN, gpu=False)["activations"]


def test_a_t4_holds_the_colab_profile_and_three_gib_do_not(qwen):
    profile = load_profile("colab", model=qwen)
    assert parts(profile, QWEN, gpu=True)["weights"] == pytest.approx(1.07, abs=0.02)
    assert estimate(profile, 15)[0]
    fits, text = estimate(profile, 3)
    assert not fits and "of 3.0 GiB GPU" in text


def test_a_server_of_our_own_holds_the_weights_again_and_one_elsewhere_does_not():
    own = parts(load_profile("paper"), QWEN, gpu=True)
    elsewhere = parts(load_profile("paper", servers="http://host:8000"), QWEN, gpu=True)
    assert own["vLLM's weights"] == own["weights"]
    assert not {"vLLM's weights", "KV cache"} & set(elsewhere)
    packed = load_profile("paper", vllm_options="--quantization bitsandbytes")
    assert parts(packed, QWEN, gpu=True)["vLLM's weights"] < 0.5 * own["weights"]


def test_without_a_gpu_the_ram_is_what_there_is(monkeypatch):
    monkeypatch.setattr(provenance, "_output", lambda command: None)
    monkeypatch.setattr(provenance, "ram_gib", lambda: 6.0)
    for name in ("smoke", "nano"):
        fits, text = estimate(load_profile(name))
        assert fits and "of 6.0 GiB RAM" in text
    monkeypatch.setattr(provenance, "_output", lambda command: "15360\n81920")
    assert "of 15.0 GiB GPU" in estimate(load_profile("nano"))[1]


@pytest.mark.parametrize("dtype, fits", [(torch.bfloat16, True), (torch.float32, False)])
def test_a_cpu_that_is_faster_in_16_bits_needs_half(dtype, fits, qwen, monkeypatch):
    monkeypatch.setattr(provenance, "gpu_gib", lambda: 0)
    monkeypatch.setattr(provenance, "ram_gib", lambda: 24.0)
    monkeypatch.setattr(preflight, "compute_dtype", lambda name: dtype)
    assert estimate(load_profile("qwen", model=qwen))[0] == fits
    assert not estimate(load_profile("qwen", model=qwen, dtype="float32"))[0]


def test_weights_that_the_first_run_unpacks_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SMOLLM2", tmp_path / "none")
    with pytest.raises(R3Error, match="none/config.json is made at the first run"):
        estimate(load_profile("smol"))


@pytest.mark.parametrize(
    "config, words",
    [
        ({}, "is not a dense decoder's"),
        (QWEN | {"hidden_size": None}, "is not a dense decoder's"),
        (QWEN | {"num_experts": 8}, "mixture of experts"),
        (QWEN | {"num_attention_heads": 0}, "is not a dense decoder's"),
        ([], "is not a dense decoder's"),
        ("not JSON", "is not a dense decoder's"),
    ],
)
def test_what_cannot_be_estimated_is_one_clear_line(config, words, tmp_path):
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(R3Error, match=f"memory is not estimated.*{words}"):
        estimate(load_profile("colab", model=str(tmp_path)))
