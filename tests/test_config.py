"""Profiles: typed, checked, and every mistake answered by one line that names the fix."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from trl import GRPOConfig, TrlParser

from r3lib.config import DEFAULTS, FLAT, FOLDER, accumulation_steps, load_profile
from r3lib.errors import R3Error
from r3lib.r3_config import R3Config
from r3lib.settings import FREE, HONOURED, REFUSED
from r3lib.study import open_studies
from r3lib.tasks import TASKS

PROFILES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "defaults")


@pytest.mark.parametrize("name", PROFILES)
def test_every_shipped_profile_loads_and_is_plain_json(name):
    profile = load_profile(name)
    assert profile.name == name and json.loads(json.dumps(asdict(profile))) == asdict(profile)


@pytest.mark.parametrize("name", PROFILES)
def test_the_blocks_of_a_shipped_profile_are_what_trl_and_peft_take(name, tmp_path):
    profile = load_profile(name)
    config = R3Config(str(tmp_path), use_cpu=True, **profile.sampling, **profile.training)
    assert config.max_steps == profile.training["max_steps"]
    assert LoraConfig(**profile.lora).r == profile.lora["r"]


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_shows_only_what_differs_from_what_it_starts_from(name):
    given = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    base = asdict(load_profile(given["base"])) if "base" in given else DEFAULTS
    for key in given.keys() - {"name", "base"}:
        if key in ("sampling", "training", "lora"):
            assert [k for k, v in given[key].items() if base[key][k] == v] == []
        else:
            assert given[key] != base[key], key


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("seeds", "3", 3),
        ("learning_rate", "2e-3", 0.002),
        ("training.learning_rate", 0.5, 0.5),
        ("beta", "1", 1.0),
        ("warmup_steps", "5", 5.0),
        ("max_steps", "1", 1),
        ("model", "some/model", "some/model"),
        ("lr_scheduler_type", "linear", "linear"),
        ("chat_template_kwargs", "{enable_thinking: false}", {"enable_thinking": False}),
        ("training.optim", "adafactor", "adafactor"),
        ("training.max_grad_norm", "1", 1.0),
        ("r", "8", 8),
        ("disable_tqdm", "false", False),
        ("save_steps", "0.1", 0.1),
        ("report_to", ["tensorboard", "wandb"], ["tensorboard", "wandb"]),
        ("target_modules", "[q_proj,v_proj]", ["q_proj", "v_proj"]),
        ("lora.use_rslora", "true", True),
        ("training.lr_scheduler_kwargs", "{min_lr: 1e-5}", {"min_lr": 1e-5}),
        ("dynamic_sampling", "3", 3),
        ("name", "mine", "mine"),
    ],
)
def test_overrides_find_their_block_and_take_the_type_of_their_setting(key, text, value):
    profile = load_profile("nano", **{key: text})
    name = key.rpartition(".")[2]
    homes = [asdict(profile), profile.sampling, profile.training, profile.lora]
    found = [home[name] for home in homes if name in home]
    assert found == [value] and type(found[0]) is type(value)


def test_another_model_has_the_machines_dtype_unless_one_is_given():
    assert load_profile("nano").dtype == load_profile("nano", seeds=2, model="base_model").dtype == "float32"
    assert load_profile("smol").dtype == load_profile("nano", model="some/model").dtype == "auto"
    assert load_profile("nano", dtype="float32", model="some/model").dtype == "float32"


def test_a_dtype_that_a_profile_of_yours_names_stays_with_another_model(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("name: one\nmodel: smollm2\ndtype: float32\n")
    two.write_text(f"name: two\nbase: {one}\nmodel: some/model\n")
    assert load_profile(str(one), model="some/model").dtype == load_profile(str(two)).dtype == "float32"


def test_a_key_that_stands_twice_is_an_error_not_the_last_of_them(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("name: own\ntraining: {learning_rate: 1e-4}\ntraining: {max_steps: 1}\n")
    with pytest.raises(R3Error, match="'training' stands there twice"):
        load_profile(str(path))


def test_task_options_change_task_by_task():
    plain = load_profile("nano").task_options
    options = load_profile("nano", task_options="{countdown: {count: [3, 4]}}").task_options
    assert options == plain | {"countdown": plain["countdown"] | {"count": [3, 4]}}
    assert load_profile("nano").task_options == plain and plain["countdown"]["count"] == 3
    with pytest.raises(R3Error, match="task_options of 'countdown'=4 is not a mapping"):
        load_profile("nano", task_options={"countdown": 4})


@pytest.mark.parametrize(
    "block, words",
    [
        ({"sampling": {"sample_bach": 3}}, "is not supported: did you mean 'sample_batch'?"),
        ({"training": {"learning_rte": 1}}, "is not supported: did you mean 'learning_rate'?"),
        ({"lora": {"lora_alfa": 3}}, "is not supported: did you mean 'lora_alpha'?"),
        ({"training": {"zzz": 3}}, "is not supported: known: "),
        ({"training": {"top_p": 0.5}}, "is not supported: R3 samples from the whole distribution"),
        ({"training": {"seed": 3}}, "is not supported"),
        ({"training": {"temperature": 3}}, "is not supported"),
        ({"training": {"mine_samples": 3}}, "is not supported"),
    ],
)
def test_a_setting_that_a_block_does_not_take_is_named_when_it_is_read(block, words, tmp_path):
    """Such names were found by R3Config in notebook 03, after the baseline and mining."""
    with pytest.raises(R3Error, match=words) as error:
        load_profile("nano", **block)
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "base": "nano", **block}))
    with pytest.raises(R3Error, match=words):
        load_profile(str(path))
    assert "\n" not in str(error.value)


def test_each_field_of_r3config_is_a_setting_or_refused_with_a_reason():
    inherited = set(GRPOConfig.__dataclass_fields__)
    assert inherited <= HONOURED | FREE | REFUSED.keys()
    assert R3Config.__dataclass_fields__.keys() - inherited <= FLAT.keys() | {"dynamic_sampling"}


def test_trls_parser_of_the_command_line_makes_an_r3config(tmp_path):
    """It gives every field, and False for what is "no" by default."""
    line = ["--output_dir", str(tmp_path), "--failures_per_step", "4", "--num_generations", "2"]
    config = TrlParser(R3Config).parse_args_and_config(line)[0]
    assert config.failures_per_step == 4 and config.include_num_input_tokens_seen == "no"


def test_what_a_profile_of_the_package_names_is_read_without_trl_or_peft():
    code = f"""
