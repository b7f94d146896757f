"""docs/extending.md: its code, run as it stands, adds a task, a condition, a model and a setting."""

import re
from pathlib import Path

import pytest
import yaml
from conftest import tiny_model

from r3lib import Study
from r3lib.config import load_profile
from r3lib.doctor import Run, outcome, problems
from r3lib.pipeline import reproduce

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
TASK, CONDITION = (text for kind, text in BLOCKS if kind == "python")
MODEL, SETTING = (text for kind, text in BLOCKS if kind == "yaml")
SMALL = {"test_problems": 24, "train_problems": 24, "max_steps": 1}


@pytest.mark.slow
def test_a_task_in_a_file_of_its_own_goes_through_every_notebook_to_the_report(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    report = reproduce("smoke", "mine.py:Sums", overrides=SMALL, results=tmp_path, log=lambda line: None)
    assert report.name == "report.html" and "sums" in report.read_text()
    figures = {path.name for path in (tmp_path / "smoke" / "figures").glob("*.png")}
    assert {"sums_conditions.png", "sums_training.png", "sums_errors.png", "baseline.png"} <= figures
    assert (tmp_path / "smoke" / "adapters" / "sums-r3-0" / "adapter_model.safetensors").exists()


def test_the_pages_task_has_the_problems_of_the_default_study(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    assert outcome(problems, Run(load_profile("nano"), ["mine.py:Sums"]))[0] == "ok"
    few = Run(load_profile("nano", test_problems=100_000), ["mine.py:Sums"])
    state, text = outcome(problems, few)
    assert state == "fail" and "sums: problems('test', 100000, seed=0)" in text and "ValueError: Sample" in text


def test_a_condition_is_a_row_that_tables_comparisons_and_figures_know(tmp_path):
    study = Study("smoke", "countdown", tmp_path)
    known = {"sampler": study.sampler(progress=False), "problems": study.problems("test", 24)}
    known["folder"] = tmp_path / "episodes"
    exec(CONDITION, known)
    rows = known["accuracy"].set_index("condition")
    assert rows.n["warm_reflect_retry"].max() == rows.n["reflect_retry"].max() > 5
    questions = known["comparisons"].question
    assert "Is a greedy second try better than a warm one?" in set(questions)
    [ax, *_] = known["figure"].axes
    assert any("warm" in label.get_text() for label in ax.get_yticklabels())
    assert "#117733" in {line.get_color() for line in ax.lines}


def test_a_model_is_a_line_in_a_profile(tmp_path, tokenizer):
    model = tiny_model("qwen2", len(tokenizer))
    model.config.max_position_embeddings = 1024
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    path = tmp_path / "mine.yaml"
    path.write_text(MODEL.replace("path/to/model", str(tmp_path / "model")))
    study = Study(load_profile(str(path), test_problems=4), "countdown", tmp_path)
    assert study.model().config.model_type == "qwen2" and study.lora().r == 8
    assert study.baseline().exists() and study.profile.training == load_profile("smoke").training


def test_a_setting_and_a_tracker_reach_the_trainer(tmp_path, monkeypatch):
    block = yaml.safe_load(SETTING)["training"]
    path = tmp_path / "tracked.yaml"
    path.write_text(SETTING)
    seen = []

    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    settings = dict(train_problems=24, max_steps=1, failures_per_step=2, per_device_train_batch_size=8)
    study = Study(load_profile(str(path), **settings), "countdown", tmp_path)
    trainer = study.trainer(0)
    assert str(trainer.args.optim.value) == block["optim"]
    study.train(0, trainer)
    assert any("retry_success" in logs and "reward" in logs for logs in seen)


def test_the_page_is_the_whole_truth_about_where_things_are():
    for path in re.findall(r"`((?:r3lib|tests)/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists(), path
