"""One self-contained HTML page of a run: summary, figures, tables, episodes, provenance."""

import base64
import json
import zlib
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader

from .config import ROOT
from .errors import R3Error
from .evaluate import ACCURACY, COMPARISONS, CONTROLS, TRAINING, paper_view, pooled
from .figures import COLUMNS, POLICIES, style
from .files import write_atomic

TEMPLATES = FileSystemLoader(Path(__file__).parent / "templates")
PAGES = Environment(loader=TEMPLATES, autoescape=True, trim_blocks=True, lstrip_blocks=True)
PAPER = ROOT / "data" / "paper_results.csv"
CELL = ["task", "policy", "condition"]
TEXTS = ["prompt", "attempt", "attempt_reason", "reflection", "retry", "retry_reason"]
EPISODE = [*CELL, "seed", "problem_id", *TEXTS]
CAPTIONS = {  # by the end of a figure's name, in the order of the notebooks
    "baseline": "The untrained model: second tries that succeed under each condition.",
    "training": "Training, a line a seed: reward should rise while some groups keep variance.",
    "conditions": "Second tries on failures under each condition, before and after training.",
    "parts": "Second tries after a reflection, by what is new in the test problems.",
    "transfer": "Policies trained on another task beside those trained on the task itself.",
    "paper": "Beside the paper. Its models are others: compare the pattern, not the level.",
    "errors": "Why first tries fail.",
    "categories": "Why first tries fail, in the paper's categories.",
    "transitions": "Where failures of each kind end after a reflection and a second try.",
    "lengths": "Length and repetition of reflections. Dashed: means; dotted: the limit.",
    "reflections": "Styles of reflections: how often each is written, how often it helps.",
    "arithmetic": "Arithmetic inside reflections: a fall is the first sign of too much training.",
}
FEW = 100  # test problems, fewer of which show no effect
PER_CELL = 300  # episodes shown of each task, policy and condition
VIEWER_BYTES = 5_000_000  # of embedded episodes: longer texts mean fewer of them
LONGEST_TABLE = 200


def write_report(results: Path) -> Path:
    """Write `results`/report.html from the files of a finished run and return its path.

    `results` is results/<profile>. The page needs no network and no other file.
    Raises R3Error when a part of the run is missing or cannot be read.
    """
    results = Path(results)
    tables = results / "tables"
    accuracy = read(results, tables / "accuracy.csv", ACCURACY).fillna({"train_task": ""})
    comparisons = read(results, tables / "comparisons.csv", [*COMPARISONS, "p_holm"])
    view = paper_view(accuracy[accuracy.policy.isin(POLICIES) & (accuracy.split == "test")])
    artefacts = read_artefacts(results)
    by_time = sorted(artefacts.values(), key=lambda made: (made["notebook"], made["seconds"]))
    html = PAGES.get_template("report.html").render(
        profile=results.name,
        problems=int(accuracy[accuracy.seed != "all"].n.max()),
        few=FEW,
        summary=summary(accuracy, view, comparisons),
        columns=[label for _, _, label in COLUMNS.values()],
        studies=headline(view, read(results, PAPER), results.name),
        figures=figures(results, artefacts),
        conditions=conditions(accuracy),
        comparisons=[compared(row) for row in comparisons.itertuples()],
        tables=[listed(path.stem, read(results, path)) for path in sorted(tables.glob("*.csv"))],
        viewer=sample(episodes(results, accuracy)),
        provenance={made["notebook"]: made for made in by_time},
    )
    write_atomic(results / "report.html", html)
    return results / "report.html"


def read(results: Path, path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """A csv or parquet file, of which only `columns`, if given; seeds are text."""
    if not path.exists():
        raise R3Error(f"no {path}: {remedy(results)}")
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path, columns=columns)
        return pd.read_csv(path, usecols=columns, dtype={"seed": str})
    except (ValueError, OSError) as error:  # the parsers' errors are ValueErrors
        why = type(error).__name__
        raise R3Error(f"cannot read {path} ({why}): {remedy(results)} --fresh") from error


def remedy(results: Path) -> str:
    return f"run `r3 reproduce --profile {results.name}`"


def read_artefacts(results: Path) -> dict[str, dict]:
    """What manifest.json knows of each file: notebook, cell, commit, hardware, seconds."""
    path = results / "manifest.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["artefacts"]
    except (OSError, ValueError, KeyError) as error:
        why = type(error).__name__
        raise R3Error(f"cannot read {path} ({why}): {remedy(results)}") from error


def percent(rate, lo, hi) -> str:
    return f"{100 * rate:.1f}% [{100 * lo:.1f}, {100 * hi:.1f}]"


def summary(accuracy: pd.DataFrame, view: pd.DataFrame, comparisons: pd.DataFrame) -> list[dict]:
    """For each task what training changed, and how many controls an own reflection beats."""
    cells = pooled(accuracy[accuracy.split == "test"])
    names = cells.policy + "/" + cells.condition
    rates = dict(zip(zip(cells.task, names), cells.rate))
    both = view[view.column.str.endswith("second")]
    rates |= dict(zip(zip(both.task, both.policy + "/both_tries"), both.rate))
    tasks = []
    for task, rows in comparisons[comparisons.a.str.startswith("r3/")].groupby("task", sort=False):
        effects = []
        for row in rows[rows.question.isin(TRAINING.values())].itertuples():
            before, after = rates[task, row.b], rates[task, row.a]
            effects.append({**compared(row), "before": f"{before:.1%}", "after": f"{after:.1%}"})
        controls = rows[rows.question.isin(CONTROLS.values())]
        beaten = controls[(controls["diff"] > 0) & (controls.p_holm < 0.05)]
        counts = {"controls": len(controls), "beaten": len(beaten)}
        tasks.append({"task": task, "effects": effects, **counts})
    return tasks


