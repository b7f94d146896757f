"""The card of an adapter or model that R3 trained: what it is, without a path of this machine."""

from importlib.metadata import version
from pathlib import Path

from .store import write_atomic

SETTINGS = (
    "max_steps", "failures_per_step", "num_generations", "learning_rate", "lr_scheduler_type", "beta",
    "loss_type", "mask", "temperature", "retry_temperature", "max_completion_length",
    "max_retry_length", "retry_turn", "truncation_penalty", "seed",
)  # fmt: skip


def plain_name(model: str | None) -> str | None:
    """A model as it was named; of an absolute path what is below this folder, else its last part."""
    if not model or not Path(model).is_absolute():
        return model
    path = Path(model)
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.name


def write_card(folder: Path, trainer, name: str | None = None) -> None:
    """Write README.md into `folder`, and let others read the weights there as the umask has it."""
    base, adapter = (
        plain_name(trainer.model.config._name_or_path),
        hasattr(trainer.model, "peft_config"),
    )
    hub = bool(base) and base.count("/") == 1 and not Path(base).exists()
    head = [f"base_model: {base}"] if hub else []
    head += [
        f"library_name: {'peft' if adapter else 'transformers'}",
        "pipeline_tag: text-generation",
    ]
    head += [
        "tags:",
        *(f"- {tag}" for tag in ("r3", "grpo", "trl", *(["lora"] if adapter else []))),
    ]
    kind = (
        type(next(iter(trainer.model.peft_config.values()))).__name__ if adapter else "all weights"
    )
    values = [f"| {key} | {_shown(getattr(trainer.args, key))} |" for key in SETTINGS]
    versions = ", ".join(
        f"{package} {version(package)}" for package in ("trl", "peft", "transformers", "torch")
    )
    text = [
        "---", *head, "---", "", f"# {name or folder.name}", "",
        f"`{base or type(trainer.model).__name__}`, trained on the task `{trainer.task.name}` with "
        "Reflect, Retry, Reward: GRPO on reflections about failed attempts, rewarded by the verdict "
        "on the retry that follows.", "",
        f"Trained: {kind}, {trainer.state.global_step} steps on {len(trainer.failures)} failures.",
        "",
        "| setting | value |", "|---|---|", *values, "", f"Made with {versions}.", "",
    ]  # fmt: skip
    write_atomic(folder / "README.md", "\n".join(text))
    mode = (folder / "README.md").stat().st_mode  # as the umask has it
    for weights in folder.glob("*.safetensors"):  # which safetensors gives to the owner alone
        weights.chmod(mode)


def _shown(value) -> str:
    value = getattr(value, "value", value)
    return f"{value:g}" if isinstance(value, float) else str(value)
