"""Tokens a second: our engine, or vLLM's too, beside `model.generate`, in one run.

    python benchmarks/sampling.py [--model base_model] [--prompts 32] [--group 8] [--tokens 160]
    R3_VLLM_PYTHON=.venv-vllm/bin/python python benchmarks/sampling.py --model smollm2 --vllm

Each samples a group of reflections for each of the same failed attempts, with the same weights,
precision, limit and temperature, in one batch, as a training step does; with `--batches 64 128`
ours does so in batches of so many rows. They take turns, so that a noisy machine slows all; the
ratios are the result. A sample counts up to its end token, with it.
"""

import argparse
import os
import statistics
import tempfile
import time
from contextlib import nullcontext
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from r3lib.chat import Chat
from r3lib.engines import SamplingParams
from r3lib.engines.transformers import TransformersEngine
from r3lib.engines.vllm import VLLMEngine
from r3lib.engines.vllm_server import Server
from r3lib.sampler import Limits, RolloutSampler, failures_of
from r3lib.tasks import load_task
from r3lib.weights import locate


def main() -> None:
    """Measure, print one line a repeat, then the median ratios."""
    options = arguments()
    logging.set_verbosity_error()
    path = locate(options.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    folder = tempfile.mkdtemp()
    if options.rank:
        lora = LoraConfig(r=options.rank, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, lora).eval()
        model.save_pretrained(folder)
    own = TransformersEngine(model, tokenizer, options.prompts * options.group)
    prompts = failed_prompts(own, tokenizer, options.prompts)
    with vllm_server(path, options) as server:
        sample = {"generate": lambda seed: by_generate(model, tokenizer, prompts, options, seed)}
        for rows in options.batches or [own.batch_size]:
            engine = TransformersEngine(model, tokenizer, rows)
            sample[f"ours, {rows}"] = partial(by_engine, engine, prompts, options)
        if server is not None:
            vllm = VLLMEngine([server.url], tokenizer)
            vllm.sync(folder if options.rank else None)
            by_engine(vllm, prompts, options, 0)  # a server's first batch is slower
            sample["vllm"] = lambda seed: by_engine(vllm, prompts, options, seed)
        report([turn(sample, repeat) for repeat in range(options.repeats)], options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="base_model", help="as in a profile")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--vllm", action="store_true", help="also a vLLM server of our own")
    parser.add_argument("--batches", type=int, nargs="+", help="rows in each of our batches")
    parser.add_argument("--rank", type=int, default=0, help="of a random LoRA adapter; 0: none")
    for name, default in (("prompts", 32), ("group", 8), ("tokens", 160), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def vllm_server(path: str, options):
    """A server of the same weights in the same precision, if asked for."""
    if not options.vllm:
        return nullcontext()
    log = os.path.join(tempfile.mkdtemp(), "log")
    further = ["--dtype", options.dtype]
    return Server(path, os.environ["R3_VLLM_PYTHON"], log=log, options=further)


def failed_prompts(engine, tokenizer, count: int) -> list[list[int]]:
    """Prompts that ask for a reflection on a failed first try."""
    task = load_task("countdown")
    chat = Chat(tokenizer, engine.model.generation_config)
    sampler = RolloutSampler(engine, chat, task, Limits(max_attempt_length=64))
    problems = task.problems("validation", 8 * count, seed=0)
    failures = failures_of(problems, sampler.first_tries(problems), sampler)[:count]
    return [sampler.reflection_prompt(failure) for failure in failures]


def by_engine(engine, prompts, options, seed) -> int:
    seeds = [seed * len(prompts) + i for i in range(len(prompts))]
    groups = engine.generate(prompts, options.group, SamplingParams(options.tokens, 1.0), seeds)
    return sum(len(completion.ids) for group in groups for completion in group)


def by_generate(model, tokenizer, prompts, options, seed) -> int:
    torch.manual_seed(seed)
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    sampled = model.generate(
        **batch, max_new_tokens=options.tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        num_return_sequences=options.group,
    )  # fmt: skip
    ended = sampled[:, batch["input_ids"].shape[1] :] == tokenizer.eos_token_id
    return int((ended.cumsum(1) - ended.int() == 0).sum())  # no end token before


def turn(sample: dict, seed: int) -> dict[str, float]:
    """Tokens a second of each of `sample`, functions of a seed that return how many they made."""
    rates = {}
    for name, function in sample.items():
        started = time.perf_counter()
        tokens = function(seed)
        rates[name] = tokens / (time.perf_counter() - started)
    print("  ".join(f"{name} {rate:,.0f} tokens/s" for name, rate in rates.items()), flush=True)
    return rates


def report(turns: list[dict], options) -> None:
    for name in sorted(set(turns[0]) - {"generate"}):
        ratios = [rates[name] / rates["generate"] for rates in turns]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name}: {statistics.median(ratios):.2f} times generate ({spread})")
    rows = options.prompts * options.group
    limit, threads = options.tokens, torch.get_num_threads()
    print(f"{options.model}, {options.dtype}, {rows} rows of up to {limit} tokens, {threads} threads")


if __name__ == "__main__":
    main()
