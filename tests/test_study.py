"""What a study costs before anything is computed: its imports."""

import importlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pandas as pd
import pytest
import torch
from conftest import CoinTask, ScriptedEngine, small_config, small_lora, tiny_model
from transformers import AutoModelForCausalLM

import r3lib.sources
import r3lib.study
from r3lib.chat import Chat
from r3lib.config import load_profile
from r3lib.errors import R3Error
from r3lib.evaluate import accuracy_table
from r3lib.mining import FAILURE, MinedFailures, failures_table
from r3lib.sampler import RolloutSampler, mine_failures
from r3lib.sources import sources_hash
from r3lib.study import Study, open_studies
from r3lib.tasks import load_task
from r3lib.trainer import R3Trainer

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"torch", "transformers", "peft", "trl", "datasets"}  # ten seconds in every notebook's kernel


def loaded(*modules):
    """Names of all modules that importing `modules` brings along, in a process of its own."""
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "modules, absent",
    [
        (["r3lib.study", "r3lib.artifacts"], MODELS | {"matplotlib"}),
        (["r3lib.study", "r3lib.evaluate", "r3lib.failures", "r3lib.figures"], MODELS),
        (["r3lib.pipeline", "r3lib.report"], MODELS),
    ],
)
def test_what_reads_a_cached_study_loads_no_model_library(modules, absent):
    assert loaded(*modules) & absent == set()


@pytest.mark.slow
def test_shares_of_a_stage_are_joined_to_what_one_process_makes(tmp_path, monkeypatch):
    """Shards of 8 of 24 problems, two processes; the stage then samples nothing."""
    settings = dict(test_problems=24, train_problems=24, shard_size=8)
    whole = Study("smoke", "countdown", tmp_path / "whole", **settings)
    shares = [Study("smoke", "countdown", tmp_path / "shares", **settings) for _ in range(3)]
    for i in range(2):
        assert shares[i].mine((i, 2)).parent.name == "parts"
    monkeypatch.setattr(r3lib.study, "mine_failures", None)
    joined = pd.read_parquet(shares[2].mine())
    monkeypatch.undo()
    assert {len(list(share.results.glob("parts/*"))) for share in shares} == {0}
    made = pd.read_parquet(whole.mine())
    pd.testing.assert_frame_equal(joined, made)
    assert len(made) > 5


def test_what_shares_lack_is_sampled_and_what_is_made_is_not_shared_out_again(tmp_path, monkeypatch, capsys):
    study, again = (Study("smoke", "countdown", tmp_path, train_problems=24, shard_size=8) for _ in range(2))
    study.mine((0, 2))
    path = study.mine()
    assert pd.read_parquet(path).problem_id.nunique() > 5
    capsys.readouterr()
    monkeypatch.setattr(r3lib.study, "mine_failures", None)
    again.mine((0, 2))
    assert again.mine() == path and capsys.readouterr().out == "cached  countdown.parquet\n"


OWN = """
from r3lib import Task, Verdict
from r3lib.tasks import CountdownTask

class Even(CountdownTask):
    name = "even"
    reasons = ("odd",)
    def __init__(self, limit: int = 20):
        super().__init__(count=3, largest=limit)
    def verify(self, text, problem):
        return Verdict(len(text) % 2 == 0, "ok" if len(text) % 2 == 0 else "odd")
"""


def test_a_task_of_ones_own_goes_all_the_way(tmp_path, monkeypatch, capsys):
    """By its file, as the command line and notebooks name it, and as an object."""
    (tmp_path / "mine.py").write_text(OWN)
    place = f"{tmp_path / 'mine.py'}:Even"
    settings = dict(test_problems=24, train_problems=24, task_options={"even": {"limit": 19}})
    study = Study("smoke", place, tmp_path, **settings)
    assert study.task.largest == 19
    episodes = study.episodes()
    assert set(episodes.task) == {"even"} and set(episodes.policy) == {"vanilla", "r3"}
    assert len(study.metrics()) == 2 and set(accuracy_table(episodes).train_task) == {"", "even"}
    capsys.readouterr()
    del settings["task_options"]
    assert Study("smoke", study.task, tmp_path, **settings).baseline() == study.baseline()
    assert capsys.readouterr().out == "cached  even-vanilla-0.parquet\n"
    (tmp_path / "mine.py").write_text(OWN.replace("% 2 == 0", "% 3 == 0"))
    Study("smoke", place, tmp_path, **settings).mine()
    assert "task's class" in capsys.readouterr().out


