"""What a run will need, worked out from the model's config alone: memory by part, disk, tokens, and what to change.

Sizes are in bytes and upper bounds: every turn as long as its limit, every first try a failure. Learning and sampling
take turns in one process, whose peak is the larger of the two. `benchmarks/memory.py` compares with measured peaks.
"""

import json
import os
import shlex
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from pathlib import Path
from random import Random

import psutil

from . import weights
from .chat import Chat
from .config import Profile, load_profile
from .doctor import GIB, TCMALLOC, reaches_hub
from .episodes import SECOND_TRIES
from .tasks import TASKS, load_task

TOLERANCE = 1.25  # a run is refused when it needs this many times the memory: the plan itself may be off by as much
NF4 = (4 + 0.127) / 8  # 4 bits a weight and its share of the doubly quantised constants (QLoRA, Dettmers et al., 2023)
ADAPTER = 4 + 4 + 8  # a parameter of an adapter in fp32, its gradient, AdamW's two moments
LIBRARIES = {"RAM": 0.6 * GIB, "GPU": 0.7 * GIB}  # what the imports take (measured); CUDA's context (an estimate)
TILE = 4096, 32768  # most tokens and vocabulary that TRL's fused head projects at once; there are never whole logits
TILE_COPIES = 8.25  # fp32 tensors of a tile's size in its backward on a CPU; on a GPU a Triton kernel needs one
CHOICE_COPIES = 5  # fp32 tensors of [rows, vocabulary] while our engine draws a token
PREFILL = 2048  # tokens of one prefill forward of our engine
SHARE, SERVER_CACHE = 0.92, 2 * GIB  # vLLM's own share of a GPU; its KV cache on a CPU, as we start it
PROMPT, TURN = 400, 40  # tokens of a first prompt and of a later request, where they cannot be measured
SAMPLE = 64  # problems and conversations whose lengths are measured
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
    """The longest texts in tokens: a first prompt, the two later requests, a conversation of the warm start."""

    prompt: int = PROMPT
    reflect: int = TURN
    retry: int = TURN
    conversation: int = 0
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
        p, s, size = self.profile, self.shape, 2 if self.device.name == "GPU" else 4
        linear = s.linear * NF4 + s.largest * size if p.quantization == "nf4" else s.linear * size
        own = {"libraries": LIBRARIES[self.device.name], "weights": linear + (s.parameters - s.linear) * size}
        own["adapters"] = p.lora_rank * s.ports * ADAPTER
        passes = [self._pass(self.learned, p.micro_batch, ceil(p.micro_batch / 4), size)]
        if p.warm_start_steps:
            passes.append(self._pass(self.lengths.conversation or self.sampled, p.micro_batch, p.micro_batch, size))
        phases = {"learning": own | max(passes, key=lambda parts: sum(parts.values()))}
        if p.engine == "transformers":
            return phases | {"sampling": own | self._sampling(size)}
        if not p.servers:
            phases["learning"]["vLLM server"] = self._server()
        return phases

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

    def _pass(self, length: int, rows: int, together: int, size: int) -> dict[str, float]:
        """Forward and backward over `rows`; `together` go through the model at once, the graphs of all are kept.

        A block keeps for the backward, for each token: what its two norms take and give (4 hidden), the heads'
        queries, keys, values and outputs (4 query), the MLP's two branches, activation and product (4 inner), LoRA's
        inner activations (rank a module), a row of the attention mask (length). Gradient checkpointing keeps its input.
        """
        s, gpu, tokens = self.shape, self.device.name == "GPU", rows * length
        block = 4 * (s.hidden + s.query + s.inner) + self.profile.lora_rank * s.modules + length
        kept = tokens * s.layers * (s.hidden if gpu else block)
        tile = min(together * length, TILE[0]) * min(s.vocabulary, TILE[1]) * (size if gpu else 4 * TILE_COPIES)
        return {"activations": (kept + together * length * block) * size * self.device.loose, "logits": tile}

    def _sampling(self, size: int) -> dict[str, float]:
        """A full batch at its last token, two copies of a layer's keys, and the larger of two transients."""
        p, s = self.profile, self.shape
        rows = min(p.sample_batch, max(p.test_problems, p.train_problems * p.mine_samples, self._step_rows))
        cache = rows * self.sampled * 2 * s.kv * (s.layers + 1) * size
        prefill = PREFILL * s.heads * (self.sampled - p.retry_tokens) * 4 * 2
        return {"KV cache": cache, "logits": max(rows * s.vocabulary * 4 * CHOICE_COPIES, prefill)}

    def _server(self) -> float:
        """What a vLLM server of our own takes beside us."""
        words = self.profile.vllm_options.replace("=", " ").split()
        if self.device.name == "RAM":
            return LIBRARIES["RAM"] + 2 * self.shape.parameters + SERVER_CACHE
        given = dict(zip(words, words[1:])).get("--gpu-memory-utilization", SHARE)
        return float(given) * self.device.memory

    @property
    def _step_rows(self) -> int:
        return self.profile.failures_per_step * self.profile.group_size

    def need(self, phase: str) -> float:
        """Bytes that a phase of `memory` needs."""
        return sum(self.memory()[phase].values())

    def share(self, phase: str) -> str:
        """What a phase needs of what is there, in words."""
        return f"{self.need(phase) / GIB:.1f} of {self.device.memory / GIB:.1f} GiB {self.device.name}"

    def state(self, phase: str) -> str:
        """ "ok", "warn" where the phase may not fit, "fail" where it surely does not."""
        need = self.need(phase) / self.device.memory
        return "ok" if need <= 1 else "warn" if need <= TOLERANCE else "fail"

    def mend(self, phase: str) -> str:
        """The least change that makes `phase` fit: a smaller share for vLLM, fewer rows, and only then NF4."""
        p, key = self.profile, {"learning": "micro_batch", "sampling": "sample_batch"}[phase]
        now = getattr(p, key)
        counts = [now >> halved for halved in range(now.bit_length())]
        if phase == "learning":  # micro_batch divides the rows of a step
            counts = [n for n in range(now, 0, -1) if self._step_rows % n == 0]
        for changes in product(dict.fromkeys([p.quantization, "nf4"]), counts, self._server_options()):
            changes = dict(zip(("quantization", key, "vllm_options"), changes))
            other = replace(self, profile=replace(p, **changes))
            if other.need(phase) <= self.device.memory:
                changed = [f"{k}={v}" for k, v in changes.items() if v != getattr(p, k)]
                return f"set {shlex.join(changed)}"
        return f"use a smaller model, or {self.device.name} of {ceil(other.need(phase) / GIB)} GiB"

    def _server_options(self) -> list[str]:
        """The profile's options for vLLM, and those that leave us more of the GPU, and it its weights."""
        p = self.profile
        if p.engine != "vllm" or p.servers or self.device.name != "GPU":
            return [p.vllm_options]
        least = 1.2 * 2 * self.shape.parameters / self.device.memory
        shares = [share / 100 for share in range(90, 0, -10) if share / 100 > least]
        return [p.vllm_options, *(f"{p.vllm_options} --gpu-memory-utilization {share}".strip() for share in shares)]

    def disk(self) -> dict[str, float]:
        """Bytes by part: what is downloaded or made of the model, the adapters, two checkpoints, the episodes."""
        p, adapter, fp32 = self.profile, self.profile.lora_rank * self.shape.ports, 4
        weights = {"base_model": 0, "smollm2": fp32 * self.shape.parameters}.get(p.model, 2 * self.shape.parameters)
        return {
            "model": 0 if Path(p.model).is_dir() else weights,
            "adapters": len(TASKS) * (p.seeds + (p.warm_start_steps > 0)) * fp32 * adapter,
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

    folder = folder_of(model)
    try:
        local = Path(folder).is_dir() or not reaches_hub()  # asking on would take half a minute
        config = AutoConfig.from_pretrained(folder, local_files_only=local)
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


def folder_of(model: str) -> str:
    """Where a profile's `model` has its config and tokenizer: as `weights.locate`, which would make SmolLM2."""
    return str({"base_model": weights.EMBEDDED, "smollm2": weights.SMOLLM2}.get(model, model))


def lengths_of(profile: Profile) -> Lengths:
    """Measured with the model's tokenizer on some problems of each task if both are on this machine, else assumed."""
    from transformers import AutoTokenizer

    try:
        if '"hub"' in json.dumps(profile.task_options):
            return Lengths()
        chat = Chat(AutoTokenizer.from_pretrained(folder_of(profile.model), local_files_only=True))
        tasks = [load_task(name, **profile.task_options.get(name, {})) for name in TASKS]
        found = [_longest(chat, task, profile.warm_start_steps > 0) for task in tasks]
    except Exception:  # no tokenizer, no data
        return Lengths()
    return Lengths(*map(max, zip(*found)), measured=True)


def _longest(chat: Chat, task, warm: bool) -> tuple[int, int, int, int]:
    prompts = [chat.start(task, problem) for problem in task.problems("train", SAMPLE, seed=0)]
    requests = [len(chat.follow([], [chat.end_id], text)) - 1 for text in (task.reflection_prompt, task.retry_prompt)]
    talks = [task.conversation(Random(index)) for index in range(SAMPLE if warm else 0)]
    whole = [chat.prompt([{"role": role, "content": text} for role, text, _ in talk]) for talk in talks]
    return max(map(len, prompts)), *requests, max(map(len, whole), default=0)


def refusal(profile: Profile) -> str:
    """Why this machine surely cannot train `profile`, and what to change.

    "" where it may, where no config can be had, and where FSDP or DeepSpeed spread the model over several GPUs.
    """
    spread = {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & set(os.environ)
    plan = None if spread else plan_of(profile)
    for phase in plan.memory() if plan else ():
        if plan.state(phase) == "fail":
            return f"{phase} needs {plan.share(phase)}: {plan.mend(phase)}"
    return ""


if __name__ == "__main__":  # `pipeline.reproduce` asks in a process of its own, which takes torch away with it
    print(refusal(load_profile(sys.argv[1], **json.loads(sys.argv[2]))))
