"""Whether a trainer that somebody has built is the one that a study's profile describes."""

from pathlib import Path

from .errors import R3Error
from .identity import UNLIKE, differences, task_facts
from .mining import failures_digest
from .r3_config import R3Config
from .settings import settings_facts


def check_trainer(study, trainer, seed: int) -> None:
    """R3Error, naming what differs, unless `trainer` is what `study.trainer(seed)` gives.

    Compared are settings, task, failures, model and adapter by their configs, and whether an engine
    of its own samples; weights that were changed in memory are not seen.
    """
    folder = study.training_folder(seed)
    if Path(trainer.args.output_dir) != folder:
        raise R3Error(f"give R3Config output_dir=study.training_folder({seed}) and seed={seed}")
    beside = {"use_configured_state": True}  # leaves the trainer its devices
    args = R3Config(str(folder), seed=seed, accelerator_config=beside, **study.settings())
    wanted = _facts(args, study.task, study.failures(), _adapters(study))
    wanted |= {"model": study.model_path, "dtype": f"torch.{study.dtype}"}
    wanted |= {"quantization": study.profile.quantization}
    wanted |= {"engine of its own": study.profile.engine != "transformers"}
    config = trainer.model.config
    adapters = getattr(trainer.model, "peft_config", {})
    given = _facts(trainer.args, trainer.task, trainer.failures, adapters)
    given |= {"model": config.name_or_path, "dtype": str(config.dtype)}
    quantization = getattr(config, "quantization_config", None)
    given |= {"quantization": getattr(quantization, "bnb_4bit_quant_type", "none")}
    given |= {"engine of its own": trainer._engine is not None}
    differing = differences(wanted, given)
    if differing:
        raise R3Error(f"not the profile's trainer: {differing}: change it in overrides instead")


def _facts(args, task, failures, adapters: dict) -> dict:
    facts = settings_facts(args) | {"max_steps": args.max_steps} | task_facts(task)
    facts["failures"] = failures_digest(failures)
    for adapter, lora in adapters.items():
        facts |= {f"lora.{k}": value for k, value in lora.to_dict().items() if k not in UNLIKE}
        facts["adapter"] = adapter
    return facts


def _adapters(study) -> dict:
    """The profile's adapter, as PEFT fits it to the model."""
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(study.model_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return get_peft_model(model, study.lora()).peft_config
