"""How much memory a run takes, estimated from the model's config.json alone. Warns, never refuses.

What a run really took stands in its metrics.jsonl as `peak_memory_gib`, step by step.
"""

import json
from pathlib import Path

from . import provenance
from .config import ROOT, Profile
from .errors import R3Error
from .weights import EMBEDDED, SMOLLM2

OVERHEAD = 1.5  # what the parts leave out: libraries, CUDA contexts, holes in the heap, temporaries
PROMPT = 400  # tokens assumed for the prompts of a conversation; the profile limits the answers
NF4 = (4 + 0.127) / 8  # bytes a weight: 4 bits and the doubly quantised constants (QLoRA)
ADAPTER = 4 + 4 + 8  # bytes a parameter of an adapter: fp32, its gradient, AdamW's two moments
TILE = 4096, 32768  # tokens and vocabulary entries that TRL's fused head projects at once
FOLDERS = {"base_model": EMBEDDED, "smollm2": SMOLLM2}
FIX = {
    "weights": "set quantization=nf4 or use a smaller model",
    "adapters": "lower lora_rank",
    "KV cache": "lower sample_batch",
    "activations": "lower micro_batch",
    "logits": "lower micro_batch",
    "vLLM's weights": "start vLLM on another machine and set servers=",
}


def read_config(model: str) -> dict:
    """The config.json of a profile's `model`, a folder or a hub id. R3Error where there is none."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    path = FOLDERS.get(model, ROOT / model) / "config.json"
    try:
        if model not in FOLDERS and not path.is_file():
            path = try_to_load_from_cache(model, "config.json")
            if not isinstance(path, str) and provenance.reaches_hub():
                path = hf_hub_download(model, "config.json")
        config = json.loads(Path(path).read_text())
        return config.get("text_config", config)
    except (OSError, ValueError, TypeError, AttributeError) as error:  # no model, network or JSON
        fix = "go online, or name a local folder, in which config.json is enough"
        if model in FOLDERS:
            fix = "it is there after the first run"
        raise R3Error(f"memory is not estimated, no config.json of {model!r}: {fix}") from error


def sizes(config: dict) -> dict[str, int]:
    """Sizes of a dense decoder with gated MLPs, in numbers; norms and biases are left out.

    `linear` counts the weights that NF4 packs, `lora_dims` the inputs and outputs that LoRA adapts.
    Raises R3Error for a config that describes something else.
    """
    if any("experts" in key for key in config):
        raise R3Error("memory is not estimated: the model is a mixture of experts")
    try:
        hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
        heads, layers = int(config["num_attention_heads"]), int(config["num_hidden_layers"])
        vocabulary = int(config["vocab_size"])
        head = int(config.get("head_dim") or hidden // heads)
        kv = head * int(config.get("num_key_value_heads") or heads)
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        why = f"config.json is not a dense decoder's: {type(error).__name__} {error}"
        raise R3Error(f"memory is not estimated, {why}") from error
    query = head * heads
    return {
        "linear": layers * (2 * hidden * (query + kv) + 3 * hidden * inner),
        "embeddings": vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2),
        "lora_dims": layers * (4 * hidden + 2 * (query + kv) + 3 * (hidden + inner)),
        "layers": layers,
        "hidden": hidden,
        "query": query,
        "kv": kv,
        "inner": inner,
        "vocabulary": vocabulary,
    }


def weight_bytes(found: dict[str, int], number: int, packed: bool) -> float:
    """Bytes of all weights, `number` bytes each; `packed`: those of linear layers in NF4."""
    return found["linear"] * (NF4 if packed else number) + found["embeddings"] * number


def parts(profile: Profile, config: dict, gpu: bool) -> dict[str, float]:
    """GiB by part, for a GPU (16 bits, gradient checkpointing) or a CPU (fp32); an upper bound.

    Every turn is as long as it may be. A layer keeps for the backward about four tensors each of
    the hidden, the attention's and the MLP's size; with checkpointing only its input, and one layer
    is computed again for a quarter of the rows at a time, as the trainer has it.
    """
    p, s = profile, sizes(config)
    number = 2 if gpu else 4
    length = PROMPT + sum(p.sampling[f"max_{turn}_length"] for turn in ("attempt", "completion", "retry"))
    learned = length - p.sampling["max_retry_length"] if p.training["mask"] == "reflection" else length
    layer = 4 * (s["hidden"] + s["query"] + s["inner"])
    kept = s["layers"] * s["hidden"] + layer / 4 if gpu else s["layers"] * layer
    tokens = p.training["per_device_train_batch_size"] * learned
    found = {
        "weights": weight_bytes(s, number, p.quantization == "nf4"),
        "adapters": p.lora["r"] * s["lora_dims"] * ADAPTER,
        "activations": tokens * kept * number,
        "logits": min(tokens, TILE[0]) * min(s["vocabulary"], TILE[1]) * 4,
    }
    rows = min(p.sampling["sample_batch"], p.train_problems * p.mine_samples)
    if p.own_server:  # which needs a group's cache to run at all, and takes what else is there
        rows = p.training["num_generations"]
        packed = p.vllm_option("--quantization", "-q") is not None
        found["vLLM's weights"] = weight_bytes(s, number, packed)
    if p.own_server or p.engine == "transformers":
        found["KV cache"] = rows * length * 2 * s["kv"] * s["layers"] * number
    return {name: size / provenance.GIB for name, size in found.items()}


def stored(model: str) -> float:
    """GiB of the weights in 16 bits that are still to be downloaded; 0 for a model in a folder."""
    if model in FOLDERS or (ROOT / model).is_dir():
        return 0.0
    found = sizes(read_config(model))
    return weight_bytes(found, 2, packed=False) / provenance.GIB


def total(profile: Profile, found: dict[str, float]) -> float:
    """GiB of all parts with the overhead; the phases take turns, but with a vLLM server."""
    learning = found["activations"] + found["logits"]
    sampling = found.get("KV cache", 0)
    both = learning + sampling if profile.own_server else max(learning, sampling)
    return OVERHEAD * (found["weights"] + found["adapters"] + both + found.get("vLLM's weights", 0))


def estimate(profile: Profile, gpu_memory: float | None = None) -> tuple[bool, str]:
    """Whether a run fits a GPU of `gpu_memory` GiB, or else this machine; and why, in a line.

    Raises R3Error where nothing can be said.
    """
    gpu = gpu_memory or provenance.gpu_gib()
    there = gpu or provenance.ram_gib()
    found = parts(profile, read_config(profile.model), bool(gpu))
    needed = total(profile, found)
    listed = ", ".join(f"{name} {size:.2f}" for name, size in found.items())
    place = "GPU" if gpu else "RAM"
    text = f"about {needed:.1f} GiB of {there:.1f} GiB {place} ({listed}; x {OVERHEAD} overhead)"
    if needed <= there:
        return True, text
    return False, f"{text}: {FIX[max(found, key=found.get)]}"
