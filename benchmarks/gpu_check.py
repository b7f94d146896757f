"""What only a GPU can show, in at most six minutes and without a network: `make gpu-check`.

    python benchmarks/gpu_check.py [--small] [--results results/gpu]

Each part runs on its own; one that fails is named and stops nothing. Writes `check.json` and
`check.md`. `--small` is the same on a CPU or a small GPU: a random model of two layers in place of
Qwen2.5-1.5B's shape. Where `--model` names a folder, its weights take the place of random ones.
"""

import argparse
import gc
import json
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from step import arguments as step_arguments
from step import step
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

from r3lib.config import ROOT, load_profile
from r3lib.engines import SamplingParams
from r3lib.engines.transformers import TransformersEngine
from r3lib.files import write_atomic
from r3lib.preflight import OVERHEAD, parts
from r3lib.provenance import GIB, machine
from r3lib.weights import locate, quantization_config

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
QWEN = {  # config.json of Qwen/Qwen2.5-1.5B-Instruct
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
    "max_position_embeddings": 32768, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    "tie_word_embeddings": True,
}  # fmt: skip
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 2048,
    "num_attention_heads": 4,
}  # fmt: skip
STEP = {"coin": True, "groups": 8, "rows": 8, "attempt": 64, "reflection": 80, "retry": 40}
STEP_SMALL = STEP | {"groups": 2, "attempt": 12, "reflection": 12, "retry": 8}


def main() -> None:
    """Run every part; write what each found, or how it failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="random models of two layers")
    parser.add_argument("--model", help="a folder with weights of about 1.5B")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "gpu")
    options = parser.parse_args()
    found = {"machine": machine(), "device": torch.cuda.get_device_name() if GPU else "CPU"}
    for part in PARTS:
        started = time.perf_counter()
        try:
            result = part(options)
        except Exception as error:
            traceback.print_exc()
            result = {"failed": f"{type(error).__name__}: {error}"[:300]}
        result["seconds"] = time.perf_counter() - started
        found[part.__name__] = result
        print(part.__name__, {k: rounded(v) for k, v in result.items()}, flush=True)
        release()
        write(options.results, found)


def write(folder: Path, found: dict) -> None:
    """`check.json`, and a table of it."""
    write_atomic(folder / "check.json", json.dumps(found, indent=1) + "\n")
    lines = [f"On {found['device']}:", "", "| part | measured | value |", "|---|---|---|"]
    for part in PARTS:
        for name, value in found.get(part.__name__, {}).items():
            lines.append(f"| {part.__name__} | {name} | {rounded(value)} |")
    write_atomic(folder / "check.md", "\n".join(lines) + "\n")


def rounded(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def release() -> None:
    """Give memory back, and count its peak anew."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def embedded(dtype):
    path = locate("base_model")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(DEVICE).eval()
    model.generation_config.eos_token_id = None  # nothing ends: every row has all its tokens
    return model, AutoTokenizer.from_pretrained(path)


