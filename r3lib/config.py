"""Profiles: the settings of a run. A profile names what differs from profiles/defaults.yaml."""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from math import gcd
from numbers import Integral, Real
from pathlib import Path

import yaml

from .errors import R3Error, nearest
from .settings import FREE, HONOURED, REFUSED
from .tasks.base import RETRY_TURNS

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "r3lib" / "profiles"
DEFAULTS = yaml.safe_load((FOLDER / "defaults.yaml").read_text(encoding="utf-8"))
BLOCKS = ("sampling", "training", "lora")  # an override may leave out the name of the block
HOMES = {name: block for block in BLOCKS for name in DEFAULTS[block]}
HOMES["dynamic_sampling"] = "training"  # off by default
ELSEWHERE = {  # fields of R3Config that no profile sets
    "seed": "a study trains with the seeds 0, 1, ...: use seeds",
    "output_dir": "use name, which names the folder of results",
    "gradient_accumulation_steps": "it follows from failures_per_step: leave it out",
    "steps_per_generation": "a step of R3 is one rollout: leave it out",
    "generation_batch_size": "a step of R3 is one rollout: leave it out",
}
# vLLM has its NF4, which is double quantised as ours, from that package since version 0.28
VLLM_NF4 = 'vllm_options="--quantization bitsandbytes" with vllm-bnb-plugin installed beside vLLM'
CHOICES = {
    "mask": ("reflection", "reflection+retry", "retry"),
    "retry_turn": RETRY_TURNS,
    "loss_type": ("dr_grpo", "grpo", "dapo", "bnpo"),
    "quantization": ("none", "nf4"),
    "engine": ("transformers", "vllm"),
    "save_strategy": ("no", "steps", "epoch", "best"),  # YAML takes a bare no for false
}
COUNTS = """seeds test_problems train_problems mine_samples shard_size max_steps failures_per_step
    num_generations dynamic_sampling per_device_train_batch_size sample_batch max_attempt_length
    max_completion_length max_retry_length r""".split()
NOT_NEGATIVE = """learning_rate warmup_steps beta mine_temperature retry_temperature
    truncation_penalty""".split()
POSITIVE = ["temperature", "save_steps"]
WHY = {  # a value is out of range, where that is not plain
    "num_generations": "a group of 1 has no variance, so nothing is learned: ",
    "truncation_penalty": "it would reward being cut off: ",
    "temperature": "greedy reflections of a group are all alike, so nothing is learned: ",
}


class Loader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number too."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("+-0123456789")
)


@dataclass(frozen=True)
class Profile:
    """All settings of a run; profiles/defaults.yaml explains each.

    `R3Config(output_dir, seed=seed, **profile.sampling, **profile.training)` and
    `LoraConfig(**profile.lora)` are what is trained.
    """

    name: str
    model: str  # "base_model" is the embedded one; else a local folder or a hub id
    quantization: str
    task_options: dict
    seeds: int
    test_problems: int
    train_problems: int
    mine_samples: int
    mine_temperature: float
    shard_size: int  # problems
    engine: str
    servers: str  # addresses of vLLM servers, separated by commas
    vllm_options: str  # further arguments of a server of our own
    sampling: dict
    training: dict
    lora: dict

    @property
    def own_server(self) -> bool:
        """Whether a vLLM server is started for the run."""
        return self.engine == "vllm" and not self.servers

    @property
    def quantized_server(self) -> bool:
        """Whether `vllm_options` has the server quantize its weights."""
        words = self.vllm_options.replace("=", " ").split()
        return "--quantization" in words or "-q" in words


KINDS = {field.name: field.type for field in fields(Profile)}


