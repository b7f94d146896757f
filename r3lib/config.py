"""Profiles: the settings of a run. A profile names what differs from profiles/defaults.yaml."""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from math import inf, isfinite
from numbers import Integral, Real
from pathlib import Path

import yaml

from .errors import R3Error, nearest
from .settings import FREE, HONOURED, REFUSED
from .tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "r3lib" / "profiles"
DEFAULTS = yaml.safe_load((FOLDER / "defaults.yaml").read_text(encoding="utf-8"))
BLOCKS = ("sampling", "training", "lora")  # an override may leave out the name of the block
HOMES = {name: block for block in BLOCKS for name in DEFAULTS[block]}
HOMES["dynamic_sampling"] = "training"  # off by default
CHOICES = {
    "mask": ("reflection", "reflection+retry", "retry"),
    "loss_type": ("dr_grpo", "grpo", "dapo"),
    "quantization": ("none", "nf4"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "engine": ("transformers", "vllm"),
    "scale_rewards": ("group", "batch", "none", True, False),
    "importance_sampling_level": ("token", "sequence"),
    "vllm_importance_sampling_mode": (
        "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ),
    "save_strategy": ("steps", "no"),  # the whole training is one epoch
}  # fmt: skip
FLAT = DEFAULTS | DEFAULTS["sampling"] | DEFAULTS["training"] | DEFAULTS["lora"]
NUMBERS = {name: type(value) for name, value in FLAT.items() if type(value) in (int, float)}
NUMBERS |= {"dynamic_sampling": int, "save_steps": float}  # which may be a share of the steps
NUMBERS |= {"top_entropy_quantile": float}
LEAST = {"num_generations": 2, "temperature": 0.01}  # equal reflections teach nothing
LEAST |= {"save_steps": 0.001}
OF_STUDY = {"seed": "it trains with seeds 0, 1, ...: use seeds", "output_dir": "use name"}
MOST = {"top_entropy_quantile": 1}


class Loader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number too, and no key may stand twice in a mapping."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands there twice")
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("+-0123456789")
)


@dataclass(frozen=True)
class Profile:
    """All settings of a run; profiles/defaults.yaml explains each.

    `R3Config(output_dir, seed=seed, **study.settings())` and `LoraConfig(**profile.lora)` are what
    is trained.
    """

    name: str
    model: str  # "base_model" is the embedded one; else a local folder or a hub id
    quantization: str
    dtype: str  # of frozen weights
    task: str  # that a run without a task is of; "all": every one that ships with the package
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

    def tasks(self, task: str = "all") -> list[str]:
        """The tasks that `task` stands for: "all" those of the profile. R3Error: an unknown one."""
        task = self.task if task == "all" else task
        if task != "all" and task not in TASKS and ":" not in task:
            known = nearest(task, ["all", *TASKS])
            raise R3Error(f"unknown task {task!r}: {known}, or your own as file.py:Class")
        return list(TASKS) if task == "all" else [task]

    @property
    def own_server(self) -> bool:
        """Whether a vLLM server is started for the run."""
        return self.engine == "vllm" and not self.servers

    @property
    def quantized_server(self) -> bool:
        """Whether `vllm_options` has the server quantize its weights."""
        return "--quantization" in self.vllm_options


KINDS = {field.name: field.type for field in fields(Profile)}


def load_profile(name: str, /, **overrides) -> Profile:
    """Read the profile called `name`, or your own .yaml file, with `overrides`, values or text.

    An override is a key of the profile, of one of its blocks (`max_steps`), or both with a dot
    (`training.optim`); its text is read as YAML. R3Error: an unknown profile or key (naming the
    nearest), a value of wrong type or out of range, settings that exclude each other.
    """
    values = _read(name)
    for key, value in _with_dtype(overrides, values).items():
        block, inner = _place(key)
        if isinstance(value, str) and KINDS.get(key) is not str:
            value = _parsed(value, f"{key}={value}")
        _merge(values, {block: {inner: value}} if block else {key: value}, name)
    profile = Profile(**values)
    if not re.fullmatch(r"\w[\w.-]*", profile.name):
        raise R3Error(f"name={profile.name!r} names a folder: use letters, digits, - and _")
    training = profile.training
    check_settings({**values, **profile.sampling, **training, **profile.lora})
    rows = ("failures_per_step", "num_generations", "per_device_train_batch_size")
    accumulation_steps(*[training[key] for key in rows])
    _check_server(profile)
    return profile


def check_settings(settings: Mapping) -> None:
    """R3Error for a setting out of range, or two that exclude each other; `settings` by name."""
    for key, known in CHOICES.items():
        if settings.get(key, known[0]) not in known:
            takes = ", ".join(map(str, known))
            raise R3Error(f"{key}={settings[key]!r} is not supported by R3: it takes {takes}")
    for key in NUMBERS:
        if key in settings:
            _check_number(key, settings[key])
    if settings["mine_samples"] > 1 and not settings["mine_temperature"]:
        raise R3Error(
            f"mine_samples={settings['mine_samples']} greedy answers to a problem are the same "
            "answer: set mine_temperature, 1.0 say, or mine_samples=1"
        )
    if settings["mask"] == "reflection":
        return
    if settings["retry_temperature"] != settings["temperature"]:
        raise R3Error(
            f"mask={settings['mask']!r} trains the retry, which must then be sampled as the "
            f"reflection is: set retry_temperature={settings['temperature']}"
        )
    if settings.get("mask_truncated_completions"):
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
    if rows % local or failures % processes:
        raise R3Error(
            f"failures_per_step x num_generations = {failures} x {group} = {rows} rows do not "
            f"divide into learning batches of {local}: change one of them, or "
            "per_device_train_batch_size"
        )
    return rows // local


