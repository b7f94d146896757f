"""What an R3 step costs as groups, prompts and models grow, beside stock TRL; a table and a figure.

    python benchmarks/scaling.py [--repeats 2]

Each point is `benchmarks/step.py` on problems whose verdict is a coin's, so that every group
learns. Writes results/performance/scaling.csv, machine.json and scaling.png.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parent))
from step import in_a_process, rates  # noqa: E402

from r3lib.config import ROOT  # noqa: E402
from r3lib.files import write_atomic  # noqa: E402
from r3lib.provenance import machine  # noqa: E402
from r3lib.weights import missing  # noqa: E402

OUT = ROOT / "results" / "performance"
USUAL = {"groups": 8, "group": 8, "reflection": 64, "retry": 32}
SERIES = {  # the axis: (label, column of the table, what differs from USUAL)
    "group": ("reflections in a group", "group", [{"group": n} for n in (2, 4, 8, 16, 32)]),
    "groups": ("failures in a step", "groups", [{"groups": n} for n in (4, 8, 16, 32)]),
    "prompt": ("tokens of prompt and failed try", "prompt_tokens",
               [{"context": n} for n in (0, 25, 50, 100)]),
}  # fmt: skip
LARGE = {"model": "smollm2", "groups": 2, "group": 8, "rows": 16, "reflection": 32, "retry": 16}
LARGE |= {"steps": 1}


def main() -> None:
    """Measure all points in turns, stock and ours; write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2)
    repeats = parser.parse_args().repeats
    OUT.mkdir(parents=True, exist_ok=True)
    speed = {"machine": machine(), "threads": torch.get_num_threads()} | rates()
    print(speed)
    write_atomic(OUT / "machine.json", json.dumps(speed, indent=1))
    cases = [(axis, USUAL | change) for axis, (*_, changes) in SERIES.items() for change in changes]
    if not missing("smollm2"):
        cases += [("model", LARGE), ("model", LARGE | {"dtype": "bfloat16"})]
        cases += [("model", LARGE | {"model": "base_model"})]
    rows = []
    for axis, case in cases:
        case = {"rows": min(64, case["groups"] * case["group"])} | case
        for kind in ("stock", "ours"):
            given = [word for name, value in case.items() for word in (f"--{name}", str(value))]
            turns = [in_a_process(kind, ["--coin", *given]) for _ in range(repeats)]
            values = {name: statistics.median(t[name] for t in turns) for name in turns[0]}
            rows.append({"axis": axis, "kind": kind, "dtype": "float32", **case, **values})
            print(axis, kind, case, f"{values['step']:.3g} s", flush=True)
            write_atomic(OUT / "scaling.csv", pd.DataFrame(rows).to_csv(index=False))
    figure(pd.DataFrame(rows)).savefig(OUT / "scaling.png", dpi=160, bbox_inches="tight")


def figure(table: pd.DataFrame):
    """A panel an axis: seconds of a step's parts, ours against stock's."""
    shown, panels = plt.subplots(1, len(SERIES), figsize=(11, 3.2), sharey=True)
    for panel, (axis, (label, column, _)) in zip(panels, SERIES.items()):
        for kind, color in (("stock", "#888888"), ("ours", "#0b6fa4")):
            rows = table[(table.axis == axis) & (table.kind == kind)]
            for part, dash in (("sampling", "-"), ("learning", "--")):
                name = f"{kind}, {part}"
                panel.plot(rows[column], rows[part], dash, color=color, marker="o", label=name)
        panel.set(xlabel=label, xscale="log", yscale="log")
        ticks = sorted(table[table.axis == axis][column].round().unique())
        panel.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks], minor=False)
        panel.minorticks_off()
    panels[0].set_ylabel("seconds of one step")
    panels[0].legend(fontsize=8)
    return shown


if __name__ == "__main__":
    main()
