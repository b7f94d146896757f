"""The doctor: what each check finds, the fix it names, and what stops a run before it starts."""

from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from r3lib import doctor, preflight, provenance, weights
from r3lib.config import load_profile
from r3lib.doctor import Run, check_run, outcome
from r3lib.errors import R3Error
from r3lib.tasks import function_calling_records as records
from r3lib.weights import EMBEDDED


@pytest.fixture(autouse=True)
def laptop(monkeypatch):
    """A laptop on a train: no hub, an empty cache of it, no GPU."""
    for module in (doctor, provenance):
        monkeypatch.setattr(module, "reaches_hub", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def ask(name, profile="smoke", **overrides):
    """(state, text) of the check called `name`."""
    return outcome(getattr(doctor, name), Run(load_profile(profile, **overrides)))


def refused(**overrides):
    with pytest.raises(R3Error) as error:
        check_run(Run(load_profile("smoke", **overrides)))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_laptop_without_network_passes_with_a_line_for_each_check():
    lines = []
    assert doctor.report("nano", log=lines.append) == 0
    assert [line[6:14].strip() for line in lines] == [check.__name__ for check in doctor.CHECKS]
    assert not any("\n" in line or line.startswith("fail") for line in lines)


@pytest.mark.parametrize("name", ["nano", "smoke"])
def test_what_ships_runs_without_a_warning(name, capsys):
    check_run(Run(load_profile(name)))
    assert capsys.readouterr() == ("", "")


def test_a_time_is_told_only_of_a_profile_as_it_was_measured(tmp_path):
    for seeds in (1, 3):
        assert "about 15 minutes a seed" in ask("time", "nano", seeds=seeds)[1]
    for changed in ({"max_steps": 400}, {"model": "smollm2"}):
        assert "not measured for this profile" in ask("time", "nano", **changed)[1]
    (tmp_path / "own.yaml").write_text("name: nano\nmodel: smollm2\n")
    assert "not measured for this profile" in ask("time", str(tmp_path / "own.yaml"))[1]


def test_the_time_of_smol_is_told_of_a_folder_with_its_start(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "not measured" in ask("time", "smol", model=str(tmp_path))[1]
    (tmp_path / "warm_start.json").write_text("{}")
    assert "an hour a task" in ask("time", "smol", model=str(tmp_path))[1]


@pytest.mark.parametrize("gain, hours", [(5.0, "an hour and a half"), (2.7, "three and a half")])
def test_the_time_of_larger_weights_goes_by_the_products_of_this_machine(gain, hours, monkeypatch):
    monkeypatch.setattr(doctor, "bf16_gain", lambda: gain)
    qwen = load_profile("qwen")
    assert f"about {hours}" in doctor.time(Run(qwen, qwen.tasks()))


def test_what_fails_stops_a_run(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: None)
    assert refused().startswith("missing ")


def test_a_check_that_fails_gives_exit_code_1_and_a_doubt_does_not(monkeypatch):
    lines = []
    monkeypatch.setattr(preflight, "estimate", lambda *_: (False, "about 9 GiB of 4 GiB RAM"))
    assert ask("memory")[0] == "warn"
    assert doctor.report("smoke", "countdown", log=lines.append) == 0
    monkeypatch.setattr(doctor, "version", lambda name: None)
    assert doctor.report("smoke", "countdown", log=lines.append) == 1


def test_missing_packages_fail_and_other_versions_are_a_doubt_each_in_one_line(monkeypatch):
    versions = {"trl": "1.0.0", "peft": "0.1.0"}
    monkeypatch.setattr(doctor, "version", lambda name: versions.get(name, version(name)))
    state, text = ask("packages")
    assert state == "warn" and "trl 1.0.0 (tested: ==" in text and "peft 0.1.0" in text
    versions |= {"trl": None}
    state, text = ask("packages")
    assert state == "fail" and "missing trl==" in text and "`pip install -e .`" in text


def test_what_colab_keeps_of_its_own_is_no_doubt_there(monkeypatch):
    versions = {"jupyterlab": None, "torch": "2.11.0"}
    monkeypatch.setattr(doctor, "version", lambda name: versions.get(name, version(name)))
    assert ask("packages")[0] == "fail"
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    assert ask("packages")[0] == "ok"


def test_a_missing_gpu_is_judged_by_the_model(monkeypatch):
    assert ask("gpu")[0] == "ok" and ask("gpu", model="some/model")[0] == "warn"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    assert ask("gpu", model="some/model") == ("ok", "Some GPU")


def test_weights_that_are_missing_stop_a_run_with_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "EMBEDDED", tmp_path)
    assert "`r3 base-model`" in refused()
    monkeypatch.setattr(weights, "SMOLLM2", tmp_path)
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    assert weights.SMOLLM2_INSTALL in refused(model="smollm2")


def test_a_model_that_is_nowhere_is_named(tmp_path):
    assert "no config.json" in refused(model=str(tmp_path / "gone"))
    assert "the hub does not answer: go online" in refused(model="some/model")
    assert "model 'not a/hub/id' is no folder" in refused(model="not a/hub/id")


def test_an_empty_folder_is_no_model_and_one_with_a_config_is(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "ROOT", tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert "has no config.json: name the folder of a model" in refused(model="models/mine")
    (tmp_path / "models" / "mine" / "config.json").touch()
    assert ask("model", model="models/mine")[0] == ask("model", model=str(EMBEDDED))[0] == "ok"
    cached = "huggingface_hub.hf_hub_download"
    monkeypatch.setattr(cached, lambda *_, local_files_only: "somewhere/config.json")
    assert ask("model", model="some/model")[0] == "ok"


def test_a_model_that_the_hub_does_not_know_is_named(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unknown(*_, **__):
        raise LocalEntryNotFoundError("no such model")

    monkeypatch.setattr(provenance, "reaches_hub", lambda: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", unknown)
    assert "and the hub does not give it" in refused(model="some/model")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"countdown": {"larges": 20}}, "no option 'larges': did you mean 'largest'?"),
        ({"function_calling": {"rules": "lenient"}}, "no option 'rules': did you mean 'rule'?"),
        ({"countdown": {"zzz": 1}}, "known: source, count, largest, largest_target"),
        ({"countdown": {"largest": "20"}}, "task 'countdown', options {'source'"),
        ({"function_calling": {"parts": 5}}, "task 'function_calling', options {'source'"),
        ({"countdown": {"source": "no/folder"}}, "cannot read Countdown problems from 'no/folder'"),
    ],
)
def test_options_that_a_task_does_not_take_are_named(options, words, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True, raising=False)
    assert words in refused(task_options=options)


