"""Masked GRPO: groups of reflections on one failure, rewarded by the verdict on the retry that follows.

Everything that depends on TRL's experimental `rollout_func` or on its private names is in this module.
"""

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pandas as pd
import pyarrow as pa
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOConfig, GRPOTrainer

from .card import plain_name, write_card
from .chat import Chat
from .config import accumulation_steps
from .engines.base import RemoteEngine, Sampling
from .engines.transformers import TransformersEngine, check_model, reach
from .episodes import Failure, Limits, Runner, check_failures, failures_digest, judge
from .errors import R3Error
from .identity import (
    check_task,
    differences,
    digest,
    model_facts,
    read_note,
    task_facts,
    write_note,
)
from .provenance import peak_memory_gib
from .settings import refuse_ignored, settings_facts
from .store import write_atomic
from .tasks.base import RETRY_TURNS
from .weights import NO_SAMPLING, training_options

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is pinned by our contract tests
RUN_NOTE = "r3_run.json"  # beside the checkpoints: what decides the training
MASKS = ("reflection", "reflection+retry", "retry")
METRICS = {  # ours: TRL's
    "reward": "reward",
    "zero_variance_share": "frac_reward_zero_std",
    "kl": "kl",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "tokens": "num_tokens",
}
REMOTE_METRICS = {"importance_ratio": "sampling/importance_sampling_ratio/mean"}  # only with a RemoteEngine


