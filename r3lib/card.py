"""The card of an adapter or model that R3 trained: what it is, without a path of this machine."""

from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

from .files import write_atomic
from .settings import FREE, REFUSED, default_of

CARD = """---
{head}
---

# {name}

`{base}`, trained on the task `{task}` with [Reflect, Retry, Reward]\
(https://arxiv.org/abs/2505.24726): GRPO on reflections about failed attempts, rewarded by the \
verdict on the retry that follows.

Trained: {trained}, {steps} steps on {failures} failures. Settings other than the defaults of \
`R3Config`: {settings}.

Made with {versions}.
"""


def plain_name(model: str | None) -> str | None:
    """A model as it was named; of an absolute path the part below this folder, or the last one."""
    if not model or not Path(model).is_absolute():
        return model
    path = Path(model)
    here = Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else path.name


def write_card(folder: Path, trainer, name=None, dataset=None, tags=()) -> None:
    """Write README.md into `folder`, and let others read the weights there as the umask has it."""
    from huggingface_hub import ModelCardData

    base = plain_name(trainer.model.config._name_or_path)
    of_hub = base and base.count("/") == 1 and not Path(base).exists()
    adapters = list(getattr(trainer.model, "peft_config", {}).values())
    head = ModelCardData(
        library_name="peft" if adapters else "transformers",
        base_model=base if of_hub else None,
        datasets=dataset,
        pipeline_tag="text-generation",
        tags=["r3", "grpo", "trl", *([tags] if isinstance(tags, str) else tags or ())],
    )
    text = CARD.format(
        head=head.to_yaml(),
        name=name or folder.name,
        base=base or type(trainer.model).__name__,
        task=trainer.task.name,
        trained=type(adapters[0]).__name__ if adapters else "all weights",
        steps=trainer.state.global_step,
        failures=len(trainer.failures),
        settings=", ".join(_changed(trainer.args)),
        versions=", ".join(f"{p} {version(p)}" for p in ("trl", "peft", "transformers", "torch")),
    )
    write_atomic(folder / "README.md", text)
    mode = (folder / "README.md").stat().st_mode  # as the umask has it
    for weights in folder.glob("*.safetensors"):  # which safetensors gives to the owner alone
        weights.chmod(mode)


def _changed(args) -> list[str]:
    """The settings that decide what is learned and are not the default, with their values."""
    values = args.to_dict()
    decisive = [f for f in fields(args) if f.name not in FREE and f.name not in REFUSED]
    changed = [f.name for f in decisive if values[f.name] != default_of(f)]
    return [f"{name} {values[name]}" for name in changed]
