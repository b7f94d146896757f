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


@pytest.mark.parametrize("gpu, most", [(False, 210), (True, 250)])
def test_two_layers_with_lora_launch_few_operations_under_autocast(tiny, tokenizer, monkeypatch, gpu, most):
    """Three levels of a tree, as in a rollout; `gpu`: its attention, by plain products in fp32."""
    if gpu:
        plain = tree_attention.plain_attention
        monkeypatch.setattr(
            tree_attention, "cpu_attention",
            lambda query, *rest, **options: plain(query.float(), *rest, **options),
        )  # fmt: skip
    model = get_peft_model(tiny("qwen2").bfloat16(), small_lora(), autocast_adapter_dtype=True)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
    prompts = [[5] * 20 + [number] * 10 for number in range(6, 10)]
    sampler = engine.TransformersEngine(model, tokenizer, end_ids={-5})
    with torch.autocast("cpu", torch.bfloat16), Operations(monkeypatch) as operations:
        sampler.generate(prompts, 4, SamplingParams(9, 1.0))
    assert 100 < operations.a_pass() < most, operations.count.most_common(20)
