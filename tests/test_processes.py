"""Two processes (gloo, CPU) do what one does: the same rollouts, none twice, the same gradients; they resume."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from r3lib.study import Study
from r3lib.train import main

pytestmark = pytest.mark.slow
TESTS = Path(__file__).resolve().parent


def launch(processes, *arguments):
    """Run a script or `-m` module in so many processes, as `accelerate launch --cpu` does; what it prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    env = os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launch, *map(str, arguments)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def train(folder, processes, steps=2, resume="no"):
    """Run processes.py; what each process has written."""
    folder.mkdir(exist_ok=True)
    launch(processes, TESTS / "processes.py", folder, steps, 16 // processes, resume)
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


def test_the_metrics_are_over_all_processes(one, two):
    names = ("retry_success", "truncated_share", "reflection_tokens", "reward")
    alone, shared = ([[row[name] for name in names] for row in rank["log"]] for rank in (one[0], two[0]))
    assert alone == shared and len(alone) == 2


def test_gradients_of_two_processes_are_those_of_one(one, two):
    """To rounding; in the second step to what AdamW made of it, which divides small gradients by themselves."""
    for rank in two:
        assert len(rank["gradients"]) == len(one[0]["gradients"]) == 2
        for mine, whole, error in zip(rank["gradients"], one[0]["gradients"], (1e-5, 1e-3)):
            assert mine.keys() == whole.keys()
            scale = max(g.abs().max() for g in whole.values())
            assert scale > 0 and all((mine[n] - g).abs().max() < error * scale for n, g in whole.items())


def test_two_processes_resume_to_the_weights_of_a_whole_run(two, tmp_path):
    train(tmp_path / "part", 2, steps=1)
    again = train(tmp_path / "part", 2, steps=2, resume="resume")
    assert rollouts(again) == [row for row in rollouts(two) if row[0] == 1]
    for rank, whole in zip(again, two):
        assert all(torch.equal(w, whole["weights"][name]) for name, w in rank["weights"].items())


def test_weights_spread_by_fsdp2_learn_from_packed_rows_what_whole_ones_do(tmp_path):
    """accelerate has FSDP on GPUs alone: here torch's own spreads the weights, in two processes on a CPU."""
    ranks = {}
    for name, processes in (("whole", 1), ("sharded", 2)):
        (tmp_path / name).mkdir()
        launch(processes, TESTS / "sharded.py", tmp_path / name, name)
        ranks[name] = [torch.load(tmp_path / name / f"rank-{rank}.pt") for rank in range(processes)]
    (whole,) = ranks["whole"]
    torch.testing.assert_close(torch.cat([rank["logps"] for rank in ranks["sharded"]]), whole["logps"])
    for rank in ranks["sharded"]:
        for name, gradient in whole["gradients"].items():
            torch.testing.assert_close(rank["gradients"][name], gradient, atol=1e-6, rtol=1e-4)
    assert all(gradient.abs().max() > 0 for gradient in whole["gradients"].values())


def test_the_command_trains_in_two_processes_what_a_study_then_finds(tmp_path, capsys):
    settings = {"train_problems": "64", "per_device_train_batch_size": "16", "max_steps": "1"}
    said = launch(2, "-m", "r3lib.train", "--profile", "smoke", "--task", "countdown", "--results", tmp_path,
                  "--set", *(f"{key}={value}" for key, value in settings.items()))  # fmt: skip
    assert said.count("running countdown.parquet") == said.count("cached  countdown.parquet") == 1  # one mines
    study = Study("smoke", "countdown", tmp_path, **settings)
    capsys.readouterr()
    path = study.train(0)
    assert said.splitlines().count(str(path)) == 1 and (path / "adapter_model.safetensors").is_file()
    assert capsys.readouterr().out.splitlines()[-1] == "cached  countdown-r3-0"
    assert len((tmp_path / "smoke" / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("setting", ["ACCELERATE_USE_FSDP=true", "ACCELERATE_DEEPSPEED_ZERO_STAGE=3"])
def test_weights_that_are_spread_are_refused_before_anything_is_sampled(tmp_path, monkeypatch, capsys, setting):
    monkeypatch.setenv(*setting.split("="))
    assert main(["--profile", "smoke", "--task", "countdown", "--results", str(tmp_path)]) == 2
    assert "use engine=vllm, or configs/ddp.yaml" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_accelerate_reads_the_configurations(name):
    config = load_config_from_file(str(TESTS.parent / "configs" / f"{name}.yaml"))
    assert config.num_processes == 4 and config.mixed_precision == "bf16"
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type == kinds[name]