def load_profile(name: str, /, **overrides) -> Profile:
    """Read the profile called `name`, or your own .yaml file, with `overrides`, values or text.

    An override is a key of the profile, of one of its blocks (`max_steps`), or both with a dot
    (`training.optim`); its text is read as YAML. R3Error: an unknown profile or key (naming the
    nearest), a value of wrong type or out of range, settings that exclude each other.
    """
    values = _read(name)
    for key, value in overrides.items():
        block, inner = _place(key)
        if isinstance(value, str) and KINDS.get(key) is not str:
            value = _parsed(value)
        _merge(values, {block: {inner: value}} if block else {key: value}, name)
    profile = Profile(**values)
    folder = profile.name
    if Path(folder).name != folder or not folder[:1].isalnum() or " " in folder:
        fix = "use letters, digits, - and _"
        raise R3Error(f"name={folder!r} cannot name a folder of results: {fix}")
    check_settings({**values, **profile.sampling, **profile.training, **profile.lora})
    training = profile.training
    accumulation_steps(
        training["failures_per_step"],
        training["num_generations"],
        training["per_device_train_batch_size"],
    )
    _check_server(profile)
    return profile


def check_settings(settings: Mapping) -> None:
    """R3Error for a setting out of range, or two that exclude each other; `settings` by name."""
    for key, known in CHOICES.items():
        if key in settings and settings[key] not in known:
            takes = ", ".join(known)
            raise R3Error(f"{key}={settings[key]!r} is not supported by R3: it takes {takes}")
    for key in (*COUNTS, *NOT_NEGATIVE, *POSITIVE):
        if key in settings:
            _check_number(key, settings[key])
    temperature, retry_temperature = settings["temperature"], settings["retry_temperature"]
    if settings["mask"] != "reflection" and retry_temperature != temperature:
        raise R3Error(
            f"mask={settings['mask']!r} trains the retry, which must then be sampled as the "
            f"reflection is: set retry_temperature={temperature} (now {retry_temperature})"
        )
    if settings["mask"] != "reflection" and settings.get("mask_truncated_completions"):
        raise R3Error(
            "mask_truncated_completions looks at the last token, which under "
            f"mask={settings['mask']!r} is the retry's: use truncation_penalty"
        )


