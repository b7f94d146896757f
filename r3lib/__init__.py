"""Reflect, Retry, Reward: the masked GRPO trainer, the verifiers and the study around them."""
# ruff: noqa: F401

import logging
import sys
import warnings
from importlib import import_module
from typing import TYPE_CHECKING

if "ipykernel" in sys.modules:  # in notebooks
    warnings.filterwarnings("ignore", "IProgress not found")  # plain progress bars do
    # on a CPU it asks for a package of kernels that it would fetch from the hub
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:  # for editors and type checkers, the same names as PUBLIC
    from .artifacts import Recorder
    from .chat import Chat
    from .conditions import Condition
    from .config import load_profile
    from .engines.transformers import TransformersEngine
    from .episodes import Policy, run_episodes
    from .errors import R3Error
    from .evaluate import accuracy_table, comparisons_table
    from .r3_config import R3Config
    from .sampler import Failure, Limits, RolloutSampler, mine_failures
    from .study import Study, open_studies
    from .tasks import Task, load_task
    from .tasks.dataset import DatasetTask
    from .trainer import R3Trainer
    from .verifiers.verdict import Verdict

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


def __dir__() -> list[str]:
    """Public names too, though not imported yet: what tab completion shows."""
    return sorted({*globals(), *PUBLIC})
