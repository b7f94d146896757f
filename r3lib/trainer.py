"""Masked GRPO: groups of reflections on one failure, rewarded by the verdict on the retry after it.

What depends on TRL's experimental `rollout_func` or on its private names is here and in `rollout`.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOTrainer
from trl.trainer.utils import create_model_from_path

from .card import plain_name, write_card
from .chat import Chat
from .checkpoints import RUN_NOTE, claim_checkpoints, last_checkpoint
from .engines.base import RemoteEngine
from .engines.support import check_model, reach
from .engines.transformers import TransformersEngine
from .errors import R3Error
from .identity import check_task, digest, model_facts, task_facts
from .mining import check_failures, failures_digest, mine_for_training
from .model_checks import check_dtypes, check_positions, train_in_fp32, trained_weights
from .r3_config import MASKS, R3Config
from .rollout import completions_under, rollout, training_order, verified
from .sampler import Failure, Limits, RolloutSampler
from .settings import settings_facts
from .tasks.dataset import DatasetTask
from .training_log import METRICS, AfterStep, R3Metrics, metrics_file
from .weights import NO_SAMPLING

__all__ = [
    "METRICS", "MASKS", "RUN_NOTE", "AfterStep", "R3Config", "R3Metrics", "R3Trainer",
    "completions_under", "last_checkpoint", "metrics_file", "rollout",
    "training_order", "verified",
]  # fmt: skip

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # the contract tests pin rollout_func


class R3Trainer(GRPOTrainer):
    """GRPO on reflections (paper, section on the method; its equation is GRPO's with a token mask).

    `failures` are failed attempts (see `mine_failures`), each read when its turn comes. For each, G
    reflections are sampled, each is followed by a retry in the same conversation, and the reward of
    a reflection is the retry's verdict, 0 or 1 (of a graded verifier: its score). In place of
    `task` and `failures`, `verifier(text, row)` and `train_dataset` (see `DatasetTask`) let the
    trainer mine the failures.

    With `mask="reflection"` the completion is the reflection alone: the retry follows it, so under
    a causal mask its tokens would change nothing. The other masks train on reflection, turn and
    retry with `env_mask`.

    What is trained is fp32, whatever dtype it was loaded in, since 16 bits lose small updates; what
    is frozen keeps its dtype. With `bf16=True` both compute in bf16.

    A run leaves `r3_run.json` beside its checkpoints: with other failures, weights or settings it
    does not resume (saving, logging and the place may change; `max_steps` may grow under a constant
    schedule).

    A `RemoteEngine` gets the adapter before each rollout, and each token's loss is multiplied by
    its probability under the trained model over that under the sampler, cut at
    `vllm_importance_sampling_clip_max`.
    """

    def __init__(
        self,
        model,
        args: R3Config,
        task=None,
        failures: Sequence[Failure] | None = None,
        peft_config=None,
        processing_class=None,
        engine=None,
        callbacks=None,
        *,
        verifier: Callable | None = None,
        train_dataset=None,
    ):
        check_args(args)
        if verifier is not None or train_dataset is not None:
            check_own_data(task, failures, verifier, train_dataset)
            model, processing_class = loaded(model, processing_class, args)
            task = DatasetTask(train_dataset, verifier)
            failures = mine_for_training(model, processing_class, task, args, engine)
        check_given(model, task, failures, peft_config)
        self.task = task
        self.failures = failures
        self.r3_metrics: dict[str, float] = {}
        self._engine = engine
        self._metrics_log = R3Metrics(self)
        wanted = args.max_steps * args.failures_per_step
        self.order = training_order(len(failures), wanted, args.seed)
        start = trained_weights(model) if isinstance(model, PeftModel) else {}
        super().__init__(
            model=model,
            args=args,
            reward_funcs=verified,
            train_dataset=self._dataset(),
            peft_config=deepcopy(peft_config),  # the name of the base is noted in it
            processing_class=processing_class,
            rollout_func=rollout,
            callbacks=[self._metrics_log, *(callbacks or [])],
        )
        self._check_and_cast(start)
        self._join_engine()
        check_model(self.model)
        check_failures(failures, self.sampler(), self._context())
        self._facts = self._decisive(fresh=peft_config is not None)

    def _check_and_cast(self, start: dict) -> None:
        """Cast what is trained to fp32; R3Error for a model that cannot be trained or sampled."""
        if self._engine is None and self._spread:
            raise R3Error(NO_SAMPLING)
        if not is_deepspeed_zero3_enabled():  # which gathers one dtype only
            train_in_fp32(self.model, start)
        if not self._spread:
            check_dtypes(self.model, self.args)
            with self.accelerator.autocast():
                check_positions(self.accelerator.unwrap_model(self.model))
        for config in getattr(self.model, "peft_config", {}).values():
            config.base_model_name_or_path = plain_name(config.base_model_name_or_path)
        self._reach = reach(self.model)

    def _join_engine(self) -> None:
        """Let engine, chat and TRL agree on the tokens that end a reply."""
        generation = self.model.generation_config
        self._chat = Chat(self.processing_class, generation, self.chat_template_kwargs)
        self.eos_token_ids = sorted(self._chat.end_ids)  # by which TRL tells what was cut off
        if isinstance(self._engine, RemoteEngine):
            self._train_for_a_remote_engine()

    @property
    def _spread(self) -> bool:
        """Whether the weights are spread over processes."""
        return self.is_fsdp_enabled or is_deepspeed_zero3_enabled()

    def _dataset(self) -> Dataset:
        """One row a group: its place in the order, inside a message that TRL logs as the prompt.

        The text of half a million conversations would take gigabytes; `rollout` takes the failure.
        """
        size = len(self.order)
        texts = pa.array(f"failure {index}" for index in self.order)
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
        """All that decides the training; a `fresh` adapter's weights come from a checkpoint."""
        turn = self._chat.follow([], [], self.task.reflection_prompt)
        facts = (
            settings_facts(self.args)
            | task_facts(self.task)
            | model_facts(self.model, trained=not fresh)
        )
        facts["failures"] = failures_digest(self.failures)
        return facts | {"turns (tokenizer, template)": digest([turn, sorted(self._chat.end_ids)])}

    def train(self, resume_from_checkpoint=None, *rest, **options):
        """TRL's. R3Error, naming what differs, if there are checkpoints of another training."""
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            max_steps = self.args.max_steps
            claim_checkpoints(folder, resume_from_checkpoint, self._facts, max_steps)
        return super().train(resume_from_checkpoint, *rest, **options)

    def log(self, logs, start_time=None) -> None:
        """TRL's, with R3's own metrics of the step."""
        if "loss" in logs:  # a step, not the summary at the end
            logs |= self._metrics_log.of_step(self.r3_metrics)
        super().log(logs, start_time)

    def sampler(self) -> RolloutSampler:
        """Samples from the policy as it stands."""
        args = self.args
        engine = self._engine or TransformersEngine(
            self.accelerator.unwrap_model(self.model),
            self.processing_class,
            args.sample_batch,
            end_ids=self._chat.end_ids,
        )
        limits = Limits(args.max_attempt_length, args.max_completion_length, args.max_retry_length)
        return RolloutSampler(
            engine, self._chat, self.task, limits, args.temperature, args.retry_turn
        )

    def _train_for_a_remote_engine(self) -> None:
        """Turn on what TRL does for its own vLLM: importance ratios, and a sync before rollouts.

        Set after TRL's init, `use_vllm` does just that in a trainer with a `rollout_func`.
        """
        if not isinstance(self.model, PeftModel):
            raise R3Error("a remote engine takes adapters, not whole models: give a peft_config")
        self._engine.end_ids = self._chat.end_ids
        self.use_vllm = True
        self._last_loaded_step = -1
        self.vllm_generation = SimpleNamespace(sync_weights=self._sync)

    def _sync(self) -> None:
        """Hand the adapter as it stands to the engine, in a new folder; remove the older ones."""
        folder = Path(self.args.output_dir) / "synced" / f"step-{self.state.global_step:06d}"
        self.save_model(str(folder))
        self.accelerator.wait_for_everyone()
        self._engine.sync(folder)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            for old in set(folder.parent.iterdir()) - {folder}:
                shutil.rmtree(old)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, *rest, **options
    ):
        """TRL's, for a quarter of the rows at a time, sorted by length, without shared padding.

        The longest reflection of a whole step sets TRL's padding; the values are the same, with
        less work.
        """
        whole = super()._get_per_token_logps_and_entropies
        if options.get("compute_aux_loss"):  # a mixture of experts balances over all rows
            return whole(model, input_ids, attention_mask, logits_to_keep, *rest, **options)
        first_token = input_ids.size(1) - logits_to_keep
        values = []
        order = attention_mask.sum(1).argsort(stable=True)
        for rows in order.chunk(4):
            used = attention_mask[rows].any(0).nonzero()
            start = int(used[0])
            end = max(int(used[-1]), first_token) + 1
            self._check_width(end - start)
            ids = input_ids[rows, start:end]
            mask = attention_mask[rows, start:end]
            logps, entropies, _ = whole(model, ids, mask, end - first_token, *rest, **options)
            values.append((logps, logps.new_zeros(logps.shape) if entropies is None else entropies))
        places = order.argsort()
        logps, entropies = (
            torch.cat([F.pad(x, (0, logits_to_keep - x.size(1))) for x in parts])[places]
            for parts in zip(*values)
        )
        return logps, entropies, None

    def _check_width(self, width: int) -> None:
        """A longrope model moves the positions of all rows once a batch is wider than its reach."""
        if width > (self._reach or width):
            raise R3Error(
                f"a learning batch is {width} tokens wide, beyond the {self._reach} up to which "
                "this model's positions are those of sampling: lower per_device_train_batch_size "
                "or leave out long failures"
            )

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


def check_args(args) -> None:
    """R3Error unless `args` is an R3Config."""
    if not isinstance(args, R3Config):
        raise R3Error(
            f"args is a {type(args).__name__}: give an R3Config, with the same settings"
        )


def check_given(model, task, failures, peft_config) -> None:
    """R3Error for a task, failures or a model that cannot be trained, before anything is built."""
    check_task(task)
    if not failures:
        raise R3Error("no failures to train on: mine more problems, or a harder task")
    if not isinstance(model, str):
        check_model(model, peft_config)


def check_own_data(task, failures, verifier, train_dataset) -> None:
    """R3Error unless `verifier` and `train_dataset` come together, and instead of the others."""
    if verifier is None or train_dataset is None:
        raise R3Error(
            "verifier and train_dataset go together: give verifier(text, row) and the rows"
        )
    if task is not None or failures is not None:
        raise R3Error(
            "verifier and train_dataset make task and failures: give the one pair or the other"
        )


def loaded(model, tokenizer, args: R3Config):
    """The model and its tokenizer, each loaded as TRL does where it is a name or missing."""
    if isinstance(model, str):
        model = create_model_from_path(model, **(args.model_init_kwargs or {}))
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
    return model, tokenizer
