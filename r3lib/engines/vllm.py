"""Sample from vLLM servers over HTTP: prompts spread over them, lost requests sent again, adapters hot-loaded."""

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from random import Random
from threading import Event
from urllib.request import HTTPErrorProcessor, ProxyHandler, Request, build_opener

from ..chat import Chat
from ..errors import R3Error
from ..store import folder_hash
from .base import Completion, SamplingParams, check

WHOLE = {  # sample from the whole distribution, whatever the model's generation_config.json says
    "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "logprobs": 0, "return_token_ids": True, "ignore_eos": True,
}  # fmt: skip

IN_FLIGHT = 512  # samples at a server at once: it computes 256 by default, and what waits counts as silent


class AnyStatus(HTTPErrorProcessor):
    """Lets `ask` judge every status itself."""

    def http_response(self, request, response):
        """The response as it is."""
        return response

    https_response = http_response


OPENER = build_opener(ProxyHandler({}), AnyStatus)


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
        """Nothing that we could do."""


class VLLMEngine:
    """Engine over vLLM servers of one model, each an address ("http://host:8000") or a `Server` of ours.

    Runs `workers` requests at once (a request is one prompt with its n samples; fewer where n is large), each sent up
    to `attempts` times with pauses of `pause` x 1, 2, 4 ... seconds after a lost connection, `timeout` seconds of
    silence or a 5xx; what one server loses goes to the others. A server that is not ours must run with
    `--logprobs-mode processed_logprobs` (otherwise log-probs are those at temperature 1), for `sync` also with
    `--enable-lora`, VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and the disk that adapters are saved to.

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
        self.workers, self.attempts, self.timeout, self.pause = workers, attempts, timeout, pause
        self.end_ids, self.adapter, self.loaded = end_ids or Chat(tokenizer).end_ids, None, None
        base = self._retry(0, Counter(), Event(), self._models)[0]
        self.base = self.policy = base["id"]
        self.longest = base["max_model_len"]

    def identity(self) -> dict:
        """See `IdentifiedEngine`: the served model, and the adapter's name, which holds its hash."""
        return {
            "engine": "vllm",
            "model": self.base,
            "adapter": "" if self.adapter is None else self.policy,
        }

    def generate(self, prompts, n: int, sampling: SamplingParams, seeds=None) -> list[list[Completion]]:
        """See `Engine`. R3Error: bad n, sampling, seeds or prompt; a server refuses, or none answers.

        A seed repeats its samples on the same server build up to rounding, which depends on the batch.
        """
        seeds = range(len(prompts)) if seeds is None else seeds
        check(prompts, n, sampling, seeds, self.longest - sampling.max_tokens)
        body = {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature, **WHOLE}
        body |= {"stop_token_ids": sorted(self.end_ids), "n": n if sampling.temperature else 1}  # greedy: all the same
        failures, over = Counter(), Event()

        def one(place: int) -> list[Completion]:
            seed = Random(seeds[place]).getrandbits(48)  # vLLM takes seed + k for sample k: keep seeds far apart
            own = body | {"prompt": list(prompts[place]), "seed": seed}
            found = self._retry(place, failures, over, lambda server: self._sample(server, own))
            return found * (n // len(found))

        pool = ThreadPoolExecutor(min(self.workers, max(1, IN_FLIGHT * len(self.servers) // body["n"])))
        try:
            jobs = [pool.submit(one, place) for place in range(len(prompts))]
            for job in as_completed(jobs):
                job.result()  # raises at the first failure
            return [job.result() for job in jobs]
        finally:
            over.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def sync(self, adapter: Path | None) -> None:
        """See `RemoteEngine`. The adapter's name holds its hash, so what a server knows by a name never changes.

        The folder must stay: a server that was away or restarted loads it later. R3Error: a server refuses it.
        """
        if adapter is None:
            self.adapter, self.policy = None, self.base  # what is loaded stays, until another takes its place
            return
        if not (Path(adapter) / "adapter_config.json").exists():
            raise R3Error(f"{adapter} holds no adapter_config.json: give a folder that PEFT's save_pretrained wrote")
        old = self.loaded
        self.adapter, self.policy = Path(adapter).resolve(), f"r3-{folder_hash(Path(adapter))[:16]}"
        self.loaded = self.policy
        self._retry(0, Counter(), Event(), self._load)
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
            if error.status != 404:  # gone with a restart, or another process of this training was faster
                raise

    def _models(self, server) -> list[dict]:
        server.ensure()
        return ask(f"{server.url}/v1/models", None, self.timeout)["data"]

    def _sample(self, server, body: dict) -> list[Completion]:
        """The completions of one request, in the order of their index."""
        server.ensure()
        url, body = f"{server.url}/v1/completions", body | {"model": self.policy}
        try:
            answer = ask(url, body, self.timeout)
        except Refused as error:
            if error.status != 404 or self.adapter is None:
                raise
            self._load(server)
            answer = ask(url, body, self.timeout)
        choices = sorted(answer["choices"], key=lambda c: c["index"])
        if len(choices) != body["n"]:
            raise Lost(f"{url} gives {len(choices)} of {body['n']} samples")
        return [self._completion(c, url) for c in choices]

    def _completion(self, choice: dict, url: str) -> Completion:
        if choice["finish_reason"] not in ("stop", "length"):  # "abort": a server that shuts down answers 200
            raise Lost(f"{url} ended a sample early ({choice['finish_reason']})")
        if choice.get("token_ids") is None:
            raise R3Error(f"{url} returns no token ids: use vLLM 0.11 or newer")
        ids = choice["token_ids"]
        return Completion(ids, choice["logprobs"]["token_logprobs"], finished=ids[-1] in self.end_ids)

    def _retry(self, place: int, failures: Counter, over: Event, work):
        """`work(server)`, tried on the server that failed least (by turns), with growing pauses."""
        for attempt in range(self.attempts):
            turn = min(range(len(self.servers)), key=lambda i: (failures[i], (place + i) % len(self.servers)))
            try:
                return work(self.servers[turn])
            except Lost as error:
                failures[turn] += 1
                trouble = error
            if attempt + 1 == self.attempts or over.wait(self.pause * 2**attempt):
                break
        raise R3Error(f"{trouble}, after {attempt + 1} tries: see the server's log, start it or give another address")


def web_address(text: str) -> str:
    """`text` without its closing slash; R3Error unless it is an http address."""
    if not text.startswith(("http://", "https://")):
        raise R3Error(f"{text!r} is no server address: write it as http://host:port")
    return text.rstrip("/").removesuffix("/v1")


def ask(url: str, body: dict | None, timeout: float):
    """POST `body` as JSON (None: GET); return the JSON answer, None if it is not JSON. Raises Lost and Refused."""
    request = Request(url, body and json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with OPENER.open(request, timeout=timeout) as answer:
            text, status, kind = answer.read(), answer.status, answer.headers.get_content_subtype()
        if status == 200:
            return json.loads(text) if kind == "json" else None
    except (OSError, HTTPException, ValueError) as error:
        raise Lost(f"{url} does not answer ({type(error).__name__}: {error})") from error
    said = f"{url} answers {status}: {' '.join(text.decode(errors='replace').split())[:500]}"
    raise Lost(said) if status >= 500 or status in (408, 429) else Refused(said, status)