@dataclass
class R3Config(GRPOConfig):
    """`GRPOConfig` with the paper's settings (its section on training) and what R3 adds.

    A step takes `failures_per_step` failures and samples `num_generations` reflections for each;
    `per_device_train_batch_size` is the number of rows in one learning forward, and the accumulation
    steps follow. Lengths are in tokens. `mask` names the turns whose tokens are trained.
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
    shuffle_dataset: bool = False  # the order is drawn here, so that a resumed run sees the same failures
    gradient_checkpointing: bool | None = None
    gradient_accumulation_steps: int | None = None  # follows from the rows of a step
    save_total_limit: int | None = 2
    failures_per_step: int = field(default=256, metadata={"help": "Failures in one step, over all processes."})
    mask: str = field(default="reflection", metadata={"help": f"Which tokens are trained: {', '.join(MASKS)}."})
    max_retry_length: int = field(default=256, metadata={"help": "Most tokens of a retry."})
    retry_temperature: float = field(default=1.0, metadata={"help": "Temperature of the retry; 0 is greedy."})
    retry_turn: str = field(default="restate", metadata={"help": "A retry restates the question, or is a reminder."})
    truncation_penalty: float = field(default=0.0, metadata={"help": "Taken from the reward of a reflection cut off."})
    sample_batch: int = field(default=256, metadata={"help": "Rows sampled at once."})

    def __post_init__(self):
        if self.mask not in MASKS:
            raise R3Error(f"mask={self.mask!r} is unknown: use one of {', '.join(MASKS)}")
        if self.retry_turn not in RETRY_TURNS:
            raise R3Error(f"retry_turn={self.retry_turn!r} is unknown: use one of {', '.join(RETRY_TURNS)}")
        if self.truncation_penalty < 0:
            raise R3Error(f"truncation_penalty={self.truncation_penalty} would reward being cut off: use 0 or more")
        if self.num_generations < 2:
            raise R3Error(f"group size {self.num_generations} has no variance to learn from: use at least 2")
        if not self.temperature > 0:
            raise R3Error(
                f"temperature={self.temperature}: a group needs different reflections: use above 0"
            )
        refuse_ignored(self)
        device = training_options(self.use_cpu)
        if self.bf16 is None and not self.fp16:
            self.bf16, self.fp16 = device["bf16"], device["fp16"]
        if self.gradient_checkpointing is None:
            self.gradient_checkpointing = device["gradient_checkpointing"]
        self.use_cpu, self.dataloader_pin_memory = device["use_cpu"], device["dataloader_pin_memory"]
        processes = int(os.environ.get("WORLD_SIZE", 1))
        needed = accumulation_steps(
            self.failures_per_step, self.num_generations, self.per_device_train_batch_size, processes
        )
        if self.gradient_accumulation_steps not in (None, needed):
            raise R3Error(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}: it follows from "
                "failures_per_step x num_generations / per_device_train_batch_size and is "
                f"{needed} here: leave it unset"
            )
        self.gradient_accumulation_steps = needed
        asked = self.steps_per_generation, self.generation_batch_size
        super().__post_init__()
        self._n_gpu = min(1, self.n_gpu)  # a process trains on one GPU, however many it sees
        self._check_steps(asked)

    def _check_steps(self, generation) -> None:
        if self.max_steps < 1:
            raise R3Error(f"max_steps={self.max_steps}: R3 counts steps, not epochs: ask for at least 1")
        if self.mask != "reflection" and self.retry_temperature != self.temperature:
            raise R3Error(
                f"mask={self.mask!r} trains the retry, which must then be sampled as the reflection is: set "
                f"retry_temperature={self.temperature} (now {self.retry_temperature})"
            )
        if generation != (None, None) and self.steps_per_generation != self.gradient_accumulation_steps:
            raise R3Error("a step of R3 is one rollout: leave steps_per_generation and generation_batch_size unset")


class R3Trainer(GRPOTrainer):
    """GRPO on reflections (paper, section on the method; its equation is GRPO's with a token mask).

    `failures` are failed attempts (see `mine_failures`), each read when its turn comes. For each, G reflections are
    sampled, each is followed by a retry in the same conversation, and the reward of a reflection is the retry's
    verdict, 0 or 1. With `mask="reflection"` the completion is the reflection alone: the retry follows it, so under a
    causal mask its tokens would change nothing. The other masks train on reflection, turn and retry with `env_mask`.

    What is trained is fp32, whatever dtype it was loaded in, since 16 bits lose small updates: full
    fine-tuning of a bf16 model trains and saves fp32 weights, twice the memory. What is frozen keeps
    its dtype. With `bf16=True` both compute in bf16; with `bf16=False` beside 16-bit neighbours only
    adapters learn, the rest is refused.

    A run leaves `r3_run.json` beside its checkpoints: with other failures, weights or settings it
    does not resume (saving, logging and the place may change; `max_steps` may grow under a constant
    schedule).

    A `RemoteEngine` gets the adapter before each rollout, and each token's loss is multiplied by its probability
    under the trained model over that under the sampler, cut at `vllm_importance_sampling_clip_max`.
    """

    def __init__(self, model, args: R3Config, task, failures: Sequence[Failure], peft_config=None,
                 processing_class=None, engine=None, callbacks=None):  # fmt: skip
        if not isinstance(args, R3Config):
            raise R3Error(
                f"args is a {type(args).__name__}: give an R3Config, with the same settings"
            )
        check_task(task)
        if not failures:
            raise R3Error("no failures to train on: mine more problems, or a harder task")
        if not isinstance(model, str):
            check_model(model, peft_config)
        self.task, self.failures, self._engine = task, failures, engine
        order = training_order(len(self.failures), args.max_steps * args.failures_per_step, args.seed)
        start = dict(model.named_parameters()) if isinstance(model, PeftModel) else {}
        start = {name: value.detach().clone() for name, value in start.items() if value.requires_grad}
        super().__init__(
            model=model,
            args=args,
            reward_funcs=verified,
            train_dataset=self._dataset(order),
            peft_config=deepcopy(peft_config),  # the name of the base is noted in it
            processing_class=processing_class,
            rollout_func=rollout,
            callbacks=[R3Metrics(self), *(callbacks or [])],
        )
        if engine is None and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            raise R3Error(NO_SAMPLING)
        for name, parameter in self.model.named_parameters():  # TRL casts QLoRA adapters to bf16: small updates vanish
            if parameter.requires_grad and not is_deepspeed_zero3_enabled():  # which gathers one dtype only
                parameter.data = start.get(name, parameter.data).float()
        self._check_dtypes()
        for config in getattr(self.model, "peft_config", {}).values():
            config.base_model_name_or_path = plain_name(config.base_model_name_or_path)
        self.r3_metrics: dict[str, float] = {}
        generation = self.model.generation_config
        self._chat = Chat(self.processing_class, generation, self.chat_template_kwargs)
        self.eos_token_ids = sorted(self._chat.end_ids)  # by which TRL tells what was cut off
        if isinstance(engine, RemoteEngine):
            self._train_for_a_remote_engine()
        self._reach = reach(self.model)
        check_model(self.model)
        check_failures(failures, self.runner(), self._context())
        self._facts = self._decisive(fresh=peft_config is not None)

    def _dataset(self, order: list[int]) -> Dataset:
        """One row a group: its place in the order, inside a message that names the failure where TRL logs it.

        The text of half a million conversations would take gigabytes; `rollout` takes the failure instead.
        """
        self.order, size = order, len(order)
        texts = pa.array(f"failure {index}" for index in order)
        messages = [pa.repeat("user", size), texts, pa.array(range(size))]
        messages = pa.StructArray.from_arrays(messages, ["role", "content", "place"])
        prompts = pa.ListArray.from_arrays(pa.array(range(size + 1), pa.int32()), messages)
        return Dataset(pa.table({"prompt": prompts}))

    def _context(self) -> int | None:
        """Tokens that model and engine take at most; None where neither says it."""
        model = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        engine = getattr(self._engine, "longest", None)
        return min((length for length in (model, engine, self._reach) if length), default=None)

    def _decisive(self, fresh: bool) -> dict:
        """All that decides the training, by name; a `fresh` adapter's weights come from a checkpoint."""
        turn = self._chat.follow([], [], self.task.reflection_prompt)
        facts = (
            settings_facts(self.args)
            | task_facts(self.task)
            | model_facts(self.model, trained=not fresh)
        )
        facts["failures"] = failures_digest(self.failures)
        return facts | {"turns (tokenizer, template)": digest([turn, sorted(self._chat.end_ids)])}

    def _claim(self, checkpoint) -> None:
        """Note in `output_dir` what this training is; R3Error if it has checkpoints of another."""
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        folders = {Path(checkpoint).parent} if isinstance(checkpoint, (str, Path)) else set()
        for other in {folder, *folders}:
            if not (found := last_checkpoint(str(other))):
                continue
            differing = differences(read_note(other / RUN_NOTE), self._facts)
            if (
                json.loads((Path(found) / "trainer_state.json").read_text())["global_step"]
                > self.args.max_steps
            ):
                differing = f"{Path(found).name} is beyond max_steps={self.args.max_steps}"
            if differing:
                raise R3Error(
                    f"{other} holds checkpoints of another training: {differing}: give another "
                    "output_dir, or delete its checkpoints"
                )
        write_note(folder / RUN_NOTE, self._facts)

    def train(self, resume_from_checkpoint=None, *rest, **options):
        """TRL's. R3Error, naming what differs, if there are checkpoints of another training."""
        self._claim(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *rest, **options)

    def runner(self) -> Runner:
        """Samples from the policy as it stands."""
        engine = self._engine or TransformersEngine(
            self.accelerator.unwrap_model(self.model),
            self.processing_class,
            self.args.sample_batch,
            end_ids=self._chat.end_ids,
        )
        limits = Limits(reflection=self.args.max_completion_length, retry=self.args.max_retry_length)
        return Runner(engine, self._chat, self.task, limits, self.args.temperature, self.args.retry_turn)

    def _train_for_a_remote_engine(self) -> None:
        """Turn on what TRL does for a vLLM of its own: weigh tokens by the importance ratio, sync before rollouts.

        Set after TRL's init, `use_vllm` does just that in a trainer with a `rollout_func`.
        """
        if not isinstance(self.model, PeftModel):
            raise R3Error("a remote engine takes adapters, not whole models: give a peft_config")
        self._engine.end_ids = self._chat.end_ids
        self.use_vllm, self._last_loaded_step = True, -1
        self.vllm_generation = SimpleNamespace(sync_weights=self._sync)

    def _sync(self) -> None:
        """Hand the adapter as it stands to the engine, in a folder of its own; remove the folders before it."""
        folder = Path(self.args.output_dir) / "synced" / f"step-{self.state.global_step:06d}"
        self.save_model(str(folder))
        self.accelerator.wait_for_everyone()
        self._engine.sync(folder)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            for old in set(folder.parent.iterdir()) - {folder}:
                shutil.rmtree(old)

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *rest, **options):
        """TRL's, for a quarter of the rows at a time, sorted by length and without the padding that all share.

        The longest reflection of a whole step sets TRL's padding; the values are the same, with less work.
        """
        whole = super()._get_per_token_logps_and_entropies
        if options.get(
            "compute_aux_loss"
        ):  # of a mixture of experts: balanced over all rows, not a quarter
            return whole(model, input_ids, attention_mask, logits_to_keep, *rest, **options)
        first_token = input_ids.size(1) - logits_to_keep
        values, order = [], attention_mask.sum(1).argsort(stable=True)
        for rows in order.chunk(4):
            used = attention_mask[rows].any(0).nonzero()
            start, end = int(used[0]), max(int(used[-1]), first_token) + 1
            self._check_width(end - start)
            ids, mask = input_ids[rows, start:end], attention_mask[rows, start:end]
            logps, entropies, _ = whole(model, ids, mask, end - first_token, *rest, **options)
            values.append((logps, logps.new_zeros(logps.shape) if entropies is None else entropies))
        places = order.argsort()
        logps, entropies = (
            torch.cat([F.pad(x, (0, logits_to_keep - x.size(1))) for x in parts])[places] for parts in zip(*values)
        )
        return logps, entropies, None

    def _check_width(self, width: int) -> None:
        """A longrope model moves the positions of all rows once a batch is wider than its reach."""
        if width > (self._reach or width):
            raise R3Error(
                f"a learning batch is {width} tokens wide, beyond the {self._reach} up to which this "
                "model's positions are those of sampling: lower per_device_train_batch_size or leave "
                "out long failures"
            )

    def _check_dtypes(self) -> None:
        """R3Error where fp32 parameters learn beside 16-bit ones that do not go with them."""
        dtypes = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        spread = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        if len(dtypes) < 2 or self.args.bf16 or self.args.fp16 or spread:
            return
        try:
            with torch.no_grad():
                self.model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self.model.device))
        except RuntimeError as error:
            raise R3Error(
                "what is trained is fp32 and its frozen neighbours are 16-bit, which without autocast "
                "do not go together: set bf16=True, or load the model with dtype=torch.float32"
            ) from error

    def _save(self, output_dir=None, state_dict=None) -> None:
        """TRL's, with a card that says what the weights are."""
        super()._save(output_dir, state_dict)
        write_card(Path(output_dir or self.args.output_dir), self)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        """The card of the run, in `output_dir`."""
        if self.is_world_process_zero():
            write_card(Path(self.args.output_dir), self, model_name)

    def resume_or_train(self):
        """Train, from the last complete checkpoint in `output_dir` if there is one."""
        return self.train(resume_from_checkpoint=last_checkpoint(self.args.output_dir))


