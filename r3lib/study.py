"""The study's steps as cached stages: baseline, mining, training, evaluation. Notebooks call these.

Torch, transformers, peft and trl are imported where a model is used: they take ten seconds, and a cached study
needs none of them.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from .chat import DATE, Chat
from .conditions import CONDITIONS
from .config import Profile, load_profile
from .episodes import UNTRAINED, Policy, in_shards, read_episodes, run_episodes
from .errors import R3Error
from .sampler import FAILURE, Limits, MinedFailures, RolloutSampler, mine_failures
from .store import SCRIPTS, folder_hash, key_of, stage, up_to_date
from .tasks import TASKS, load_task
from .weights import commit, compute_dtype, load, locate, reading

if TYPE_CHECKING:
    from peft import LoraConfig

    from .trainer import R3Trainer

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "data"
SOURCES = "study.py weights.py chat.py conditions.py sampler.py episodes.py r3_config.py "
SOURCES += "rollout.py trainer.py engines/* tasks/base.py tasks/{0}* verifiers/*"
Part = tuple[int, int] | None  # (i, n): the share of process i of n, see `Study._sampled`
SAMPLING = ("attempt_tokens", "reflection_tokens", "retry_tokens", "reflection_temperature", "retry_turn")
SAMPLING += ("sample_batch",)
TRAINING = (
    "steps", "failures_per_step", "group_size", "learning_rate", "warmup_steps", "scheduler", "lora_rank",
    "lora_alpha", "beta", "loss_type", "mask", "retry_temperature", "truncation_penalty", "max_grad_norm",
    "micro_batch",
)  # fmt: skip


class Study:
    """One task under one profile; every method returns the path of a cached artefact below `results`."""

    def __init__(self, profile: Profile | str, task: str, results: Path | str = "results", **overrides):
        self.profile = load_profile(profile, **overrides) if isinstance(profile, str) else profile
        self.task_name = task
        self.task = load_task(task, **self.profile.task_options.get(task, {}))
        self.results = (DATA.parent / results) / self.profile.name
        self.made: set[Path] = set()
        self.drawn: dict[tuple[str, int], list] = {}

    @property
    def model_path(self) -> str:
        """What transformers loads: see `weights.locate`."""
        return locate(self.profile.model)

    @cached_property
    def model_hash(self) -> str:
        """Hash of a local model's files; for a hub id "id@commit", or the id alone where no commit is known."""
        if found := folder_hash(Path(self.model_path), without=SCRIPTS):
            return found
        return f"{self.model_path}@{known}" if (known := commit(self.model_path)) else self.model_path

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
        return Chat(self.tokenizer, ends, self.profile.chat_template_kwargs)

    def model(self, adapter: Path | None = None, trainable: bool = False):
        """The model, with the adapter in `adapter` if one is named."""
        import torch

        if self.profile.threads:
            torch.set_num_threads(self.profile.threads)
        return load(self.model_path, self.profile.quantization, adapter, trainable)

    def runner(self, adapter: Path | None = None, progress: bool = True) -> RolloutSampler:
        """Samples episodes from the model under the profile's limits."""
        p, chat = self.profile, self.chat
        if engine := self.remote_engine():
            engine.sync(adapter)
        else:
            from .engines.transformers import TransformersEngine

            sampled = self.model(adapter), self.tokenizer
            engine = TransformersEngine(*sampled, p.sample_batch, progress, chat.end_ids)
        limits = Limits(p.attempt_tokens, p.reflection_tokens, p.retry_tokens)
        return RolloutSampler(engine, chat, self.task, limits, p.reflection_temperature, p.retry_turn)

    def remote_engine(self):
        """The engine over vLLM servers that the profile asks for, the same for all studies; None: transformers."""
        p = self.profile
        if p.engine == "transformers":
            return None
        options, log = self.server_options, self.results / "vllm.log"
        ends = self.chat.end_ids
        return vllm_engine(self.model_path, p.servers, options, p.lora_rank, log, ends)

    @cached_property
    def server_options(self) -> str:
        """Arguments for a vLLM server of our own, see `vllm_server.server_options`."""
        from .engines.vllm_server import server_options

        return server_options(self.profile) if self.profile.own_server else ""

    def problems(self, split: str, n: int) -> list:
        """The study's problems of a split: the same for every policy and seed, read once a study."""
        if (split, n) not in self.drawn:
            self.drawn[split, n] = self.task.problems(split, n, seed=0)
        return self.drawn[split, n]

    def baseline(self, part: Part = None) -> Path:
        """Episodes of the untrained model on the test problems."""
        return self._episodes(Policy(UNTRAINED, 0, self.profile.model), None, part)

    def evaluate(self, seed: int, part: Part = None) -> Path:
        """Episodes of the policy that was trained with `seed`."""
        adapter = self.train(seed)
        return self._episodes(Policy("r3", seed, self.profile.model, adapter.name), adapter, part)

    def mine(self, part: Part = None) -> Path:
        """The untrained model's failures on training problems: the data set of the training."""
        p = self.profile

        def sample(out: Path, part: tuple[int, int]) -> None:
            problems, runner = self.problems("train", p.train_problems), self.runner()

            def mined(some: list) -> pd.DataFrame:
                failures = mine_failures(runner, some, p.mine_samples, p.mine_temperature)
                rows = [[f.problem.id, f.attempt, f.reason, f.count, f.attempt_ids] for f in failures]
                return pd.DataFrame(rows, columns=FAILURE)

            in_shards(out, problems, mined, p.shard_size, part)

        target = self.results / "failures" / f"{self.task_name}.parquet"
        config = self._config("train_problems", "mine_samples", "mine_temperature", "attempt_tokens", "shard_size")
        return self._sampled(target, config, [], sample, part)

    def failures(self) -> MinedFailures:
        """The mined failures, as training takes them."""
        problems = self.problems("train", self.profile.train_problems)
        return MinedFailures(self.mine(), problems, self.chat, self.task)

    def train(self, seed: int, on_step: Callable[[pd.DataFrame], None] | None = None) -> Path:
        """Train an adapter with R3 on the mined failures; a killed run resumes from its last checkpoint.

        `on_step` is given the metrics so far, a row a step, after each step.
        """

        def build(work: Path) -> None:
            from .trainer import metrics_file

            trainer = self.trainer(seed, work, on_step)
            trainer.resume_or_train()
            adapter = work / f"{self.task_name}-r3-{seed}"
            trainer.save_model(str(adapter))
            if trainer.is_world_process_zero():
                (adapter / "metrics.jsonl").write_text(metrics_file(trainer.args).read_text())

        target = self.results / "adapters" / f"{self.task_name}-r3-{seed}"
        config = self._config(*SAMPLING, *TRAINING, seed=seed)
        path = self._stage(target, config, [self.mine()], build)
        self._collect_metrics()
        return path

    def trainer(self, seed: int, folder: Path, on_step: Callable[[pd.DataFrame], None] | None = None) -> "R3Trainer":
        """The trainer that the profile describes; checkpoints and metrics go to `folder`."""
        from transformers import PrinterCallback

        from .trainer import AfterStep, R3Config, R3Trainer

        p = self.profile
        config = R3Config(
            output_dir=str(folder), seed=seed, learning_rate=p.learning_rate, lr_scheduler_type=p.scheduler,
            warmup_steps=p.warmup_steps, max_steps=p.steps, beta=p.beta, loss_type=p.loss_type, mask=p.mask,
            failures_per_step=p.failures_per_step, num_generations=p.group_size, temperature=p.reflection_temperature,
            retry_temperature=p.retry_temperature, max_completion_length=p.reflection_tokens,
            max_retry_length=p.retry_tokens, retry_turn=p.retry_turn, truncation_penalty=p.truncation_penalty,
            per_device_train_batch_size=p.micro_batch, sample_batch=p.sample_batch, max_grad_norm=p.max_grad_norm,
            save_steps=p.save_steps, disable_tqdm=True, chat_template_kwargs=p.chat_template_kwargs,
        )  # fmt: skip
        model, failures, engine = self.model(trainable=True), self.failures(), self.remote_engine()
        callbacks = [AfterStep(on_step)] if on_step else []
        trainer = R3Trainer(
            model, config, self.task, failures, self.lora(), self.tokenizer, engine, callbacks
        )
        trainer.remove_callback(PrinterCallback)  # metrics.jsonl has it all
        return trainer

    def lora(self) -> "LoraConfig":
        """The adapter that is trained: on all linear layers, without dropout."""
        from peft import LoraConfig

        p = self.profile
        return LoraConfig(r=p.lora_rank, lora_alpha=p.lora_alpha, lora_dropout=0.0, target_modules="all-linear",
                          task_type="CAUSAL_LM")  # fmt: skip

    def transfer(self, seed: int, other: "Study", part: Part = None) -> Path:
        """Episodes of the policy that was trained with `seed` on the `other` study's task."""
        adapter = other.train(seed)
        policy = Policy(f"r3_from_{other.task_name}", seed, self.profile.model, adapter.name)
        return self._episodes(policy, adapter, part)

    def episodes(self, others: Sequence["Study"] = ()) -> pd.DataFrame:
        """Every episode of this task under this profile's seeds; also by policies trained on the tasks of `others`."""
        return pd.concat([pd.read_parquet(path) for path in self.episode_files(others)], ignore_index=True)

    def episode_files(self, others: Sequence["Study"] = ()) -> list[Path]:
        """The files that `episodes` reads."""
        seeds = range(self.profile.seeds)
        own = [self.baseline(), *(self.evaluate(seed) for seed in seeds)]
        return own + [self.transfer(seed, other) for other in others for seed in seeds]

    def metrics(self) -> pd.DataFrame:
        """One row a training step and seed."""
        parts = [pd.read_json(self.train(seed) / "metrics.jsonl", lines=True) for seed in range(self.profile.seeds)]
        return pd.concat(parts, ignore_index=True)

    def _episodes(self, policy: Policy, adapter: Path | None, part: Part) -> Path:
        def sample(out: Path, part: tuple[int, int]) -> None:
            problems, size = self.problems("test", self.profile.test_problems), self.profile.shard_size
            run_episodes(self.runner(adapter), problems, policy, out, shard=size, say=print, part=part)

        target = self.results / "episodes" / f"{self.task_name}-{policy.name}-{policy.seed}.parquet"
        config = self._config("test_problems", "shard_size", *SAMPLING, conditions=[c.name for c in CONDITIONS])
        return self._sampled(target, config, [adapter] if adapter else [], sample, part)

    def _sampled(self, target: Path, config: dict, inputs: list[Path], sample, part: Part) -> Path:
        """A table that is sampled in shards. With `part` (i, n) only those of process i of n, into a folder for all.

        Without, the table; the shards that such processes have left are taken, and what is missing is sampled. A table
        that is there and up to date is neither sampled nor shared out again.
        """
        shards = self.results / "parts" / f"{target.stem}-{key_of(config, inputs, target)[:12]}"
        size, problems = config["shard_size"], config.get("test_problems") or config["train_problems"]
        count, made = -(-problems // size), len(list(shards.glob("shard-*.parquet")))
        if part and part[0] >= count:
            print(f"share {part[0]}/{part[1]} is empty: {problems} problems make {count} shards (shard_size={size})")
            return shards
        if part and not up_to_date(target, config, inputs):
            sample(shards, part)
            return shards
        if 0 < made < count:
            print(f"{count - made} of {count} shards are missing: sampling them here")

        def build(work: Path) -> None:
            out = shards if shards.exists() and not os.environ.get("R3_FRESH") else work / "shards"
            sample(out, (0, 1))
            read_episodes(out).to_parquet(work / target.name)

        path = self._stage(target, config, inputs, build)
        shutil.rmtree(shards, ignore_errors=True)
        return path

    def _config(self, *keys, **extra) -> dict:
        """What a stage depends on besides its input files: task, model and the named profile keys."""
        options = self.profile.task_options.get(self.task_name, {})
        same = {"task": self.task_name, "task_options": options, "code": code_of(self.task_name)}
        same["data"] = folder_hash(*self.task.files())
        same |= {"model": self.model_hash, "quantization": self.profile.quantization, "engine": self.profile.engine}
        same |= {"chat_template_kwargs": self.profile.chat_template_kwargs, "prompt_date": DATE}
        values = asdict(self.profile)
        return same | {k: values[k] for k in keys} | extra

    def _stage(self, target: Path, config: dict, inputs: list[Path], build) -> Path:
        """`stage`, asked once a study."""
        if target not in self.made:
            stage(target, config, inputs, build)
            self.made.add(target)
        return target

    def _collect_metrics(self) -> None:
        """Keep results/<profile>/metrics.jsonl equal to the logs of this profile's adapters."""
        if os.environ.get("RANK", "0") != "0":
            return
        runs = [f"{task}-r3-{seed}" for task in TASKS for seed in range(self.profile.seeds)]
        logs = [log for run in runs if (log := self.results / "adapters" / run / "metrics.jsonl").exists()]
        (self.results / "metrics.jsonl").write_text("".join(log.read_text() for log in logs))


def generation_config(model: str):
    """The generation config that transformers gives `model`, without loading the weights."""
    from transformers import AutoConfig, GenerationConfig

    with suppress(OSError):
        return GenerationConfig.from_pretrained(model)
    with reading(model):
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(model))


