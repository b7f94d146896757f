"""Profiles: the settings of a run. A profile names what differs from profiles/defaults.yaml."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from math import gcd
from pathlib import Path

import yaml

from .errors import R3Error
from .tasks.base import RETRY_TURNS

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "r3lib" / "profiles"
DEFAULTS = yaml.safe_load((FOLDER / "defaults.yaml").read_text(encoding="utf-8"))
BLOCKS = ("sampling", "training", "lora")  # an override may leave out the name of the block
# vLLM has its NF4, which is double quantised as ours, from that package since version 0.28
VLLM_NF4 = 'vllm_options="--quantization bitsandbytes" with vllm-bnb-plugin installed beside vLLM'
CHOICES = {
    "mask": ("reflection", "reflection+retry", "retry"),
    "retry_turn": RETRY_TURNS,
    "loss_type": ("dr_grpo", "grpo", "dapo", "bnpo"),
    "quantization": ("none", "nf4"),
    "engine": ("transformers", "vllm"),
}
LEAST = {  # and why
    "num_generations": (2, "a group of 1 has no variance, so nothing is learned: use 2 or more"),
    "truncation_penalty": (0, "it would reward being cut off: use 0 or more"),
    **dict.fromkeys(["seeds", "shard_size", "max_steps", "mine_samples"], (1, "use 1 or more")),
    **dict.fromkeys(["test_problems", "train_problems"], (1, "use 1 or more")),
}


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


def load_profile(name: str, /, **overrides) -> Profile:
    """Read the profile called `name`, or your own .yaml file, with `overrides`, values or text.

    An override is a key of the profile, of one of its blocks (`max_steps`), or both with a dot
    (`training.optim`). R3Error: an unknown profile or key (naming the nearest), a value of wrong
    type or out of range, settings that exclude each other.
    """
    values = _read(name)
    for key, value in overrides.items():
        block, _, inner = _place(key).rpartition(".")
        _merge(values, {block: {inner: value}} if block else {inner: value}, name)
    if not isinstance(values.get("name"), str) or not _names_a_folder(values["name"]):
        given = values.get("name")
        raise R3Error(
            f"name={given!r} cannot name a folder of results: use letters, digits, - and _"
        )
    profile = Profile(**values)
    check_settings({**values, **profile.sampling, **profile.training})
    training = profile.training
    accumulation_steps(
        training["failures_per_step"],
        training["num_generations"],
        training["per_device_train_batch_size"],
    )
    _check_server(profile)
    return profile


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for an unknown `word`: the known one that looks most like it, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(str(word), known, 1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def check_settings(settings: Mapping) -> None:
    """R3Error for a setting out of range, or two that exclude each other; `settings` by name."""
    for key, known in CHOICES.items():
        if key in settings and settings[key] not in known:
            raise R3Error(f"{key}={settings[key]!r} is unknown: {nearest(settings[key], known)}")
    for key, (least, why) in LEAST.items():
        if key in settings and settings[key] < least:
            raise R3Error(f"{key}={settings[key]} is out of range: {why}")
    temperature, retry_temperature = settings["temperature"], settings["retry_temperature"]
    if not temperature > 0:
        raise R3Error(
            f"temperature={temperature}: greedy reflections of a group are all alike, so nothing "
            "is learned: use 1.0"
        )
    if settings["mask"] != "reflection" and retry_temperature != temperature:
        raise R3Error(
            f"mask={settings['mask']!r} trains the retry, which must then be sampled as the "
            f"reflection is: set retry_temperature={temperature} (now {retry_temperature})"
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
        known = [p.stem for p in FOLDER.glob("*.yaml") if p.stem != "defaults"]
        raise R3Error(f"unknown profile {name!r}: {nearest(name, known)}")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())
        raise R3Error(f"{path} is not a profile ({why}): fix that line") from error
    if not isinstance(given, dict) or "name" not in given:
        raise R3Error(f"{path} is not a profile: its first line must be name: ...")
    base = given.pop("base", None)
    values = _read(base) if base else yaml.safe_load(yaml.safe_dump(DEFAULTS))
    _merge(values, given, str(path))
    return values


def _merge(values: dict, given: Mapping, where: str) -> None:
    """Put `given` into `values`, whose types it must have; blocks and task options key by key."""
    known = {field.name for field in fields(Profile)}
    for key, value in given.items():
        if key not in known:
            raise R3Error(f"unknown setting {key!r} in {where}: {nearest(key, known)}")
        value = _typed(key, value, DEFAULTS.get(key, ""))
        if key in BLOCKS:
            typed = {k: _typed(k, v, DEFAULTS[key].get(k)) for k, v in value.items()}
            values[key] = values[key] | typed
        elif key == "task_options":
            values[key] = values[key] | value
        else:
            values[key] = value


def _place(key: str) -> str:
    """Where an override called `key` goes: "seeds", or "training.max_steps"."""
    block, _, inner = key.rpartition(".")
    if block in ("sampling", "lora") and inner not in DEFAULTS[block]:
        raise R3Error(f"{key}: no such setting: {nearest(inner, DEFAULTS[block])}")
    if block in BLOCKS or key in {field.name for field in fields(Profile)}:
        return key
    homes = {inner: block for block in BLOCKS for inner in DEFAULTS[block]}
    if key in homes:
        return f"{homes[key]}.{key}"
    known = [*homes, *(field.name for field in fields(Profile))]
    raise R3Error(
        f"unknown setting {key!r}: {nearest(key, known)} (others of R3Config: training.{key}=...)"
    )


def _typed(key: str, value, default):
    """`value`, which may be text as typed, in the type of `default` (None: any)."""
    wanted = {int: "a whole number", float: "a number", dict: "a mapping", str: "text"}
    kind = type(default)
    if isinstance(value, str) and kind is not str:
        value = _parsed(value)
    if kind is float and type(value) is int:
        value = float(value)
    if default is not None and (isinstance(value, bool) or not isinstance(value, kind)):
        raise R3Error(f"{key}={value!r} is not {wanted[kind]}: write {wanted[kind]}")
    return value


def _parsed(text: str):
    """What YAML makes of `text`; 1e-5 too is a number."""
    try:
        return float(text) if "e" in text.lower() else yaml.safe_load(text)
    except ValueError:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _names_a_folder(name: str) -> bool:
    return Path(name).name == name and name[:1].isalnum() and " " not in name


def _check_server(profile: Profile) -> None:
    """R3Error where a vLLM server of our own would sample from other weights than are trained."""
    unpacked = profile.own_server and not profile.quantized_server
    if unpacked and profile.quantization == "nf4":
        raise R3Error(
            "engine=vllm would sample from unquantised weights while quantization=nf4 trains on "
            f"4 bits: set quantization=none, or {VLLM_NF4}"
        )