def test_the_limits_of_a_profile_of_one_task_are_a_doubt_for_another():
    profile = load_profile("qwen", model="base_model", train_problems=4, test_problems=4)
    assert outcome(doctor.problems, Run(profile, profile.tasks())) == ("ok", "data/arithmetic.py:Arithmetic")
    state, text = outcome(doctor.problems, Run(profile, profile.tasks("countdown")))
    assert state == "warn" and "max_attempt_length=16" in text and "enough for countdown?" in text


def test_too_few_problems_are_counted_not_searched_for():
    few = {"countdown": {"count": 3, "largest": 5}}
    assert "countdown train with numbers up to 5 holds only about 81 " in refused(task_options=few)


def test_problems_of_the_hub_are_a_doubt_while_offline_and_bfcl_names_its_package(monkeypatch):
    monkeypatch.setattr(doctor, "reaches_hub", lambda: False)
    state, text = ask("problems", task_options={"countdown": {"source": "hub"}})
    assert state == "warn" and text.startswith("countdown: the hub does not answer")
    monkeypatch.setattr("r3lib.tasks.function_calling_records.find_spec", lambda name: None)
    records.read.cache_clear()  # other tests have read them
    state, text = ask("problems", task_options={"function_calling": {"source": "bfcl"}})
    assert state == "fail" and "pip install --no-deps bfcl-eval==" in text


def test_gated_data_name_how_to_get_access(monkeypatch):
    monkeypatch.setattr(doctor, "reaches_hub", lambda: True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True, raising=False)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: 1 / 0)
    state, text = ask("problems", task_options={"function_calling": {"source": "hub"}})
    assert state == "fail" and "accept the terms at" in text and "hf auth login" in text


def test_memory_that_may_be_short_or_is_unknown_is_a_warning_and_no_stop(monkeypatch, capsys):
    monkeypatch.setattr(preflight, "estimate", lambda *_: (False, "about 9 GiB of 4 GiB RAM"))
    check_run(Run(load_profile("smoke")))
    said = capsys.readouterr().err
    assert said.startswith("r3: warning: memory may be short, about 9 GiB of 4 GiB RAM: lower")
    monkeypatch.undo()
    monkeypatch.setattr(provenance, "reaches_hub", lambda: False)
    state, text = ask("memory", model="some/model")
    assert state == "warn" and "does not answer: go online" in text


def test_the_manifest_gets_commit_versions_and_hardware():
    machine = provenance.machine()
    assert machine["packages"]["torch"] == torch.__version__
    assert machine["hardware"]["memory_gib"] > 0
    assert machine["hardware"]["processor"] in Path("/proc/cpuinfo").read_text()
    assert {"commit", "dirty"} <= machine.keys() and {"cpus", "gpu"} <= machine["hardware"].keys()


def test_the_measured_peak_is_at_least_what_is_held():
    before = provenance.peak_memory_gib()
    held = b"x" * 2**28
    assert provenance.peak_memory_gib() >= before > 0.05 and held


@pytest.mark.parametrize(
    "setting, value, why",
    [
        ("training.optim", "adamw_8bt", "adamw_8bt is not a valid"),
        ("lr_scheduler_type", "cosin", "cosin is not a valid"),
        ("report_to", "wandbb", "wandbb is not supported"),
    ],
)
def test_a_word_that_only_the_training_would_refuse_is_refused_before_the_baseline(
    setting, value, why
):
    assert why in refused(**{setting: value})
    assert ask("training", **{"training.optim": "sgd"}) == ("ok", "settings as TRL takes them")
