"""The check for a GPU, on its CPU twin: random models of two layers."""

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.slow
def test_every_part_is_measured_and_one_that_fails_stops_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = runpy.run_path(str(BENCHMARKS / "gpu_check.py"))

    def broken(options):
        raise RuntimeError("no kernel image")

    parts = module["PARTS"]
    module["main"].__globals__["PARTS"] = (*parts[:3], broken, parts[4])
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--small", "--results", str(tmp_path)])
    module["main"]()
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["broken"]["failed"] == "RuntimeError: no kernel image"
    assert found["sampling"]["float32: greedy texts equal to generate"] == 1
    assert found["sampling"]["float32: largest gap of a log-prob"] < 1e-4
    assert found["embedded_steps"]["step"] > 0
    assert found["beside_stock"]["stock / ours: learning"] > 0
    assert found["memory"]["weights"] == pytest.approx(found["memory"]["weights, estimated"], rel=0.01)
    assert "| broken | failed | RuntimeError: no kernel image |" in (tmp_path / "check.md").read_text()
