"""The command `r3`: reproduce, sample, doctor, report, fetch, base-model."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .errors import R3Error

STAGES = ("baseline", "mine", "evaluate")


def main(argv: list[str] | None = None) -> int:
    """Run one command; return 0, 1 (a check failed), 2 (a stated error) or 130 (interrupted)."""
    options = parser().parse_args(argv)
    if argv is None and options.run is sample:  # the kernels of `reproduce` have it by themselves
        from .provenance import restart_with_allocator

        restart_with_allocator()
    try:
        return options.run(options)
    except R3Error as error:
        print(f"r3: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "r3: interrupted: the same command, without --fresh, goes on from what is finished",
            file=sys.stderr,
        )
        return 130


def parser() -> argparse.ArgumentParser:
    """The command line; heavy imports wait until a command runs."""
    top = argparse.ArgumentParser(prog="r3", description="Reflect, Retry, Reward, reproduced.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable, about: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=about, description=about)
        one.set_defaults(run=run)
        return one

    one = command("reproduce", reproduce, "Run the notebooks; write tables, figures and report.")
    add_study(one)
    one.add_argument("--from", dest="start", metavar="NN", help="first notebook, for example 03")
    one.add_argument("--only", metavar="NN", help="the one notebook to run")
    one.add_argument("--fresh", action="store_true", help="compute everything again")
    one.add_argument("--verbose", action="store_true", help="show what the notebooks print")

    one = command("sample", sample, "Sample one step of a task, or the share of one process.")
    one.add_argument("stage", choices=STAGES, help="what to sample")
    add_study(one)
    share = "share I (from 0) of N; without, what is left"
    one.add_argument("--shard", type=_shard, metavar="I/N", help=share)
    one.add_argument("--seed", type=int, help="of the training that is evaluated (default: 0)")

    one = command("doctor", doctor, "Check this machine for a profile; suggest fixes.")
    add_study(one, results=False)
    one.add_argument("--gpu-memory", type=_gib, metavar="GIB", help="estimate for such a GPU")

    one = command("report", report, "Write report.html again from the results that are there.")
    add_study(one, task=False)

    one = command("fetch", fetch, "Fetch real weights that a profile names, without the hub too.")
    one.add_argument("model", help="qwen2.5-coder-0.5b (1 GB on disk) or qwen2.5-coder-1.5b (3 GB)")

    one = command("base-model", base_model, "Pretrain the embedded model (44 minutes; resumes).")
    one.add_argument("--out", help="folder of the model (default: data/base_model)")
    one.add_argument("--seed", type=int)
    one.add_argument("--steps", type=int, help="number of training steps (default: as shipped)")
    return top


def add_study(one: argparse.ArgumentParser, task: bool = True, results: bool = True) -> None:
    """Add the options that name a study: --profile, --set, and what else the command reads."""
    about = "nano (default), smoke, smol, qwen, colab, paper, or a .yaml file of your own"
    one.add_argument("--profile", default="nano", help=about)
    pairs = {"nargs": "+", "action": "extend", "default": [], "metavar": "KEY=VALUE"}
    one.add_argument("--set", **pairs, help="override settings")
    if task:
        about = "all (default): those of the profile; or one, or your own as file.py:Class"
        one.add_argument("--task", default="all", help=about)
    if results:
        about = "folder of the results"
        one.add_argument("--results", type=os.path.abspath, default=Path("results"), help=about)


def reproduce(options) -> int:
    from . import pipeline

    pipeline.reproduce(
        options.profile, options.task, options.start, options.only, options.fresh,
        _overrides(options.set), options.results, verbose=options.verbose,
    )  # fmt: skip
    return 0


def sample(options) -> int:
    from .files import claimed

    seed = []
    if options.stage == "evaluate":
        seed = [options.seed or 0]
    elif options.seed is not None:
        raise R3Error(f"r3 sample {options.stage} has no --seed: leave it out")
    study = study_of(options)
    with claimed(study.results, shared=options.shard is not None):
        print(getattr(study, options.stage)(*seed, part=options.shard))
    return 0


def doctor(options) -> int:
    from . import doctor

    overrides = _overrides(options.set)
    return doctor.report(options.profile, options.task, overrides, options.gpu_memory)


def report(options) -> int:
    from .config import ROOT, load_profile
    from .report import write_report

    profile = load_profile(options.profile, **_overrides(options.set))
    print(write_report(ROOT / options.results / profile.name))
    return 0


def fetch(options) -> int:
    from . import gguf

    print(gguf.fetch(options.model))
    return 0


def base_model(options) -> int:
    from .weights import EMBEDDED

    command = [sys.executable, str(EMBEDDED / "pretrain.py")]
    for name in ("out", "seed", "steps"):
        if getattr(options, name) is not None:
            command += [f"--{name}", str(getattr(options, name))]
    return subprocess.run(command).returncode


def study_of(options):
    """The study that the options name."""
    from .config import load_profile
    from .study import Study

    profile = load_profile(options.profile, **_overrides(options.set))
    task, *others = profile.tasks(options.task)
    if others:
        raise R3Error("this takes one task: add --task, for example --task countdown")
    return Study(profile, task, options.results)


def _shard(text: str) -> tuple[int, int]:
    i, _, n = text.partition("/")
    if not (i.isdigit() and n.isdigit() and int(i) < int(n)):
        raise argparse.ArgumentTypeError(
            f"{text!r}: write I/N with I from 0 to N - 1, for example 0/4"
        )
    return int(i), int(n)


def _gib(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: write GiB above 0, for example 15")
    return float(text)


def _overrides(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise R3Error(f"--set {pair!r}: write KEY=VALUE, for example --set seeds=3")
    return dict(pair.split("=", 1) for pair in pairs)
