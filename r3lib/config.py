"""Profiles: every setting of a run, read from YAML, overridden by name, and checked."""

import difflib
from contextlib import suppress
from dataclasses import dataclass, fields
from math import gcd
from pathlib import Path

import yaml

from .errors import R3Error
from .tasks import TASKS
from .tasks.base import RETRY_TURNS

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "r3lib" / "profiles"


@dataclass(frozen=True)
class Profile:
    """All settings of a run; profiles/nano.yaml explains each. `dataclasses.asdict` of it is plain JSON."""

    name: str
    model: str  # "base_model" is the embedded one; else a local folder or a hub id
    task_options: dict
    chat_template_kwargs: dict  # arguments for the model's chat template
    seeds: int
    test_problems: int
    train_problems: int
    mine_samples: int
    mine_temperature: float
    attempt_tokens: int
    reflection_tokens: int
    retry_tokens: int
    steps: int
    failures_per_step: int
    group_size: int
    learning_rate: float
    warmup_steps: int | float  # a number of steps, or a share of them below 1
    scheduler: str
    quantization: str
    lora_rank: int
    lora_alpha: int
    beta: float
    loss_type: str
    mask: str
    reflection_temperature: float
    retry_temperature: float
    retry_turn: str
    truncation_penalty: float
    max_grad_norm: float
    micro_batch: int
    save_steps: int
    sample_batch: int
    shard_size: int  # problems
    engine: str
    servers: str  # addresses of vLLM servers, separated by commas
    vllm_options: str  # further arguments of a server of our own
    threads: int

    @property
    def own_server(self) -> bool:
        """Whether a vLLM server is started for the run."""
        return self.engine == "vllm" and not self.servers

    def vllm_option(self, *names: str) -> str | None:
        """What `vllm_options` gives for an option, under any of its `names`; None where it does not name it."""
        words = self.vllm_options.replace("=", " ").split()
        words = [word.replace("_", "-") if word.startswith("--") else word for word in words]  # vLLM takes both
        given = dict(zip(words, [*words[1:], ""]))
        return next((given[name] for name in names if name in given), None)


# vLLM has its NF4, which is double quantised as ours, from that package since version 0.28
VLLM_NF4 = 'vllm_options="--quantization bitsandbytes" with vllm-bnb-plugin installed beside vLLM'
KINDS = {field.name: field.type for field in fields(Profile)}
READERS = {kind: kind for kind in (int, float, str)} | {dict: yaml.safe_load}
READERS[int | float] = lambda text: int(text) if text.isdigit() else float(text)
CHOICES = {
    "scheduler": ("constant_with_warmup", "constant", "linear", "cosine"),
    "loss_type": ("dr_grpo", "grpo", "dapo", "bnpo"),
    "mask": ("reflection", "reflection+retry", "retry"),
    "retry_turn": RETRY_TURNS,
    "quantization": ("none", "nf4"),
    "engine": ("transformers", "vllm"),
}
FROM_ZERO = {"mine_temperature", "retry_temperature", "warmup_steps", "beta", "threads"}
FROM_ZERO |= {"truncation_penalty"}
ABOVE_ZERO = {"learning_rate", "max_grad_norm", "reflection_temperature"}  # others: from 1
WHY = {
    "group_size": "a group of 1 has no variance, so nothing is learned: use 2 or more, for example 8",
    "reflection_temperature": "greedy reflections of a group are all alike, so nothing is learned: use 1.0",
    "learning_rate": "use a value between 0 and 1, for example 0.002",
    "warmup_steps": "use whole steps, or a share of the steps below 1",
}


