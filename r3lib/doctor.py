"""What this machine is, and whether it can run a profile: each finding with its mend."""

import os
import platform
import shutil
import subprocess
import tomllib
import urllib.request
from contextlib import suppress
from functools import cache
from glob import glob
from importlib import metadata
from typing import NamedTuple

import psutil
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .colab import KEPT, on_colab
from .config import ROOT, Profile, load_profile
from .errors import R3Error
from .tasks.function_calling_records import BFCL_INSTALL, GATED_MEND
from .tasks.function_calling_records import HUB_DATASET as GATED
from .weights import missing

PACKAGES = "torch transformers trl peft bitsandbytes vllm jupyterlab papermill matplotlib pandas".split()
TCMALLOC = next(iter(glob("/usr/lib*/*/libtcmalloc_minimal.so.?")), "")  # 10 to 20% faster when preloaded
GIB = 2**30
HAS_VLLM = "import importlib.util, sys; sys.exit(not importlib.util.find_spec('vllm'))"
INSTALLED = {canonicalize_name(d.name): d.version for d in metadata.distributions()}


class Finding(NamedTuple):
    """`state` is "ok", "warn" or "fail"; `mend` says what to do when it is not "ok", and else may say more."""

    name: str
    state: str
    value: str
    mend: str = ""


@cache
def machine() -> dict:
    """Git commit, package versions and hardware: where a result comes from."""
    git, gpu = f'git -C "{ROOT}" ', "nvidia-smi --query-gpu=name --format=csv,noheader"
    done = map(subprocess.getstatusoutput, (git + "rev-parse --verify HEAD", git + "status --porcelain", gpu))
    commit, changes, gpu = (output if status == 0 else None for status, output in done)
    versions = {name: INSTALLED.get(name) for name in PACKAGES}
    hardware = {"cpus": os.cpu_count(), "gpu": gpu, "memory_gib": round(psutil.virtual_memory().total / 2**30, 1)}
    return {"commit": commit, "dirty": bool(changes), "packages": versions, "hardware": hardware}


def examine(profile: Profile, gpu_memory: float | None = None, task: str = "all") -> list[Finding]:
    """All findings about this machine for a profile and task; with `gpu_memory` planned for a GPU of so many GiB."""
    lacking, memory = missing(profile.model), psutil.virtual_memory().total / GIB
    return [
        *_versions(),
        Finding("cores", "ok", str(os.cpu_count())),
        _finding("memory", f"{memory:.1f} GiB", memory >= 3.5, "needs 4 GiB: use a larger machine"),
        _gpu(profile),
        _finding("model", profile.model, not lacking, lacking),
        *_plan(profile, gpu_memory),
        *_hub(),
        *(_function_calling(profile) if task in ("all", "function_calling") else []),
        *vllm(profile),
        _finding("tcmalloc", TCMALLOC or "none", TCMALLOC, "10 to 20% slower: install libtcmalloc-minimal4", "warn"),
    ]


def report(profile="nano", say=print, gpu_memory=None, overrides: dict | None = None, task: str = "all") -> int:
    """Print the findings as a table; return 1 if something that `profile` needs fails, else 0."""
    findings = examine(load_profile(profile, **(overrides or {})), gpu_memory, task)
    wide = [max(len(getattr(f, part)) for f in findings) for part in ("name", "value")]
    for f in findings:
        say(f"{f.state:4}  {f.name:{wide[0]}}  {f.value:{wide[1]}}  {f.mend}".rstrip())
    return int(any(f.state == "fail" for f in findings))


def _finding(name: str, value: str, good, mend: str, bad: str = "fail") -> Finding:
    return Finding(name, "ok", value) if good else Finding(name, bad, value, mend)


def _versions() -> list[Finding]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python, version = Requirement("python" + project["requires-python"]).specifier, platform.python_version()
    found = [_finding("python", version, python.contains(version), f"install Python {python}")]
    found += [_package(Requirement(text), "fail", "run `make install`") for text in project["dependencies"]]
    extras = [(extra, text) for extra in ("gpu", "vllm") for text in project["optional-dependencies"][extra]]
    return found + [_package(Requirement(text), "ok", f"optional: extra [{extra}]") for extra, text in extras]


def _package(wanted: Requirement, absent: str, mend: str) -> Finding:
    if on_colab() and wanted.name in KEPT:
        return Finding(wanted.name, "ok", INSTALLED.get(wanted.name, "not installed"), "Colab's own")
    if not (version := INSTALLED.get(name := canonicalize_name(wanted.name))):
        return Finding(name, absent, "not installed", mend)
    fits = wanted.specifier.contains(version, prereleases=True)
    return _finding(name, version, fits, f'tested with another: pip install "{wanted}"', "warn")


