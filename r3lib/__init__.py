"""Reflect, Retry, Reward: the masked GRPO trainer, the verifiers and the study around them."""

import logging
import warnings
from importlib import import_module

warnings.filterwarnings("ignore", "IProgress not found")  # plain progress bars do in notebooks
logging.getLogger("bitsandbytes").setLevel(
    logging.ERROR
)  # it warns of a kernel that it would fetch from the hub

PUBLIC = {  # name: the module that it is in
    "Chat": "chat",
    "Condition": "conditions",
    "DatasetTask": "tasks.dataset",
    "Failure": "sampler",
    "Limits": "sampler",
    "Policy": "episodes",
    "R3Config": "r3_config",
    "R3Error": "errors",
    "R3Trainer": "trainer",
    "Recorder": "artifacts",
    "RolloutSampler": "sampler",
    "Study": "study",
    "Task": "tasks",
    "TransformersEngine": "engines.transformers",
    "Verdict": "verifiers.verdict",
    "accuracy_table": "evaluate",
    "comparisons_table": "evaluate",
    "load_profile": "config",
    "load_task": "tasks",
    "mine_failures": "sampler",
    "open_studies": "study",
    "run_episodes": "episodes",
}
__all__ = sorted(PUBLIC)


def __getattr__(name: str):
    """Import a public name on first use, so that `r3 --help` does not wait for torch."""
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{PUBLIC[name]}", __name__), name)
