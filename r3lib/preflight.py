"""How much memory a run takes, estimated from the model's config.json alone; stops nothing.

What a run really took stands in its metrics.jsonl as `peak_memory_gib`, step by step.
"""

import json
from math import ceil
from pathlib import Path

from . import provenance
from .config import Profile
from .errors import R3Error
from .weights import compute_dtype, folder_of

OVERHEAD = 1.5  # what the parts leave out: libraries, CUDA contexts, holes in the heap, temporaries
PACKED = 2048  # most tokens of a packed row, as in shared_prefix, which loads torch
PROMPT = 400  # tokens assumed for the prompts of a conversation; the profile limits the answers
NF4 = (4 + 0.127) / 8  # bytes a weight: 4 bits and the doubly quantised constants (QLoRA)
ADAPTER = 4 + 4 + 8  # bytes a parameter of an adapter: fp32, its gradient, AdamW's two moments
TILE = 4096, 32768  # tokens and vocabulary entries that TRL's fused head projects at once
FIX = (
    "lower sample_batch (KV cache) or per_device_train_batch_size (activations, logits), "
    "set quantization=nf4, or start vLLM on another machine and set servers="
)


def config_file(model: str) -> Path:
    """The config.json of a profile's `model`, in its folder, the hub's cache or the hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    folder = folder_of(model)
    if folder:
        return folder / "config.json"
    online = provenance.reaches_hub()
    try:
        return Path(hf_hub_download(model, "config.json", local_files_only=not online))
    except (ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        why = "the hub does not give it" if online else "the hub does not answer: go online"
        raise R3Error(f"model {model!r} is no folder with a model, and {why}") from error


def read_config(model: str) -> dict:
    """The config of a profile's `model`; of one that also sees, its language model's."""
    config = json.loads(config_file(model).read_text())
    return config.get("text_config", config)


def sizes(config: dict) -> dict[str, int]:
    """Sizes of a dense decoder with gated MLPs, in numbers; norms and biases are left out.

    `linear` counts the weights that NF4 packs, `lora_dims` the inputs and outputs that LoRA adapts.
    Raises KeyError, TypeError or ValueError for a config that describes something else.
    """
    if any("experts" in key for key in config):
        raise ValueError("a mixture of experts")
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    vocabulary = config["vocab_size"]
    head = config.get("head_dim") or hidden // heads
    kv = head * (config.get("num_key_value_heads") or heads)
    query = head * heads
    return {
        "linear": layers * (2 * hidden * (query + kv) + 3 * hidden * inner),
        "embeddings": vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2),
        "lora_dims": layers * (4 * hidden + 2 * (query + kv) + 3 * (hidden + inner)),
        "layers": layers,
        "inputs": layers * hidden,  # numbers a token that all layers take in,
        "inside": 4 * (hidden + query + inner),  # that one keeps for the backward,
        "cache": layers * 2 * kv,  # and that stay for the next tokens
        "vocabulary": vocabulary,
    }


def parts(profile: Profile, config: dict, gpu: bool, number: int | None = None) -> dict[str, float]:
    """GiB by part, for a GPU (with gradient checkpointing) or a CPU, at `number` bytes a value.

    `number` is by default 4 on a CPU and 2 on a GPU. Every turn is as long as it may be. Groups are
    packed (see `r3lib.shared_prefix`); more is needed where a model cannot have that. A layer keeps
    for the backward about four tensors each of the hidden, the attention's and the MLP's size; with
    checkpointing only its input, and one layer is computed again for a quarter of the groups.
    """
    sampling, training, s = profile.sampling, profile.training, sizes(config)
    number = number or (4 if profile.dtype == "float32" or not gpu else 2)
    prompt = PROMPT + sampling["max_attempt_length"]
    learned = sampling["max_completion_length"]
    length = prompt + learned + sampling["max_retry_length"]
    if training["mask"] != "reflection":
        learned += sampling["max_retry_length"]
    rows = training["per_device_train_batch_size"]
    fit = max(1, (PACKED - prompt) // learned)  # beside one prompt
    groups = ceil(rows / min(fit, training["num_generations"]))
    tokens = groups * prompt + rows * learned
    again = s["inside"] * max(1 / 4, 1 / groups)
    kept = s["inputs"] + again if gpu else s["layers"] * s["inside"]
    plain = (s["linear"] + s["embeddings"]) * number
    packed = s["linear"] * NF4 + s["embeddings"] * number
    found = {
        "weights": packed if profile.quantization == "nf4" else plain,
        "adapters": profile.lora["r"] * s["lora_dims"] * ADAPTER,
        "activations": tokens * kept * number,
        "logits": min(tokens, TILE[0]) * min(s["vocabulary"], TILE[1]) * 4,
    }
    rows = min(sampling["sample_batch"], profile.train_problems * profile.mine_samples)
    if profile.own_server:  # which needs a group's cache to run at all, and takes what is left
        rows = training["num_generations"]
        found["vLLM's weights"] = packed if profile.quantized_server else plain
    if profile.own_server or profile.engine == "transformers":
        found["KV cache"] = rows * length * s["cache"] * number
    if profile.engine == "transformers" and (number, profile.quantization) == (4, "none"):
        found["merged weights"] = s["linear"] * number  # of the trained policy, while it samples
    return {name: size / provenance.GIB for name, size in found.items()}


def estimate(profile: Profile, gpu_memory: float | None = None) -> tuple[bool, str]:
    """Whether a run fits a GPU of `gpu_memory` GiB, or else this machine; and why, in a line.

    The phases take turns, except beside a vLLM server. R3Error where nothing can be said.
    """
    gpu = gpu_memory or provenance.gpu_gib()
    there = gpu or provenance.ram_gib()
    try:
        config = read_config(profile.model)
        found = parts(profile, config, bool(gpu))
    except (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        why = f"config.json is not a dense decoder's ({type(error).__name__}: {error})"
        if isinstance(error, FileNotFoundError):  # of weights that a run unpacks
            why = f"{error.filename} is made at the first run; ask again after it"
        raise R3Error(f"memory is not estimated for {profile.model!r}: {why}") from error
    needed = _peak(found, profile)
    if needed > there and not gpu and profile.dtype != "float32":
        number = compute_dtype(profile.dtype).itemsize  # measured, with torch: only where it tells
        found = parts(profile, config, False, number)
        needed = _peak(found, profile)
    listed = ", ".join(f"{name} {size:.2f}" for name, size in found.items())
    place = "GPU" if gpu else "RAM"
    text = f"about {needed:.1f} GiB of {there:.1f} GiB {place} ({listed}; x {OVERHEAD} overhead)"
    return needed <= there, text


def _peak(found: dict[str, float], profile: Profile) -> float:
    """The GiB of the larger phase, or of both beside a vLLM server."""
    sampling = found.get("KV cache", 0) + found.get("merged weights", 0)
    phases = [found["activations"] + found["logits"], sampling]
    held = found["weights"] + found["adapters"] + found.get("vLLM's weights", 0)
    return OVERHEAD * (held + (sum(phases) if profile.own_server else max(phases)))
