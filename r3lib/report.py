"""One self-contained HTML page of a run: headline, comparisons, figures, tables, provenance, rollouts."""

import base64
import json
import zlib
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader

from .config import ROOT
from .episodes import UNTRAINED
from .errors import R3Error
from .evaluate import paper_view
from .files import write_atomic

TEMPLATES = FileSystemLoader(Path(__file__).parent / "templates")
PAGES = Environment(loader=TEMPLATES, autoescape=True, trim_blocks=True, lstrip_blocks=True)
PAPER = ROOT / "data" / "paper_results.csv"
ACCURACY = "task policy train_task condition split seed n k rate lo hi".split()
COMPARISONS = "question task a b n seeds diff lo hi p p_holm".split()
PAPER_COLUMNS = "task model column value confidence".split()
CELL = ["task", "policy", "condition"]
EPISODE = [*CELL, *"seed problem_id prompt attempt attempt_reason reflection retry retry_reason".split()]
HEADLINE = "vanilla_first vanilla_second trained_first trained_second".split()
UNFOLDED = ("accuracy", "comparisons")  # tables that are not under "Tables"
PER_CELL = 300  # episodes shown of each task, policy and condition
VIEWER_BYTES = 5_000_000  # of embedded episodes: longer texts mean fewer of them
LONGEST_TABLE = 200


def write_report(results: Path) -> Path:
    """Write `results`/report.html from the files of a finished run and return its path.

    `results` is results/<profile>. The page needs no network and no other file.
    Raises R3Error when a part of the run is missing or cannot be read.
    """
    results = Path(results)
    accuracy = read(results, results / "tables" / "accuracy.csv", ACCURACY).fillna({"train_task": ""})
    comparisons = read(results, results / "tables" / "comparisons.csv", COMPARISONS)
    artefacts = read_artefacts(results)
    others = [p for p in sorted((results / "tables").glob("*.csv")) if p.stem not in UNFOLDED]
    html = PAGES.get_template("report.html").render(
        profile=results.name,
        studies=headline(accuracy, read(results, PAPER, PAPER_COLUMNS), results.name),
        cells=conditions(accuracy),
        comparisons=[compared(row) for row in comparisons.itertuples()],
        figures=figures(results, artefacts),
        tables=[listed(path.stem, read(results, path, [])) for path in others],
        provenance={a["notebook"]: a for a in sorted(artefacts.values(), key=lambda a: a["seconds"])},
        viewer=sample(episodes(results, accuracy)),
    )
    write_atomic(results / "report.html", html)
    return results / "report.html"


def remedy(results: Path) -> str:
    return f"run `r3 reproduce --profile {results.name}`"


def read(results: Path, path: Path, columns: list[str]) -> pd.DataFrame:
    """Read a csv or parquet file that must have `columns`."""
    if not path.exists():
        raise R3Error(f"no {path}: {'restore it from the repository' if path == PAPER else remedy(results)}")
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path, columns=columns)
        table = pd.read_csv(path, dtype={"seed": str})
    except (ValueError, OSError) as error:  # the parsers' errors, pandas' and pyarrow's, are ValueErrors
        raise R3Error(f"cannot read {path} ({type(error).__name__}): {remedy(results)} --fresh") from error
    if missing := [name for name in columns if name not in table]:
        raise R3Error(f"{path} has no column {missing[0]!r}: {remedy(results)} --fresh")
    return table


def read_artefacts(results: Path) -> dict[str, dict]:
    """What manifest.json knows of each file: its notebook, cell, commit, packages, hardware, seconds."""
    path = results / "manifest.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["artefacts"]
    except (OSError, ValueError, KeyError) as error:
        raise R3Error(f"cannot read {path} ({type(error).__name__}): {remedy(results)}") from error


def percent(rate, lo, hi) -> str:
    return f"{100 * rate:.1f}% [{100 * lo:.1f}, {100 * hi:.1f}]"


def conditions(accuracy: pd.DataFrame) -> list[dict]:
    """The pooled row of every cell of the study, with its number of seeds."""
    cells = []
    for _, rows in accuracy.groupby(ACCURACY[:5], sort=False):
        seeds = int((rows.seed != "all").sum())
        for row in rows[rows.seed == "all"].itertuples():
            cells.append({**row._asdict(), "text": percent(row.rate, row.lo, row.hi), "seeds": seeds})
    return cells


