"""Tokens a second: the vLLM engine and our own beside `model.generate`, in one run, on SmolLM2-135M-Instruct.

    R3_VLLM_PYTHON=.venv-vllm/bin/python .venv/bin/python benchmarks/vllm_sampling.py [--dtype bfloat16] [--prompts 8]
        [--group 8] [--tokens 128] [--repeats 3] [--adapter] [--options "..."]

All three sample a group of reflections for each of the same failed attempts, with the same weights, precision, limit
and temperature, as a training step does; with --adapter through a LoRA adapter of rank 16 on all linear layers. They
take turns, so that a noisy machine slows all; the ratios are the result. A sample counts up to its end token, with it:
what `model.generate` pads a finished row with does not.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from sampling import by_engine, by_generate, failed_prompts, timed
from transformers.utils import logging

from r3lib.engines.transformers import TransformersEngine
from r3lib.engines.vllm import VLLMEngine
from r3lib.engines.vllm_server import Server
from r3lib.sampler import Limits, RolloutSampler
from r3lib.study import Study


def main() -> None:
    """Measure and print one line a repeat, then the median ratios."""
    options = arguments()
    logging.set_verbosity_error()
    study = Study("smol", "countdown")
    model = study.model().to(getattr(torch, options.dtype)).eval()
    with tempfile.TemporaryDirectory() as folder, serve(study, folder, options) as server:
        vllm, own = VLLMEngine([server], study.tokenizer), TransformersEngine(model, study.tokenizer)
        runner = RolloutSampler(vllm, study.chat, study.task, Limits(attempt=study.profile.attempt_tokens))
        prompts = failed_prompts(study, runner, options.prompts)
        if options.adapter:
            own.model = model = get_peft_model(model, study.lora()).eval()
            model.save_pretrained(folder)
            vllm.sync(Path(folder))
        print(f"{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens", flush=True)
        by_engine(vllm, prompts, options, 0)  # a server's first batch is slower
        sample = {
            "vllm": lambda seed: by_engine(vllm, prompts, options, seed),
            "transformers": lambda seed: by_engine(own, prompts, options, seed),
            "generate": lambda seed: by_generate(model, study.tokenizer, prompts, options, seed),
        }
        report([turn(sample, repeat) for repeat in range(options.repeats)], options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("prompts", 8), ("group", 8), ("tokens", 128), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--adapter", action="store_true", help="sample through a LoRA adapter")
    parser.add_argument("--options", default="", help="further arguments of the server")
    return parser.parse_args()


def serve(study: Study, folder: str, options) -> Server:
    """A server of the model in the precision that is asked for; its log lies in `folder`."""
    further = ["--dtype", options.dtype, *options.options.split()]
    return Server(study.model_path, os.environ["R3_VLLM_PYTHON"], study.profile.lora_rank, f"{folder}/log", further)


def turn(sample: dict, seed: int) -> dict[str, float]:
    """Tokens a second of each of `sample`, functions of a seed."""
    rates = {name: timed(function, seed) for name, function in sample.items()}
    print("  ".join(f"{name} {rate:,.0f} tokens/s" for name, rate in rates.items()), flush=True)
    return rates


def report(turns: list[dict], options) -> None:
    for name in ("vllm", "transformers"):
        ratios = [rates[name] / rates["generate"] for rates in turns]
        print(f"{name}: {statistics.median(ratios):.2f} times generate ({min(ratios):.2f} to {max(ratios):.2f})")
    rows, policy = options.prompts * options.group, "LoRA" if options.adapter else "base"
    print(f"{policy}, {options.dtype}, {rows} rows of up to {options.tokens} tokens, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
