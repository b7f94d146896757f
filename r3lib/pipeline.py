"""The study from end to end: papermill over the numbered notebooks, then the report."""

import io
import json
import os
import re
import sys
import time
from pathlib import Path

import papermill
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbformat import read
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from .config import ROOT, Profile, load_profile
from .doctor import Run, check_run, outcome
from .doctor import time as expected_time
from .errors import R3Error, Stale
from .files import claimed
from .provenance import allocator, reaches_hub
from .render import render

NOTEBOOKS = ROOT / "notebooks"
STUDY = "05"  # its last notebook; a later one runs alone
NEWS = re.compile(  # lines shown at once
    r"(cached|running|step) .+|.*no group has variance.+|\w+ left out: .+"
)


def reproduce(
    profile: str = "nano",
    task: str = "all",
    start: str | None = None,
    only: str | None = None,
    fresh: bool = False,
    overrides: dict | None = None,
    results: Path | str = "results",
    log=print,
    verbose: bool = False,
) -> Path:
    """Run notebooks 00 to 05 (from `start`, or `only` one); return the path of the report.

    Before notebook 04 has ever run there is no report, and the path is that of the results.
    `results`, if relative, lies beside the notebooks. Executed copies go to
    `results/<profile>/executed`, pages of them to `notebooks`. R3Error before anything runs: an
    unknown profile, setting, task, notebook or parameter, what `check_run` refuses, a folder that
    cannot be written or that another run holds. R3Error later: a cell fails.
    """
    overrides = overrides or {}
    settings = load_profile(profile, **overrides)
    given = dict(profile=profile, task=task, overrides=json.dumps(overrides), results=str(results))
    notebooks = choose(start, only)
    for notebook in notebooks:
        check_parameters(notebook, given)
    run = Run(settings, settings.tasks(task))
    check_run(run)
    log(f"time: {outcome(expected_time, run)[1]}")
    kernel = kernel_of(settings, fresh)
    started = time.time()
    folder = NOTEBOOKS.parent / results / settings.name
    with claimed(folder):
        for number, notebook in enumerate(notebooks, 1):
            log(f"{notebook.stem} ({number} of {len(notebooks)})")
            copy = folder / "executed" / notebook.name
            execute(notebook, copy, given, kernel, News(log, verbose))
            render(copy, folder / "notebooks")
    log(f"{time.time() - started:.0f} s in all")
    return report_of(folder, log)


def report_of(folder: Path, log) -> Path:
    """The report on the results in `folder`, or `folder` where there are no tables yet."""
    if not (folder / "tables" / "comparisons.csv").exists():
        log("no report yet, notebook 04 writes its tables")
        return folder
    from .report import write_report

    try:
        report = write_report(folder)
    except Stale as error:  # of notebooks that are run one by one
        log(f"no report: {error}")
        return folder
    log(f"report: {report}")
    return report


def choose(start: str | None, only: str | None) -> list[Path]:
    """The notebooks to run, in the order of their numbers."""
    found = {path.name[:2]: path for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}
    if not found:
        raise R3Error(
            f"no notebooks in {NOTEBOOKS}: run r3 from a source checkout (pip install -e .)"
        )
    if only and start:
        raise R3Error(f"--from {start} and --only {only}: give one of them")
    wanted = (only or start or "00").zfill(2)
    if (only or start) and wanted not in found:
        raise R3Error(f"no notebook {wanted!r}: known: {', '.join(found)}")
    if only or wanted > STUDY:
        return [found[wanted]]
    return [path for number, path in found.items() if wanted <= number <= STUDY]


def check_parameters(notebook: Path, given: dict) -> None:
    """R3Error unless the parameters cell declares all of `given`: papermill would only warn."""
    declared = papermill.inspect_notebook(str(notebook))
    absent = [name for name in given if name not in declared]
    if absent:
        raise R3Error(
            f"{notebook.name}: its parameters cell does not declare {', '.join(absent)}: add it"
        )


def kernel_of(profile: Profile, fresh: bool) -> type[AsyncKernelManager]:
    """A manager of kernels that run this very interpreter, whatever kernel specs there are."""
    env = {
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    needs_hub = profile.model != "base_model" or '"hub"' in json.dumps(profile.task_options)
    if not needs_hub or not reaches_hub():  # the cache is then read without retries
        env["HF_HUB_OFFLINE"] = "1"
    env |= allocator()
    if fresh or os.environ.get("R3_FRESH") == "1":
        env["R3_FRESH"] = str(time.time_ns())  # what this run made afresh counts as cached later
    launcher = [sys.executable, "-m", "ipykernel_launcher"]
    command = [*launcher, "-f", "{connection_file}", "--log-level=ERROR"]

    class ThisInterpreter(AsyncKernelManager):
        kernel_spec = KernelSpec(argv=command, env=env, display_name="Python 3", language="python")

    return ThisInterpreter


def execute(notebook: Path, copy: Path, given: dict, kernel: type, news: "News") -> None:
    """Run one notebook into its executed copy; R3Error names the cell that fails."""
    sources = [cell.source for cell in read(notebook, 4).cells]
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        papermill.execute_notebook(
            notebook, copy, given, kernel_name="python3", language="python",
            progress_bar={"leave": False, "disable": None},  # none where there is no terminal
            stdout_file=news, stderr_file=news, kernel_manager_class=kernel,
        )  # fmt: skip
    except PapermillExecutionError as error:
        place = sources.index(error.source) + 1 if error.source in sources else "of parameters"
        line, why = error.source.strip().split("\n")[0], error.evalue.strip().split("\n")[-1]
        raise R3Error(
            f"{notebook.name}, cell {place} (`{line}`): {error.ename}: {why} [see {copy}]"
        ) from error
    except RuntimeError as error:
        raise R3Error(
            f"{notebook.name}: the kernel died ({error}): is memory short? a rerun resumes"
        ) from error


class News(io.TextIOBase):
    """Shows what matters of what a notebook prints, all of it if `verbose`."""

    def __init__(self, log, verbose: bool):
        self.log = log
        self.verbose = verbose

    def write(self, text: str) -> int:
        with tqdm.external_write_mode():
            if self.verbose:
                print(text, end="", flush=True)
            else:
                for line in text.split("\n"):
                    if NEWS.fullmatch(line.strip()):
                        self.log(f"  {line.strip()}")
        return len(text)
