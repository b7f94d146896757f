"""The card of an adapter or model that R3 trained: what it is, without a path of this machine."""

from importlib.metadata import version
from pathlib import Path

from .files import write_atomic

CARD = """---
{head}
---

# {name}

`{base}`, trained on the task `{task}` with [Reflect, Retry, Reward]\
(https://arxiv.org/abs/2505.24726): {steps} steps of GRPO on reflections about {failures} failed \
attempts, rewarded by the verdict on the retry that follows.

Settings: {settings}.

Made with {versions}.
"""
SETTINGS = """learning_rate lr_scheduler_type beta loss_type mask failures_per_step num_generations
    max_completion_length max_retry_length temperature retry_temperature seed""".split()


def plain_name(model: str | None) -> str | None:
    """A model as it was named; of an absolute path the part below this folder, or the last one."""
    if not model or not Path(model).is_absolute():
        return model
    path = Path(model)
    here = Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else path.name


def write_card(folder: Path, trainer, name=None, dataset=None, tags=()) -> None:
    """Write README.md into `folder`."""
    from huggingface_hub import ModelCardData

    base = plain_name(trainer.model.config._name_or_path)
    is_of_hub = base and base.count("/") == 1 and not Path(base).exists()
    head = ModelCardData(
        library_name="peft" if hasattr(trainer.model, "peft_config") else "transformers",
        base_model=base if is_of_hub else None,
        datasets=dataset,
        pipeline_tag="text-generation",
        tags=["r3", "grpo", "trl", *([tags] if isinstance(tags, str) else tags or ())],
    )
    values = trainer.args.to_dict()
    text = CARD.format(
        head=head.to_yaml(),
        name=name or folder.name,
        base=base or type(trainer.model).__name__,
        task=trainer.task.name,
        steps=trainer.state.global_step,
        failures=len(trainer.failures),
        settings=", ".join(f"{key} {values[key]}" for key in SETTINGS),
        versions=", ".join(f"{p} {version(p)}" for p in ("trl", "peft", "transformers", "torch")),
    )
    write_atomic(folder / "README.md", text)
