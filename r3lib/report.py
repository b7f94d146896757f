"""One self-contained HTML page of a run: tables, figures, episodes, where each file came from."""

import base64
from functools import cache
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader

from .artifacts import manifest_entries
from .config import ROOT
from .episodes import read_episodes
from .errors import R3Error, Stale
from .evaluate import paper_view, pooled
from .figures import COLUMNS, POLICIES, style
from .files import sha256, write_atomic

TEMPLATES = FileSystemLoader(Path(__file__).parent / "templates")
PAGES = Environment(loader=TEMPLATES, autoescape=True, trim_blocks=True, lstrip_blocks=True)
PAPER = ROOT / "data" / "paper_results.csv"
CELL = ["task", "policy", "condition"]
COMPARED = ["question", "task", "a", "b", "difference", "n", "seeds", "p", "p (Holm)"]
PER_CELL = 20  # episodes shown of each task, policy and condition
LONGEST_TABLE = 200  # rows


def write_report(results: Path) -> Path:
    """Write `results`/report.html from the files of a finished run and return its path.

    `results` is results/<profile>. The page needs no network and no other file. R3Error: a file of
    the run is missing, damaged or of other settings than the others.
    """
    try:
        html = page(Path(results))
    except OSError as error:
        fix = f"run `r3 reproduce --profile {Path(results).name}`"
        raise R3Error(f"no {error.filename}, which the report shows: {fix}") from error
    path = Path(results) / "report.html"
    write_atomic(path, html)
    return path


def page(results: Path) -> str:
    """The page as HTML."""
    tables = results / "tables"
    accuracy = read(tables / "accuracy.csv").fillna({"train_task": ""})
    view = paper_view(accuracy[accuracy.policy.isin(POLICIES) & (accuracy.split == "test")])
    entries = manifest_entries(results / "manifest.json")
    check_origins(results, entries)
    artefacts = pd.DataFrame.from_dict(entries, orient="index")
    artefacts = artefacts.sort_values(["notebook", "seconds"], kind="stable")
    names = sorted(Path(name).stem for name in artefacts.index if name.startswith("tables/"))
    return PAGES.get_template("report.html").render(
        profile=results.name,
        problems=int(accuracy[accuracy.seed != "all"].n.max()),
        conditions=html_of(conditions(accuracy), index=True),
        comparisons=html_of(compared(read(tables / "comparisons.csv"))),
        paper=html_of(beside_the_paper(view, results.name), index=True),
        figures=figures(results, artefacts),
        tables={name: html_of(read(tables / f"{name}.csv")) for name in names},
        episodes=sample(read_episodes(results / "episodes"), accuracy),
        per_cell=PER_CELL,
        provenance=html_of(provenance(artefacts)),
    )


def check_origins(results: Path, entries: dict) -> None:
    """Stale unless each table and figure is as it was made, and from files as they are now."""
    known = cache(sha256)
    for name, made in entries.items():
        number = made["notebook"][:2]
        fix = f"run `r3 reproduce --from {number}` with the settings of the others"
        if known(results / name) != made["sha256"]:
            raise Stale(f"{results / name} is not as notebook {number} wrote it: {fix}")
        for source, digest in made["inputs"].items():
            path = results / source
            if path.is_file() and known(path) != digest:
                raise Stale(f"{path} has changed since notebook {number} drew {name}: {fix}")


def read(path: Path) -> pd.DataFrame:
    """A csv file; its seeds are text."""
    return pd.read_csv(path, dtype={"seed": str})


def html_of(table: pd.DataFrame, index: bool = False) -> str:
    """A table as HTML, escaped; of a long one the first and the last rows."""
    with pd.option_context("display.max_colwidth", None):
        return table.rename_axis(columns=None).to_html(
            index=index, na_rep="", float_format="{:.4g}".format, max_rows=LONGEST_TABLE, border=0
        )


