"""A vLLM server in an environment of its own, stopped on exit."""

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
from pathlib import Path

from ..config import ROOT
from ..errors import R3Error
from ..weights import compute_dtype, device
from .vllm import VLLMEngine, ask

STARTUP = 1800.0  # seconds in which a server must be up
GRACE = 10.0  # seconds between asking it to end and killing it
# Linux asks the server to end when this process dies, even of kill -9
WITH_US = ("setpriv", "--pdeathsig", "TERM") if shutil.which("setpriv") else ()
GPU_OPTIONS = (
    *("--gpu-memory-utilization", "0.5"),  # the other half is the trainer's
    *("--max-model-len", "auto"),  # else vLLM wants cache for a whole context, or does not start
)
# without it vLLM 0.32 on a CPU dies ("CPU Generator does not use offset") of a seeded sample whose
# prompt it reads in two steps
CPU_OPTIONS = ("--no-enable-chunked-prefill",)
CPU_ENVIRONMENT = {  # the environment's own values win
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # every core: vLLM would keep one for its scheduler
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: a second one would wait busily
}


def interpreter() -> str:
    """The Python for a `Server`: $R3_VLLM_PYTHON, this one if it has vLLM, or .venv-vllm's."""
    named = os.environ.get("R3_VLLM_PYTHON")
    if named:
        return named
    return sys.executable if find_spec("vllm") else str(ROOT / ".venv-vllm" / "bin" / "python")


class Server:
    """Serves `model` on a free loopback port with `python`, an interpreter that has vLLM.

    `start` makes its `url` answer; it stops with `stop`, a `with` block or this process. `rank` is
    the largest LoRA rank, one that vLLM takes: 1, 8, 16, 32, 64, 128, 256, 320, 512. `options` are
    further arguments, such as ("--dtype", "float32"), and win over ours: by default it computes in
    what this machine is best in and leaves half of a GPU to it. Its output goes to the file `log`.
    """

    def __init__(self, model, python, rank=64, log="vllm.log", options: Sequence[str] = ()):
        if not shutil.which(python):
            raise R3Error(
                f"no Python that has vLLM at {python}: make it as docs/scaling.md says, or name "
                "another in R3_VLLM_PYTHON"
            )
        self.command = [
            *WITH_US, str(python), "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(model), "--enable-lora", "--max-lora-rank", str(rank),
            "--max-loras", "2", "--logprobs-mode", "processed_logprobs",
            "--generation-config", "vllm", "--dtype", str(compute_dtype()).removeprefix("torch."),
            *(CPU_OPTIONS if device() == "cpu" else GPU_OPTIONS), *options,
        ]  # fmt: skip
        self.log = Path(log)
        self.url = ""
        self.process = None
        atexit.register(self.stop)

    def start(self) -> None:
        """Start the server unless it runs; R3Error if it is not up within `STARTUP` seconds."""
        if self.process and self.process.poll() is None:
            return
        self.stop()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        ours = CPU_ENVIRONMENT if device() == "cpu" else {}
        fixed = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
        env = {"VLLM_NO_USAGE_STATS": "1"} | ours | os.environ | fixed
        command = [*self.command, "--host", "127.0.0.1", "--port", str(port)]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=env, start_new_session=True
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ask the server to end, then kill it and what it has left behind."""
        if self.process is None:
            return
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def _wait(self) -> None:
        """Return when the server answers."""
        deadline = time.monotonic() + STARTUP
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                tail = " | ".join(self.log.read_text(errors="replace").splitlines()[-5:])
                why = f"the last lines of {self.log}: {tail}"
                raise R3Error(f"the vLLM server does not start, {why}")
            with suppress(R3Error):
                ask(f"{self.url}/health", timeout=5.0)
                return
            time.sleep(0.2)
        raise R3Error(f"the vLLM server is not up after {STARTUP:.0f} s: see {self.log}")


@cache
def own_server(model: str, options: str, rank: int, log: Path) -> Server:
    """This process's server for `model`."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise R3Error(
            "several processes share vLLM servers: start them on GPUs of their own and give "
            "servers=ADDRESS"
        )
    return Server(model, interpreter(), rank, log, options.split())


def vllm_engine(
    model: str, servers: str, options: str, rank: int, log: Path, end_ids: frozenset
) -> VLLMEngine:
    """An engine over `servers`, addresses with commas; for "", over our own, started if needed."""
    addresses = servers.replace(",", " ").split()
    if not addresses:
        server = own_server(model, options, rank, log)
        server.start()
        addresses = [server.url]
    return VLLMEngine(addresses, None, end_ids)
