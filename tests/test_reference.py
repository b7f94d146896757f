"""The reference run that the repository keeps: whole, and what README says of it is what its tables say."""

import json
from pathlib import Path

import pandas as pd
import pytest

from r3lib.episodes import Condition, read_episodes
from r3lib.evaluate import accuracy_table, comparisons_table
from r3lib.report import percent
from r3lib.store import sha256

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "results" / "reference"


@pytest.fixture(scope="module")
def accuracy():
    table = pd.read_csv(REFERENCE / "tables" / "accuracy.csv")
    return table[table.seed == "all"].set_index(["policy", "condition"])


@pytest.fixture(scope="module")
def episodes():
    return read_episodes(REFERENCE / "episodes")


def test_its_files_are_those_of_its_manifest():
    artefacts = json.loads((REFERENCE / "manifest.json").read_text())["artefacts"]
    assert {"tables/accuracy.csv", "tables/comparisons.csv", "figures/countdown_conditions.svg"} <= artefacts.keys()
    assert {name: sha256(REFERENCE / name) for name in artefacts} == {n: a["sha256"] for n, a in artefacts.items()}


def test_its_tables_follow_from_its_episodes(episodes, accuracy):
    again = accuracy_table(episodes)
    again = again[again.seed == "all"].set_index(["policy", "condition"])
    columns = ["n", "k", "rate", "lo", "hi"]
    pd.testing.assert_frame_equal(again[columns], accuracy[columns], check_dtype=False)
    kept = pd.read_csv(REFERENCE / "tables" / "comparisons.csv")
    pd.testing.assert_frame_equal(comparisons_table(episodes), kept, check_dtype=False)


def test_it_answers_with_three_seeds_on_2000_problems(episodes):
    first = episodes[episodes.condition == "first_try"]
    assert first.groupby(["policy", "seed"]).problem_id.nunique().tolist() == [2000] * 4
    assert episodes[episodes.policy == "r3"].seed.nunique() == 3


def test_readme_gives_its_rates(accuracy):
    readme = (ROOT / "README.md").read_text()
    for condition in Condition:
        cells = [accuracy.loc[(policy, condition.value)] for policy in ("vanilla", "r3")]
        row = " | ".join([f"`{condition}`", *(percent(c.rate, c.lo, c.hi) for c in cells)])
        assert f"| {row} |" in readme
    for policy in ("vanilla", "r3"):
        assert f"{accuracy.loc[(policy, 'reflect_retry')].n:,}" in readme


def test_readme_gives_its_main_differences():
    readme = (ROOT / "README.md").read_text()
    table = pd.read_csv(REFERENCE / "tables" / "comparisons.csv").set_index(["a", "b"])
    for pair in [("r3/reflect_retry", "vanilla/reflect_retry"), ("r3/reflect_retry", "r3/resample")]:
        row = table.loc[pair]
        assert f"{100 * row['diff']:+.1f} [{100 * row.lo:+.1f}, {100 * row.hi:+.1f}]" in readme