def accumulation_steps(failures: int, group: int, batch: int, processes: int = 1) -> int:
    """Learning forwards of one process in a step, `batch` rows in each.

    It has its share of `failures` x `group` rows. R3Error unless they come out even and every
    process has whole groups.
    """
    rows, local = failures * group, batch * processes
    if rows % local or (rows // processes) % group:
        fits = gcd(rows // processes, batch)
        raise R3Error(
            f"failures_per_step x num_generations = {failures} x {group} = {rows} rows do not "
            f"divide into learning batches of {local}: change one of them, or "
            f"per_device_train_batch_size, for example to {fits}"
        )
    return rows // local


def _read(name: str) -> dict:
    """The values of a profile, over those of its `base` and the defaults."""
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file() or name == "defaults":
        known = sorted(p.stem for p in FOLDER.glob("*.yaml") if p.stem != "defaults")
        raise R3Error(f"unknown profile {name!r}: {nearest(name, known)}")
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())
        raise R3Error(f"{path} is not a profile ({why}): fix that line") from error
    if not isinstance(given, dict) or "name" not in given:
        raise R3Error(f"{path} is not a profile: its first line must be name: ...")
    base = given.pop("base", None)
    values = _read(base) if base else copy.deepcopy(DEFAULTS)
    _merge(values, given, str(path))
    return values


def _merge(values: dict, given: Mapping, where: str) -> None:
    """Put `given` into `values`; blocks, and the options of each task, key by key."""
    for key, value in given.items():
        if key not in KINDS:
            raise R3Error(f"unknown setting {key!r} in {where}: {nearest(key, KINDS)}")
        _check_kind(key, value, KINDS[key])
        if key in BLOCKS:
            _check_names(key, value, where)
            for name, setting in value.items():
                values[key][name] = _like(DEFAULTS[key].get(name), setting)
        elif key == "task_options":
            for task, options in value.items():
                _check_kind(f"task_options of {task!r}", options, dict)
                values[key][task] = values[key].get(task, {}) | options
        else:
            values[key] = _like(DEFAULTS.get(key), value)


def _place(key: str) -> tuple[str, str]:
    """Block and name of an override called `key`: ("", "seeds"), or ("training", "max_steps")."""
    block, _, name = key.rpartition(".")
    if block in BLOCKS or key in KINDS:
        return block, name
    if key in HOMES:
        return HOMES[key], key
    raise R3Error(
        f"unknown setting {key!r}: {nearest(key, [*HOMES, *KINDS])} (others of R3Config: "
        f"training.{key}=..., of LoraConfig: lora.{key}=...)"
    )


def _check_names(block: str, names: Iterable[str], where: str) -> None:
    """R3Error for a setting that `block` does not have, or that R3 refuses."""
    for name in names:
        if HOMES.get(name) == block:
            continue
        if name in HOMES or name in KINDS:
            place = HOMES.get(name, "the profile itself")
            raise R3Error(f"{block}.{name} in {where}: it is a setting of {place}: move it there")
        why = (ELSEWHERE | REFUSED).get(name)
        if block == "training" and why:
            raise R3Error(f"training.{name} in {where} is not supported: {why}")
        known = _others(block)
        if name not in known:
            hint = nearest(name, [*DEFAULTS[block], *sorted(known)])
            raise R3Error(f"{block}.{name} in {where}: no such setting: {hint}")


def _others(block: str) -> set[str]:
    """Settings of a block that are not among the defaults."""
    if block == "lora":
        from peft import LoraConfig  # seconds: only where such a setting is given

        return set(LoraConfig.__dataclass_fields__)
    return HONOURED | FREE if block == "training" else set()


def _check_kind(key: str, value, kind: type) -> None:
    """R3Error unless a `value` that must be text or a mapping is; `check_settings` has the rest."""
    wanted = {str: "text", dict: "a mapping"}
    if kind in wanted and not isinstance(value, kind):
        raise R3Error(f"{key}={value!r} is not {wanted[kind]}: write {wanted[kind]}")


def _like(default, value):
    """`value`, as a float where the default is one: 1 and 1.0 are the same setting."""
    return float(value) if type(value) is int and type(default) is float else value


def _check_number(key: str, value) -> None:
    """R3Error unless `value` is a number in the range of the setting `key`."""
    number = isinstance(value, Integral if key in COUNTS else Real) and not isinstance(value, bool)
    if key in POSITIVE:
        wanted, fits = "a number above 0", number and value > 0
    elif key in NOT_NEGATIVE:
        wanted, fits = "a number, 0 or more", number and value >= 0
    else:
        least = 2 if key == "num_generations" else 1
        wanted, fits = f"a whole number, {least} or more", number and value >= least
    if not fits:
        raise R3Error(f"{key}={value!r} is out of range: {WHY.get(key, '')}use {wanted}")


def _parsed(text: str):
    """What YAML makes of `text`."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError:
        return text


def _check_server(profile: Profile) -> None:
    """R3Error for vLLM settings that nobody would read, or a server that has other weights."""
    for key in ("servers", "vllm_options"):
        given = getattr(profile, key)
        if given and profile.engine != "vllm":
            raise R3Error(f"{key}={given!r} is for engine=vllm: set engine=vllm, or leave it out")
    if profile.servers and profile.vllm_options:
        raise R3Error(
            f"vllm_options={profile.vllm_options!r} are for a server of our own: start those of "
            "servers= with them, and leave vllm_options out"
        )
    unpacked = profile.own_server and not profile.quantized_server
    if unpacked and profile.quantization == "nf4":
        raise R3Error(
            "engine=vllm would sample from unquantised weights while quantization=nf4 trains on "
            f"4 bits: set quantization=none, or {VLLM_NF4}"
        )
