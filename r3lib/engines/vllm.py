"""Sample from vLLM servers: spread prompts over them, repeat lost requests, hot-load adapters."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from ssl import create_default_context
from threading import Event

import httpx

from ..chat import Chat
from ..errors import R3Error
from ..files import folder_hash
from .base import Completion, SamplingParams, check

WHOLE = {  # sample from the whole distribution, whatever the model's generation_config.json says
    "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "logprobs": 0, "return_token_ids": True, "ignore_eos": True,
}  # fmt: skip
IN_FLIGHT = 512  # samples at a server at once: it computes 256 by default, and what waits is silent
CLIENT = httpx.Client(
    trust_env=False,  # no proxies
    verify=create_default_context(),
    limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
)


class Lost(R3Error):
    """No answer, or a failure of the server: the request may be sent again."""


class Refused(R3Error):
    """The server says that the request is wrong; `status` is its HTTP status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Address:
    """A server that someone else keeps running."""

    url: str

    def ensure(self) -> None:
        """Do nothing: whoever runs it restarts it."""


class VLLMEngine:
    """Engine over vLLM servers of one model, each an address ("http://host:8000") or a `Server`.

    A request is one prompt with its n samples; `workers` of them run at once, fewer where n is
    large. Each is sent up to `attempts` times, with pauses of `pause` x 1, 2, 4 ... seconds after a
    lost connection, `timeout` seconds of silence or a 5xx; what one server loses goes to others.

    A server given by address must run with `--logprobs-mode processed_logprobs` (otherwise
    log-probs are those at temperature 1), for `sync` also with `--enable-lora`,
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and the disk that adapters are saved to.

    A completion ends at the first of `end_ids`, by default those of `Chat(tokenizer)`; give those
    of your `Chat` if it has other arguments, such as the model's generation config.
    """

    def __init__(
        self, servers: Sequence, tokenizer, workers=64, attempts=6, timeout=600.0, pause=0.5,
        end_ids=None,
    ):  # fmt: skip
        self.servers = [Address(web_address(s)) if isinstance(s, str) else s for s in servers]
        if not self.servers:
            raise R3Error("no vLLM server: give at least one address or Server")
        self.workers = workers
        self.attempts = attempts
        self.timeout = timeout
        self.pause = pause
        self.end_ids = end_ids or Chat(tokenizer).end_ids
        self.adapter = None  # the folder that `sync` named last
        self.loaded = None  # the name of the adapter that servers have loaded
        model = self._retry(self._models)[0]
        self.base = self.policy = model["id"]
        self.longest = model["max_model_len"]

    def identity(self) -> dict:
        """See `IdentifiedEngine`: the served model, and the adapter's name with its hash."""
        adapter = "" if self.adapter is None else self.policy
        return {"engine": "vllm", "model": self.base, "adapter": adapter}

    def generate(
        self, prompts, n: int, sampling: SamplingParams, seeds=None
    ) -> list[list[Completion]]:
        """See `Engine`. R3Error: bad n, sampling, seeds or prompt; refused; no server answers.

        A seed repeats its samples on the same server build up to rounding, which depends on the
        batch.
        """
        if seeds is None:
            seeds = range(len(prompts))
        check(prompts, n, sampling, seeds, self.longest - sampling.max_tokens)
        shared = self._request(n, sampling)
        samples = shared["n"]
        failures, over = Counter(), Event()

        def ask_one(index: int) -> list[Completion]:
            seed = Random(seeds[index]).getrandbits(48)  # far apart: vLLM's sample k has seed + k
            body = shared | {"prompt": list(prompts[index]), "seed": seed}
            found = self._retry(lambda server: self._sample(server, body), index, failures, over)
            return found * (n // samples)

        most = max(1, IN_FLIGHT * len(self.servers) // samples)
        pool = ThreadPoolExecutor(min(self.workers, most))
        try:
            jobs = [pool.submit(ask_one, index) for index in range(len(prompts))]
            for job in as_completed(jobs):
                job.result()  # raises at the first failure
            return [job.result() for job in jobs]
        finally:
            over.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _request(self, n: int, sampling: SamplingParams) -> dict:
        """What all requests of a call have in common."""
        return WHOLE | {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "stop_token_ids": sorted(self.end_ids),
            "n": n if sampling.temperature else 1,  # greedy samples are all the same
        }

    def sync(self, adapter: Path | None) -> None:
        """See `RemoteEngine`. R3Error: the folder holds no adapter, or a server refuses it.

        The adapter's name holds its hash, so what a server knows by a name never changes. The
        folder must stay: a server that was away or restarted loads it later.
        """
        if adapter is None:  # what is loaded stays, until another takes its place
            self.adapter, self.policy = None, self.base
            return
        if not (Path(adapter) / "adapter_config.json").exists():
            raise R3Error(
                f"{adapter} holds no adapter_config.json: give a folder that PEFT's "
                "save_pretrained wrote"
            )
        old = self.loaded
        self.adapter = Path(adapter).resolve()
        self.loaded = self.policy = f"r3-{folder_hash(Path(adapter))[:16]}"
        self._retry(self._load)
        for server in self.servers:
            with suppress(Lost):  # `_sample` loads it when the server answers again
                self._load(server)
                if old not in (None, self.policy):
                    self._unload(server, old)

    def _load(self, server) -> None:
        server.ensure()
        wanted = {"lora_name": self.policy, "lora_path": str(self.adapter)}
        try:
            ask(f"{server.url}/v1/load_lora_adapter", wanted, self.timeout)
        except Refused:
            if self.policy not in [model["id"] for model in self._models(server)]:
                raise

    def _unload(self, server, name: str) -> None:
        try:
            ask(f"{server.url}/v1/unload_lora_adapter", {"lora_name": name}, self.timeout)
        except Refused as error:
            if error.status != 404:  # lost in a restart, or unloaded by another process
                raise

    def _models(self, server) -> list[dict]:
        server.ensure()
        return ask(f"{server.url}/v1/models", None, self.timeout)["data"]

    def _sample(self, server, body: dict) -> list[Completion]:
        """The completions of one request, in the order of their index."""
        server.ensure()
        url = f"{server.url}/v1/completions"
        body = body | {"model": self.policy}
        try:
            answer = ask(url, body, self.timeout)
        except Refused as error:
            if error.status != 404 or self.adapter is None:
                raise
            self._load(server)
            answer = ask(url, body, self.timeout)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != body["n"]:
            raise Lost(f"{url} gives {len(choices)} of {body['n']} samples")
        return [self._completion(choice, url) for choice in choices]

    def _completion(self, choice: dict, url: str) -> Completion:
        reason, ids = choice["finish_reason"], choice.get("token_ids")
        if reason not in ("stop", "length"):  # "abort": a server that shuts down answers 200
            raise Lost(f"{url} ended a sample early ({reason})")
        if ids is None:
            raise R3Error(f"{url} returns no token ids: use vLLM 0.11 or newer")
        finished = ids[-1] in self.end_ids
        return Completion(ids, choice["logprobs"]["token_logprobs"], finished)

    def _retry(self, work, index: int = 0, failures: Counter | None = None, over=None):
        """`work(server)`, on the server with the fewest `failures`, again with growing pauses.

        Servers with as many take turns by `index`; once `over` is set, nothing is tried again.
        """
        failures = Counter() if failures is None else failures
        over = over or Event()
        count = len(self.servers)
        for attempt in range(1, self.attempts + 1):
            turn = min(range(count), key=lambda i: (failures[i], (index + i) % count))
            try:
                return work(self.servers[turn])
            except Lost as error:
                failures[turn] += 1
                trouble = error
            if attempt == self.attempts or over.wait(self.pause * 2 ** (attempt - 1)):
                break
        raise R3Error(
            f"{trouble}, after {attempt} tries: see the server's log, start it or give another "
            "address"
        )


def web_address(text: str) -> str:
    """`text` without its closing slash; R3Error unless it is an http address."""
    if not text.startswith(("http://", "https://")):
        raise R3Error(f"{text!r} is no server address: write it as http://host:port")
    return text.rstrip("/").removesuffix("/v1")


def ask(url: str, body: dict | None, timeout: float):
    """POST `body` as JSON (None: GET); the JSON answer, None if it is not JSON.

    Raises Lost after `timeout` seconds of silence, without an answer, or for a status of the
    server's own failures; Refused for any other status but 200.
    """
    method = "GET" if body is None else "POST"
    try:
        answer = CLIENT.request(method, url, json=body, timeout=timeout)
        if answer.status_code == 200:
            is_json = "json" in answer.headers.get("Content-Type", "")
            return answer.json() if is_json else None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise Lost(f"{url} does not answer ({type(error).__name__}: {error})") from error
    status, text = answer.status_code, " ".join(answer.text.split())[:500]
    message = f"{url} answers {status}: {text}"
    if status >= 500 or status in (408, 429):
        raise Lost(message)
    raise Refused(message, status)
