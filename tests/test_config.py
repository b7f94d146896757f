"""Profiles: typed, checked, and every mistake answered by one line that names the mend."""

import json
from dataclasses import asdict

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from r3lib.config import FOLDER, accumulation_steps, load_profile
from r3lib.errors import R3Error

PROFILES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", PROFILES)
def test_every_shipped_profile_loads_and_is_plain_json(name):
    profile = load_profile(name)
    assert profile.name == name and json.loads(json.dumps(asdict(profile))) == asdict(profile)


@pytest.mark.parametrize("name", PROFILES)
def test_every_value_of_a_shipped_profile_is_explained_beside_itself(name):
    lines = [line for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if line and line[0].isalpha()]
    assert len(lines) > 25 and all("#" in line for line in lines)


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("seeds", "3", 3),
        ("learning_rate", "2e-3", 0.002),
        ("learning_rate", 0.5, 0.5),
        ("beta", "1", 1.0),
        ("beta", 0, 0.0),
        ("warmup_steps", "5", 5),
        ("warmup_steps", "0.03", 0.03),
        ("steps", "1", 1),
        ("model", "some/model", "some/model"),
        ("scheduler", "linear", "linear"),
        ("task_options", "{countdown: {count: [3, 4]}}", {"countdown": {"count": [3, 4]}}),
        ("name", "mine", "mine"),
    ],
)
def test_overrides_take_the_type_of_their_field(key, text, value):
    found = getattr(load_profile("nano", **{key: text}), key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("group_size", "1", ["group_size=1", "a group of 1 has no variance, so nothing is learned", "2 or more"]),
        ("group_sise", "4", ["unknown profile key 'group_sise'", "did you mean 'group_size'?"]),
        ("steps", "-1", ["steps=-1", "1 or more"]),
        ("steps", "many", ["steps='many'", "a whole number"]),
        ("steps", 2.5, ["steps=2.5", "a whole number"]),
        ("steps", True, ["steps=True", "a whole number"]),
        ("seeds", "0", ["seeds=0", "1 or more"]),
        ("learning_rate", "0", ["learning_rate=0.0", "between 0 and 1"]),
        ("learning_rate", "2", ["learning_rate=2.0", "between 0 and 1"]),
        ("learning_rate", "nan", ["learning_rate=nan", "between 0 and 1"]),
        ("max_grad_norm", "inf", ["max_grad_norm=inf", "above 0"]),
        ("beta", "-0.1", ["beta=-0.1", "0 or more"]),
        ("warmup_steps", "1.5", ["warmup_steps=1.5", "share of the steps below 1"]),
        ("reflection_temperature", "0", ["reflection_temperature=0.0", "all alike"]),
        ("mask", "reflexion", ["mask='reflexion'", "did you mean 'reflection'?"]),
        ("loss_type", "drgrpo", ["loss_type='drgrpo'", "did you mean 'dr_grpo'?"]),
        ("task_options", "{contdown: {}}", ["'contdown'", "did you mean 'countdown'?"]),
        ("task_options", "7", ["task_options=7", "a mapping"]),
        ("model", {"a": 1}, ["model={'a': 1}", "text"]),
        ("name", "../up", ["name='../up'", "letters"]),
        ("name", "", ["name=''", "letters"]),
    ],
)
def test_bad_value_is_one_line_with_key_value_and_mend(key, value, words):
    with pytest.raises(R3Error) as error:
        load_profile("nano", **{key: value})
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"failures_per_step": 4}, ["4 x 8 = 32 rows", "batches of 64", "for example to 32"]),
        ({"micro_batch": "48"}, ["32 x 8 = 256 rows", "batches of 48", "for example to 16"]),
        ({"mask": "retry"}, ["mask='retry' trains the retry", "set retry_temperature=1.0 (now 0.0)"]),
    ],
)
def test_settings_that_exclude_each_other_are_refused_when_the_profile_is_read(settings, words):
    """Training, and so the rows of a step, came only after mining."""
    with pytest.raises(R3Error) as error:
        load_profile("nano", **settings)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@given(*[st.integers(1, 40)] * 3, st.integers(1, 4))
def test_rows_of_a_step_come_out_even_or_are_refused(failures, group, batch, processes):
    rows = failures * group
    try:
        steps = accumulation_steps(failures, group, batch, processes)
    except R3Error as error:
        assert rows % (batch * processes) or failures % processes
        named = int(str(error).rsplit(" ", 1)[1])
        if failures % processes == 0:
            assert accumulation_steps(failures, group, named, processes)
    else:
        assert steps * batch * processes == rows and failures % processes == 0


def test_a_server_of_our_own_has_the_trainers_weights():
    with pytest.raises(R3Error, match="engine=vllm .* quantization=nf4 .*: set quantization=none, or vllm_options="):
        load_profile("colab", engine="vllm")
    for fine in ({"quantization": "none"}, {"servers": "http://h:1"}, {"vllm_options": "--quantization bitsandbytes"}):
        assert load_profile("colab", engine="vllm", **fine).own_server == ("servers" not in fine)


@pytest.mark.parametrize(
    "text, value",
    [
        ("", None),
        ("--max-model-len 512 --seed 1", "512"),
        ("--seed 1 --max_model_len=512", "512"),
        ("--max-model-len 512 --max-model-len 1k", "1k"),
        ("--seed 1 --max-model-len", ""),
        ("--max-model-length 512", None),
    ],
)
def test_an_option_of_vllm_is_found_as_vllm_would(text, value):
    assert load_profile("nano", vllm_options=text).vllm_option("--max-model-len", "-m") == value


def test_unknown_profile_names_the_nearest():
    with pytest.raises(R3Error, match="unknown profile 'nanno': did you mean 'nano'"):
        load_profile("nanno")


def own(tmp_path, change):
    values = yaml.safe_load((FOLDER / "nano.yaml").read_text())
    change(values)
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_own_profile_is_read_from_its_path(tmp_path):
    path = own(tmp_path, lambda values: values.update(name="mine", steps=7))
    assert (load_profile(path).name, load_profile(path, steps="8").steps) == ("mine", 8)


def test_own_profile_that_lacks_a_key_is_told_which(tmp_path):
    with pytest.raises(R3Error, match="own.yaml lacks beta, mask: copy the missing lines"):
        load_profile(own(tmp_path, lambda values: (values.pop("mask"), values.pop("beta"))))


@pytest.mark.parametrize("text", ["steps: [", "just words", "", "- a\n- b"])
def test_file_that_is_no_profile_is_one_line(tmp_path, text):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(R3Error, match="own.yaml is not a profile") as error:
        load_profile(str(tmp_path / "own.yaml"))
    assert "\n" not in str(error.value)
