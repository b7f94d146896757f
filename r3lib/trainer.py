"""Masked GRPO: groups of reflections on one failure, rewarded by the verdict on the retry after it.

What depends on TRL's experimental `rollout_func` or on its private names is here and in `rollout`.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from math import isfinite
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import ProcessorMixin
from transformers.integrations import is_deepspeed_zero3_enabled

from .card import plain_name, write_card
from .chat import Chat
from .checkpoints import claim_checkpoints, last_checkpoint
from .engines.base import RemoteEngine
from .engines.support import check_model, reach
from .engines.transformers import TransformersEngine
from .errors import R3Error
from .files import claimed
from .identity import check_task, digest, model_facts, task_facts
from .learning import SharedPrefixGRPO
from .mining import check_failures, failures_digest, mine_for_training
from .model_checks import check_dtypes, check_positions, train_in_fp32, trained_weights
from .r3_config import R3Config
from .rollout import rollout, training_order, verified
from .sampler import Failure, Limits, RolloutSampler
from .settings import settings_facts
from .tasks.dataset import DatasetTask
from .training_log import R3Metrics
from .weights import NO_SAMPLING, device

TRAINING = "_training.lock"  # in output_dir while it trains; transformers pushes no name with _

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # the contract tests pin rollout_func


class R3Trainer(SharedPrefixGRPO):
    """GRPO on reflections (paper, section on the method; its equation is GRPO's with a token mask).

    `failures` are failed attempts (see `mine_failures`), each read when its turn comes. For each, G
    reflections are sampled, each is followed by a retry in the same conversation, and the reward of
    a reflection is the retry's verdict, 0 or 1 (of a graded verifier: its score). In place of
    `task` and `failures`, `verifier(text, row)` and `train_dataset` let the trainer mine the
    failures, and so does a `DatasetTask` of them, which may have prompts of its own, as `task`.

    The other arguments are TRL's. TRL loads a `model` given by name, and its tokenizer.

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
        args: R3Config | None = None,
        *,
        verifier: Callable | None = None,
        train_dataset=None,
        task=None,
        failures: Sequence[Failure] | None = None,
        engine=None,
        processing_class=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config=None,
        reward_funcs=None,
        eval_dataset=None,
    ):
        check_args(args, reward_funcs, eval_dataset)
        check_reference(model, args, peft_config)
        task = task_of(task, failures, verifier, train_dataset)
        if not isinstance(model, str):
            check_model(model, peft_config)
        self.task, self._engine, self.failures = task, engine, ()
        self._task_facts = task_facts(task)  # a verifier that counts has not judged yet
        self.r3_metrics, self._metrics_log = {}, R3Metrics(self)
        start = trained_weights(model) if isinstance(model, PeftModel) else {}
        with on_one_device(model, args):
            super().__init__(
                model=model,
                args=args,
                reward_funcs=verified,
                train_dataset=Dataset.from_dict({"prompt": []}),  # which `_take` replaces
                peft_config=deepcopy(peft_config),  # the name of the base is noted in it
                processing_class=processing_class,
                rollout_func=rollout,
                callbacks=[self._metrics_log, *(callbacks or [])],
                optimizers=optimizers,
                quantization_config=quantization_config,
            )
        self._check_and_cast(start)
        self._join_engine()
        self._take(self._mined(fresh=peft_config is not None) if failures is None else failures)
        self._packs = self._check_packing()
        self._facts = self._decisive(fresh=peft_config is not None)

    def _check_and_cast(self, start: dict) -> None:
        """Cast what is trained to fp32; R3Error for a model that cannot be trained or sampled."""
        check_model(self.model)
        if self._engine is None and self._spread:
            raise R3Error(NO_SAMPLING)
        # its backward under a mask can give nan at widths of 64 modulo 128: pytorch's issue 196678
        torch.backends.cuda.enable_cudnn_sdp(False)
        if not is_deepspeed_zero3_enabled():  # which gathers one dtype only
            train_in_fp32(self.model, start)
        if self.ref_model is not None and not self._spread:  # which TRL has read from the disk
            self.ref_model.load_state_dict(self.model.state_dict())
        if not self._spread:
            check_dtypes(self.model, self.args)
            with self.accelerator.autocast():
                check_positions(self.accelerator.unwrap_model(self.model))
        for config in getattr(self.model, "peft_config", {}).values():
            config.base_model_name_or_path = plain_name(config.base_model_name_or_path)
        self._reach = reach(self.model)

    def _join_engine(self) -> None:
        """Let engine, chat and TRL agree on the tokens that end a reply."""
        if isinstance(self.processing_class, ProcessorMixin):
            raise R3Error(
                f"{self.model.config.model_type} has a {type(self.processing_class).__name__}, and "
                "R3 takes text alone: give its tokenizer as processing_class"
            )
        generation = self.model.generation_config
        self._chat = Chat(self.processing_class, generation, self.chat_template_kwargs)
        self.eos_token_ids = sorted(self._chat.end_ids)  # by which TRL tells what was cut off
        if isinstance(self._engine, RemoteEngine):
            self._train_for_a_remote_engine()

    @property
    def _spread(self) -> bool:
        """Whether the weights are spread over processes."""
        return self.is_fsdp_enabled or is_deepspeed_zero3_enabled()

    def _mined(self, fresh: bool) -> Sequence[Failure]:
        """The policy's failures; a `fresh` adapter changes nothing yet: those of the model."""
        if isinstance(self._engine, RemoteEngine) and fresh:
            self._engine.sync(None)  # it may hold the adapter of another trainer
        return mine_for_training(self.sampler(sync=not fresh), self.args)

    def _take(self, failures: Sequence[Failure]) -> None:
        """Train on `failures`; R3Error if there are none, or one does not fit."""
        if not failures:
            raise R3Error("no failures to train on: mine more problems, or a harder task")
        check_failures(failures, self.sampler(sync=False), self._context())
        wanted = self.args.max_steps * self.args.failures_per_step
        self.failures = failures
        self.order = training_order(len(failures), wanted, self.args.seed)
        self.train_dataset = self._dataset()

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
            | self._task_facts
            | model_facts(self.model, trained=not fresh)
        )
        facts["failures"] = failures_digest(self.failures)
        return facts | {"turns (tokenizer, template)": digest([turn, sorted(self._chat.end_ids)])}

    def train(self, resume_from_checkpoint=None, *rest, **options):
        """TRL's. R3Error, naming what differs, if there are checkpoints of another training.

        Also while another process trains into `output_dir`, and for weights that this trainer has
        trained already, unless it resumes.
        """
        if resume_from_checkpoint is True:  # transformers would take one that is not complete
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise R3Error(f"no complete checkpoint in {self.args.output_dir}: call train()")
        if self.state.global_step and not resume_from_checkpoint:
            raise R3Error(
                f"this trainer has taken {self.state.global_step} steps already: go on from its "
                "checkpoint with resume_or_train(), or, where there is none, build a new trainer "
                "on a model loaded anew"
            )
        self._step, self._buffered_inputs = 0, None  # what an interrupted step has left
        for values in self._metrics.values():
            values.clear()
        main = self.is_world_process_zero()
        folder = Path(self.args.output_dir)
        with claimed(folder, lock=TRAINING) if main else nullcontext():
            if main:
                max_steps = self.args.max_steps
                claim_checkpoints(folder, resume_from_checkpoint, self._facts, max_steps)
            return super().train(resume_from_checkpoint, *rest, **options)

    def log(self, logs, start_time=None) -> None:
        """TRL's, with R3's own metrics of the step."""
        if "loss" in logs:  # a step, not the summary at the end
            self._check_gradient(logs.get("grad_norm", 0.0))
            logs |= self._metrics_log.of_step(self.r3_metrics)
        super().log(logs, start_time)

    def _check_gradient(self, norm: float) -> None:
        """R3Error if the step was taken with a gradient that is not finite (DeepSpeed: -1)."""
        finite = isfinite(norm) and norm >= 0
        if not finite and not self.accelerator.optimizer_step_was_skipped:  # as fp16's scaler does
            kept = last_checkpoint(self.args.output_dir)
            kept = f"{Path(kept).name} is sound" if kept else "there is no checkpoint"
            raise R3Error(
                f"step {self.state.global_step}: the gradient is not finite (norm {norm}), so the "
                f"weights are lost: nothing of this step is saved, {kept}. This run would come "
                "here again: begin one with a lower learning_rate in another output_dir, or with "
                "a model loaded with attn_implementation='eager'"
            )

    def sampler(self, sync: bool = True) -> RolloutSampler:
        """Samples from the policy as it stands.

        A `RemoteEngine` is handed it first, by all processes together, unless `sync` is False.
        """
        if sync and isinstance(self._engine, RemoteEngine):
            self._sync()
        args = self.args
        engine = self._engine or TransformersEngine(
            self.accelerator.unwrap_model(self.model),
            self.processing_class,
            args.sample_batch,
            end_ids=self._chat.end_ids,
            within=partial(self._autocast, learning=False),
        )
        limits = Limits(args.max_attempt_length, args.max_completion_length, args.max_retry_length)
        return RolloutSampler(engine, self._chat, self.task, limits, args.temperature)

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
        self.save_model(str(folder), _internal_call=True)  # which pushes nothing to the hub
        self.accelerator.wait_for_everyone()
        self._engine.sync(folder)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            for old in set(folder.parent.iterdir()) - {folder}:
                shutil.rmtree(old)

    def _save(self, output_dir=None, state_dict=None) -> None:
        """TRL's, with a card that says what the weights are.

        Without the copy of a given adapter that TRL makes as the reference, as it does anew at a
        resume: beside a folder with it the trained one would not be loaded.
        """
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        shutil.rmtree(folder / "ref", ignore_errors=True)
        write_card(folder, self)

    def create_model_card(self, model_name=None, dataset_name=None, tags=()) -> None:
        """The card of the run, in `output_dir`."""
        if self.is_world_process_zero():
            write_card(Path(self.args.output_dir), self, model_name, dataset_name, tags)

    def resume_or_train(self):
        """Train, from the last complete checkpoint in `output_dir` if there is one."""
        return self.train(resume_from_checkpoint=last_checkpoint(self.args.output_dir))


