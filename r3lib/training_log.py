"""`metrics.jsonl`, a line a training step, and the callbacks that write and read it."""

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from transformers import TrainerCallback

from .files import write_atomic
from .provenance import peak_memory_gib

METRICS = {  # ours: TRL's
    "reward": "reward",
    "zero_variance_share": "frac_reward_zero_std",
    "kl": "kl",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "tokens": "num_tokens",
}
ROLLOUT_METRICS = ("retry_success", "truncated_share", "reflection_tokens", "seconds_sampling")
REMOTE_METRIC = "sampling/importance_sampling_ratio/mean"  # only with a RemoteEngine


def metrics_file(args) -> Path:
    """Where a run with the config `args` writes its metrics."""
    return Path(args.output_dir) / "metrics.jsonl"


class R3Metrics(TrainerCallback):
    """Logs what R3 adds, writes the log to `metrics.jsonl`, warns once if no group has variance."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.warned = False
        self.started = 0.0

    def on_train_begin(self, args, state, control, **_):
        """Write the steps before a resumed one; those after it are taken again."""
        self._write(args, state)

    def on_step_begin(self, args, state, control, **_):
        """Start the step's clock."""
        self.started = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **_):
        """Write the lines up to the step that just ended."""
        if "frac_reward_zero_std" not in logs:  # the summary at the end
            return
        self._write(args, state)
        if logs["frac_reward_zero_std"] == 1.0 and not self.warned:
            self.warned = True
            warnings.warn(
                f"step {state.global_step}: no group has variance (retry success "
                f"{logs['retry_success']:.0%}), so no reward teaches anything: raise "
                "num_generations or the temperature, or take failures of middling difficulty",
                stacklevel=2,
            )

    def of_step(self, rollout: dict) -> dict:
        """What a step's log gets beside TRL's: the rollout's metrics, seconds and memory."""
        seconds = time.perf_counter() - self.started - rollout["seconds_sampling"]
        return rollout | {"seconds_learning": seconds, "peak_memory_gib": peak_memory_gib()}

    def _write(self, args, state) -> None:
        if not state.is_world_process_zero:
            return
        known = {"task": self.trainer.task.name, "seed": args.seed}
        steps = [entry for entry in state.log_history if "frac_reward_zero_std" in entry]
        lines = [json.dumps(row_of(entry, **known)) + "\n" for entry in steps]
        write_atomic(metrics_file(args), "".join(lines))


def row_of(entry: dict, task: str, seed: int) -> dict:
    """The row of metrics.jsonl for an entry of the trainer's `state.log_history`."""
    row = {"task": task, "step": entry["step"], "seed": seed}
    row |= {ours: entry.get(theirs) for ours, theirs in METRICS.items()}
    row |= {name: entry.get(name) for name in ROLLOUT_METRICS}
    if REMOTE_METRIC in entry:
        row["importance_ratio"] = entry[REMOTE_METRIC]
    if "groups_drawn" in entry:  # only with dynamic_sampling
        row["groups_drawn"] = entry["groups_drawn"]
    return row | {name: entry.get(name) for name in ("seconds_learning", "peak_memory_gib")}


class AfterStep(TrainerCallback):
    """Calls `on_step` with the metrics so far, a row a step, when a step's line is written."""

    def __init__(self, on_step: Callable[[pd.DataFrame], None]):
        self.on_step = on_step

    def on_log(self, args, state, control, logs=None, **_):
        """Skip what is not a step: the summary at the end."""
        if "frac_reward_zero_std" in logs and state.is_world_process_zero:
            self.on_step(pd.read_json(metrics_file(args), lines=True))