def headline(view: pd.DataFrame, paper: pd.DataFrame, profile: str) -> list[dict]:
    """For each task the paper's Table 1 or 2 (percent of all test problems) with this run below."""
    paper = paper[paper.confidence.isin(["A", "B"])]
    studies = []
    for task, own in view.groupby("task", sort=False):
        rows = []
        for model, cells in paper[paper.task == task].groupby("model", sort=False):
            rows.append({"name": model, "cells": across(cells, paper_number)})
        ours = {"name": f"this run ({profile})", "cells": across(own, our_number), "ours": True}
        studies.append({"task": task, "rows": [*rows, ours]})
    return studies


def across(cells: pd.DataFrame, text) -> list[str]:
    """`text` of the row of each of the paper's columns, or nothing where there is none."""
    found = {cell.column: text(cell) for cell in cells.itertuples()}
    return [found.get(column, "") for column in COLUMNS]


def paper_number(cell) -> str:
    return f"{cell.value:.1f}%{'†' if cell.confidence == 'B' else ''}"


def our_number(cell) -> str:
    seeds = f"{cell.seeds} seed{'s' * (cell.seeds > 1)}"
    return f"{percent(cell.rate, cell.lo, cell.hi)}, n={cell.n:,}, {seeds}"


def conditions(accuracy: pd.DataFrame) -> list[dict]:
    """For each task and split a row a condition, a column a policy."""
    tables = []
    for (task, split), rows in pooled(accuracy).groupby(["task", "split"], sort=False):
        found = {(row.condition, row.policy): our_number(row) for row in rows.itertuples()}
        policies = list(rows.policy.unique())
        lines = []
        for condition in rows.condition.unique():
            lines.append([condition, *(found.get((condition, p), "") for p in policies)])
        names = [style(policy)[2] for policy in policies]
        tables.append({"task": task, "split": split, "policies": names, "rows": lines})
    return tables


def compared(row) -> dict:
    """A row of comparisons.csv as text, its difference in percentage points."""
    sides = {}
    for side in ("a", "b"):
        policy, _, condition = getattr(row, side).partition("/")
        sides[side] = f"{style(policy)[2]}: {condition}"
    points = f"{100 * row.diff:+.1f} [{100 * row.lo:+.1f}, {100 * row.hi:+.1f}]"
    p = {"p": f"{row.p:.2g}", "p_holm": f"{row.p_holm:.2g}"}
    return {**row._asdict(), **sides, "points": points, **p}


def figures(results: Path, artefacts: dict) -> list[dict]:
    """The figures as data URIs, those of one kind together; one's own kinds come last."""
    paths = sorted((results / "figures").glob("*.png"))
    if not paths:
        raise R3Error(f"no {results / 'figures'}/*.png: {remedy(results)}")
    found = {caption: [] for caption in CAPTIONS.values()}
    for path in paths:
        captions = [CAPTIONS[kind] for kind in CAPTIONS if f"_{path.stem}".endswith(f"_{kind}")]
        image = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        made = artefacts.get(f"figures/{path.name}", {})
        figure = {**made, "name": path.stem, "image": image}
        found.setdefault(captions[0] if captions else path.stem, []).append(figure)
    return [{"caption": caption, "images": images} for caption, images in found.items() if images]


def listed(name: str, table: pd.DataFrame) -> dict:
    """A table as rows of short text, cut at LONGEST_TABLE rows."""
    rows = table.map(lambda value: f"{value:.4g}" if isinstance(value, float) else value)
    rows = rows.where(table.notna(), "").to_numpy(object).tolist()
    return {"name": name, "columns": list(table), "rows": rows[:LONGEST_TABLE], "total": len(rows)}


def episodes(results: Path, accuracy: pd.DataFrame) -> pd.DataFrame:
    """Every episode of the policies and seeds in `accuracy`; an earlier run may have left more."""
    paths = sorted((results / "episodes").glob("*.parquet"))
    if not paths:
        raise R3Error(f"no {results / 'episodes'}/*.parquet: {remedy(results)}")
    found = pd.concat([read(results, path, EPISODE) for path in paths], ignore_index=True)
    cells = accuracy[["task", "policy", "seed"]].drop_duplicates()
    return found.astype({"seed": str}).merge(cells, on=["task", "policy", "seed"])


def sample(table: pd.DataFrame) -> dict:
    """The same problems from every cell (by a hash of their id), few enough for VIEWER_BYTES."""
    table = table.assign(order=[zlib.crc32(name.encode()) for name in table.problem_id])
    table = table.sort_values(["order", "problem_id", "seed", *CELL], kind="stable")
    most = PER_CELL
    while True:
        shown = table.groupby(CELL).head(most)[EPISODE].astype(object)
        rows = shown.where(shown.notna(), None).to_numpy().tolist()
        if most == 1 or len(json.dumps(rows)) <= VIEWER_BYTES:
            return {"columns": EPISODE, "rows": rows, "total": len(table), "most": most}
        most //= 2
