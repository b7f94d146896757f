"""What a run will need, worked out from the model's config alone: memory by part, disk, tokens, and what to change.

Sizes are in bytes and upper bounds: every turn as long as its limit, every first try a failure. Learning and sampling
take turns in one process, whose peak is the larger of the two. `benchmarks/memory.py` compares with measured peaks.
"""

import json
import os
import re
import shlex
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count, product
from math import ceil, floor
from pathlib import Path

import psutil

from . import weights
from .chat import Chat
from .conditions import SECOND_TRIES
from .config import Profile, load_profile
from .doctor import GIB, TCMALLOC, reaches_hub
from .errors import R3Error
from .tasks import TASKS, load_task

TOLERANCE = 1.25  # a run is refused when it needs this many times the memory: the plan itself may be off by as much
NF4 = (4 + 0.127) / 8  # 4 bits a weight and its share of the doubly quantised constants (QLoRA, Dettmers et al., 2023)
ADAPTER = 4 + 4 + 8  # a parameter of an adapter in fp32, its gradient, AdamW's two moments
LIBRARIES = {"RAM": 0.6 * GIB, "GPU": 0.7 * GIB}  # what the imports take (measured); CUDA's context (an estimate)
TILE = 4096, 32768  # most tokens and vocabulary that TRL's fused head projects at once; there are never whole logits
TILE_COPIES = 8.25  # fp32 tensors of a tile's size in its backward on a CPU; on a GPU a Triton kernel needs one
CHOICE_COPIES = 5  # fp32 tensors of [rows, vocabulary] while our engine draws a token
PREFILL = 2048  # tokens of one prefill forward of our engine
SHARE, SERVER_CACHE = 0.92, 2 * GIB  # most of a GPU for vLLM, its own default; its KV cache on a CPU, as we start it
SERVER_WORK = 1 * GIB  # of a GPU, besides weights and KV cache: vLLM's activations and CUDA graphs (an estimate)
UTILIZATION = "--gpu-memory-utilization"
SHARE_OPTION = re.compile(r"--gpu[-_]memory[-_]utilization([ =]\S+)? ?")
PROMPT, TURN = 400, 40  # tokens of a first prompt and of a later request, where they cannot be measured
SAMPLE = 64  # problems whose lengths are measured
LOOSE = 1.5  # RAM for a byte of activations without tcmalloc: glibc leaves holes between them (1.3 to 1.6 measured)


@dataclass(frozen=True)
class Device:
    """Where the model lies: a GPU (16 bits, gradient checkpointing) or the RAM (fp32, none), with `memory` bytes."""

    name: str
    memory: float
    loose: float = 1.0  # bytes that the allocator holds for one of activations


@dataclass(frozen=True)
class Shape:
    """A model's sizes. `linear`: weights of the linear layers but the head, which NF4 packs and LoRA adapts."""

    parameters: int
    linear: int
    largest: int  # weights of the largest of these layers
    ports: int  # their inputs and outputs: LoRA of rank r has r times as many parameters
    modules: float  # how many of them a block has
    layers: int
    heads: int
    hidden: int
    inner: int
    query: int
    kv: int
    vocabulary: int


@dataclass(frozen=True)
class Lengths:
    """The longest texts in tokens: a first prompt, the two later requests."""

    prompt: int = PROMPT
    reflect: int = TURN
    retry: int = TURN
    measured: bool = False


