"""Whether a trainer that somebody has built is the one that a study's profile describes."""

from dataclasses import fields
from pathlib import Path

from .errors import R3Error
from .identity import UNLIKE, differences, task_facts
from .mining import failures_digest
from .settings import FREE, REFUSED, default_of
from .weights import compute_dtype, quantization_config, training_options


def check_trainer(study, trainer, seed: int) -> None:
    """R3Error, naming what differs, unless `trainer` is what `study.trainer(seed)` gives.

    Compared are settings, task, failures, model and adapter by their configs, and whether an engine
    of its own samples; weights that were changed in memory are not seen.
    """
    if Path(trainer.args.output_dir) != study.training_folder(seed):
        raise R3Error(f"give R3Config output_dir=study.training_folder({seed}) and seed={seed}")
    block = study.profile.sampling | study.profile.training | {"seed": seed}
    wanted = _settings(trainer.args, block)
    given = {name: getattr(trainer.args, name) for name in wanted}
    has_engine = study.profile.engine != "transformers"
    wanted |= _facts(study.task, study.failures(), _blank_model(study), has_engine)
    has_engine = trainer._engine is not None
    given |= _facts(trainer.task, trainer.failures, trainer.model, has_engine)
    differing = differences(wanted, given)
    if differing:
        raise R3Error(f"not the profile's trainer: {differing}: change it in overrides instead")


def _settings(args, block: dict) -> dict:
    """The settings of `block`, and the defaults of all others that decide what is learned.

    No second config is made: transformers would take the first one's devices from it.
    """
    defaults = {f.name: default_of(f) for f in fields(args)}
    settings = defaults | training_options(args.use_cpu) | block
    precision = {"bf16", "fp16"} & block.keys()
    ignored = FREE | REFUSED.keys()
    if precision:  # the other one follows from it
        ignored |= {"bf16", "fp16"} - precision
    return {name: value for name, value in settings.items() if name not in ignored}


def _facts(task, failures, model, has_engine: bool) -> dict:
    config = model.config
    quantization = getattr(config, "quantization_config", None) or {}
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    facts = task_facts(task) | {"failures": failures_digest(failures)}
    facts |= {"engine of its own": has_engine, "model": config.name_or_path}
    facts["dtype"] = str(config.dtype)
    facts["quantization"] = quantization.get("bnb_4bit_quant_type", quantization)
    for adapter, lora in getattr(model, "peft_config", {}).items():
        settings = lora.to_dict().items()
        facts |= {f"lora.{name}": value for name, value in settings if name not in UNLIKE}
        facts["adapter"] = adapter
    return facts


def _blank_model(study):
    """The profile's model with its adapter, without weights."""
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(study.model_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=compute_dtype())
    quantized = quantization_config(study.profile.quantization)
    if quantized:
        model.config.quantization_config = quantized
    return get_peft_model(model, study.lora())