def percent(rate, lo, hi) -> str:
    return f"{100 * rate:.1f}% [{100 * lo:.1f}, {100 * hi:.1f}]"


def our_number(cell) -> str:
    seeds = f"{cell.seeds} seed{'s' * (cell.seeds > 1)}"
    return f"{percent(cell.rate, cell.lo, cell.hi)}, n={cell.n:,}, {seeds}"


def conditions(accuracy: pd.DataFrame) -> pd.DataFrame:
    """A row a task, split and condition, a column a policy."""
    table = pooled(accuracy)
    table = table.assign(
        text=[our_number(cell) for cell in table.itertuples()],
        policy=[style(policy)[2] for policy in table.policy],
    )
    return wide(table, ["task", "split", "condition"], "policy")


def beside_the_paper(view: pd.DataFrame, profile: str) -> pd.DataFrame:
    """The paper's Tables 1 and 2 (percent of all test problems) with this run below."""
    paper = pd.read_csv(PAPER)
    paper = paper[paper.confidence.isin(["A", "B"]) & paper.task.isin(view.task)]
    paper = paper.assign(text=[paper_number(cell) for cell in paper.itertuples()])
    ours = view.assign(text=[our_number(cell) for cell in view.itertuples()])
    cells = pd.concat([paper, ours.assign(model=f"this run ({profile})")])
    table = wide(cells.sort_values("task", kind="stable"), ["task", "model"], "column")
    labels = {name: label for name, (_, _, label) in COLUMNS.items()}
    return table.reindex(columns=COLUMNS).rename(columns=labels)


def paper_number(cell) -> str:
    return f"{cell.value:.1f}%{'†' if cell.confidence == 'B' else ''}"


def wide(table: pd.DataFrame, rows: list[str], columns: str) -> pd.DataFrame:
    """The column `text` with a row for each of `rows`, in the order of the table."""
    texts = table.pivot_table("text", rows, columns, aggfunc="first", sort=False)
    return texts.reindex(pd.MultiIndex.from_frame(table[rows].drop_duplicates()))


def compared(comparisons: pd.DataFrame) -> pd.DataFrame:
    """comparisons.csv with differences in percentage points."""
    table = comparisons.rename(columns={"p_holm": "p (Holm)"})
    table["difference"] = [points(row) for row in comparisons.itertuples()]
    return table[COMPARED]


def points(row) -> str:
    return f"{100 * row.diff:+.1f} [{100 * row.lo:+.1f}, {100 * row.hi:+.1f}]"


def figures(results: Path, artefacts: pd.DataFrame) -> dict[str, list[dict]]:
    """By the heading in its notebook, the figures drawn there: their names, images as data URIs."""
    found: dict[str, list[dict]] = {}
    for name, made in artefacts[artefacts.index.str.endswith(".png")].iterrows():
        image = base64.b64encode((results / name).read_bytes()).decode()
        figure = {"name": Path(name).stem, "image": f"data:image/png;base64,{image}"}
        found.setdefault(f"{made.notebook}: {made.cell}", []).append(figure)
    return found


def sample(episodes: pd.DataFrame, accuracy: pd.DataFrame) -> list[dict]:
    """The first PER_CELL episodes of each cell of `accuracy`; an earlier run may have left more."""
    shown = episodes.merge(accuracy[CELL].drop_duplicates(), on=CELL).groupby(CELL).head(PER_CELL)
    verdict = shown.retry_reason.fillna(shown.attempt_reason)
    return shown.assign(verdict=verdict).astype(object).fillna("").to_dict("records")


def provenance(artefacts: pd.DataFrame) -> pd.DataFrame:
    """A row a notebook: its time until its last file, commit, hardware and versions."""
    last = artefacts.drop_duplicates("notebook", keep="last")
    for column in ("hardware", "packages"):
        last = last.assign(**{column: last[column].map(listed)})
    return last[["notebook", "seconds", "commit", "dirty", "hardware", "packages"]]


def listed(facts: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value)