def load_profile(name: str, /, **overrides) -> Profile:
    """Read the profile called `name`, or your own .yaml file, with `overrides` (values, or text as typed).

    Raises R3Error for an unknown profile or key (naming the nearest) and for a value of wrong type or range.
    """
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise R3Error(f"unknown profile {name!r}: {nearest(name, (p.stem for p in FOLDER.glob('*.yaml')))}")
    try:
        values = {**yaml.safe_load(path.read_text(encoding="utf-8")), **overrides}
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise R3Error(f"{path} is not a profile ({' '.join(str(error).split())}): mend that line") from error
    if unknown := [key for key in values if key not in KINDS]:
        raise R3Error(f"unknown profile key {unknown[0]!r}: {nearest(unknown[0], KINDS)}")
    if absent := [key for key in KINDS if key not in values]:
        raise R3Error(f"{path} lacks {', '.join(absent)}: copy the missing lines from profiles/nano.yaml")
    return _agreeing(Profile(**{key: _checked(key, _typed(key, values[key])) for key in KINDS}))


def nearest(word: str, known) -> str:
    """A hint for an unknown `word`: the known one that looks most like it, or all of them."""
    near = difflib.get_close_matches(str(word), known := sorted(known), 1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def accumulation_steps(failures: int, group: int, batch: int, processes: int = 1) -> int:
    """Learning forwards of one process in a step: its share of `failures` x `group` rows, `batch` rows in each.

    Raises R3Error unless they come out even and every process has whole groups.
    """
    rows, local = failures * group, batch * processes
    if rows % local or (rows // processes) % group:
        fits = gcd(rows // processes, batch)
        raise R3Error(
            f"failures_per_step x group_size (num_generations) = {failures} x {group} = {rows} rows do not divide "
            f"into learning batches of {local}: change one of them, or micro_batch (per_device_train_batch_size), "
            f"for example to {fits}"
        )
    return rows // local


def _agreeing(profile: Profile) -> Profile:
    """`profile`, unless two of its settings exclude each other, which training would say only after mining."""
    p = profile
    accumulation_steps(p.failures_per_step, p.group_size, p.micro_batch)
    if p.mask != "reflection" and p.retry_temperature != p.reflection_temperature:
        why = f"mask={p.mask!r} trains the retry, which must then be sampled as the reflection is"
        raise R3Error(f"{why}: set retry_temperature={p.reflection_temperature} (now {p.retry_temperature})")
    if profile.own_server and profile.quantization == "nf4" and profile.vllm_option("--quantization", "-q") is None:
        why = "engine=vllm would sample from unquantised weights while quantization=nf4 trains on 4 bits"
        raise R3Error(f"{why}: set quantization=none, or {VLLM_NF4}")
    return profile


def _checked(key: str, value):
    if key == "name" and (Path(value).name != value or not value[:1].isalnum()):
        raise R3Error(f"name={value!r} cannot name a folder of results: use letters, digits, - and _")
    if key in CHOICES and value not in CHOICES[key]:
        raise R3Error(f"{key}={value!r} is unknown: {nearest(value, CHOICES[key])}")
    if key == "task_options" and (odd := [k for k, v in value.items() if k not in TASKS or not isinstance(v, dict)]):
        raise R3Error(f"task_options of {odd[0]!r}: write {{option: value}} of a task; {nearest(odd[0], TASKS)}")
    if KINDS[key] in (str, dict):
        return value
    least = 0 if key in FROM_ZERO | ABOVE_ZERO else 2 if key == "group_size" else 1
    bound = "a value above 0" if key in ABOVE_ZERO else f"{least} or more"
    odd = {"learning_rate": value >= 1, "warmup_steps": value > 1 and value % 1}.get(key, False)
    if odd or not least <= value < float("inf") or (key in ABOVE_ZERO and value == 0):
        raise R3Error(f"{key}={value} is out of range: {WHY.get(key, f'use {bound}')}")
    return value


def _typed(key: str, value):
    kind = KINDS[key]
    with suppress(ValueError, yaml.YAMLError):
        value = READERS[kind](value) if isinstance(value, str) else value
    value = float(value) if kind is float and type(value) is int else value
    if isinstance(value, bool) or not isinstance(value, kind):
        wanted = {int: "a whole number", dict: "a mapping", str: "text"}.get(kind, "a number")
        raise R3Error(f"{key}={value!r} is not {wanted}: write {wanted}, as profiles/nano.yaml does")
    return value