def headline(accuracy: pd.DataFrame, paper: pd.DataFrame, profile: str) -> list[dict]:
    """For each task the paper's Table 1 or 2 (percent of all test problems) with this run's row below it."""
    paper = paper[paper.confidence.isin(["A", "B"])]
    view = paper_view(accuracy[accuracy.policy.isin([UNTRAINED, "r3"]) & (accuracy.split == "test")])
    view = view[(view.policy == UNTRAINED) | (view.train_task == view.task)]
    studies = []
    for task, own in view.groupby("task", sort=False):
        published = paper[paper.task == task].groupby("model", sort=False)
        rows = [{"name": model, "cells": across(cells, paper_number)} for model, cells in published]
        rows.append({"name": f"this run ({profile})", "ours": True, "cells": across(own, our_number)})
        studies.append({"task": task, "rows": rows})
    return studies


def across(cells: pd.DataFrame, text) -> list[str]:
    """`text` of the row of each headline column, or nothing where there is none."""
    found = {cell.column: text(cell) for cell in cells.itertuples()}
    return [found.get(column, "") for column in HEADLINE]


def paper_number(cell) -> str:
    return f"{cell.value:.1f}%{'†' if cell.confidence == 'B' else ''}"


def our_number(cell) -> str:
    plural = "" if cell.seeds == 1 else "s"
    return f"{percent(cell.rate, cell.lo, cell.hi)}, n={cell.n}, {cell.seeds} seed{plural}"


def compared(row) -> dict:
    """A row of comparisons.csv with its difference in percentage points."""
    points = f"{100 * row.diff:+.1f} [{100 * row.lo:+.1f}, {100 * row.hi:+.1f}]"
    return {**row._asdict(), "points": points, "p": f"{row.p:.2g}", "p_holm": f"{row.p_holm:.2g}"}


def figures(results: Path, artefacts: dict) -> list[dict]:
    """Every figure as a data URI, with the notebook and cell that made it."""
    if not (paths := sorted((results / "figures").glob("*.png"))):
        raise R3Error(f"no {results / 'figures'}/*.png: {remedy(results)}")
    shown = []
    for path in paths:
        source = artefacts.get(f"figures/{path.name}", {})
        image = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        shown.append({"name": path.stem.replace("_", " ").capitalize(), "image": image, **source})
    return shown


def listed(name: str, table: pd.DataFrame) -> dict:
    """A table as rows of short text, cut at LONGEST_TABLE rows."""
    rows = table.map(lambda value: f"{value:.4g}" if isinstance(value, float) else value)
    rows = rows.where(table.notna(), "").to_numpy(object).tolist()
    return {"name": name, "columns": list(table), "rows": rows[:LONGEST_TABLE], "total": len(rows)}


def episodes(results: Path, accuracy: pd.DataFrame) -> pd.DataFrame:
    """Every episode of the policies and seeds in `accuracy`; files of an earlier run with more of them stay out."""
    if not (paths := sorted((results / "episodes").glob("*.parquet"))):
        raise R3Error(f"no {results / 'episodes'}/*.parquet: {remedy(results)}")
    found = pd.concat([read(results, path, EPISODE) for path in paths], ignore_index=True)
    cells = accuracy[["task", "policy", "seed"]].drop_duplicates()
    return found.astype({"seed": str}).merge(cells, on=["task", "policy", "seed"])


def sample(table: pd.DataFrame) -> dict:
    """The same problems from every cell (by a hash of their id), few enough for VIEWER_BYTES."""
    table = table.assign(order=[zlib.crc32(name.encode()) for name in table.problem_id])
    cells = table.sort_values(["order", "problem_id", "seed", *CELL], kind="stable").groupby(CELL)
    most = PER_CELL
    while True:
        shown = cells.head(most)[EPISODE].astype(object)
        rows = shown.where(shown.notna(), None).to_numpy().tolist()
        if most == 1 or len(json.dumps(rows)) <= VIEWER_BYTES:
            return {"columns": EPISODE, "rows": rows, "total": len(table), "most": most}
        most //= 2
