"""The study from end to end: papermill over the numbered notebooks, then the report."""

import ast
import io
import json
import os
import re
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import papermill
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbformat import NotebookNode, read
from papermill.exceptions import PapermillExecutionError

from .config import ROOT, Profile, load_profile
from .doctor import Run, check_run, tasks_of
from .errors import R3Error
from .provenance import TCMALLOC, reaches_hub
from .store import claimed, room_for

NOTEBOOKS, RESULTS = ROOT / "notebooks", Path("results")
TABLES = ("accuracy.csv", "comparisons.csv")  # what a report cannot do without
NEWS = re.compile(r"(cached|running) .+|.*no group has variance.+")  # lines of a notebook that are shown at once
BEAT = 30.0  # seconds between two lines of progress where there is no terminal to rewrite one


def reproduce(
    profile: str = "nano", task: str = "all", start: str | None = None, only: str | None = None,
    fresh: bool = False, overrides: dict | None = None, results=RESULTS, say=print, verbose: bool = False,
) -> Path:  # fmt: skip
    """Run notebooks 00 to 05 (from `start`, or `only` one) under a profile; return the path of the report.

    Before notebook 04 has ever run there is no report, and the path is that of the results.
    `results`, if relative, lies beside the notebooks, as does the kernels' working directory. Executed copies go
    to `results/<profile>/executed`, also of a notebook that fails. Raises R3Error before anything runs for an
    unknown profile, key, task, notebook or parameter, for what `doctor.check_run` refuses, and a folder of results
    that cannot be written or that another run holds; and for the cell that fails.
    Warns on stderr of what else `check_run` finds: vLLM that is not there, memory or disk that may be short.
    """
    settings = load_profile(profile, **(overrides or {}))
    run = Run(settings, tasks_of(task))
    profile = str(Path(profile).resolve()) if profile.endswith(".yaml") else profile
    given = dict(profile=profile, task=task, overrides=json.dumps(overrides or {}), results=str(results))
    notebooks = choose(start, only)
    for notebook in notebooks:
        check_parameters(notebook, given)
    check_run(run)
    kernel, started, folder = kernel_of(settings, fresh), time.time(), NOTEBOOKS.parent / results / settings.name
    with claimed(folder):
        for notebook in notebooks:
            copy = folder / "executed" / notebook.name
            execute(notebook, copy, given, kernel, Progress(notebook.stem, say, verbose))
    seconds = f"{time.time() - started:.0f} s in all"
    if absent := [name for name in TABLES if not (folder / "tables" / name).exists()]:
        say(f"no report yet, notebook 04 writes tables/{absent[0]} ({seconds})")
        return folder
    from .report import write_report

    say(f"report: {write_report(folder)} ({seconds})")
    return folder / "report.html"


def choose(start: str | None, only: str | None) -> list[Path]:
    """The notebooks to run, in the order of their numbers."""
    found = {path.name[:2]: path for path in sorted(NOTEBOOKS.glob("0[0-5]_*.ipynb"))}
    if not found:
        raise R3Error(f"no notebooks in {NOTEBOOKS}: run r3 from a source checkout (pip install -e .)")
    wanted = (only or start or "00").zfill(2)
    if (only or start) and wanted not in found:
        raise R3Error(f"no notebook {wanted!r}: known: {', '.join(found)}")
    return [path for number, path in found.items() if number == wanted or (number > wanted and not only)]


def check_parameters(notebook: Path, given: dict) -> None:
    """Raise R3Error unless the parameters cell declares all of `given`, as literals and at most eight."""
    declared = papermill.inspect_notebook(str(notebook))
    if absent := [name for name in given if name not in declared]:
        raise R3Error(f"{notebook.name}: its parameters cell does not declare {', '.join(absent)}: add it there")
    if len(declared) > 8:
        raise R3Error(f"{notebook.name}: {len(declared)} parameters: keep 8, move others into the profile")
    for name, parameter in declared.items():
        try:
            ast.literal_eval(parameter["default"])
        except (ValueError, SyntaxError) as error:
            raise R3Error(f"{notebook.name}: parameter {name!r} is no literal: write its value out") from error


def kernel_of(profile: Profile, fresh: bool) -> type[AsyncKernelManager]:
    """A manager of kernels that run this very interpreter, whichever kernel specs the machine has."""
    env = {"TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    needs_hub = profile.model != "base_model" or '"hub"' in json.dumps(profile.task_options)
    if not needs_hub or not reaches_hub():  # what is in the cache is then taken at once, without retries
        env["HF_HUB_OFFLINE"] = "1"
    if TCMALLOC:
        env["LD_PRELOAD"] = f"{TCMALLOC}:{os.environ.get('LD_PRELOAD', '')}".rstrip(":")
    if fresh or os.environ.get("R3_FRESH") == "1":
        env["R3_FRESH"] = str(time.time_ns())  # one run: what an earlier notebook made afresh counts as cached
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]

    class ThisInterpreter(AsyncKernelManager):
        kernel_spec = KernelSpec(argv=command, env=env, display_name="Python 3", language="python")

    return ThisInterpreter


def execute(notebook: Path, copy: Path, given: dict, kernel: type, progress: "Progress") -> None:
    """Run one notebook into its executed copy; R3Error names the notebook and the cell that fails."""
    sources = [cell.source for cell in read(notebook, 4).cells]
    try:
        with room_for(copy), progress.shown(len(sources) + 1):  # papermill adds a cell with the parameters
            copy.parent.mkdir(parents=True, exist_ok=True)
            papermill.execute_notebook(
                notebook, copy, given, kernel_name="python3", language="python", progress_bar=False,
                cwd=NOTEBOOKS.parent, stdout_file=progress, stderr_file=progress,
                on_cell_start=progress.cell, kernel_manager_class=kernel,
            )  # fmt: skip
    except PapermillExecutionError as error:
        place = sources.index(error.source) + 1 if error.source in sources else "of parameters"
        line, why = error.source.strip().split("\n")[0], error.evalue.strip().split("\n")[-1]
        raise R3Error(f"{notebook.name}, cell {place} (`{line}`): {error.ename}: {why} [see {copy}]") from error
    except RuntimeError as error:
        raise R3Error(f"{notebook.name}: the kernel died ({error}): is memory short? a rerun resumes") from error


class Progress(io.TextIOBase):
    """One line that tells which cell runs, for how long, and what it printed last."""

    def __init__(self, name: str, say, verbose: bool):
        self.name, self.say, self.verbose, self.number, self.last = name, say, verbose, 0, ""
        self.clear = "\r\x1b[2K" if sys.stdout.isatty() and not verbose else ""

    def cell(self, cell: NotebookNode, cell_index: int) -> None:
        self.number = cell_index + 1

    def write(self, text: str) -> None:
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        self.last = (lines or [self.last])[-1]
        if self.verbose:
            return print(text, end="", flush=True)
        for line in filter(NEWS.fullmatch, lines):
            self.say(f"{self.clear}{self.name}  {line}")

    @contextmanager
    def shown(self, cells: int):
        """Show the line while the block runs: each second on a terminal, else every BEAT seconds."""
        done, started = Event(), time.time()
        clear = self.clear

        def show():
            over = False
            while not over:
                over = done.wait(1.0 if clear else BEAT)
                line = f"{clear}{self.name}  cell {self.number}/{cells}  {time.time() - started:.0f} s  "
                line += "ended" if over else self.last[:40]
                print(line, end="", flush=True) if clear and not over else self.say(line)

        (thread := Thread(target=show, daemon=True)).start()
        try:
            yield
        finally:
            done.set()
            thread.join()
