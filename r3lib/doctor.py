"""What can be checked before a run: each check, with a suggested fix.

`r3 doctor` runs all of CHECKS. `r3 reproduce` runs those in BEFORE_A_RUN: it stops at a model or
problems that are not there, and warns of the rest. A check returns what it found, or raises `Doubt`
for what may go wrong and R3Error for what surely will.
"""

import os
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from . import preflight
from .colab import KEPT, on_colab
from .config import ROOT, Profile, load_profile, nearest
from .errors import R3Error
from .provenance import GIB, INSTALLED, TCMALLOC, reaches_hub
from .tasks import TASKS, Task, load_task
from .weights import missing

VALIDATION = 32  # problems of the tour
HAS_VLLM = "import importlib.util, sys; sys.exit(not importlib.util.find_spec('vllm'))"
TIMES = {  # measured on two cores, unless settings change
    "smoke": "about 90 seconds",
    "nano": "about 20 minutes for both tasks and one seed",
    "smol": "about two hours a task",
}


class Doubt(R3Error):
    """What may go wrong, or is only slow: no reason to stop."""


@dataclass(frozen=True)
class Run:
    """What is about to run: `tasks` under `profile`, here or on a GPU of `gpu_memory` GiB."""

    profile: Profile
    tasks: Iterable[str] = tuple(TASKS)
    gpu_memory: float | None = None


def report(profile="nano", log=print, gpu_memory=None, overrides=None, task="all") -> int:
    """Log a line for each check; return 1 if one fails, else 0."""
    run = Run(load_profile(profile, **(overrides or {})), tasks_of(task), gpu_memory)
    failed = False
    for check in CHECKS:
        state, text = outcome(check, run)
        log(f"{state:4}  {check.__name__:8}  {text}")
        failed |= state == "fail"
    return int(failed)


def check_run(run: Run) -> None:
    """Raise R3Error if model or problems are not there; warn on stderr of all else."""
    for check in BEFORE_A_RUN:
        warn(check, run, stop_at=(model, problems))


def warn(check: Callable[[Run], str], run: Run, stop_at: tuple = ()) -> None:
    """Warn on stderr unless `check` passes; R3Error if it fails and is one of `stop_at`."""
    state, text = outcome(check, run)
    if state == "fail" and check in stop_at:
        raise R3Error(text)
    if state != "ok":
        print(f"r3: warning: {text}", file=sys.stderr)


def outcome(check: Callable[[Run], str], run: Run) -> tuple[str, str]:
    """("ok", "warn" or "fail", what was found and the fix)."""
    try:
        return "ok", check(run)
    except Doubt as doubt:
        return "warn", str(doubt)
    except R3Error as error:
        return "fail", str(error)


def tasks_of(task: str) -> list[str]:
    """The tasks that "all" or a task's name stands for. R3Error for an unknown name."""
    if task != "all" and task not in TASKS and ":" not in task:
        raise R3Error(f"unknown task {task!r}: {nearest(task, ['all', *TASKS])}")
    return list(TASKS) if task == "all" else [task]


def python(run: Run) -> str:
    """Whether this Python is a supported one."""
    version = platform.python_version()
    wanted = Requirement(f"python{project()['requires-python']}").specifier
    if not wanted.contains(version):
        raise R3Error(f"{version}: install Python {wanted}")
    return version


def packages(run: Run) -> str:
    """Whether the packages are there, in the pinned versions; Colab keeps some of its own."""
    lines, fix = project()["dependencies"], "run `pip install -e .`"
    if run.profile.quantization == "nf4":
        lines = lines + project()["optional-dependencies"]["gpu"]
        fix = "run `pip install -e '.[gpu]'`"
    wanted = {canonicalize_name(r.name): r for r in map(Requirement, lines)}
    if on_colab():
        wanted = {name: r for name, r in wanted.items() if name not in KEPT}
    if absent := [str(r) for name, r in wanted.items() if name not in INSTALLED]:
        raise R3Error(f"missing {', '.join(absent)}: {fix}")
    others = [
        f"{name} {INSTALLED[name]} (tested: {r.specifier})"
        for name, r in wanted.items()
        if not r.specifier.contains(INSTALLED[name], prereleases=True)
    ]
    if others:
        raise Doubt(f"other versions than tested, {', '.join(others)}: {fix}")
    return f"all {len(wanted)} as pinned"


