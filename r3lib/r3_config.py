"""`R3Config`: TRL's `GRPOConfig` with the paper's settings, and what R3 adds to them."""

import os
from dataclasses import dataclass, field

from trl import GRPOConfig

from .config import CHOICES, accumulation_steps, check_settings
from .errors import R3Error
from .settings import refuse_ignored
from .weights import training_options

MASKS = CHOICES["mask"]


def setting(default, help: str):
    """A field of the config with its help on the command line."""
    return field(default=default, metadata={"help": help})


@dataclass
class R3Config(GRPOConfig):
    """`GRPOConfig` with the paper's settings (its section on training) and what R3 adds.

    Each step uses `failures_per_step` failures and samples `num_generations` reflections for each;
    `per_device_train_batch_size` is the number of rows in one learning forward, and the
    accumulation steps follow. Lengths are in tokens: `max_completion_length` is that of a
    reflection, the completion that is trained. `mask` names the turns whose tokens are trained.
    R3Error: a setting out of range, or one of TRL's that R3 does not honour.
    """

    learning_rate: float = 5e-7
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    max_steps: int = 1750
    beta: float = 0.001
    loss_type: str = "grpo"
    use_bias_correction_kl: bool = False
    vllm_importance_sampling_mode: str = "token_truncate"  # used when the engine is a RemoteEngine
    max_completion_length: int = 256
    logging_steps: float = 1
    shuffle_dataset: bool = False  # the order is drawn by R3: a resumed run sees the same failures
    gradient_checkpointing: bool | None = None
    gradient_accumulation_steps: int | None = None  # follows from the rows of a step
    save_total_limit: int | None = 2
    failures_per_step: int = setting(256, "Failures in one step, over all processes.")
    mask: str = setting("reflection", f"Which tokens are trained: {', '.join(MASKS)}.")
    max_retry_length: int = setting(256, "Most tokens of a retry.")
    retry_temperature: float = setting(0.0, "Temperature of the retry; 0 is greedy.")
    truncation_penalty: float = setting(0.0, "Taken from the reward of a reflection cut off.")
    mine_samples: int = setting(1, "Answers a row, where the trainer mines.")
    mine_temperature: float = setting(0.0, "Their temperature; 0 is greedy.")
    max_attempt_length: int = setting(256, "Most tokens of such an answer.")
    dynamic_sampling: int = setting(
        1, "Draws of a group at most, each of a new failure, until its retries differ; 1: no."
    )
    sample_batch: int = setting(256, "Rows sampled at once.")

    def __post_init__(self):
        refuse_ignored(self)
        check_settings(vars(self))
        self._fit_device()
        self._fit_accumulation()
        super().__post_init__()
        if not (self.bf16 or self.fp16):
            self.mixed_precision = "no"  # which an accelerate launcher may have set
        self._n_gpu = min(1, self.n_gpu)  # a process trains on one GPU, however many it sees

    def _fit_device(self) -> None:
        """Precision, checkpointing and device, where they are not given."""
        device = training_options(self.use_cpu)
        if self.bf16 is None and not self.fp16:
            self.bf16 = device["bf16"]
            self.fp16 = device["fp16"]
        if self.gradient_checkpointing is None:
            self.gradient_checkpointing = device["gradient_checkpointing"]
        self.use_cpu = device["use_cpu"]
        self.dataloader_pin_memory = device["dataloader_pin_memory"]

    def _fit_accumulation(self) -> None:
        """The accumulation steps with which one step is one rollout."""
        processes = int(os.environ.get("WORLD_SIZE", 1))
        needed = accumulation_steps(
            self.failures_per_step,
            self.num_generations,
            self.per_device_train_batch_size,
            processes,
        )
        if self.gradient_accumulation_steps not in (None, needed):
            raise R3Error(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}: it follows from "
                "failures_per_step x num_generations / per_device_train_batch_size and is "
                f"{needed} here: leave it unset"
            )
        self.gradient_accumulation_steps = needed
