"""`metrics.jsonl`, a line a training step, and the callbacks that write and read it."""

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from transformers import TrainerCallback

from .provenance import peak_memory_gib
from .store import write_atomic

METRICS = {  # ours: TRL's
    "reward": "reward",
    "zero_variance_share": "frac_reward_zero_std",
    "kl": "kl",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "tokens": "num_tokens",
}
REMOTE_METRICS = {  # only with a RemoteEngine
    "importance_ratio": "sampling/importance_sampling_ratio/mean"
}


def metrics_file(args) -> Path:
    """Where a run with the config `args` writes its metrics."""
    return Path(args.output_dir) / "metrics.jsonl"


class R3Metrics(TrainerCallback):
    """Writes the trainer's `metrics.jsonl`, and warns once when no group has variance."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.warned = False
        self.started = 0.0

    def on_train_begin(self, args, state, control, **_):
        """Drop the lines of steps that a resumed run takes again."""
        path = metrics_file(args)
        lines = path.read_text().splitlines() if path.exists() else []
        whole = [line for line in lines if line.endswith("}")]
        kept = [line for line in whole if json.loads(line)["step"] <= state.global_step]
        if state.is_world_process_zero:
            write_atomic(path, "".join(line + "\n" for line in kept))

    def on_step_begin(self, args, state, control, **_):
        """Start the step's clock."""
        self.started = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **_):
        """Write one line for the step that just ended."""
        if "frac_reward_zero_std" not in logs or not state.is_world_process_zero:
            return
        row = {"task": self.trainer.task.name, "step": state.global_step, "seed": args.seed}
        row |= {ours: logs.get(theirs) for ours, theirs in METRICS.items()}
        row |= self.trainer.r3_metrics
        row |= {ours: logs[theirs] for ours, theirs in REMOTE_METRICS.items() if theirs in logs}
        row["seconds_learning"] = time.perf_counter() - self.started - row["seconds_sampling"]
        row["peak_memory_gib"] = peak_memory_gib()
        with metrics_file(args).open("a") as file:
            file.write(json.dumps(row) + "\n")
        if row["zero_variance_share"] == 1.0 and not self.warned:
            self.warned = True
            warnings.warn(
                f"step {state.global_step}: no group has variance (retry success "
                f"{row['reward']:.0%}), so nothing is learned: raise num_generations or the "
                "temperature, or take failures of middling difficulty",
                stacklevel=2,
            )


class AfterStep(TrainerCallback):
    """Calls `on_step` with the metrics so far, a row a step, when a step's line is written."""

    def __init__(self, on_step: Callable[[pd.DataFrame], None]):
        self.on_step = on_step

    def on_log(self, args, state, control, logs=None, **_):
        """Skip what is not a step: the summary at the end."""
        if "frac_reward_zero_std" in logs and state.is_world_process_zero:
            self.on_step(pd.read_json(metrics_file(args), lines=True))