import sys
from r3lib.config import load_profile
for name in {PROFILES}:
    load_profile(name, max_steps=4, r=8)
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"trl", "peft", "torch"} & set(done.stdout.split())


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("num_generations", "1", ["num_generations=1 is out of range", "2 or more"]),
        ("num_generation", "4", ["unknown setting 'num_generation'", "did you mean 'num_generations'?"]),
        ("sampling.max_step", "4", ["sampling.max_step", "is not supported"]),
        ("training.seed", "7", ["training.seed", "is not supported", "use seeds"]),
        ("use_rslora", "true", ["unknown setting 'use_rslora'", "lora.use_rslora=..."]),
        ("max_steps", "-1", ["max_steps=-1", "1 or more"]),
        ("max_steps", "many", ["max_steps='many'", "a whole number"]),
        ("max_steps", 2.5, ["max_steps=2.5", "a whole number"]),
        ("max_steps", True, ["max_steps=True", "a whole number"]),
        ("max_steps", "[3", ["max_steps=[3 is not YAML", "fix it"]),
        ("dynamic_sampling", "0", ["dynamic_sampling=0", "1 or more"]),
        ("temperature", "0", ["temperature=0.0", "0.01 or more"]),
        ("temperature", "nan", ["temperature='nan'", "a number"]),
        ("learning_rate", ".inf", ["learning_rate=inf", "a number"]),
        ("mask", "reflexion", ["mask='reflexion'", "it takes reflection, reflection+retry, retry"]),
        ("loss_type", "sapo", ["loss_type='sapo' is not supported by R3: it takes dr_grpo, grpo,"]),
        ("retry_temperature", "-1", ["retry_temperature=-1", "0 or more"]),
        ("learning_rate", "fast", ["learning_rate='fast'", "a number"]),
        ("task_options", "7", ["task_options=7", "a mapping"]),
        ("training", "7", ["training=7", "a mapping"]),
        ("model", {"a": 1}, ["model={'a': 1}", "text"]),
        ("name", "../up", ["name='../up'", "letters"]),
        ("name", "has space", ["name='has space'", "letters"]),
        ("name", "", ["name=''", "letters"]),
        ("name", 3, ["name=3", "text"]),
    ],
)
def test_bad_value_is_one_line_with_key_value_and_fix(key, value, words):
    with pytest.raises(R3Error) as error:
        load_profile("nano", **{key: value})
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"failures_per_step": 4}, ["4 x 8 = 32 rows", "batches of 64", "change one of them"]),
        (
            {"mask": "retry", "retry_temperature": 1, "training.mask_truncated_completions": True},
            ["mask_truncated_completions looks at the last token", "use truncation_penalty"],
        ),
        ({"mask": "retry"}, ["mask='retry' trains the retry", "set retry_temperature=1.0"]),
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
    except R3Error:
        assert rows % (batch * processes) or failures % processes
    else:
        assert steps * batch * processes == rows and failures % processes == 0


