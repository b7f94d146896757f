"""Tokens a second: our engine beside `model.generate`, in one run, on the embedded model.

    python benchmarks/sampling.py [--prompts 32] [--group 8] [--tokens 160] [--repeats 5]

Both sample a group of reflections for each of the same failed attempts, with the same limit and temperature, in
one batch, as a training step of the nano profile does. The two take turns, so that a noisy machine slows both; the
ratio is the result.
"""

import argparse
import statistics
import time

import torch
from transformers.utils import logging

from r3lib.engines import SamplingParams
from r3lib.sampler import failures_of
from r3lib.study import Study


def main() -> None:
    """Measure and print one line a repeat, then the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("prompts", 32), ("group", 8), ("tokens", 160), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    logging.set_verbosity_error()
    study = Study("nano", "countdown")
    runner = study.runner(progress=False)
    model, prompts = runner.engine.model, failed_prompts(study, runner, options.prompts)
    runner.engine.batch_size = options.prompts * options.group
    ratios = []
    for repeat in range(options.repeats):
        ours = timed(by_engine, runner.engine, prompts, options, repeat)
        theirs = timed(by_generate, model, study.tokenizer, prompts, options, repeat)
        ratios.append(ours / theirs)
        print(f"engine {ours:,.0f}  generate {theirs:,.0f} tokens/s  ratio {ratios[-1]:.1f}")
    rows, threads = options.prompts * options.group, torch.get_num_threads()
    print(f"median ratio {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f}), {rows} rows of "
          f"up to {options.tokens} tokens, {threads} threads")  # fmt: skip


def failed_prompts(study, runner, count: int) -> list[list[int]]:
    """Prompts that ask for a reflection on a failed first try."""
    problems = study.problems("validation", 8 * count)
    failures = failures_of(problems, runner.first_tries(problems), runner)[:count]
    return [runner.reflection_prompt(failure) for failure in failures]


def timed(sample, *arguments) -> float:
    """Tokens a second of `sample`, which returns how many it made."""
    started = time.perf_counter()
    tokens = sample(*arguments)
    return tokens / (time.perf_counter() - started)


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


if __name__ == "__main__":
    main()