def training_order(size: int, wanted: int, seed: int) -> list[int]:
    """`wanted` indices below `size`: seeded permutations, one after the other."""
    order: list[int] = []
    while len(order) < wanted:
        order += Random(f"{seed}/order/{len(order)}").sample(range(size), size)
    return order[:wanted]


def verified(
    completions, reward, prompts=(), conversation=None, log_extra=None, **columns
) -> list[float]:
    """The reward, as `rollout` found it: the verdict on the retry, less a cut reflection's penalty.

    With `log_completions` TRL's table gets the conversation as the prompt, and retry and verdict.
    """
    for prompt, text in zip(prompts, conversation or ()):
        prompt[0]["content"] = text
    for name in ("retry", "verdict") if conversation else ():
        log_extra(name, columns[name])
    return reward


def rollout(prompts: list, trainer: R3Trainer) -> dict:
    """TRL's `rollout_func`: G reflections a failure, one retry each; rows in the order of `prompts`.

    `prompts` come repeated G times, contiguous. Returns ids of prompt and completion, log-probs, the
    rewards, and for the masks with a retry `env_mask` (1 = trained).
    """
    started, args, runner = time.perf_counter(), trainer.args, trainer.runner()
    size = args.num_generations
    places = [p[0]["place"] for p in prompts[::size]]
    failures = [trainer.failures[trainer.order[place]] for place in places]
    asked = [runner.reflection_prompt(f) for f in failures]
    seeds = [Random(f"{args.seed}/{place}").getrandbits(32) for place in places]  # whatever the process
    sampling = Sampling(args.max_completion_length, args.temperature)
    groups = runner.engine.generate(asked, size, sampling, seeds)
    rows = [(f, a, c) for f, a, group in zip(failures, asked, groups) for c in group]
    retry_prompts = [runner.retry_prompt(f, c.ids) for f, _, c in rows]
    retry_seeds = [Random(f"{seeds[i // size]}/{i % size}").getrandbits(32) for i in range(len(rows))]
    sampling = Sampling(args.max_retry_length, args.retry_temperature)
    retries = [r[0] for r in runner.engine.generate(retry_prompts, 1, sampling, retry_seeds)]
    verdicts = [
        judge(runner.task, runner.chat.text(r.ids), f.problem)
        for (f, _, _), r in zip(rows, retries)
    ]
    cut = [not c.finished for _, _, c in rows]
    trainer.r3_metrics = {
        "retry_success": sum(v.ok for v in verdicts) / len(rows),
        "truncated_share": sum(cut) / len(rows),
        "reflection_tokens": sum(len(c.ids) for _, _, c in rows) / len(rows),
        "seconds_sampling": time.perf_counter() - started,
    }
    rewards = [v.ok - args.truncation_penalty * c for v, c in zip(verdicts, cut)]
    output = {"prompt_ids": [a for _, a, _ in rows], "reward": rewards}
    if args.log_completions:
        decode = trainer.processing_class.decode
        output["conversation"] = [decode(a) for _, a, _ in rows]
        output["retry"] = [decode(r.ids) for r in retries]
        output["verdict"] = [v.reason for v in verdicts]
    return output | completions_under(args.mask, rows, retry_prompts, retries)