def sampling(options) -> dict:
    """Our engine beside `generate` and the model's own log-probs, in each number format."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model, tokenizer = embedded(dtype)
        name = str(dtype).removeprefix("torch.")
        text = "Using the numbers [3, 8, 11], create an equation that equals {}. "
        prompts = [tokenizer.encode(text.format(target)) for target in range(20, 36)]
        engine = TransformersEngine(model, tokenizer)
        engine.end_ids = frozenset([-5])
        with torch.no_grad():
            greedy = [g[0].ids for g in engine.generate(prompts, 1, SamplingParams(24, 0.0))]
            theirs = [generated(model, prompt, 24) for prompt in prompts]
            equal = [a == b for a, b in zip(greedy, theirs)]
            found[f"{name}: greedy texts equal to generate"] = sum(equal) / len(equal)
            [group] = engine.generate(prompts[:1], 8, SamplingParams(24, 1.0), [1])
            gaps = [abs_gap(model, prompts[0], completion) for completion in group]
            found[f"{name}: largest gap of a log-prob"] = max(gaps)
    return found


def generated(model, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def abs_gap(model, prompt: list[int], completion) -> float:
    """The largest difference of a sampled log-prob to that of a forward of the whole text."""
    ids = torch.tensor([[*prompt, *completion.ids]], device=model.device)
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    own = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)
    return (own.cpu() - torch.tensor(completion.logprobs)).abs().max().item()


def embedded_steps(options) -> dict:
    """Two R3 steps on the embedded model."""
    model, tokenizer = embedded(torch.bfloat16 if GPU else torch.float32)
    small = {"groups": 4, "rows": 32} if options.small else {"groups": 32, "rows": 64}
    return step(model, tokenizer, step_options("ours", model.dtype, **small))


def step_options(run: str, dtype, **changes):
    """The options of `step.py`, without its command line."""
    given = step_arguments([])
    given.run, given.dtype, given.steps = run, str(dtype).removeprefix("torch."), 1
    for name, value in changes.items():
        setattr(given, name, value)
    return given


def large(options, quantization: str = "none"):
    """The model of 1.5B, of a folder or with random weights, and a tokenizer for it."""
    dtype = torch.bfloat16
    if options.model:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        config = quantization_config(quantization)
        place = {"": DEVICE}
        model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=dtype, quantization_config=config, device_map=place
        )
        return model, tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(**(QWEN | SMALL)) if options.small else Qwen2Config(**QWEN)
    config.eos_token_id = 1
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if quantization != "none":
        model = quantized(model)
    return model, AutoTokenizer.from_pretrained(locate("base_model"))


def quantized(model):
    """The random model through NF4, which transformers does as it loads a folder."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        release()
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=quantization_config("nf4"),
            device_map={"": DEVICE},
        )  # fmt: skip


def beside_stock(options) -> dict:
    """One R3 step of 8 groups of 8 at 1.5B, beside stock TRL's."""
    found = {}
    for run in ("stock", "ours"):
        model, tokenizer = large(options)
        changes = STEP_SMALL if options.small else STEP
        values = step(model, tokenizer, step_options(run, model.dtype, **changes))
        found |= {f"{run}: {name}": value for name, value in values.items()}
        del model
        release()
    for name in ("step", "sampling", "learning", "peak_gib"):
        found[f"stock / ours: {name}"] = found[f"stock: {name}"] / found[f"ours: {name}"]
    return found


def qlora(options) -> dict:
    """The same step under NF4."""
    model, tokenizer = large(options, "nf4")
    changes = STEP_SMALL if options.small else STEP
    return step(model, tokenizer, step_options("ours", torch.bfloat16, **changes))


def memory(options) -> dict:
    """The preflight's estimate of that step beside what it took."""
    profile = load_profile("colab", quantization="none")
    shape = QWEN | (SMALL if options.small else {})
    changes = STEP_SMALL if options.small else STEP
    sampling_block = profile.sampling | {
        "max_attempt_length": changes["attempt"], "max_completion_length": changes["reflection"],
        "max_retry_length": changes["retry"], "sample_batch": changes["groups"] * 8,
    }  # fmt: skip
    training = profile.training | {"per_device_train_batch_size": changes["rows"]}
    estimate = parts(replace(profile, sampling=sampling_block, training=training), shape, gpu=True)
    held = estimate["weights"] + estimate["adapters"]
    needed = held + max(estimate["activations"] + estimate["logits"], estimate["KV cache"])
    model, tokenizer = large(options)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / GIB
    taken = step(model, tokenizer, step_options("ours", model.dtype, **changes))["peak_gib"]
    return {
        "weights, estimated": estimate["weights"],
        "weights": weights,
        "peak, estimated": needed * OVERHEAD,
        "peak": taken,
        "estimated / taken": needed * OVERHEAD / taken,
    }


PARTS = (sampling, embedded_steps, beside_stock, qlora, memory)

if __name__ == "__main__":
    main()