def test_a_function_beside_a_task_of_ones_own_counts_as_the_task(tmp_path, capsys):
    helper = OWN.replace("len(text) % 2 == 0", "even(text)") + "\ndef even(text): return {}\n"
    place = f"{tmp_path / 'mine.py'}:Even"
    for body in ("len(text) % 2 == 0", "len(text) % 3 == 0", "len(text) % 3 == 0"):
        (tmp_path / "mine.py").write_text(helper.format(body))
        Study("smoke", place, tmp_path, train_problems=8).mine()
    made, again, cached = capsys.readouterr().out.splitlines()
    assert made == "running even.parquet: not there yet"
    assert again.startswith("running even.parquet: ") and "task's class" in again
    assert cached == "cached  even.parquet"


def test_a_function_that_a_task_imports_from_a_file_beside_it_counts_too(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mine.py").write_text("import r3_helpers\n" + OWN.replace("len(text)", "r3_helpers.size(text)"))
    keys = []
    for body in ("len(text)", "len(text) + 1", "len(text) + 1"):
        (tmp_path / "r3_helpers.py").write_text(f"def size(text):\n    return {body}\n")
        sys.modules.pop("r3_helpers", None)
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        keys.append(Study("smoke", f"{tmp_path / 'mine.py'}:Even", tmp_path)._config())
    assert keys[0] != keys[1] == keys[2]


@pytest.mark.parametrize(("body", "words"), [
    ("def problems(self, split, n, seed): return super().problems(split, n, seed)[:5]", "gives 5: ask for as many"),
    ("def problems(self, split, n, seed): return 1 / 0", "raises ZeroDivisionError: division by zero"),
    ("def messages(self, problem): return 'What?'", "messages gives 'What.': return"),
    ("def part(self, problem_id): return None", "part gives None: return text"),
])  # fmt: skip
def test_problems_that_are_none_are_refused_before_anything_is_sampled(tmp_path, body, words):
    (tmp_path / "mine.py").write_text(f"{OWN}    {body}\n")
    study = Study("smoke", f"{tmp_path / 'mine.py'}:Even", tmp_path, test_problems=8)
    with pytest.raises(R3Error, match=words):
        study.problems("test", 8)


def test_other_folders_among_the_adapters_are_left_alone(tmp_path):
    study = Study("smoke", CoinTask(), tmp_path)
    for name in ("countdown-r3-0", "countdown-r3-0-backup"):
        (study.results / "adapters" / name).mkdir(parents=True)
        (study.results / "adapters" / name / "metrics.jsonl").write_text(f"{name}\n")
    study._collect_metrics()
    assert (study.results / "metrics.jsonl").read_text() == "countdown-r3-0\n"


def test_a_task_that_inherits_a_shipped_one_hangs_on_its_sources(tmp_path, monkeypatch):
    """Those of the other shipped task, of conditions and of styles decide nothing in it."""
    root = tmp_path / "r3lib"
    shutil.copytree(r3lib.sources.HERE, root, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(r3lib.sources, "HERE", root)
    before = sources_hash(CoinTask(), "transformers")
    for name in ("tasks/function_calling.py", "tasks/styles.yaml", "conditions.py", "engines/vllm.py"):
        with open(root / name, "a") as file:
            file.write("# edited")
        assert sources_hash(CoinTask(), "transformers") == before
    for name in ("tasks/countdown.py", "tasks/sources.py", "study.py", "verifiers/countdown.py"):
        with open(root / name, "a") as file:
            file.write("# edited")
        after = sources_hash(CoinTask(), "transformers")
        assert after != before
        before = after


def test_two_files_of_one_name_hold_two_tasks(tmp_path):
    tasks = []
    for name in ("even", "odd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(OWN.replace('"even"', f'"{name}"'))
        tasks.append(load_task(f"{tmp_path / name / 'mine.py'}:Even"))
    assert [task.name for task in tasks] == ["even", "odd"]
    assert len({type(task).__module__ for task in tasks}) == 2


@pytest.mark.parametrize(
    "place, words",
    [
        ("countdwn", "did you mean 'countdown'"),
        ("no/such.py:Task", "no task at"),
        ("no.such.module:Task", "no task at"),
        ("r3lib.errors:R3Error", "is no task: let the class inherit"),
        ("mine.py:Task", "mine.py fails when imported: SyntaxError: .*line 1"),
        ("script.py:Task", "script.py exits when imported: put what it runs under `if __name__"),
    ],
)
def test_a_task_that_is_nowhere_is_one_line(place, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("class Task(")
    Path("script.py").write_text("raise SystemExit(0)")
    with pytest.raises(R3Error, match=words) as error:
        load_task(place)
    assert "\n" not in str(error.value)


def test_shares_and_what_a_killed_run_has_left_are_all_taken(tmp_path, monkeypatch, capsys):
    """A whole run that is killed, then a share, one of other settings, and the whole again."""
    given = {"test_problems": 6, "shard_size": 2}
    real, left = r3lib.episodes._episodes, []

    def killed(sampler, problems, *rest):
        if left and not left.pop():
            raise KeyboardInterrupt
        done.append(problems[0].id)
        return real(sampler, problems, *rest)

    monkeypatch.setattr(r3lib.episodes, "_episodes", killed)
    done, left[:] = [], [False, True]
    with pytest.raises(KeyboardInterrupt):
        Study("smoke", CoinTask(), tmp_path, **given).baseline()
    assert len(done) == 1
    Study("smoke", CoinTask(), tmp_path, **given).baseline(part=(1, 3))
    Study("smoke", CoinTask(), tmp_path, **given | {"test_problems": 4}).baseline(part=(1, 2))
    done.clear()
    study = Study("smoke", CoinTask(), tmp_path, **given)
    table = pd.read_parquet(study.baseline())
    assert len(done) == 1, "the third shard"
    assert [*table[table.condition == "first_try"].problem_id] == [p.id for p in study.problems("test", 6)]
    said = capsys.readouterr().out
    assert said.count("is not used: it is of other settings, data or code") == 1


SHORT = dict(train_problems=32, failures_per_step=2, num_generations=4, per_device_train_batch_size=8, max_steps=1)


@pytest.fixture
def short(tmp_path):
    """A study with a training of one step."""
    return Study("smoke", "countdown", tmp_path, **SHORT)


def test_a_trainer_of_ones_own_is_taken_only_if_it_is_the_profiles(short, tmp_path):
    trainer = short.trainer(0)
    trainer.args.learning_rate = 0.5
    with pytest.raises(R3Error, match="learning_rate was 0.002, is 0.5: change it in overrides"):
        short.train(0, trainer)
    trainer.args.learning_rate = 0.002
    with pytest.raises(R3Error, match="training_folder"):
        short.train(1, trainer)
    path = short.train(0, trainer)
    assert (path / "adapter_model.safetensors").exists()
    assert short.train(0, short.trainer(0)) == path == short.train(0)
    code = f"""import sys; from r3lib.study import Study
Study("smoke", "countdown", {str(tmp_path)!r}, **{SHORT}).train(0); print(*sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "cached  countdown-r3-0" in done.stdout
    assert MODELS & set(done.stdout.split()) == {"datasets"}


def in_bf16(study):
    return AutoModelForCausalLM.from_pretrained(study.model_path, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (lambda study: {"peft_config": small_lora(r=2)}, "lora.r was 16, is 2"),
        (lambda study: {"peft_config": small_lora(target_modules=["q_proj"])}, "lora.target_modules was"),
        (lambda study: {"peft_config": None}, "lora.r was 16, is null"),
        (lambda study: {"model": tiny_model("llama", len(study.tokenizer))}, "model was .*base_model., is"),
        (lambda study: {"model": in_bf16(study)}, "dtype was .torch.float32., is .torch.bfloat16"),
        (lambda study: {"task": CoinTask(count=3, largest=20)}, "task's class was"),
        (lambda study: {"failures": study.failures()[1:]}, "failures was"),
        (lambda study: {"engine": ScriptedEngine(study.tokenizer)}, "engine of its own was false, is true"),
    ],
    ids=["r", "targets", "whole", "model", "dtype", "task", "failures", "engine"],
)
def test_what_is_edited_in_the_trainer_and_not_in_the_profile_is_named(short, changes, words):
    """Else the edited trainer's adapter would be kept, or another one taken, as the profile's."""
    parts = dict(model=short.model(), args=short.args(0), task=short.task, failures=short.failures(),
                 peft_config=short.lora(), processing_class=short.tokenizer)  # fmt: skip
    with pytest.raises(R3Error, match=f"not the profile's trainer: .*{words}"):
        short.train(0, R3Trainer(**parts | changes(short)))


def test_a_conditions_colour_and_question_make_no_episodes_anew_and_its_temperature_does(tmp_path, monkeypatch):
    first, *others = r3lib.study.CONDITIONS
    keys = []
    monkeypatch.setattr(r3lib.study, "stage", lambda target, config, *_: keys.append(config))
    for edited in (first, replace(first, color="#000000", control="Why?"), replace(first, temperature=0.5)):
        monkeypatch.setattr(r3lib.study, "CONDITIONS", [edited, *others])
        Study("smoke", "countdown", tmp_path).baseline()
    assert keys[0] == keys[1] != keys[2]


def test_overrides_are_a_mapping_or_its_text(tmp_path):
    [study] = open_studies("smoke", "countdown", tmp_path, "{training: {learning_rate: 1e-4}}")
    assert study.profile.training["learning_rate"] == 0.0001
    for overrides in ({"seeds": 2}, '{"seeds": 2}', "{seeds: 2}"):
        [study] = open_studies("smoke", "countdown", tmp_path, overrides)
        assert study.profile.seeds == 2
    for wrong in ("{seeds: ", "seeds", "[1]", None):
        with pytest.raises(R3Error, match="is no mapping"):
            open_studies("smoke", "countdown", tmp_path, wrong)


def test_settings_that_a_study_could_not_apply_are_refused(tmp_path):
    """They were dropped: of a profile and a task that are made already."""
    with pytest.raises(R3Error, match="^seeds: give overrides to load_profile"):
        Study(load_profile("smoke"), "countdown", tmp_path, seeds=3)
    coin, options = CoinTask(), {"task_options": {"countdown": {"largest": 9}}}
    with pytest.raises(R3Error, match="make this one with them instead"):
        Study("smoke", coin, tmp_path, **options)
    coin.name = "coin"
    own = load_profile("smoke", task_options={"coin": {"largest": 9}})
    with pytest.raises(R3Error, match="make this one with them instead"):
        Study(own, coin, tmp_path)
    assert Study("smoke", coin, tmp_path).task is coin


def test_arguments_of_a_server_of_our_own_decide_what_it_samples(tmp_path):
    configs = [
        Study("smoke", "countdown", tmp_path, engine="vllm", vllm_options=options)._config()
        for options in ("", "--dtype half", "--dtype float")
    ]
    assert all(configs.count(config) == 1 for config in configs)


def test_a_setting_of_the_block_makes_the_adapter_anew_but_not_what_comes_before_it(tmp_path):
    plain = Study("smoke", "countdown", tmp_path)
    for setting in ({"beta": 0.1}, {"training.optim": "sgd"}, {"r": 8}):
        other = Study("smoke", "countdown", tmp_path, **setting)
        assert other._training(0) != plain._training(0)
        assert other._config("test_problems") == plain._config("test_problems")
    free = Study("smoke", "countdown", tmp_path, report_to="tensorboard", save_steps=7, sample_batch=3)
    assert free._training(0) == plain._training(0)
    longer = Study("smoke", "countdown", tmp_path, max_retry_length=65)
    assert longer._config("test_problems") != plain._config("test_problems")


def test_failures_hold_plain_numbers_that_an_engine_in_another_process_can_be_sent(tmp_path, monkeypatch):
    """A table gives token ids back as numpy's numbers, which JSON does not know."""
    study, path = Study("smoke", "countdown", tmp_path), tmp_path / "mined.parquet"
    [problem] = study.problems("train", 1)
    pd.DataFrame([[problem.id, "1", "missed_target", 1, [5, 1]]], columns=FAILURE).to_parquet(path)
    monkeypatch.setattr(Study, "mine", lambda self: path)
    [failure] = study.failures()
    assert json.dumps(failure.attempt_ids) == "[5, 1]"


def mined(study, path, count=12):
    """Failures at random attempts, and the same as `study` reads them from a table at `path`."""
    runner = RolloutSampler(ScriptedEngine(study.tokenizer), Chat(study.tokenizer), study.task)
    found = mine_failures(runner, study.problems("train", study.profile.train_problems)[:count], k=3)
    failures_table(found).to_parquet(path)
    return found, MinedFailures(path, study.problems("train", study.profile.train_problems), runner.chat, study.task)


def test_failures_are_made_anew_at_each_access_as_they_were_mined(tmp_path):
    found, read = mined(Study("smoke", "countdown", tmp_path), tmp_path / "mined.parquet")
    assert len(read) == len(found) > 30 and list(read) == found
    assert (read[-1], read[2:5], read[:0]) == (found[-1], found[2:5], [])
    assert read[0] is not read[0] and read[0].problem is found[0].problem
    with pytest.raises(IndexError):
        read[len(read)]


def test_what_is_kept_of_failures_is_four_bytes_a_token(tmp_path):
    found, read = mined(Study("smoke", "countdown", tmp_path), tmp_path / "mined.parquet", count=192)
    tokens = sum(len(f.attempt_ids) for f in found)
    assert read._rows.nbytes < 4 * tokens + 16 * len(found) + 4096  # and the dictionaries of names


def test_a_table_without_failures_is_an_empty_sequence(tmp_path):
    pd.DataFrame([], columns=FAILURE).to_parquet(tmp_path / "mined.parquet")
    assert list(MinedFailures(tmp_path / "mined.parquet", [], None, None)) == []


def test_training_on_failures_of_a_table_is_training_on_a_list_of_them(tiny, tmp_path):
    study, steps = Study("smoke", "countdown", tmp_path), []
    for name, failures in zip("ab", mined(study, tmp_path / "mined.parquet")):
        engine, config = ScriptedEngine(study.tokenizer), small_config(tmp_path / name, max_steps=3)
        trainer = R3Trainer(tiny(), config, task=CoinTask(), failures=failures, peft_config=small_lora(),
                            processing_class=study.tokenizer, engine=engine)  # fmt: skip
        trainer.train()
        assert trainer.failures is failures
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows = [{k: v for k, v in json.loads(line).items() if "seconds" not in k} for line in lines]
        steps.append((engine.calls, rows, [p.tolist() for p in trainer.model.parameters() if p.requires_grad]))
    assert steps[0] == steps[1] and len(steps[0][1]) == 3


def test_a_changed_source_makes_results_anew(tmp_path):
    """A local file of problems is part of what every stage is made from."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    keys = []
    for source in ("generator", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")):
        study = Study("nano", "countdown", tmp_path, task_options={"countdown": {"source": source}})
        keys.append(study._config()["data"])
    assert keys[0] == "" and len(set(keys)) == 3


def test_problems_are_read_once_a_study_and_not_at_all_for_a_cached_stage(tmp_path, monkeypatch):
    study, made, asked = Study("smoke", "countdown", tmp_path), tmp_path / "made", []
    draw = study.task.problems
    monkeypatch.setattr(study.task, "problems", lambda *given, seed: asked.append(given) or draw(*given, seed))
    monkeypatch.setattr(r3lib.study, "stage", lambda *_: made)  # as if cached
    study.mine()
    study.baseline()
    assert asked == []
    for split, n in [("train", 5), ("test", 5), ("train", 5), ("train", 6)]:
        assert study.problems(split, n) == draw(split, n, 0)
    assert asked == [("train", 5), ("test", 5), ("train", 6)]


def test_a_hub_model_is_known_by_its_commit_in_the_cache_while_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cached, hashes = tmp_path / "models--some--model", []
    (cached / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        (cached / "snapshots" / commit).mkdir(parents=True)
        (cached / "snapshots" / commit / "config.json").write_text("{}")
        (cached / "refs" / "main").write_text(commit)
        study = Study("smoke", "countdown", tmp_path, model="some/model")
        hashes.append(study._config()["model"])
    assert hashes == [f"some/model@{'a' * 40}", f"some/model@{'b' * 40}"]
    for absent in ("other/model", "no/such/folder"):
        assert Study("smoke", "countdown", tmp_path, model=absent).model_hash == absent
    assert "@" not in Study("smoke", "countdown", tmp_path).model_hash
