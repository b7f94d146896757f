"""Two processes (gloo, CPU) do what one does: the same rollouts, none twice, the same gradients; they resume."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
TESTS = Path(__file__).resolve().parent


def train(folder, processes, steps=2, resume="no"):
    """Run processes.py; what each process has written."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    env = os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, str(TESTS / "processes.py")]
    command += [str(folder), str(steps), str(16 // processes), resume]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return train(tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return train(tmp_path_factory.mktemp("two"), 2)


def rollouts(ranks):
    """What was sampled, sorted: (step, place of the failure, tokens, verdict)."""
    return sorted(row for rank in ranks for row in rank["seen"])


def test_two_processes_sample_what_one_samples_and_nothing_twice(one, two):
    assert rollouts(two) == rollouts(one) and len(rollouts(one)) == 2 * 4 * 4
    places = [{place for _, place, _, _ in rank["seen"]} for rank in two]
    assert not places[0] & places[1] and sorted(places[0] | places[1]) == list(range(8))


def test_gradients_of_two_processes_are_those_of_one(one, two):
    for rank in two:
        assert len(rank["gradients"]) == len(one[0]["gradients"]) == 2
        for mine, whole in zip(rank["gradients"], one[0]["gradients"]):
            assert mine.keys() == whole.keys()
            scale = max(g.abs().max() for g in whole.values())
            assert scale > 0 and all((mine[n] - g).abs().max() < 1e-5 * scale for n, g in whole.items())


def test_two_processes_resume_to_the_weights_of_a_whole_run(two, tmp_path):
    train(tmp_path / "part", 2, steps=1)
    again = train(tmp_path / "part", 2, steps=2, resume="resume")
    assert rollouts(again) == [row for row in rollouts(two) if row[0] == 1]
    for rank, whole in zip(again, two):
        assert all(torch.equal(w, whole["weights"][name]) for name, w in rank["weights"].items())