@dataclass(frozen=True)
class Plan:
    """What `profile` needs of `device`, for a model of `shape` and texts of `lengths`."""

    profile: Profile
    shape: Shape
    lengths: Lengths
    device: Device

    def memory(self) -> dict[str, dict[str, float]]:
        """Bytes by phase and part; the phases are "learning" and, unless vLLM does it elsewhere, "sampling"."""
        own = self._own()
        phases = {"learning": own | self._learning()}
        if self.profile.engine == "transformers":
            return phases | {"sampling": own | self._sampling()}
        if self.profile.own_server:
            phases["learning"]["vLLM server"] = self._server()
        return phases

    @property
    def size(self) -> int:
        """Bytes of a number of the trainer."""
        return 2 if self.device.name == "GPU" else 4

    @property
    def learned(self) -> int:
        """Tokens of the longest row that a training step learns from: to its reflection, or to the retry."""
        p, n = self.profile, self.lengths
        return self.sampled if p.mask != "reflection" else self.sampled - n.retry - p.retry_tokens

    @property
    def sampled(self) -> int:
        """Tokens of the longest row that is sampled: to the end of the retry."""
        p, n = self.profile, self.lengths
        return n.prompt + p.attempt_tokens + n.reflect + p.reflection_tokens + n.retry + p.retry_tokens

    def _own(self) -> dict[str, float]:
        """What our process holds in every phase."""
        p, s, size = self.profile, self.shape, self.size
        linear = s.linear * NF4 + s.largest * size if p.quantization == "nf4" else s.linear * size
        own = {"libraries": LIBRARIES[self.device.name], "weights": linear + (s.parameters - s.linear) * size}
        return own | {"adapters": p.lora_rank * s.ports * ADAPTER}

    def _learning(self) -> dict[str, float]:
        """A training step's forward and backward."""
        rows = self.profile.micro_batch
        return self._pass(self.learned, rows, ceil(rows / 4))

    def _pass(self, length: int, rows: int, together: int) -> dict[str, float]:
        """Forward and backward over `rows`; `together` go through the model at once, the graphs of all are kept.

        A block keeps for the backward, for each token: what its two norms take and give (4 hidden), the heads'
        queries, keys, values and outputs (4 query), the MLP's two branches, activation and product (4 inner), LoRA's
        inner activations (rank a module), a row of the attention mask (length). Gradient checkpointing keeps its input.
        """
        s, gpu, size, tokens = self.shape, self.device.name == "GPU", self.size, rows * length
        block = 4 * (s.hidden + s.query + s.inner) + self.profile.lora_rank * s.modules + length
        kept = tokens * s.layers * (s.hidden if gpu else block)
        tile = min(together * length, TILE[0]) * min(s.vocabulary, TILE[1]) * (size if gpu else 4 * TILE_COPIES)
        return {"activations": (kept + together * length * block) * size * self.device.loose, "logits": tile}

    def _sampling(self) -> dict[str, float]:
        """A full batch at its last token, two copies of a layer's keys, and the larger of two transients."""
        p, s = self.profile, self.shape
        rows = min(p.sample_batch, max(p.test_problems, p.train_problems * p.mine_samples, self._step_rows))
        cache = rows * self.sampled * 2 * s.kv * (s.layers + 1) * self.size
        prefill = PREFILL * s.heads * (self.sampled - p.retry_tokens) * 4 * 2
        return {"KV cache": cache, "logits": max(rows * s.vocabulary * 4 * CHOICE_COPIES, prefill)}

    def _server(self) -> float:
        """What a vLLM server of our own takes beside us. Its share of a GPU does not count its CUDA context."""
        if self.device.name == "RAM":
            return LIBRARIES["RAM"] + self.size * self.shape.parameters + SERVER_CACHE
        return LIBRARIES["GPU"] + self.server_share * self.device.memory

    @property
    def server_share(self) -> float:
        """The share of the GPU for a vLLM server of our own: the profile's, or else what the trainer leaves.

        The trainer keeps TOLERANCE times what it needs, unless the server then had less than `server_least`.
        """
        if (given := self.profile.vllm_option(UTILIZATION)) is not None:
            return _share(given)
        memory, trainer = self.device.memory, sum((self._own() | self._learning()).values())
        left = memory - LIBRARIES["GPU"] - TOLERANCE * trainer
        return min(SHARE, max(floor(100 * left / memory), ceil(100 * self.server_least / memory)) / 100)

    @property
    def server_least(self) -> float:
        """The least that such a server needs of a GPU: its weights, and KV cache for a group of the longest rows."""
        p, s = self.profile, self.shape
        packed = p.vllm_option("--quantization", "-q") is not None
        weights = 2 * (s.parameters - s.linear) + s.linear * (NF4 if packed else 2)
        return weights + SERVER_WORK + p.group_size * self.sampled * 2 * s.kv * s.layers * 2

    def _strain(self, phase: str) -> float:
        """What a phase needs by what it may have. A server's share of a GPU is taken whole, and it has no more."""
        if self.device.name != "GPU" or not self.profile.own_server:
            return self.need(phase) / self.device.memory
        server, share = self._server(), self.server_share * self.device.memory
        room = max(self.device.memory - server, 1)
        return max((self.need(phase) - server) / room, self.server_least / share)

    @property
    def _step_rows(self) -> int:
        return self.profile.failures_per_step * self.profile.group_size

    def need(self, phase: str) -> float:
        """Bytes that a phase of `memory` needs."""
        return sum(self.memory()[phase].values())

    def share(self, phase: str) -> str:
        """What a phase needs of what is there, in words."""
        there = f"{self.device.memory / GIB:.1f} GiB {self.device.name}"
        if self.device.name == "GPU" and self.profile.own_server:
            share = self.server_share
            if self.server_least > share * self.device.memory:
                return f"{self.server_least / GIB:.1f} GiB for vLLM, whose share is {share:g} of {there}"
        return f"{self.need(phase) / GIB:.1f} of {there}"

    def state(self, phase: str) -> str:
        """ "ok", "warn" where the phase may not fit, "fail" where it surely does not."""
        strain = self._strain(phase)
        return "ok" if strain <= 1 else "warn" if strain <= TOLERANCE else "fail"

    def mend(self, phase: str) -> str:
        """The least change that makes `phase` fit: our share for vLLM, fewer rows, and only then NF4."""
        p, key = self.profile, {"learning": "micro_batch", "sampling": "sample_batch"}[phase]
        now = getattr(p, key)
        counts = [now >> halved for halved in range(now.bit_length())]
        if phase == "learning":  # micro_batch divides the rows of a step
            counts = [n for n in range(now, 0, -1) if self._step_rows % n == 0]
        packed = [p.quantization] if p.own_server else [p.quantization, "nf4"]  # which a server would have to be, too
        options = dict.fromkeys([p.vllm_options, SHARE_OPTION.sub("", p.vllm_options).strip()])
        for changes in product(dict.fromkeys(packed), counts, options):
            changes = dict(zip(("quantization", key, "vllm_options"), changes))
            other = replace(self, profile=replace(p, **changes))
            if other._strain(phase) <= 1:
                changed = [f"{k}={v}" for k, v in changes.items() if v != getattr(p, k)]
                return f"set {shlex.join(changed)}"
        sizes = (replace(self.device, memory=gib * GIB) for gib in count(1))
        enough = next(device for device in sizes if replace(other, device=device)._strain(phase) <= 1)
        elsewhere = ", or start vLLM on another machine and set servers=" if p.own_server else ""
        return f"use a smaller model, or {self.device.name} of {enough.memory // GIB} GiB{elsewhere}"

    def disk(self) -> dict[str, float]:
        """Bytes by part: what is downloaded or made of the model, the adapters, two checkpoints, the episodes."""
        p, adapter, fp32 = self.profile, self.profile.lora_rank * self.shape.ports, 4
        weights = {"base_model": 0, "smollm2": fp32 * self.shape.parameters}.get(p.model, 2 * self.shape.parameters)
        return {
            "model": 0 if Path(p.model).is_dir() else weights,
            "adapters": len(TASKS) * p.seeds * fp32 * adapter,
            "checkpoints": 2 * (fp32 + 8) * adapter,
            "episodes": 4 * self.tokens()["evaluation"],  # characters a token
        }

    def tokens(self) -> dict[str, int]:
        """The most tokens that are sampled, by what for, and that are "learned" from; over all tasks and seeds."""
        p, tasks = self.profile, len(TASKS)
        episode = p.attempt_tokens + p.reflection_tokens + len(SECOND_TRIES) * p.retry_tokens
        policies = 1 + p.seeds * tasks  # with those of the other tasks
        rows = p.seeds * p.steps * self._step_rows
        trained = {"reflection": p.reflection_tokens, "retry": p.retry_tokens}
        return {
            "mining": tasks * p.train_problems * p.mine_samples * p.attempt_tokens,
            "evaluation": tasks * policies * p.test_problems * episode,
            "training": tasks * rows * (p.reflection_tokens + p.retry_tokens),
            "learned": tasks * rows * sum(trained[turn] for turn in p.mask.split("+")),
        }