def _gpu(profile: Profile) -> Finding:
    import torch

    if not torch.cuda.is_available():
        return _finding("gpu", "none", profile.model == "base_model", "slow on a CPU: use a GPU or nano", "warn")
    bf16 = torch.cuda.get_device_capability()[0] >= 8  # in hardware from Ampere on
    return _finding("gpu", torch.cuda.get_device_name(), bf16, "no bf16: train in fp16 or fp32", "warn")


def _plan(profile: Profile, gpu_memory: float | None) -> list[Finding]:
    """What the run will need, by part, and whether it is there."""
    from .plan import plan_of

    free, need, parts, findings = shutil.disk_usage(ROOT).free / GIB, 2.0, "", []
    if plan := plan_of(profile, gpu_memory):
        how = "measured" if plan.lengths.measured else "assumed"
        prompts = f"prompts of {plan.lengths.prompt} tokens ({how})"
        findings.append(Finding("plan", "ok", f"{plan.shape.parameters:,} parameters", prompts))
        for phase, needed in plan.memory().items():
            state, parts = plan.state(phase), _words(needed, GIB)
            mend = parts if state == "ok" else f"{plan.mend(phase)} ({parts})"
            findings.append(Finding(phase, state, plan.share(phase), mend))
        tokens = plan.tokens()
        learned = tokens.pop("learned")
        value = f"{sum(tokens.values()) / 1e6:,.2f} M sampled, {learned / 1e6:,.2f} M learned"
        findings.append(Finding("tokens", "ok", value, f"at most; {_words(tokens, 1e6)}"))
        need, parts = max(need, sum(plan.disk().values()) / GIB), f" ({_words(plan.disk(), GIB)})"
    else:
        mend = "to see what it will need go online, or name a local folder, in which config.json is enough"
        findings.append(Finding("plan", "warn", f"no config of {profile.model}", mend))
    mend = f"needs {need:.1f} GiB{parts}: free some disk space"
    return [*findings, _finding("disk", f"{free:.1f} GiB free", free >= need, mend)]


def _words(counts: dict[str, float], unit: float) -> str:
    return ", ".join(f"{name} {count / unit:,.2f}" for name, count in counts.items() if count >= 0.005 * unit)


def reaches_hub() -> bool:
    """Whether the hub answers within three seconds."""
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=3).close()
    except (OSError, ValueError):
        return False
    return True


def _hub() -> list[Finding]:
    if not reaches_hub():
        return [Finding("hub", "warn", "not reachable", "nano and smoke work offline; else name local folders")]
    return [Finding("hub", "ok", "reachable")]


def vllm(profile: Profile) -> list[Finding]:
    """Whether the profile's vLLM servers answer; without any, whether one of our own could be started."""
    if profile.engine != "vllm":
        return []
    from .engines.vllm_server import install, interpreter

    if not profile.own_server:
        return [_server(address) for address in profile.servers.replace(",", " ").split()]
    python, found = interpreter(), False
    with suppress(OSError, subprocess.TimeoutExpired):
        found = subprocess.run([python, "-c", HAS_VLLM], capture_output=True, timeout=60).returncode == 0
    return [_finding("vllm server", python, found, f"no Python that has vLLM: {install()}")]


def _server(address: str) -> Finding:
    """Whether a vLLM server answers within three seconds."""
    from .engines.vllm import Lost, Refused, ask, web_address

    try:
        ask(f"{web_address(address)}/health", None, 3.0)
    except (Lost, Refused) as error:
        return Finding("vllm server", "fail", address, f"{error}: start it, or give another address in servers=")
    except R3Error as error:
        return Finding("vllm server", "fail", address, str(error))
    return Finding("vllm server", "ok", address)


def _function_calling(profile: Profile) -> list[Finding]:
    """Whether the data of the profile's function-calling source can be had."""
    source = profile.task_options.get("function_calling", {}).get("source")
    if source == "bfcl":
        version = INSTALLED.get("bfcl-eval")
        return [_finding("bfcl-eval", version or "not installed", version, f"run `{BFCL_INSTALL}`")]
    if source != "hub":
        return []
    from huggingface_hub import auth_check, get_token

    allowed = False
    with suppress(Exception):  # whatever stands in the way, there is no access
        allowed = bool(get_token()) and auth_check(GATED, repo_type="dataset") is None
    return [_finding("gated data", GATED, allowed, GATED_MEND)]
