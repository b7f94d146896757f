"""What is wrong with a run's model, tasks or problems is said before anything runs, and what is right is not."""

import time

import pytest

from r3lib import checks
from r3lib.config import load_profile
from r3lib.errors import R3Error
from r3lib.weights import EMBEDDED

TASKS = ["countdown", "function_calling"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No hub, and an empty cache of it."""
    monkeypatch.setattr(checks, "reaches_hub", lambda: False)


def refused(**overrides):
    started = time.process_time()
    with pytest.raises(R3Error) as error:
        checks.check(load_profile("smoke", **overrides), TASKS)
    assert time.process_time() - started < 10 and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["nano", "smoke"])
def test_what_ships_is_fine(name):
    checks.check(load_profile(name), TASKS)


def test_a_model_that_is_nowhere_is_named(tmp_path):
    assert "no config.json" in refused(model=str(tmp_path / "gone"))
    assert "not in the hub's cache, and the hub does not answer: go online" in refused(model="some/model")
    assert "model 'not a/hub/id' is no folder" in refused(model="not a/hub/id")


def test_an_empty_folder_is_no_model(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert "has no config.json: name a model's folder" in refused(model="models/mine")
    (tmp_path / "models" / "mine" / "config.json").touch()
    checks.check_model("models/mine")


def test_a_model_in_a_folder_or_in_the_hubs_cache_is_fine(tmp_path, monkeypatch):
    checks.check_model(str(EMBEDDED))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "somewhere/config.json")
    checks.check_model("some/model")


def test_a_model_that_the_hub_does_not_know_is_named(monkeypatch):
    def unknown(*_):
        raise LocalEntryNotFoundError("no such model")

    from huggingface_hub.errors import LocalEntryNotFoundError

    monkeypatch.setattr(checks, "reaches_hub", lambda: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", unknown)
    assert "the hub does not give it: no such model" in refused(model="some/model")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"countdown": {"larges": 20}}, "task 'countdown': no option 'larges': did you mean 'largest'?"),
        ({"function_calling": {"rules": "lenient"}}, "no option 'rules': did you mean 'rule'?"),
        ({"countdown": {"zzz": 1}}, "known: source, count, largest, largest_target"),
        ({"countdown": {"largest": "20"}}, "task 'countdown', options {'largest': '20'}"),
        ({"countdown": {"count": "three"}}, "task 'countdown', options {'count': 'three'}"),
        ({"function_calling": {"parts": 5}}, "task 'function_calling', options {'parts': 5}"),
        ({"function_calling": {"parts": {"tools": "x"}}}, "task 'function_calling', options {'parts': {'tools': 'x'}}"),
        ({"countdown": {"source": "no/such/folder"}}, "cannot read Countdown problems from 'no/such/folder'"),
    ],
)
def test_options_that_a_task_does_not_take_are_named(options, words, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True, raising=False)
    assert words in refused(task_options=options)


def test_too_few_problems_are_counted_not_searched_for():
    few = {"countdown": {"count": 3, "largest": 5}}
    assert "countdown train holds only about 81 " in refused(task_options=few)
    started = time.process_time()
    words = refused(test_problems=20_000, task_options={"countdown": {"count": 3, "largest": 20}})
    assert "countdown test holds" in words and time.process_time() - started < 3


def test_problems_of_the_hub_are_not_waited_for_while_offline():
    started = time.process_time()
    checks.check(load_profile("smoke", task_options={"countdown": {"source": "hub"}}), TASKS)
    assert time.process_time() - started < 5