@cache
def vllm_engine(model: str, servers: str, options: str, rank: int, log: Path, end_ids: frozenset):
    """An engine over `servers`, or over one of our own for `model`, which ends with this process.

    Ours computes in the precision in which the trainer computes: vLLM's own choice for weights in fp32 would be lower.
    It holds the weights in it too, where `options` name no quantization: see `config.VLLM_NF4`.
    """
    from .engines.vllm import VLLMEngine
    from .engines.vllm_server import Server, interpreter

    if not servers and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise R3Error("several processes share vLLM servers: start them on GPUs of their own and give servers=ADDRESS")
    ours = ["--dtype", str(compute_dtype()).removeprefix("torch.")]
    own = [] if servers else [Server(model, interpreter(), rank, log, [*ours, *options.split()])]
    return VLLMEngine(servers.replace(",", " ").split() or own, None, end_ids=end_ids)


@cache
def code_of(task: str) -> str:
    """Hash of the sources that decide what an episode or an adapter of `task` is: a change makes them anew."""
    return folder_hash(*(path for pattern in SOURCES.format(task).split() for path in sorted(HERE.glob(pattern))))


def open_studies(profile: str, task: str = "all", results: Path | str = "results", **overrides) -> list[Study]:
    """A study for `task`, or for every task that ships with the package. `results`: relative to the repository."""
    return [Study(profile, name, results, **overrides) for name in (TASKS if task == "all" else [task])]
