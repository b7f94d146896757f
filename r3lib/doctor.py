"""What can be checked before a run: each check, with a suggested fix.

`r3 doctor` runs all of CHECKS, `r3 reproduce` those that can stop it or have it warn. A check
returns what it found, or raises `Doubt` for what may go wrong and R3Error for what surely will.
"""

import os
import sys
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from packaging.requirements import Requirement

from . import preflight
from .colab import KEPT, version
from .config import HOMES, ROOT, Profile, load_profile
from .errors import R3Error
from .provenance import TCMALLOC, reaches_hub
from .settings import CONSTANT
from .tasks import TASKS, drawn, load_task
from .weights import bf16_gain, folder_of, missing

# of the profile as it is, but for the number of seeds, measured on two cores
TIMES = {"smoke": "90 seconds", "nano": "15 minutes a seed"}
TIMES["smol"] = "three quarters of an hour a task and seed"  # with a folder of its start
TIMES["qwen"] = "an hour and a half for one seed, an hour for each further one"  # from its parts
WITHOUT_AMX = {"qwen": "three and a half hours for one seed, three for each further one"}
AMX = 4  # with it bf16 products are over 4 times as fast as fp32, with AVX512-BF16 alone 2.7


class Doubt(R3Error):
    """What may go wrong, or is only slow: no reason to stop."""


@dataclass(frozen=True)
class Run:
    """What is about to run: `tasks` under `profile`, here or on a GPU of `gpu_memory` GiB."""

    profile: Profile
    tasks: Iterable[str] = tuple(TASKS)
    gpu_memory: float | None = None


def report(profile="nano", task="all", overrides=None, gpu_memory=None, log=print) -> int:
    """Log a line for each check; return 1 if one fails, else 0."""
    profile = load_profile(profile, **(overrides or {}))
    run = Run(profile, profile.tasks(task), gpu_memory)
    failed = False
    for check in CHECKS:
        state, text = outcome(check, run)
        log(f"{state:4}  {check.__name__:8}  {text}")
        failed |= state == "fail"
    return int(failed)


def check_run(run: Run) -> None:
    """Raise R3Error if a check fails, warn on stderr of what is only doubtful; see CHECKS."""
    for check in CHECKS:
        if check in (gpu, time):  # one loads torch, both stop nothing
            continue
        state, text = outcome(check, run)
        if state == "fail":
            raise R3Error(text)
        if state == "warn":
            print(f"r3: warning: {text}", file=sys.stderr)


def outcome(check: Callable[[Run], str], run: Run) -> tuple[str, str]:
    """("ok", "warn" or "fail", what was found and the fix)."""
    try:
        return "ok", check(run)
    except Doubt as doubt:
        return "warn", str(doubt)
    except R3Error as error:
        return "fail", str(error)


def packages(run: Run) -> str:
    """Whether the packages are there, in the pinned versions; Colab keeps some of its own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    absent, others = [], []
    for wanted in map(Requirement, project["dependencies"]):
        here = version(wanted.name)
        if wanted.name in KEPT and "COLAB_RELEASE_TAG" in os.environ:
            continue
        if here is None:
            absent.append(str(wanted))
        elif not wanted.specifier.contains(here, prereleases=True):
            others.append(f"{wanted.name} {here} (tested: {wanted.specifier})")
    if absent:
        raise R3Error(f"missing {', '.join(absent)}: run `pip install -e .`")
    if others:
        raise Doubt(f"other versions than tested, {', '.join(others)}: run `pip install -e .`")
    return "as pinned"


def gpu(run: Run) -> str:
    """Whether torch finds a GPU, which matters for larger models."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if run.profile.model != "base_model":
        gain = f"bf16 products are {bf16_gain():.1f} times as fast as fp32 on this CPU"
        raise Doubt(f"none found by torch, so this model will be slow: use a GPU ({gain})")
    return "none, which this model does not need"


def model(run: Run) -> str:
    """Whether the profile's model is there, or the hub has it."""
    name = run.profile.model
    why = missing(name)
    if why:
        raise R3Error(f"model {name!r} has {why}")
    preflight.config_file(name)
    return name


def problems(run: Run) -> str:
    """Whether each task takes its options and has enough problems; downloads those of the hub."""
    wanted = {"train": run.profile.train_problems, "test": run.profile.test_problems}
    for name in run.tasks:
        task = load_task(name, run.profile.task_options)
        if getattr(task, "source", "") == "hub" and not reaches_hub():
            why = "the hub does not answer, its data must be in the hub's cache: go online"
            raise Doubt(f"{name}: {why}")
        for split, count in wanted.items():
            drawn(task, split, count)
    own, limits = run.profile.task, run.profile.sampling
    if own not in ("all", *run.tasks):
        tokens = ", ".join(f"{key}={limits[key]}" for key in limits if key.endswith("_length"))
        raise Doubt(f"this profile is of {own}: are {tokens} enough for {', '.join(run.tasks)}?")
    return ", ".join(run.tasks)


def training(run: Run) -> str:
    """Whether TRL takes the training's settings, and their tracker is installed.

    TRL is imported, which takes seconds, only where there are settings beyond those of ours.
    """
    given = run.profile.training
    ours = given.keys() <= HOMES.keys() and given["report_to"] == "none"
    if ours and given["lr_scheduler_type"] in ("cosine", *CONSTANT):
        return "settings of ours alone"
    from transformers.integrations import get_reporting_integration_callbacks

    from .r3_config import R3Config

    try:
        config = R3Config("unused", **run.profile.sampling, **given)
        for tracker in get_reporting_integration_callbacks(config.report_to):
            tracker()
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise R3Error(f"the training's settings are refused: {error}") from error
    return "settings as TRL takes them"


def memory(run: Run) -> str:
    """Whether the estimated memory is there, see `preflight`."""
    try:
        fits, text = preflight.estimate(run.profile, run.gpu_memory)
    except R3Error as error:  # nothing to estimate with
        raise Doubt(str(error)) from error
    if not fits:
        raise Doubt(f"memory may be short, {text}: {preflight.FIX}")
    return text


def time(run: Run) -> str:
    """How long the run takes, where that was measured."""
    name = run.profile.name
    took = "not measured for this profile with these settings"
    known = name in TIMES and set(run.tasks) <= set(run.profile.tasks())
    folder = folder_of(run.profile.model)
    started = name == "smol" and folder and (folder / "warm_start.json").is_file()
    same = {"seeds": run.profile.seeds} | ({"model": run.profile.model} if started else {})
    if known and run.profile == load_profile(name, **same):
        slower = name in WITHOUT_AMX and bf16_gain() < AMX
        took = f"about {WITHOUT_AMX[name] if slower else TIMES[name]} on two cores"
    faster = "" if TCMALLOC else "; 10 to 20% less on a CPU with libtcmalloc-minimal4 installed"
    return f"{took} ({os.cpu_count()} here){faster}"


CHECKS = (packages, gpu, model, problems, training, memory, time)