def completions_under(mask: str, rows, retry_prompts, retries) -> dict:
    """Completion ids, log-probs and (for the masks that reach beyond the reflection) `env_mask`."""
    if mask == "reflection":
        return {"completion_ids": [c.ids for *_, c in rows], "logprobs": [c.logprobs for *_, c in rows]}
    ids, logprobs, env_mask = [], [], []
    for (_, asked, reflection), prompt, retry in zip(rows, retry_prompts, retries):
        joined = prompt[len(asked) :] + retry.ids
        kept = len(reflection.ids)
        if joined[:kept] != reflection.ids:  # `Chat.closed` has replaced its end
            kept -= 1
        turn = len(joined) - kept - len(retry.ids)
        ids.append(joined)
        logprobs.append(reflection.logprobs[:kept] + [0.0] * turn + retry.logprobs)
        own = int(mask == "reflection+retry")
        env_mask.append([own] * kept + [0] * turn + [1] * len(retry.ids))
    return {"completion_ids": ids, "logprobs": logprobs, "env_mask": env_mask}


def last_checkpoint(folder: str) -> str | None:
    """The newest checkpoint that was written to its end; unfinished ones after it are removed, by the main process."""
    found = {int(p.name[11:]): p for p in Path(folder).glob("checkpoint-*") if p.name[11:].isdigit()}
    for _, path in sorted(found.items(), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
        except (FileNotFoundError, ValueError):  # unfinished, or being removed
            if os.environ.get("RANK", "0") == "0":
                shutil.rmtree(path)
    return None


def metrics_file(args: R3Config) -> Path:
    """Where a run writes its metrics, a JSON line a step."""
    return Path(args.output_dir) / "metrics.jsonl"


class R3Metrics(TrainerCallback):
    """Writes `metrics.jsonl`, a line a step, and warns once when no group has variance."""

    def __init__(self, trainer: R3Trainer):
        self.trainer, self.warned, self.started = trainer, False, 0.0

    def on_train_begin(self, args, state, control, **_):
        """Drop the lines of steps that a resumed run takes again."""
        path = metrics_file(args)
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [x for x in lines if x.endswith("}") and json.loads(x)["step"] <= state.global_step]
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
        row |= {ours: logs.get(theirs) for ours, theirs in METRICS.items()} | self.trainer.r3_metrics
        row |= {ours: logs[theirs] for ours, theirs in REMOTE_METRICS.items() if theirs in logs}
        row["seconds_learning"] = time.perf_counter() - self.started - row["seconds_sampling"]
        row["peak_memory_gib"] = peak_memory_gib()
        with metrics_file(args).open("a") as file:
            file.write(json.dumps(row) + "\n")
        if row["zero_variance_share"] == 1.0 and not self.warned:
            self.warned = True
            warnings.warn(
                f"step {state.global_step}: no group has variance (retry success {row['reward']:.0%}), so nothing is "
                "learned: raise num_generations or the temperature, or take failures of middling difficulty",
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