def test_a_server_of_our_own_has_the_trainers_weights():
    with pytest.raises(R3Error, match="engine=vllm .* quantization=nf4 .*: set quantization=none, or vllm_options="):
        load_profile("colab", engine="vllm")
    for fine in ({"quantization": "none"}, {"servers": "http://h:1"}, {"vllm_options": "--quantization bitsandbytes"}):
        assert load_profile("colab", engine="vllm", **fine).own_server == ("servers" not in fine)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"servers": "http://h:1"}, "servers='http://h:1' is for engine=vllm: set that"),
        ({"vllm_options": "--dtype half"}, "vllm_options='--dtype half' are for a server of our own"),
        (
            {"engine": "vllm", "servers": "http://h:1", "vllm_options": "--dtype half"},
            "are for a server of our own: .*leave them out",
        ),
    ],
)
def test_settings_of_a_server_that_nobody_would_ask_are_refused(settings, words):
    with pytest.raises(R3Error, match=words):
        load_profile("nano", **settings)


def test_unknown_profile_names_the_nearest():
    with pytest.raises(R3Error, match="unknown profile 'nanno': did you mean 'nano'"):
        load_profile("nanno")


def test_an_own_profile_may_end_in_yml_and_must_be_utf_8(tmp_path):
    path = tmp_path / "own.yml"
    path.write_text("name: mine\nbase: nano\n")
    assert load_profile(str(path)).name == "mine"
    path.write_bytes("name: mine  # für mich\n".encode("latin-1"))
    with pytest.raises(R3Error, match="own.yml is not UTF-8"):
        load_profile(str(path))


def test_own_profile_names_what_differs_from_another(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("name: mine\nbase: nano\ntraining: {max_steps: 7, learning_rate: 1e-4}\n")
    own, nano = load_profile(str(path), seeds=2), load_profile("nano")
    assert (own.name, own.seeds, own.training["max_steps"]) == ("mine", 2, 7)
    assert own.training["learning_rate"] == 0.0001  # which YAML takes for text
    assert own.sampling == nano.sampling and own.training["beta"] == nano.training["beta"]


def test_profiles_that_are_bases_of_each_other_are_named(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(f"name: one\nbase: {two}\n")
    two.write_text(f"name: two\nbase: {one}\n")
    with pytest.raises(R3Error, match="one.yaml is a base of itself: name another base in .*two.yaml"):
        load_profile(str(one))


@pytest.mark.parametrize("text", ["steps: [", "just words", "", "- a\n- b", "model: base_model"])
def test_file_that_is_no_profile_is_one_line(tmp_path, text):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(R3Error, match="own.yaml is not (a profile|YAML)") as error:
        load_profile(str(tmp_path / "own.yaml"))
    assert "\n" not in str(error.value)


def test_own_profile_with_an_unknown_setting_is_told_the_nearest(tmp_path):
    (tmp_path / "own.yaml").write_text("name: mine\nmodle: here\n")
    with pytest.raises(R3Error, match="unknown setting 'modle' in .*own.yaml: did you mean 'model'"):
        load_profile(str(tmp_path / "own.yaml"))


def test_a_profile_says_what_a_run_without_a_task_is_of(tmp_path, monkeypatch):
    assert load_profile("nano").tasks() == list(TASKS)
    assert load_profile("nano", task="countdown").tasks() == ["countdown"]
    monkeypatch.chdir(tmp_path)  # whose files the profile's task is not
    [study] = open_studies("qwen", results=tmp_path)
    assert study.task.name == "arithmetic"
    assert load_profile("qwen").tasks("countdown") == ["countdown"]
    with pytest.raises(R3Error, match="unknown task 'countdwn': did you mean 'countdown'"):
        load_profile("nano", task="countdwn").tasks()
