"""How many operations a decode pass launches: what bounds it where the model is small or the device fast."""

from collections import Counter

import pytest
import torch
from conftest import small_lora
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode

from r3lib.engines import SamplingParams, tree_attention
from r3lib.engines import transformers as engine

# copy no data, and launch nothing
VIEWS = set("view _unsafe_view t transpose expand slice unsqueeze squeeze select split unbind alias".split())


class Operations(TorchDispatchMode):
    """Counts the operations of the decode passes within the block."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count, self.passes, self.decoding = Counter(), 0, False
        decode = engine.Batch.decode

        def counted(batch, tokens):
            self.passes, self.decoding = self.passes + 1, True
            logits = decode(batch, tokens)
            self.decoding = False
            return logits

        monkeypatch.setattr(engine.Batch, "decode", counted)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.decoding:
            self.count[function.__name__.split(".")[0]] += 1
        return function(*args, **(kwargs or {}))

    def a_pass(self) -> float:
        return sum(n for name, n in self.count.items() if name not in VIEWS) / self.passes


def attend_as_on_a_gpu(monkeypatch):
    plain = tree_attention.plain_attention
    monkeypatch.setattr(
        tree_attention, "cpu_attention", lambda query, *rest, **options: plain(query.float(), *rest, **options)
    )


@pytest.mark.parametrize("most_scores", [tree_attention.MAX_SCORES, 100])
def test_attention_as_on_a_gpu_gives_the_tokens_and_log_probs_of_that_on_a_cpu(
    tiny, tokenizer, monkeypatch, most_scores
):
    """On ragged prompts, whose grids have gaps and whose keys are hidden, and on texts that go on."""
    monkeypatch.setattr(tree_attention, "MAX_SCORES", most_scores)
    prompts = [[5] * 20 + [*range(6, 6 + number)] for number in (1, 4, 9)] + [[7, 8]]
    found = []
    for gpu in (False, True):
        if gpu:
            attend_as_on_a_gpu(monkeypatch)
        sampler = engine.TransformersEngine(tiny("qwen2"), tokenizer, end_ids={-5})
        with sampler.keeping():
            first = sampler.generate(prompts, 1, SamplingParams(7, 1.0))
            longer = [ids + group[0].ids[:3] + [9, 9] for ids, group in zip(prompts, first)]
            found.append([c for group in first + sampler.generate(longer, 1, SamplingParams(5, 0.0)) for c in group])
    for ours, other in zip(*found, strict=True):
        assert ours.ids == other.ids
        assert ours.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize("gpu, most", [(False, 210), (True, 250)])
def test_two_layers_with_lora_launch_few_operations_under_autocast(tiny, tokenizer, monkeypatch, gpu, most):
    """Three levels of a tree, as in a rollout; `gpu`: its attention, by plain products in fp32."""
    if gpu:
        attend_as_on_a_gpu(monkeypatch)
    model = get_peft_model(tiny("qwen2").bfloat16(), small_lora(), autocast_adapter_dtype=True)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
    prompts = [[5] * 20 + [number] * 10 for number in range(6, 10)]
    sampler = engine.TransformersEngine(model, tokenizer, end_ids={-5})
    with torch.autocast("cpu", torch.bfloat16), Operations(monkeypatch) as operations:
        sampler.generate(prompts, 4, SamplingParams(9, 1.0))
    assert 100 < operations.a_pass() < most, operations.count.most_common(20)