def project() -> dict:
    """The [project] table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def gpu(run: Run) -> str:
    """Whether torch finds a GPU, which matters for larger models, and one that computes in bf16."""
    import torch

    if not torch.cuda.is_available():
        if run.profile.model != "base_model":
            raise Doubt(
                "none found by torch, so this model will be slow: use a GPU, or profile nano"
            )
        return "none, which this model does not need"
    name = torch.cuda.get_device_name()
    if torch.cuda.get_device_capability()[0] < 8:  # in hardware from Ampere on
        raise Doubt(f"{name} has no bf16: training will use fp16")
    return name


def model(run: Run) -> str:
    """Whether the model is on this machine, or the hub has it."""
    check_model(run.profile.model)
    return run.profile.model


def check_model(name: str) -> None:
    """Raise R3Error unless the model `name` is on this machine or the hub has it."""
    if why := missing(name):
        raise R3Error(f"model {name!r} has {why}")
    folder = ROOT / name  # where the notebooks' kernels look for a relative one
    if name in ("base_model", "smollm2") or (folder / "config.json").is_file():
        return
    if folder.is_dir():
        raise R3Error(f"model {name!r} has no config.json: name a model's folder, or a hub id")
    _check_hub_id(name)


def _check_hub_id(name: str) -> None:
    """Raise R3Error unless the hub, or while offline its cache, has the model `name`."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    no_folder = f"model {name!r} is no folder with a model"
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        if not reaches_hub():
            why = "and not in the hub's cache, and the hub does not answer: go online"
            raise R3Error(f"{no_folder} {why}")
        hf_hub_download(name, "config.json")
    except (ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        said = " ".join(str(error).split())[:200]
        raise R3Error(f"{no_folder}, and the hub does not give it: {said}") from error


def problems(run: Run) -> str:
    """Whether each task takes its options and has enough problems; downloads those of the hub."""
    for name in run.tasks:
        task = load_task(name, run.profile.task_options)
        if getattr(task, "source", "") == "hub" and not reaches_hub():
            raise Doubt(
                f"{name}: the hub does not answer, its data must be in the hub's cache: go online"
            )
        check_problems(task, run.profile)
    return f"{', '.join(run.tasks)}"


def check_problems(task: Task, profile: Profile) -> None:
    """Raise R3Error unless `task` has as many problems as the profile asks for, in every split."""
    wanted = {"train": profile.train_problems, "test": profile.test_problems}
    wanted["validation"] = VALIDATION
    for split, count in wanted.items():
        try:
            task.problems(split, count, seed=0)
        except (TypeError, ValueError, KeyError) as error:
            why = f"{type(error).__name__}: {error}"
            raise R3Error(
                f"task {task.name!r} cannot make {split} problems ({why}): see its options"
            ) from error


def vllm(run: Run) -> str:
    """Whether the profile's vLLM servers answer; without any, whether we could start one."""
    if run.profile.engine != "vllm":
        return "not asked for"
    if run.profile.own_server:
        return _interpreter()
    addresses = run.profile.servers.replace(",", " ").split()
    for address in addresses:
        _check_server(address)
    return ", ".join(addresses)


def _interpreter() -> str:
    """The Python that would run a vLLM server of our own; R3Error if it has no vLLM."""
    from .engines.vllm_server import install, interpreter

    path = interpreter()
    try:
        subprocess.run([path, "-c", HAS_VLLM], capture_output=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise R3Error(f"engine=vllm, but {path} is no Python that has vLLM: {install()}") from error
    return path


def _check_server(address: str) -> None:
    """Raise R3Error unless a vLLM server answers within three seconds."""
    from .engines.vllm import Lost, Refused, ask, web_address

    try:
        ask(f"{web_address(address)}/health", None, 3.0)
    except (Lost, Refused) as error:
        raise R3Error(
            f"engine=vllm, {error}: start it, or give another address in servers="
        ) from error


def memory(run: Run) -> str:
    """Whether the estimated memory is there, see `preflight`."""
    try:
        fits, text = preflight.estimate(run.profile, run.gpu_memory)
    except R3Error as error:  # nothing to estimate with
        raise Doubt(str(error)) from error
    if not fits:
        raise Doubt(f"memory may be short, {text}")
    return text


def disk(run: Run) -> str:
    """Whether two GiB are free, and room for the weights of a model that the hub gives."""
    free, needed = shutil.disk_usage(ROOT).free / GIB, 2.0
    try:
        needed += preflight.stored(run.profile.model)
    except R3Error:  # a model of unknown size
        pass
    if free < needed:
        raise Doubt(f"{free:.1f} GiB free, about {needed:.1f} are needed: free some disk space")
    return f"{free:.1f} GiB free of about {needed:.1f} needed"


def time(run: Run) -> str:
    """How long the run takes, where that was measured."""
    known = TIMES.get(run.profile.name, "not measured for this profile")
    faster = "" if TCMALLOC else "; 10 to 20% less on a CPU with libtcmalloc-minimal4 installed"
    return f"{known} ({os.cpu_count()} cores here){faster}"


CHECKS = (python, packages, gpu, model, problems, vllm, memory, disk, time)
BEFORE_A_RUN = (model, problems, vllm, memory, disk)