def _read(name: str, over: tuple[Path, ...] = ()) -> dict:
    """The values of a profile, over those of its `base` and the defaults; a base of `over`."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file() or name == "defaults":
        known = sorted(p.stem for p in FOLDER.glob("*.yaml") if p.stem != "defaults")
        raise R3Error(f"unknown profile {name!r}: {nearest(name, known)}")
    if path in over:
        raise R3Error(f"{path} is a base of itself: name another base in {over[-1]}")
    try:
        given = _parsed(path.read_text(encoding="utf-8"), path)
    except UnicodeDecodeError as error:
        raise R3Error(f"{path} is not UTF-8: save it as that") from error
    if not isinstance(given, dict) or "name" not in given:
        raise R3Error(f"{path} is not a profile: its first line must be name: ...")
    base = given.pop("base", None)
    values = _read(base, (*over, path)) if base else copy.deepcopy(DEFAULTS)
    _merge(values, _with_dtype(given, values), str(path))
    return values


def _with_dtype(given: Mapping, values: Mapping) -> dict:
    """`given`, with the default dtype where it replaces the embedded model without naming one."""
    another = values["model"] == "base_model" != given.get("model", "base_model")
    return {"dtype": DEFAULTS["dtype"], **given} if another else dict(given)


def _merge(values: dict, given: Mapping, where: str) -> None:
    """Put `given` into `values`; blocks, and the options of each task, key by key."""
    for key, value in given.items():
        if key not in KINDS:
            raise R3Error(f"unknown setting {key!r} in {where}: {nearest(key, KINDS)}")
        _check_kind(key, value, KINDS[key])
        if key in BLOCKS:
            _check_names(key, value, where)
            values[key] |= {name: _number(name, setting) for name, setting in value.items()}
        elif key == "task_options":
            for task, options in value.items():
                _check_kind(f"task_options of {task!r}", options, dict)
                values[key][task] = values[key].get(task, {}) | options
        else:
            values[key] = _number(key, value)


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
    known = {name for name, home in HOMES.items() if home == block}
    further = set(names) - known
    if further and block == "training":
        known |= (HONOURED | FREE) - HOMES.keys() - OF_STUDY.keys()
    elif further and block == "lora":
        from peft import LoraConfig  # seconds: only where such a setting is given

        known |= LoraConfig.__dataclass_fields__.keys()
    for name in further - known:
        why = nearest(name, sorted(known))
        if block == "training":
            why = (REFUSED | OF_STUDY).get(name, why)
        raise R3Error(f"{block}.{name} in {where} is not supported: {why}")


def _check_kind(key: str, value, kind: type) -> None:
    """R3Error unless a `value` that must be text or a mapping is; `check_settings` has the rest."""
    wanted = {str: "text", dict: "a mapping"}
    if kind in wanted and not isinstance(value, kind):
        raise R3Error(f"{key}={value!r} is not {wanted[kind]}: write {wanted[kind]}")


def _number(key: str, value):
    """`value`, as a float where `key` takes one: 1 and 1.0 are the same setting."""
    return float(value) if type(value) is int and NUMBERS.get(key) is float else value


def _check_number(key: str, value) -> None:
    """R3Error unless `value` is a number in the range of the setting `key`."""
    whole = NUMBERS[key] is int
    least = LEAST.get(key, int(whole))
    number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if not (number and isfinite(value) and least <= value <= MOST.get(key, inf)):
        kind = "a whole number" if whole else "a number"
        fit = f"from {least} to {MOST[key]}" if key in MOST else f"{least} or more"
        raise R3Error(f"{key}={value!r} is out of range: use {kind}, {fit}")


def _parsed(text: str, where):
    """What YAML makes of `text`, which stands at `where`."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        why = " ".join(str(error).split())
        raise R3Error(f"{where} is not YAML ({why}): fix it there") from error


def _check_server(profile: Profile) -> None:
    """R3Error for vLLM settings that nobody would read, or a server that has other weights."""
    if profile.servers and profile.engine != "vllm":
        raise R3Error(f"servers={profile.servers!r} is for engine=vllm: set that, or leave it out")
    if profile.vllm_options and not profile.own_server:
        raise R3Error(
            f"vllm_options={profile.vllm_options!r} are for a server of our own: set engine=vllm "
            "without servers, or leave them out"
        )
    if profile.own_server and profile.quantization == "nf4" and not profile.quantized_server:
        raise R3Error(
            "engine=vllm would sample from unquantised weights while quantization=nf4 trains on "
            '4 bits: set quantization=none, or vllm_options="--quantization bitsandbytes" with '
            "vllm-bnb-plugin installed beside vLLM"
        )