def plan_of(profile: Profile, gpu_memory: float | None = None) -> Plan | None:
    """The plan for this machine or for a GPU of `gpu_memory` GiB; None where the model's config cannot be had."""
    shape = shape_of(profile.model)
    return shape and Plan(profile, shape, lengths_of(profile), device_of(gpu_memory))


def device_of(gpu_memory: float | None = None) -> Device:
    """A GPU of `gpu_memory` GiB, else this process's GPU, else the RAM within the limit of the cgroup."""
    import torch

    if gpu_memory:
        return Device("GPU", gpu_memory * GIB)
    if torch.cuda.is_available():
        return Device("GPU", torch.cuda.get_device_properties(weights.device()).total_memory)
    limits = [psutil.virtual_memory().total]
    with suppress(OSError, ValueError):  # no cgroup (v2), or "max"
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return Device("RAM", min(limits), 1.0 if TCMALLOC else LOOSE)


def shape_of(model: str) -> Shape | None:
    """Build the model without weights and measure it; None for a hub id while offline, or a folder without a config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(**source_of(model))
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(config)
    except Exception:  # whatever stands in the way, there is nothing to plan with
        return None
    head, text = whole.get_output_embeddings(), config.get_text_config()
    linear = [m for m in whole.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shape(
        parameters=sum(p.numel() for p in whole.parameters()),
        linear=sum(m.weight.numel() for m in linear),
        largest=max(m.weight.numel() for m in linear),
        ports=sum(m.in_features + m.out_features for m in linear),
        modules=len(linear) / text.num_hidden_layers,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        hidden=text.hidden_size,
        inner=text.intermediate_size,
        query=text.num_attention_heads * size,
        kv=text.num_key_value_heads * size,
        vocabulary=text.vocab_size,
    )


def source_of(model: str) -> dict:
    """Arguments of `from_pretrained` for the config and tokenizer of a profile's `model`, without making SmolLM2."""
    if model == "smollm2" and not weights.SMOLLM2.is_dir():
        return weights.gguf()
    folder = str({"base_model": weights.EMBEDDED, "smollm2": weights.SMOLLM2}.get(model, model))
    local = Path(folder).is_dir() or not reaches_hub()  # asking on would take half a minute
    return {"pretrained_model_name_or_path": folder, "local_files_only": local}


