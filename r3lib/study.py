"""The study's expensive steps, cached: baseline, mining, training, evaluation.

Torch, transformers, peft and trl are imported where a model is used: they take ten seconds, and a
cached study needs none of them (torch only for `dtype: auto`).
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import yaml

from .artifacts import key_of, stage, up_to_date, work_folder
from .chat import DATE, Chat
from .conditions import CONDITIONS
from .config import ROOT, Loader, Profile, load_profile
from .episodes import UNTRAINED, Policy, in_shards, read_episodes, run_episodes
from .errors import R3Error
from .files import data_hash
from .identity import task_facts
from .mining import MinedFailures, failures_table
from .sampler import Limits, RolloutSampler, mine_failures
from .settings import FREE
from .sources import sources_hash
from .tasks import TASKS, Task, check_options, drawn, load_task
from .weights import compute_dtype, generation_config, hash_of, load, locate, precision, reading

if TYPE_CHECKING:
    from peft import LoraConfig

    from .r3_config import R3Config
    from .trainer import R3Trainer

LENGTHS = ("max_attempt_length", "max_completion_length", "max_retry_length")
Part = tuple[int, int] | None  # (i, n): the shards of process i of n


class Study:
    """One task under one profile; each step returns the path of its result, which is made once.

    `task` is a name ("countdown"), a Task of your own, or where its class is: "file.py:Class" or
    "package.module:Class". `overrides` are settings of the profile, if that is given by its name.
    A step is made again when anything that decides its result has changed: it then says what.
    """

    def __init__(self, profile: Profile | str, task: Task | str, results="results", **overrides):
        if isinstance(profile, str):
            profile = load_profile(profile, **overrides)
        elif overrides:
            raise R3Error(f"{', '.join(overrides)}: give overrides to load_profile, with the name")
        options = profile.task_options
        if isinstance(task, str):
            task = load_task(task, options)
        elif "task_options" in overrides or (task.name in options and task.name not in TASKS):
            raise R3Error("task_options make a task from its name: make this one with them instead")
        check_options(options, task.name)
        self.profile = profile
        self.task = task
        self.results = (ROOT / results) / self.profile.name
        self._made: set[Path] = set()
        self._drawn: dict[tuple[str, int], list] = {}

    # What the steps work with

    @property
    def model_path(self) -> str:
        """What transformers loads: see `weights.locate`."""
        return locate(self.profile.model)

    @cached_property
    def tokenizer(self):
        """The model's tokenizer."""
        from transformers import AutoTokenizer

        with reading(self.model_path):
            return AutoTokenizer.from_pretrained(self.model_path)

    @cached_property
    def chat(self) -> Chat:
        """Joins conversations: the model's tokenizer and ends, the profile's template arguments."""
        ends = generation_config(self.model_path)
        return Chat(self.tokenizer, ends, self.profile.sampling["chat_template_kwargs"])

    def model(self, adapter: Path | None = None, trainable: bool = False):
        """The model, with the adapter in the folder `adapter` if one is named."""
        p = self.profile
        return load(self.model_path, p.quantization, adapter, trainable, p.dtype)

    @cached_property
    def dtype(self) -> str:
        """Of the frozen weights, on this machine: "float32", "bfloat16" or "float16"."""
        if self.profile.dtype != "auto":
            return self.profile.dtype  # without torch, which takes seconds
        return str(compute_dtype()).removeprefix("torch.")

    def sampler(self, adapter: Path | None = None, progress: bool = True) -> RolloutSampler:
        """Samples tries and reflections from the model, under the profile's limits."""
        settings = self.profile.sampling
        engine = self.remote_engine()
        if engine:
            engine.sync(adapter)
        else:
            from .engines.transformers import TransformersEngine

            model, batch = self.model(adapter), settings["sample_batch"]
            engine = TransformersEngine(model, self.tokenizer, batch, progress, self.chat.end_ids)
        limits = Limits(**{name: settings[name] for name in LENGTHS})
        return RolloutSampler(engine, self.chat, self.task, limits, settings["temperature"])

    def remote_engine(self):
        """The engine over vLLM servers that the profile asks for; None: transformers."""
        p = self.profile
        if p.engine == "transformers":
            return None
        log, ends = self.results / "vllm.log", self.chat.end_ids
        from .engines.vllm_server import vllm_engine

        options = f"--dtype {self.dtype} {p.vllm_options}"
        return vllm_engine(self.model_path, p.servers, options, p.lora["r"], log, ends)

    def problems(self, split: str, n: int) -> list:
        """`n` problems of a split: the same for every policy and seed, drawn once a study."""
        if (split, n) not in self._drawn:
            self._drawn[split, n] = drawn(self.task, split, n)
        return self._drawn[split, n]

    # The steps

    def baseline(self, part: Part = None) -> Path:
        """Episodes of the untrained model on the test problems."""
        return self._episodes(Policy(UNTRAINED, 0, self.profile.model), None, part)

    def mine(self, part: Part = None) -> Path:
        """The untrained model's failures on training problems: the data set of the training."""
        p = self.profile

        def sample(out: Path, part: tuple[int, int]) -> None:
            sampler = self.sampler()

            def mined(problems: list) -> pd.DataFrame:
                samples = p.mine_samples, p.mine_temperature
                return failures_table(mine_failures(sampler, problems, *samples))

            in_shards(out, self.problems("train", p.train_problems), mined, p.shard_size, part)

        target = self.results / "failures" / f"{self.task.name}.parquet"
        config = self._config("train_problems", "mine_samples", "mine_temperature", "shard_size")
        return self._sampled(target, config, [], sample, part)

    def failures(self) -> MinedFailures:
        """The mined failures, as training takes them."""
        problems = self.problems("train", self.profile.train_problems)
        return MinedFailures(self.mine(), problems, self.chat, self.task)

    def train(self, seed: int, trainer: "R3Trainer | None" = None) -> Path:
        """An adapter, trained with R3 on the mined failures; a killed run resumes.

        `trainer`: yours, made as `Study.trainer` makes one. R3Error, naming what differs: model,
        adapter, task, failures or settings are not the profile's (see `check_trainer`).
        """
        if trainer is not None:
            from .own_trainer import check_trainer

            check_trainer(self, trainer, seed)

        def build(work: Path) -> None:
            from .training_log import metrics_file

            training = trainer or self.trainer(seed)
            training.resume_or_train()
            adapter = work / self._adapter(seed).name
            training.save_model(str(adapter))
            if training.is_world_process_zero():
                (adapter / "metrics.jsonl").write_text(metrics_file(training.args).read_text())

        path = self._stage(self._adapter(seed), self._training(seed), [self.mine()], build)
        self._collect_metrics()
        return path

    def training_folder(self, seed: int) -> Path:
        """Where the checkpoints and metrics of a training are while it runs."""
        return work_folder(self._adapter(seed), self._training(seed), [self.mine()])

    def args(self, seed: int) -> "R3Config":
        """The profile's settings of a training."""
        from .r3_config import R3Config

        return R3Config(str(self.training_folder(seed)), seed=seed, **self.settings())

    def settings(self) -> dict:
        """Arguments of R3Config: the profile's blocks, and the precision that goes with `dtype`."""
        mixed = precision(compute_dtype(self.dtype))
        return mixed | self.profile.sampling | self.profile.training

    def lora(self) -> "LoraConfig":
        """The adapter that is trained."""
        from peft import LoraConfig

        return LoraConfig(**self.profile.lora)

    def trainer(self, seed: int) -> "R3Trainer":
        """The trainer that the profile describes; notebook 03 makes the same, in the open."""
        from transformers import PrinterCallback

        from .trainer import R3Trainer

        trainer = R3Trainer(
            model=self.model(trainable=True),
            args=self.args(seed),
            task=self.task,
            failures=self.failures(),
            peft_config=self.lora(),
            processing_class=self.tokenizer,
            engine=self.remote_engine(),
        )
        trainer.remove_callback(PrinterCallback)  # metrics.jsonl has it all
        return trainer

    def evaluate(self, seed: int, part: Part = None) -> Path:
        """Episodes of the policy that was trained with `seed`."""
        adapter = self.train(seed)
        return self._episodes(Policy("r3", seed, self.profile.model, adapter.name), adapter, part)

    def transfer(self, seed: int, other: "Study", part: Part = None) -> Path:
        """Episodes of the policy that was trained with `seed` on the `other` study's task."""
        adapter = other.train(seed)
        policy = Policy(f"r3_from_{other.task.name}", seed, self.profile.model, adapter.name)
        return self._episodes(policy, adapter, part)

    # What they leave

    def episodes(self, others: Sequence["Study"] = ()) -> pd.DataFrame:
        """Every episode of this task; also by policies trained on the tasks of `others`."""
        parts = [pd.read_parquet(path) for path in self.episode_files(others)]
        return pd.concat(parts, ignore_index=True)

    def episode_files(self, others: Sequence["Study"] = ()) -> list[Path]:
        """The files that `episodes` reads."""
        seeds = range(self.profile.seeds)
        own = [self.baseline(), *(self.evaluate(seed) for seed in seeds)]
        return own + [self.transfer(seed, other) for other in others for seed in seeds]

    def metrics(self) -> pd.DataFrame:
        """One row a training step and seed."""
        folders = [self.train(seed) for seed in range(self.profile.seeds)]
        parts = [pd.read_json(folder / "metrics.jsonl", lines=True) for folder in folders]
        return pd.concat(parts, ignore_index=True)

    # The cache

    @cached_property
    def model_hash(self) -> str:
        """What tells the model from another: see `weights.hash_of`."""
        return hash_of(self.model_path)

    def _config(self, *keys, **extra) -> dict:
        """What a stage depends on besides its inputs: task, model, sampling, and `keys`."""
        profile = asdict(self.profile)
        if profile["vllm_options"]:
            keys = (*keys, "vllm_options")
        same = {"task": self.task.name, "task_facts": task_facts(self.task)}
        same["code"] = sources_hash(self.task, self.profile.engine)
        same["data"] = data_hash(self.task.files())
        same |= {"model": self.model_hash, "dtype": self.dtype, "prompt_date": DATE}
        same["sampling"] = _decisive(self.profile.sampling)
        same |= {key: profile[key] for key in ("quantization", "engine", *keys)}
        return same | extra

    def _adapter(self, seed: int) -> Path:
        return self.results / "adapters" / f"{self.task.name}-r3-{seed}"

    def _training(self, seed: int) -> dict:
        """What an adapter depends on."""
        return self._config("lora", training=_decisive(self.profile.training), seed=seed)

    def _episodes(self, policy: Policy, adapter: Path | None, part: Part) -> Path:
        def sample(out: Path, part: tuple[int, int]) -> None:
            problems = self.problems("test", self.profile.test_problems)
            size = self.profile.shard_size
            sampler = self.sampler(adapter)
            run_episodes(sampler, problems, policy, out, shard=size, log=print, part=part)

        target = self.results / "episodes" / f"{self.task.name}-{policy.name}-{policy.seed}.parquet"
        conditions = [[c.name, c.told, c.reflection, c.temperature] for c in CONDITIONS]
        config = self._config("test_problems", "shard_size", conditions=conditions)
        return self._sampled(target, config, [adapter] if adapter else [], sample, part)

    def _sampled(
        self, target: Path, config: dict, inputs: list[Path], sample: Callable, part: Part
    ) -> Path:
        """A table that is sampled in shards.

        With `part` (i, n) only those of process i of n, into a folder for all. Without, the table:
        the shards that such processes have left are taken, and what is missing is sampled.
        """
        shards = self.results / "parts" / f"{target.stem}-{key_of(config, inputs, target)[:12]}"
        if part:
            if not up_to_date(target, config, inputs):
                sample(shards, part)
            return shards

        def build(work: Path) -> None:
            out = work / "shards"
            out.mkdir(exist_ok=True)
            for folder in shards.parent.glob(f"{escape(target.stem)}-{'?' * 12}"):
                if folder != shards:
                    print(f"{folder} is not used: it is of other settings, data or code")
                elif not os.environ.get("R3_FRESH"):
                    for path in folder.glob("[!.]*.*"):
                        if not (out / path.name).exists():
                            path.rename(out / path.name)
            sample(out, (0, 1))
            read_episodes(out).to_parquet(work / target.name)

        path = self._stage(target, config, inputs, build)
        shutil.rmtree(shards, ignore_errors=True)
        return path

    def _stage(self, target: Path, config: dict, inputs: list[Path], build: Callable) -> Path:
        """`stage`, asked once a study."""
        if target not in self._made:
            stage(target, config, inputs, build)
            self._made.add(target)
        return target

    def _collect_metrics(self) -> None:
        """Keep results/<profile>/metrics.jsonl equal to the logs of this profile's adapters."""
        if os.environ.get("RANK", "0") != "0":
            return
        logs = sorted((self.results / "adapters").glob("[!.]*-r3-*/metrics.jsonl"))
        seeds = [str(seed) for seed in range(self.profile.seeds)]
        ours = [log for log in logs if log.parent.name.rpartition("-")[2] in seeds]
        (self.results / "metrics.jsonl").write_text("".join(log.read_text() for log in ours))


def _decisive(settings: dict) -> dict:
    """A block of settings without those that decide no result."""
    return {name: value for name, value in settings.items() if name not in FREE}


def open_studies(
    profile: str, task: str = "all", results: Path | str = "results", overrides: dict | str = "{}"
) -> list[Study]:
    """A study for `task`, or for every task of the profile.

    `overrides`: settings of the profile, as a mapping or its text. R3Error: it is none.
    """
    try:
        settings = yaml.load(overrides, Loader) if isinstance(overrides, str) else overrides
        if not isinstance(settings, Mapping):
            raise yaml.YAMLError
        loaded = load_profile(profile, **settings)
        return [Study(loaded, name, results) for name in loaded.tasks(task)]
    except yaml.YAMLError as error:
        raise R3Error(f"overrides={overrides!r} is no mapping: write '{{\"seeds\": 3}}'") from error