@contextmanager
def on_one_device(model, args):
    """Within the block TRL loads a model by name to this process's GPU, not spread over several."""
    given = args.model_init_kwargs
    if isinstance(model, str) and torch.cuda.device_count() > 1 and not args.use_cpu:
        args.model_init_kwargs = {"device_map": {"": device()}} | (given or {})
    try:
        yield
    finally:
        args.model_init_kwargs = given


def check_args(args, reward_funcs, eval_dataset) -> None:
    """R3Error unless `args` is an R3Config, and what R3 cannot use of TRL's is None."""
    if not isinstance(args, R3Config):
        what = "missing" if args is None else f"a {type(args).__name__}"
        raise R3Error(f"args is {what}: give an R3Config, with the same settings")
    if reward_funcs is not None:
        raise R3Error("reward_funcs: R3's reward is the verdict on the retry: give verifier=...")
    if eval_dataset is not None:
        raise R3Error("eval_dataset: R3 does not evaluate while it trains: use run_episodes")


def check_reference(model, args, peft_config) -> None:
    """R3Error if TRL would need a reference model, for KL, and could not make one."""
    if not args.beta or isinstance(model, str):
        return
    if isinstance(model, PeftModel):
        if "default" not in model.peft_config:
            names = ", ".join(model.peft_config)
            raise R3Error(f"the adapter is called {names}: call it 'default', or set beta=0")
    elif peft_config is None and not model.config._name_or_path:
        raise R3Error(
            f"beta={args.beta} compares with a copy of the model as it was, which TRL loads by "
            "the model's name, and this one has none: set beta=0, or give a peft_config"
        )


def task_of(task, failures, verifier, train_dataset):
    """The task; R3Error unless it is whole, and its failures are given or can be mined."""
    own = [thing is not None for thing in (verifier, train_dataset)]
    made = [thing is not None for thing in (task, failures)]
    if any(own) and any(made):
        raise R3Error(
            "verifier and train_dataset make task and failures: give the one pair or the other"
        )
    if not all(own) and not all(made) and not isinstance(task, DatasetTask):
        raise R3Error(
            "what to train on is missing: give verifier(text, row) and train_dataset together, "
            "or task and failures, or a DatasetTask"
        )
    task = task if verifier is None else DatasetTask(train_dataset, verifier)
    check_task(task)
    return task
