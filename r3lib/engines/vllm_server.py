"""A vLLM server in an environment of its own: restarted when it dies, stopped on exit."""

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from math import floor
from pathlib import Path
from threading import Lock

from ..config import ROOT, Profile
from ..errors import R3Error
from ..preflight import OVERHEAD, parts, read_config
from ..provenance import GIB
from ..weights import compute_dtype, device
from .vllm import Lost, Refused, VLLMEngine, ask
from .watch import GRACE

INSTALL = "python3 -m venv .venv-vllm && .venv-vllm/bin/pip install vllm==0.32.0"  # for GPUs
INSTALL_CPU = "make .venv-vllm/.installed"
SHARE = 0.92  # of a GPU, vLLM's own default
UTILIZATION = "--gpu-memory-utilization"
WATCH = Path(__file__).with_name("watch.py")
ON_CPU = {  # the environment's own values win
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # every core: vLLM would keep one for its scheduler
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: a second one would wait busily
}
# without it vLLM 0.32 on a CPU dies ("CPU Generator does not use offset") of a seeded sample whose
# prompt it reads in two steps
CPU_OPTIONS = ("--no-enable-chunked-prefill",)


def interpreter() -> str:
    """The Python for a `Server`: $R3_VLLM_PYTHON, this one if it has vLLM, or .venv-vllm's."""
    named = os.environ.get("R3_VLLM_PYTHON")
    if named:
        return named
    return sys.executable if find_spec("vllm") else str(ROOT / ".venv-vllm" / "bin" / "python")


def install() -> str:
    """How this machine gets an interpreter that has vLLM."""
    command = INSTALL_CPU if device() == "cpu" else INSTALL
    return f"run `{command}` in {ROOT}, or name another Python that has vLLM in R3_VLLM_PYTHON"


def server_options(profile: Profile) -> str:
    """Arguments for a server of ours: what a GPU asks for, then the profile's `vllm_options`.

    On a GPU that is the share that the trainer leaves, and a context that fits vLLM's cache.
    """
    if device() == "cpu":
        return profile.vllm_options
    ours = {}
    with suppress(R3Error):  # nothing to estimate with: vLLM decides
        ours[UTILIZATION] = f"{server_share(profile):g}"
    ours["--max-model-len"] = "auto"  # else vLLM wants cache for a whole context, or does not start
    added = [f"{name} {value}" for name, value in ours.items() if profile.vllm_option(name) is None]
    return " ".join([*added, profile.vllm_options]).strip()


def server_share(profile: Profile) -> float:
    """The share of this GPU, from 0.1 to SHARE, that the trainer's estimate leaves to a server."""
    found = parts(profile, read_config(profile.model), gpu=True)
    own = ("weights", "adapters", "activations", "logits")
    left = 1 - OVERHEAD * sum(found[name] for name in own) / gpu_gib()
    return max(0.1, min(SHARE, floor(100 * left) / 100))


def gpu_gib() -> float:
    """Memory of this process's GPU in GiB."""
    import torch

    return torch.cuda.get_device_properties(device()).total_memory / GIB


class Server:
    """Serves `model` on a free loopback port with `python`, an interpreter that has vLLM.

    Starts on first use or on entering a `with` block, and is then up within `timeout` seconds or an
    error; restarts up to `restarts` times when it dies. `rank` is the largest LoRA rank, one that
    vLLM takes: 1, 8, 16, 32, 64, 128, 256, 320, 512. `options` are further arguments, such as
    ("--dtype", "float32"). Its output goes to the file `log`.
    """

    def __init__(
        self, model, python, rank=64, log="vllm.log", options: Sequence[str] = (), timeout=900.0,
        restarts=2,
    ):  # fmt: skip
        if not shutil.which(python):
            raise R3Error(f"no Python interpreter at {python}: {install()}")
        self.command = [
            str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
            "--enable-lora", "--max-lora-rank", str(rank), "--max-loras", "2",
            "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm",
        ]  # fmt: skip
        if device() == "cpu":
            self.command += CPU_OPTIONS
        self.command += options
        self.log = Path(log)
        self.timeout = timeout
        self.restarts = restarts
        self.url = ""
        self.process = None
        self.starts = 0
        self._lock = Lock()
        atexit.register(self.stop)

    def ensure(self) -> None:
        """Start the server unless it runs. R3Error: it does not start, or has died too often."""
        with self._lock:
            if self.process and self.process.poll() is None:
                return
            self._end()
            if self.starts > self.restarts:
                raise R3Error(f"the vLLM server died {self.starts} times, {self._tail()}")
            self.starts += 1
            try:
                self._start()
            except BaseException:
                self._end()
                raise

    def stop(self) -> None:
        """End the server and all that it started; `ensure` may start it again."""
        with self._lock:
            self._end()
            self.starts = 0

    def __enter__(self) -> "Server":
        self.ensure()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def _start(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, str(WATCH), *self.command]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment(),
                start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + self.timeout
        while not self._answers():
            if self.process.poll() is not None:
                raise R3Error(f"the vLLM server does not start, {self._tail()}")
            if time.monotonic() > deadline:
                raise R3Error(
                    f"the vLLM server is not up after {self.timeout:.0f} s: raise timeout, or see "
                    f"{self.log}"
                )
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            ask(f"{self.url}/health", None, 5.0)
        except (Lost, Refused):
            return False
        return True

    def _end(self) -> None:
        """Let the watcher end the server, then kill what is left if the watcher was killed."""
        if self.process is None:
            return
        self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE + 5)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-5:]
        return f"the last lines of {self.log}: {' | '.join(lines)}"


def environment() -> dict[str, str]:
    """A server's environment variables."""
    ours = {"VLLM_NO_USAGE_STATS": "1"}
    if device() == "cpu":
        ours |= ON_CPU
    return ours | os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}


@cache
def vllm_engine(model: str, servers: str, options: str, rank: int, log: Path, end_ids: frozenset):
    """An engine over `servers`, or over one of our own for `model`, which ends with this process.

    Ours computes in the precision in which the trainer computes: vLLM's own choice for weights in fp32 would be lower.
    It holds the weights in it too, where `options` name no quantization: see `config.VLLM_NF4`.
    """
    if not servers and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise R3Error("several processes share vLLM servers: start them on GPUs of their own and give servers=ADDRESS")
    ours = ["--dtype", str(compute_dtype()).removeprefix("torch.")]
    own = [] if servers else [Server(model, interpreter(), rank, log, [*ours, *options.split()])]
    return VLLMEngine(servers.replace(",", " ").split() or own, None, end_ids=end_ids)
