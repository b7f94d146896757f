"""Peak memory: what `r3lib.plan` expects beside what a process really takes, in RAM, on a CPU.

    python benchmarks/memory.py [smoke] [nano] [smol] [--set KEY=VALUE ...] [--glibc]

A process for each profile samples one full batch of retries, learns from as many rows as one
learning pass has, and reports its peak resident set. Every turn is as long as its limit, on function
calling, whose prompts are the longer ones. How many rows and steps follow changes no peak.
Memory comes from tcmalloc where it is installed, as in `r3 reproduce`, unless --glibc is given.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from r3lib.config import load_profile
from r3lib.doctor import GIB, TCMALLOC
from r3lib.plan import LOOSE, device_of, plan_of

TASK = "function_calling"


def main() -> None:
    """Print a line for each profile: planned and measured peak, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profiles", nargs="*", default=["smoke", "nano", "smol"])
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--glibc", action="store_true", help="measure without tcmalloc")
    options = parser.parse_args()
    overrides = dict(pair.split("=", 1) for pair in options.set)
    preload = "" if options.glibc else TCMALLOC
    for name in options.profiles:
        plan = plan_of(load_profile(name, **overrides))
        plan = replace(plan, device=replace(device_of(), loose=1.0 if preload else LOOSE))
        command = [sys.executable, __file__, "--measure", name, json.dumps(overrides)]
        environment = os.environ | {"LD_PRELOAD": preload}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        measured = json.loads(done.stdout.splitlines()[-1])
        planned, most = max(map(plan.need, plan.memory())) / GIB, max(measured.values())
        after = ", ".join(f"{phase} {size:.2f}" for phase, size in measured.items())
        print(f"{name}: planned {planned:.2f} GiB, measured {most:.2f} (after {after}), ratio {planned / most:.2f}")


def measure(name: str, overrides: dict) -> None:
    """Sample and learn in this process; print the peak (GiB) after each as JSON."""
    from r3lib.study import Study

    p, peaks = load_profile(name, **overrides), {}
    one_pass = {"steps": 1, "failures_per_step": max(1, p.micro_batch // p.group_size)}
    with TemporaryDirectory() as folder:
        study = Study(name, TASK, folder, **overrides | one_pass)
        sample(study)
        peaks["sampling"] = peak()
        learn(study, folder)
        peaks["learning"] = peak()
    print(json.dumps(peaks))


def peak() -> float:
    """This process's largest resident set so far, in GiB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20


def sample(study) -> None:
    """One full batch of retries, none of which ends before its limit."""
    from r3lib.engines import SamplingParams

    p, runner = study.profile, study.runner(progress=False)
    runner.engine.end_ids = {-2}
    failed = failures(study, p.sample_batch)
    prompts = [runner.retry_prompt(f, noise(study, f.problem.id, p.reflection_tokens)) for f in failed]
    runner.engine.generate(prompts, 1, SamplingParams(p.retry_tokens))


def learn(study, folder: str) -> None:
    """A training step on reflections of full length, sampled by the real engine."""
    from r3lib.engines.transformers import TransformersEngine

    study.failures = partial(failures, study, study.profile.failures_per_step)
    trainer = study.trainer(0, Path(folder) / "run")
    trainer._engine = TransformersEngine(trainer.model, study.tokenizer, study.profile.sample_batch)
    trainer._engine.end_ids = {-2}
    trainer.train()


def failures(study, count: int) -> list:
    """Failed attempts of full length at the `count` problems with the longest prompts of a few more."""
    from r3lib.plan import SAMPLE
    from r3lib.sampler import Failure

    chat, tokens = study.chat, study.profile.attempt_tokens
    prompts = [(q, chat.start(study.task, q)) for q in study.problems("train", max(count, SAMPLE))]
    longest = sorted(prompts, key=lambda pair: -len(pair[1]))[:count]
    return [Failure(q, ids, noise(study, q.id, tokens), "", "missed") for q, ids in longest]


def noise(study, seed: str, tokens: int) -> list[int]:
    """Random token ids."""
    return Random(seed).choices(range(100, study.tokenizer.vocab_size), k=tokens)


if __name__ == "__main__":
    measure(sys.argv[2], json.loads(sys.argv[3])) if sys.argv[1:2] == ["--measure"] else main()
