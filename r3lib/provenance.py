"""Where a result comes from: git commit, package versions, hardware, memory."""

import os
import resource
import subprocess
import sys
import urllib.request
from contextlib import suppress
from functools import cache
from glob import glob
from pathlib import Path

import psutil

from .colab import version
from .config import ROOT

GIB = 2**30
PACKAGES = (
    "torch transformers trl peft bitsandbytes vllm jupyterlab papermill matplotlib pandas".split()
)
# preloaded where it is installed (see `allocator`): sampling on a CPU is 10 to 20% faster
TCMALLOC = next(iter(glob("/usr/lib*/*/libtcmalloc_minimal.so.?")), "")


@cache
def machine() -> dict:
    """Git commit, package versions and hardware, as they go into the manifest."""
    hardware = {
        "cpus": os.cpu_count(),
        "processor": _output("sed -n '/^model name/{s/.*: //p;q}' /proc/cpuinfo"),
        "gpu": _output("nvidia-smi --query-gpu=name --format=csv,noheader"),
        "memory_gib": round(ram_gib(), 1),
    }
    return {
        "commit": _output(f'git -C "{ROOT}" rev-parse --verify HEAD'),
        "dirty": bool(_output(f'git -C "{ROOT}" status --porcelain')),
        "packages": {name: version(name) for name in PACKAGES},
        "hardware": hardware,
    }


def allocator() -> dict[str, str]:
    """Environment of a process that has tcmalloc, where that is installed."""
    loaded = os.environ.get("LD_PRELOAD", "")
    if not TCMALLOC or TCMALLOC in loaded:
        return {}
    return {"LD_PRELOAD": f"{TCMALLOC}:{loaded}".rstrip(":")}


def restart_with_allocator() -> None:
    """Begin this process again with `allocator`, unless it has it."""
    missing = allocator()
    if missing:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | missing)


def _output(command: str) -> str | None:
    """What a command prints; None if it fails or does not exist."""
    status, output = subprocess.getstatusoutput(command)
    return output if status == 0 else None


def ram_gib() -> float:
    """RAM in GiB, within the limit of this process's cgroup."""
    limits = [psutil.virtual_memory().total]
    with suppress(OSError, ValueError):  # no cgroup (v2), or "max"
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits) / GIB


def gpu_gib() -> float | None:
    """GiB of this machine's smallest NVIDIA GPU, without importing torch; None without one."""
    sizes = _output("nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits")
    with suppress(AttributeError, ValueError):  # no nvidia-smi, or one that does not know the size
        return min(map(float, sizes.split())) / 1024
    return None


def peak_memory_gib() -> float:
    """The most memory this process has used so far in GiB: of its GPU, or RAM on a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    with suppress(OSError):  # Linux; its ru_maxrss begins with the parent's
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


@cache
def reaches_hub() -> bool:
    """Whether the hub answers within three seconds; asked once."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(hub, timeout=3).close()
    except (OSError, ValueError):
        return False
    return True
