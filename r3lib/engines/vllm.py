"""Sample from vLLM servers: share prompts out among them, hot-load adapters."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import httpx

from ..chat import Chat
from ..errors import R3Error
from ..files import folder_hash
from .base import Completion, SamplingParams, check

WHOLE = {  # sample from the whole distribution, whatever the model's generation_config.json says
    "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "logprobs": 0, "return_token_ids": True, "ignore_eos": True,
}  # fmt: skip
IN_FLIGHT = 256  # samples at a server at once: as many as it computes, since what waits is silent
TIMEOUT = 600.0  # seconds of silence
FIX = (
    "see the server's log (vllm.log among the results if it is ours), start it or give another "
    "address, and run again: the run resumes"
)
CLIENT = httpx.Client(
    trust_env=False,  # no proxies
    transport=httpx.HTTPTransport(
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        retries=3,  # of connecting
    ),
)


class VLLMEngine:
    """Engine over vLLM servers of one model, by their addresses ("http://host:8000").

    A request is one prompt with its n samples; the servers get them in turn. What a server refuses,
    fails or leaves unanswered for `TIMEOUT` seconds is an R3Error.

    A server must run with `--logprobs-mode processed_logprobs` (otherwise log-probs are those at
    temperature 1), for `sync` also with `--enable-lora`, VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and
    the disk that adapters are saved to. `vllm_server.Server` starts one so.

    A completion ends at the first of `end_ids`, by default those of `Chat(tokenizer)`; give those
    of your `Chat` if it has other arguments, such as the model's generation config.
    """

    def __init__(self, servers: Sequence[str], tokenizer, end_ids=None):
        self.servers = [server.rstrip("/").removesuffix("/v1") for server in servers]
        self.end_ids = end_ids or Chat(tokenizer).end_ids
        model = self._models(self.servers[0])[0]
        self.longest = model["max_model_len"]
        self.base = self.model_name = model["id"]
        self.policy = self.base  # the name of what is sampled: the model or an adapter
        self.adapter_hash = ""

    def identity(self) -> dict:
        """See `Engine`: the served model, and the adapter's hash."""
        return {"engine": "vllm", "model": self.base, "adapter": self.adapter_hash}

    def generate(
        self, prompts, n: int, sampling: SamplingParams, seeds=None
    ) -> list[list[Completion]]:
        """See `Engine`. R3Error: bad n, sampling, seeds or prompt; a server refuses or fails.

        A seed repeats its samples on the same server build up to rounding, which depends on the
        batch.
        """
        if seeds is None:
            seeds = range(len(prompts))
        check(prompts, n, sampling, seeds, self.longest - sampling.max_tokens)
        samples = n if sampling.temperature else 1  # greedy samples are all the same
        shared = WHOLE | {
            "model": self.policy,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "stop_token_ids": sorted(self.end_ids),
            "n": samples,
        }

        def ask_one(index: int) -> list[Completion]:
            server = self.servers[index % len(self.servers)]
            seed = Random(seeds[index]).getrandbits(48)  # far apart: vLLM's sample k has seed + k
            body = shared | {"prompt": list(prompts[index]), "seed": seed}
            return self._sample(server, body) * (n // samples)

        threads = max(1, IN_FLIGHT // samples) * len(self.servers)
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(ask_one, range(len(prompts))))  # a failure cancels the rest

    def sync(self, adapter: Path | None) -> None:
        """See `RemoteEngine`. R3Error: a server refuses the folder, as where it holds no adapter.

        The adapter's name holds its folder and hash, so what a server knows by a name never
        changes. What was loaded before, the server drops when it needs the room.
        """
        if adapter is None:
            self.policy = self.base
            self.adapter_hash = ""
            return
        folder = Path(adapter).resolve()
        self.adapter_hash = folder_hash(folder)[:16]
        self.policy = f"{folder}@{self.adapter_hash}"
        for server in self.servers:
            self._load(server, folder)

    def _load(self, server: str, folder: Path) -> None:
        wanted = {"lora_name": self.policy, "lora_path": str(folder)}
        try:
            ask(f"{server}/v1/load_lora_adapter", wanted)
        except R3Error:  # no error if it is loaded, perhaps by another process
            if self.policy not in [model["id"] for model in self._models(server)]:
                raise

    def _models(self, server: str) -> list[dict]:
        return ask(f"{server}/v1/models").json()["data"]

    def _sample(self, server: str, body: dict) -> list[Completion]:
        """The completions of one request, in the order of their index."""
        url = f"{server}/v1/completions"
        choices = ask(url, body).json()["choices"]
        choices.sort(key=lambda choice: choice["index"])
        return [self._completion(choice, url) for choice in choices]

    def _completion(self, choice: dict, url: str) -> Completion:
        reason = choice["finish_reason"]
        if reason not in ("stop", "length"):  # "abort": a server that shuts down answers 200
            raise R3Error(f"{url} ended a sample early ({reason}): {FIX}")
        ids = choice["token_ids"]
        finished = ids[-1] in self.end_ids
        return Completion(ids, choice["logprobs"]["token_logprobs"], finished)


def ask(url: str, body: dict | None = None, timeout: float | None = None) -> httpx.Response:
    """POST `body` as JSON (None: GET); the answer.

    R3Error for none within `timeout` seconds (None: `TIMEOUT`) and for any status but 200.
    """
    method = "GET" if body is None else "POST"
    try:
        answer = CLIENT.request(method, url, json=body, timeout=timeout or TIMEOUT)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise R3Error(f"{url} does not answer ({type(error).__name__}: {error}): {FIX}") from error
    if answer.status_code != 200:
        text = " ".join(answer.text.split())[:500]
        raise R3Error(f"{url} answers {answer.status_code}: {text}: {FIX}")
    return answer
