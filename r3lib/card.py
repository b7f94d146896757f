"""The card of an adapter or model that R3 trained: what it is, without a path of this machine."""

from importlib.metadata import version
from pathlib import Path

from .files import write_atomic

SETTINGS = (
    "max_steps", "failures_per_step", "num_generations", "learning_rate", "lr_scheduler_type",
    "beta", "loss_type", "mask", "temperature", "retry_temperature", "max_completion_length",
    "max_retry_length", "retry_turn", "truncation_penalty", "seed",
)  # fmt: skip
CARD = """---
{head}
pipeline_tag: text-generation
tags: [{tags}]
---

# {name}

`{base}`, trained on the task `{task}` with Reflect, Retry, Reward: GRPO on reflections \
about failed attempts, rewarded by the verdict on the retry that follows.

Trained: {trained}, {steps} steps on {failures} failures.

| setting | value |
|---|---|
{settings}

Made with {versions}.
"""


def plain_name(model: str | None) -> str | None:
    """A model as it was named; of an absolute path the part below this folder, or the last one."""
    if not model or not Path(model).is_absolute():
        return model
    path = Path(model)
    here = Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else path.name


def write_card(folder: Path, trainer, name: str | None = None) -> None:
    """Write README.md into `folder`, and let others read the weights there as the umask has it."""
    base = plain_name(trainer.model.config._name_or_path)
    configs = list(getattr(trainer.model, "peft_config", {}).values())
    head = [f"library_name: {'peft' if configs else 'transformers'}"]
    if base and base.count("/") == 1 and not Path(base).exists():  # an id of the hub
        head.insert(0, f"base_model: {base}")
    text = CARD.format(
        head="\n".join(head),
        tags="r3, grpo, trl, lora" if configs else "r3, grpo, trl",
        name=name or folder.name,
        base=base or type(trainer.model).__name__,
        task=trainer.task.name,
        trained=type(configs[0]).__name__ if configs else "all weights",
        steps=trainer.state.global_step,
        failures=len(trainer.failures),
        settings="\n".join(f"| {key} | {_shown(getattr(trainer.args, key))} |" for key in SETTINGS),
        versions=", ".join(f"{p} {version(p)}" for p in ("trl", "peft", "transformers", "torch")),
    )
    write_atomic(folder / "README.md", text)
    mode = (folder / "README.md").stat().st_mode  # as the umask has it
    for weights in folder.glob("*.safetensors"):  # which safetensors gives to the owner alone
        weights.chmod(mode)


def _shown(value) -> str:
    value = getattr(value, "value", value)
    return f"{value:g}" if isinstance(value, float) else str(value)