def lengths_of(profile: Profile) -> Lengths:
    """Measured with the model's tokenizer on some problems of each task if both are on this machine, else assumed."""
    from transformers import AutoTokenizer

    try:
        if '"hub"' in json.dumps(profile.task_options):
            return Lengths()
        source = source_of(profile.model) | {"local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        chat = Chat(tokenizer, chat_template_kwargs=profile.chat_template_kwargs)
        tasks = [load_task(name, **profile.task_options.get(name, {})) for name in TASKS]
        found = [_longest(chat, task) for task in tasks]
    except Exception:  # no tokenizer, no data
        return Lengths()
    return Lengths(*map(max, zip(*found)), measured=True)


def _longest(chat: Chat, task) -> tuple[int, int, int]:
    problems = task.problems("train", SAMPLE, seed=0)
    prompts = [chat.start(task, problem) for problem in problems]
    again = max((task.second_turn(task.retry_prompt, problem) for problem in problems), key=len)
    requests = [len(chat.follow([], [chat.end_id], text)) - 1 for text in (task.reflection_prompt, again)]
    return max(map(len, prompts)), *requests


def _share(text: str) -> float:
    with suppress(ValueError):
        if 0 < (share := float(text)) <= 1:
            return share
    raise R3Error(f"vllm_options: {UTILIZATION} {text!r}: write a share of the GPU, for example 0.4")


def server_options(profile: Profile) -> str:
    """Arguments for a vLLM server of our own: the profile's, and on a GPU what else lets it live beside the trainer.

    That is its share of the GPU, and a context no longer than its KV cache: vLLM would not start with less cache than
    one row of the model's whole context takes. R3Error where the weights and a small KV cache do not fit the share.
    """
    if weights.device() == "cpu" or not (plan := plan_of(profile)):
        return profile.vllm_options
    if plan.server_least > TOLERANCE * plan.server_share * plan.device.memory:
        raise R3Error(f"engine=vllm needs {plan.share('learning')}: {plan.mend('learning')}")
    ours = {UTILIZATION: f"{plan.server_share:g}", "--max-model-len": "auto"}
    lacking = [f"{name} {value}" for name, value in ours.items() if profile.vllm_option(name) is None]
    return " ".join([*lacking, profile.vllm_options]).strip()


def doubts(profile: Profile) -> list[list[str]]:
    """["warn" or "fail", why and what to change] for each phase of `profile` that may not fit this machine, or cannot.

    Empty also where no config can be had, and where FSDP or DeepSpeed spread the model over several GPUs.
    """
    spread = {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & set(os.environ)
    plan = None if spread else plan_of(profile)
    states = [(plan.state(phase), phase) for phase in plan.memory()] if plan else []
    return [[s, f"{phase} needs {plan.share(phase)}: {plan.mend(phase)}"] for s, phase in states if s != "ok"]


def heed(found: list[list[str]], quiet: bool = False) -> None:
    """Print the warnings among `doubts` to stderr unless `quiet`. Raises R3Error for a failure."""
    for state, why in found:
        if state == "fail":
            raise R3Error(why)
        if not quiet:
            print(f"r3: warning: {why}", file=sys.stderr)


if __name__ == "__main__":  # `pipeline.reproduce` asks in a process of its own, which takes torch away with it
    print(json.dumps(doubts(load_profile(sys.argv[1], **json.loads(sys.argv[2])))))
