"""Episodes under every condition, with an engine that answers from a table; shards, resuming, mining."""

import json
from collections import Counter
from dataclasses import dataclass, replace

import pandas as pd
import pytest
import torch
from conftest import ScriptedEngine, small_lora
from corpus_countdown import solutions
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model

from r3lib.chat import Chat
from r3lib.conditions import CONDITIONS, Condition
from r3lib.engines import transformers as engine_module
from r3lib.engines.base import Completion
from r3lib.episodes import Policy, in_shards, read_episodes, run_episodes
from r3lib.errors import R3Error
from r3lib.evaluate import accuracy_table
from r3lib.figures import conditions_figure
from r3lib.identity import content, differences, digest, model_facts, task_facts
from r3lib.sampler import Failure, Limits, RolloutSampler, deranged, failures_of, mine_failures
from r3lib.tasks import CountdownTask, FunctionCallingTask
from r3lib.tasks.base import Task
from r3lib.verifiers.verdict import Verdict

COLUMNS = (
    "task split problem_id policy seed condition sample prompt attempt attempt_reason reflection retry retry_reason "
    "attempt_tokens reflection_tokens retry_tokens model adapter schema_version"
).split()
SECOND_TRIES = CONDITIONS[1:]
TASK = CountdownTask(count=3, largest=20, largest_target=99)
PROBLEMS = TASK.problems("test", 8, 0)
KNOWN = {p.id for p in PROBLEMS[::4]}  # answered right at once


class TableEngine:
    """Answers by the conversation's text and the seed; dies at call number `dies_at`; keeps what it was asked."""

    def __init__(self, tokenizer, known=KNOWN, dies_at=None):
        self.tokenizer, self.known, self.dies_at, self.calls = tokenizer, known, dies_at, []

    def generate(self, prompts, n, sampling, seeds):
        if len(self.calls) == self.dies_at:
            raise KeyboardInterrupt
        texts = [self.tokenizer.decode(ids) for ids in prompts]
        self.calls.append((texts, sampling))
        return [[self.completion(t, s, k, sampling) for k in range(n)] for t, s in zip(texts, seeds)]

    def completion(self, text, seed, k, sampling):
        ids = self.tokenizer.encode(self.reply(text, (seed + k) % 4 if sampling.temperature else None))
        ids = [*ids, self.tokenizer.eos_token_id][: sampling.max_tokens]
        return Completion(ids, [0.0] * len(ids), ids[-1] == self.tokenizer.eos_token_id)

    def reply(self, text, luck):
        problem = next(p for p in PROBLEMS if text.startswith(user(TASK.messages(p)[0]["content"])))
        if text.endswith(user(TASK.reflection_prompt) + "<|assistant|>"):
            return reflected(problem)
        solved = luck == 0 or reflected(problem) in text or (text.count("<|user|>") == 1 and problem.id in self.known)
        return right(problem) if solved and luck in (None, 0) else wrong(problem, luck)


def user(text):
    return f"<|user|>{text}<|end|>"


def assistant(text):
    return f"<|assistant|>{text}<|end|>"


def right(problem):
    return f"<answer>{solutions(problem.nums, problem.target)[0][1]}</answer>"


def wrong(problem, luck=None):
    return f"<answer>{problem.nums[0]} + {luck or 0}</answer>"


def reflected(problem):
    return f"I failed on {problem.id}."


@pytest.fixture
def sampler(tokenizer):
    """A function of the engine's options: a fresh sampler."""
    limits = Limits(64, 64, 64)
    return lambda **options: RolloutSampler(TableEngine(tokenizer, **options), Chat(tokenizer), TASK, limits)


def run(sampler, out, problems=PROBLEMS, **options):
    return run_episodes(sampler, problems, Policy("vanilla", 3, "nano", "none"), out, **options)


def in_order(table):
    return table.sort_values(["problem_id", "condition"]).reset_index(drop=True)


def test_rows_have_the_schema_and_second_tries_are_for_failures_only(sampler, tmp_path):
    table = run(sampler(), tmp_path)
    assert list(table.columns) == COLUMNS
    first, second = table[table.condition == "first_try"], table[table.condition != "first_try"]
    assert list(first.problem_id) == [p.id for p in PROBLEMS]
    assert set(first.problem_id[first.attempt_reason == "ok"]) == KNOWN
    failed = {p.id for p in PROBLEMS} - KNOWN
    assert Counter(zip(second.problem_id, second.condition)) == {(p, c.name): 1 for p in failed for c in SECOND_TRIES}
    assert first[["reflection", "retry", "retry_reason", "reflection_tokens", "retry_tokens"]].isna().all(axis=None)
    without = second.condition.isin(["resample", "retry", "retry_sampled"])
    assert (second.reflection.isna() == without).all() and (second.reflection_tokens.isna() == without).all()
    assert second[["retry", "retry_reason", "retry_tokens"]].notna().all(axis=None)


def test_rows_say_who_answered_what(sampler, tokenizer, tmp_path):
    table = run(sampler(), tmp_path, split="validation")
    constant = dict(
        task="countdown",
        split="validation",
        policy="vanilla",
        seed=3,
        sample=0,
        model="nano",
        adapter="none",
        schema_version=1,
    )
    assert {name: set(table[name]) for name in constant} == {name: {value} for name, value in constant.items()}
    row = table[(table.problem_id == PROBLEMS[1].id) & (table.condition == "reflect_retry")].iloc[0]
    assert row.prompt == TASK.messages(PROBLEMS[1])[0]["content"]
    assert (row.attempt, row.attempt_reason) == (wrong(PROBLEMS[1]), "wrong_numbers")
    assert (row.reflection, row.retry, row.retry_reason) == (reflected(PROBLEMS[1]), right(PROBLEMS[1]), "ok")
    texts = (row.attempt, row.reflection, row.retry)
    counts = (row.attempt_tokens, row.reflection_tokens, row.retry_tokens)
    assert counts == tuple(len(tokenizer.encode(text)) + 1 for text in texts)  # and the end of turn


def test_each_condition_asks_what_it_says(sampler, tmp_path):
    """The seven conditions' prompts, decoded, and their temperatures."""
    one = sampler()
    run(one, tmp_path)
    failed = [p for p in PROBLEMS if p.id not in KNOWN]
    task = {p: user(TASK.messages(p)[0]["content"]) for p in PROBLEMS}
    told = {p: task[p] + assistant(wrong(p)) for p in failed}
    asked = {p: told[p] + user(TASK.reflection_prompt) for p in failed}
    again = {p: user(f"{TASK.retry_prompt}\n{TASK.messages(p)[0]['content']}") for p in failed}
    blind = {p: user(f"{TASK.blind_retry_prompt}\n{TASK.messages(p)[0]['content']}") for p in failed}
    expected = [
        (task.values(), 0),
        (asked.values(), 1),
        ([asked[p] + assistant(reflected(p)) + again[p] for p in failed], 0),
        (None, 0),
        ([asked[p] + assistant(TASK.generic_reflection) + again[p] for p in failed], 0),
        ([told[p] + blind[p] for p in failed], 0),
        ([told[p] + blind[p] for p in failed], 1),
        ([task[p] for p in failed], 1),
    ]
    assert [sampling.temperature for _, sampling in one.engine.calls] == [t for _, t in expected]
    for (texts, _), (wanted, _) in zip(one.engine.calls, expected):
        assert wanted is None or texts == [text + "<|assistant|>" for text in wanted]
    shuffled = one.engine.calls[3][0]
    dealt = [
        text.removeprefix(asked[p]).split("<|end|>")[0].removeprefix("<|assistant|>")
        for p, text in zip(failed, shuffled)
    ]
    assert sorted(dealt) == sorted(map(reflected, failed))
    assert all(text != reflected(p) for p, text in zip(failed, dealt))


@given(st.integers(2, 40), st.integers(0, 99))
def test_a_derangement_moves_everything_and_loses_nothing(count, seed):
    items = list(range(count))
    moved = deranged(items, seed)
    assert sorted(moved) == items and all(a != b for a, b in zip(items, moved))
    assert moved == deranged(items, seed)


def test_a_single_failure_loses_its_shuffled_row_and_nothing_else(sampler, tmp_path):
    said = []
    table = run(sampler(), tmp_path, PROBLEMS[:2], log=said.append)
    assert set(table.condition) == {c.name for c in CONDITIONS} - {"shuffled_reflection"}
    assert any("shuffled_reflection left out" in line for line in said)


def test_no_failure_leaves_first_tries_only(sampler, tmp_path):
    table = run(sampler(known={p.id for p in PROBLEMS}), tmp_path)
    assert set(table.condition) == {"first_try"} and len(table) == len(PROBLEMS)
    assert table.reflection.isna().all()


def test_an_unknown_condition_is_refused_before_anything_runs(sampler, tmp_path):
    with pytest.raises(R3Error, match="unknown condition 'reflect': known: first_try, resample, .*reflect_retry"):
        run(sampler(), tmp_path, conditions=["first_try", "reflect"])
    assert not [*tmp_path.iterdir()]


def test_a_killed_run_resumes_with_the_same_rows_and_keeps_the_finished_shard(sampler, tmp_path):
    whole = run(sampler(), tmp_path / "whole", shard=3)
    killed = sampler(dies_at=11)  # 8 calls a shard: in the middle of the second
    with pytest.raises(KeyboardInterrupt):
        run(killed, tmp_path / "killed", shard=3)
    kept = tmp_path / "killed" / "shard-000000.parquet"
    before = kept.stat().st_mtime_ns
    resumed = sampler()
    pd.testing.assert_frame_equal(run(resumed, tmp_path / "killed", shard=3), whole)
    assert kept.stat().st_mtime_ns == before
    first_shard = [user(TASK.messages(p)[0]["content"]) for p in PROBLEMS[:3]]
    assert not any(text.startswith(tuple(first_shard)) for texts, _ in resumed.engine.calls for text in texts)
    again = sampler()
    pd.testing.assert_frame_equal(run(again, tmp_path / "killed", shard=3), whole)
    assert again.engine.calls == []


def test_results_do_not_depend_on_the_shards_but_for_the_shuffle(sampler, tmp_path):
    tables = [in_order(run(sampler(), tmp_path / str(shard), shard=shard)) for shard in (3, 8)]
    kept = [t[t.condition != "shuffled_reflection"].reset_index(drop=True) for t in tables]
    assert kept[0].retry[kept[0].condition == "resample"].nunique() > 2
    pd.testing.assert_frame_equal(*kept)


def test_processes_that_share_a_folder_make_together_what_one_makes(sampler, tmp_path):
    """Three shards for two processes; a third process finds nothing to do."""
    whole, processes = run(sampler(), tmp_path / "whole", shard=3), [sampler() for _ in range(2)]
    for i, one in enumerate(processes):
        run(one, tmp_path / "shared", shard=3, part=(i, 2))
    asked = [{text for texts, _ in one.engine.calls for text in texts} for one in processes]
    assert not asked[0] & asked[1]
    idle = sampler()
    pd.testing.assert_frame_equal(run(idle, tmp_path / "shared", shard=3), whole)
    assert idle.engine.calls == [] and run(idle, tmp_path / "none", shard=3, part=(3, 4)).empty


def test_by_default_a_thousand_rows_are_work_for_four_processes(tmp_path):
    for i in range(4):
        before = {*tmp_path.iterdir()}
        in_shards(tmp_path, range(1000), lambda some: pd.DataFrame({"row": some}), part=(i, 4))
        assert {*tmp_path.iterdir()} > before
    assert [*read_episodes(tmp_path).row] == [*range(1000)]


def test_a_damaged_shard_is_named(sampler, tmp_path):
    run(sampler(), tmp_path, shard=3)
    damaged = tmp_path / "shard-000003.parquet"
    damaged.write_bytes(damaged.read_bytes()[:200])
    for read in (lambda: run(sampler(), tmp_path, shard=3), lambda: read_episodes(tmp_path)):
        with pytest.raises(R3Error, match=r"shard-000003.parquet is damaged .*: delete it and run again"):
            read()


def test_no_problems_and_no_episodes_are_refused(sampler, tmp_path):
    with pytest.raises(R3Error, match="no problems to run"):
        run(sampler(), tmp_path, [])
    with pytest.raises(R3Error, match="no episodes in"):
        read_episodes(tmp_path)


def test_mining_keeps_each_failing_answer_once_with_its_count(sampler):
    """Four samples a problem: one is right, three are wrong in three ways; eight samples see each twice."""
    mined = mine_failures(sampler(), PROBLEMS, k=8, temperature=1.0)
    assert Counter(f.problem.id for f in mined) == {p.id: 3 for p in PROBLEMS}
    assert {f.count for f in mined} == {2}
    assert all(not TASK.verify(f.attempt, f.problem).ok and f.reason == "wrong_numbers" for f in mined)
    assert len({(f.problem.id, tuple(f.attempt_ids)) for f in mined}) == len(mined)


def test_greedy_mining_keeps_what_the_best_answer_gets_wrong(sampler, tokenizer):
    mined = mine_failures(sampler(), PROBLEMS, k=1, temperature=0.0)
    assert [f.problem for f in mined] == [p for p in PROBLEMS if p.id not in KNOWN]
    chat = Chat(tokenizer)
    assert mined[0].prompt_ids == chat.prompt(TASK.messages(mined[0].problem))
    assert chat.text(mined[0].attempt_ids) == mined[0].attempt


def test_an_answer_cut_off_and_the_same_answer_finished_are_two_failures(sampler, tokenizer):
    one, ids = sampler(), tokenizer.encode("<answer>1</answer>")
    ended = [*ids, tokenizer.eos_token_id]
    tries = [[Completion(i, [0.0] * len(i), i is ended) for i in (ids, ended, ids)]]
    assert [f.count for f in failures_of(PROBLEMS[:1], tries, one)] == [2, 1]


@pytest.mark.parametrize("task", [TASK, FunctionCallingTask()])
def test_second_tries_restate_the_question_alike(tokenizer, task):
    """In every condition that goes on in the chat the last turn ends with the question."""
    [problem] = task.problems("test", 1, seed=0)
    chat = Chat(tokenizer)
    failure = Failure(problem, chat.start(task, problem), tokenizer.encode("no"), "no", "no_answer")
    question = {"countdown": task.messages(problem)[0]["content"], "function_calling": getattr(problem, "query", None)}
    engine = ScriptedEngine(tokenizer)
    one = RolloutSampler(engine, chat, task)
    for condition in SECOND_TRIES[1:]:
        one.second_tries(condition, [failure, failure], reflections=[[30], [31]])
        asked = tokenizer.decode(engine.calls[-1][0][0]).split("<|user|>")[-1]
        told = task.blind_retry_prompt if condition.reflection == "none" else task.retry_prompt
        assert asked == f"{told}\n{question[task.name]}<|end|><|assistant|>"


# rows of another run never come back


@dataclass(frozen=True)
class Sum:
    """A problem of a user's own: its answer is in no prompt."""

    id: str
    text: str
    answer: int = 4


class SumTask(Task):
    name = "sum"
    reflection_prompt = "Reflect."

    def __init__(self, unit="apples", hidden=0):
        self.unit, self._cache = unit, [hidden]

    def messages(self, problem):
        return [{"role": "user", "content": f"{problem.text} ({self.unit})"}]

    def verify(self, text, problem):
        return Verdict(len(text) % 3 == 0, "ok" if len(text) % 3 == 0 else "wrong")


class PickySumTask(SumTask):
    def verify(self, text, problem):
        return Verdict(False, "wrong")


SUMS = [Sum(f"s{i}", f"{i} + {4 - i}") for i in range(4)]
SAME_RUN = dict(
    task=SumTask(), problems=SUMS, policy=Policy(), limits=Limits(8, 8, 8), temperature=0.0, seed=0,
    split="test", conditions=["first_try", "reflect_retry"], shard=2,
)  # fmt: skip
OTHER_RUNS = {
    "task.unit": {"task": SumTask("pears")},
    "task's class": {"task": PickySumTask()},
    "problem ids": {"problems": [Sum(f"t{i}", s.text) for i, s in enumerate(SUMS)]},
    "prompts": {"problems": [replace(SUMS[0], text="9 - 5"), *SUMS[1:]]},
    "problems' values": {"problems": [replace(SUMS[0], answer=5), *SUMS[1:]]},
    "policy.name": {"policy": Policy("r3")},
    "policy.adapter": {"policy": Policy(adapter="mine")},
    "limits.max_attempt_length": {"limits": Limits(7, 8, 8)},
    "limits.max_completion_length": {"limits": Limits(8, 7, 8)},
    "limits.max_retry_length": {"limits": Limits(8, 8, 7)},
    "reflection_temperature": {"temperature": 1.0},
    "split": {"split": "validation"},
    "conditions": {"conditions": ["first_try"]},
    "seed": {"seed": 1},
    "shard": {"shard": 3},
}


def run_sums(engine, tokenizer, out, **changes):
    given = SAME_RUN | changes
    chat = Chat(tokenizer)
    sampler = RolloutSampler(engine, chat, given["task"], given["limits"], given["temperature"])
    rest = {name: given[name] for name in ("split", "conditions", "seed", "shard")}
    return run_episodes(sampler, given["problems"], given["policy"], out, **rest)


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_a_folder_of_another_run_is_refused_and_what_differs_is_named(tokenizer, tmp_path, name):
    run_sums(ScriptedEngine(tokenizer), tokenizer, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(R3Error, match="give an empty folder") as error:
        run_sums(ScriptedEngine(tokenizer), tokenizer, tmp_path, **OTHER_RUNS[name])
    assert name in str(error.value) and "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_decides_no_row_may_change(tokenizer, tmp_path):
    """What a task keeps for itself (a leading underscore), and equal objects made anew."""
    rows = run_sums(ScriptedEngine(tokenizer), tokenizer, tmp_path)
    same = dict(task=SumTask(hidden=9), problems=[replace(s) for s in SUMS])
    idle = ScriptedEngine(tokenizer)
    pd.testing.assert_frame_equal(run_sums(idle, tokenizer, tmp_path, **same), rows)
    assert idle.calls == []


@pytest.mark.parametrize(
    "change", ["one weight", "adapter", "disabled adapter", "scaling", "architecture"]
)
def test_a_folder_of_another_model_is_refused(tiny, tokenizer, tmp_path, change):
    def adapted(**changes):
        torch.manual_seed(1)
        return get_peft_model(tiny(), small_lora(init_lora_weights=False, **changes))

    start, other = (
        (tiny(), tiny()) if change in ("one weight", "adapter") else (adapted(), adapted())
    )
    if change == "one weight":
        other.model.layers[1].mlp.up_proj.weight.data[17, 5] += 1e-3
    elif change == "adapter":
        other = adapted()
    elif change == "disabled adapter":
        other.base_model.disable_adapter_layers()
    elif change == "scaling":
        other = adapted(lora_alpha=16)
    else:
        other = tiny("qwen2")
    engines = [engine_module.TransformersEngine(model, tokenizer) for model in (start, other)]
    rows = run_sums(engines[0], tokenizer, tmp_path)
    with pytest.raises(R3Error, match="model"):
        run_sums(engines[1], tokenizer, tmp_path)
    pd.testing.assert_frame_equal(run_sums(engines[0], tokenizer, tmp_path), rows)


def test_a_model_is_the_same_wherever_it_was_loaded_from_and_on_any_number_of_threads(
    tiny, tmp_path
):
    one = get_peft_model(tiny(), small_lora())
    facts = model_facts(one)
    one.peft_config["default"].base_model_name_or_path = one.config._name_or_path = (
        "/elsewhere/model"
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    assert model_facts(one) == facts
    torch.set_num_threads(threads)


def test_an_adapter_that_changes_nothing_yet_is_the_same_whatever_its_random_half(tiny):
    one, other = (get_peft_model(tiny(), small_lora()) for _ in range(2))
    for name, value in other.named_parameters():
        if "lora_A" in name:
            value.data += 0.1
    assert model_facts(one) == model_facts(other)
    for model in (one, other):
        model.base_model.model.model.layers[0].mlp.up_proj.lora_B.default.weight.data += 0.1
    assert "model's weights" in differences(model_facts(one), model_facts(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(place=st.integers(0, 10**6))
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_one_value_of_any_weight_changes_the_models_facts(tiny, dtype, place):
    model = tiny().to(dtype)
    facts, parameters = model_facts(model), list(model.parameters())
    weight = parameters[place % len(parameters)].data.view(-1)
    weight[place % len(weight)] += 1.0
    assert "model's weights" in differences(facts, model_facts(model))


def test_engines_that_say_nothing_of_their_policy_are_known_by_their_class(
    sampler, tokenizer, tmp_path
):
    run(sampler(), tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["engine"] == "TableEngine"


def test_episodes_without_a_note_are_refused(sampler, tmp_path):
    run(sampler(), tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(R3Error, match="no run.json.*empty folder"):
        run(sampler(), tmp_path)


def test_facts_are_the_same_in_every_process():
    """Sets have another order, objects another address in each."""

    class Loaded:
        pass

    assert digest([{"b", "a", "c"}, Loaded()]) == digest([["a", "b", "c"], "Loaded"])
    task = SumTask()
    task._cache = Loaded()
    assert task_facts(task) == task_facts(SumTask())
    assert content(SUMS[0]) == {"id": "s0", "text": "0 + 4", "answer": 4}


# problems, tasks and verifiers that cannot be used


@pytest.mark.parametrize("use", ["run", "mine"])
@pytest.mark.parametrize(
    ("problems", "words"),
    [
        ([*SUMS, replace(SUMS[2], text="new")], "problem id 's2' occurs twice"),
        (
            [Sum(i, "1 + 1") for i in range(2)],
            "problem 0 has id 0, which is no string: make it str",
        ),
        ([object()], "problem 0 has id None"),
    ],
)
def test_ids_that_are_not_unique_strings_are_refused_at_the_start(
    tokenizer, tmp_path, use, problems, words
):
    engine = ScriptedEngine(tokenizer)
    with pytest.raises(R3Error, match=words):
        if use == "run":
            run_sums(engine, tokenizer, tmp_path / "out", problems=problems)
        else:
            mine_failures(RolloutSampler(engine, Chat(tokenizer), SumTask()), problems, k=2)
    assert engine.calls == [] and not (tmp_path / "out").exists()


class Careless(SumTask):
    """Raises, or returns what it should not, on the third problem alone."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def verify(self, text, problem):
        if problem.id != "s2":
            return super().verify(text, problem)
        return self.answer()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda: {}["city"], "sum: verify raised KeyError: 'city' on problem 's2'"),
        (lambda: int("four\n"), "sum: verify raised ValueError: .* on problem 's2'"),
        (lambda: True, "verify returned True on problem 's2': return Verdict"),
        (
            lambda: Verdict(0.5, "half"),
            "verify raised ValueError: Verdict.ok=0.5, reason='half', score=None.: the reason .* 's2'",
        ),
    ],
)
def test_a_verifier_that_fails_names_the_problem(tokenizer, tmp_path, answer, words):
    with pytest.raises(R3Error, match=words) as error:
        run_sums(ScriptedEngine(tokenizer), tokenizer, tmp_path, task=Careless(answer))
    assert "\n" not in str(error.value)
    if "raised" in words:
        assert isinstance(error.value.__cause__, (KeyError, ValueError))


def test_a_task_without_a_name_is_refused_at_the_start(tokenizer, tmp_path):
    class Nameless(Task):
        reflection_prompt = "Reflect."

    sampler = RolloutSampler(ScriptedEngine(tokenizer), Chat(tokenizer), Nameless())
    for use in (
        lambda: mine_failures(sampler, SUMS, k=2),
        lambda: run_episodes(sampler, SUMS, Policy(), tmp_path),
    ):
        with pytest.raises(R3Error, match="task Nameless has no name: give its class name"):
            use()


def test_an_error_inside_messages_is_the_tasks_own(tokenizer, tmp_path):
    task = SumTask()
    task.messages = lambda problem: {}["question"]
    with pytest.raises(KeyError, match="question"):
        run_sums(ScriptedEngine(tokenizer), tokenizer, tmp_path, task=task)


@pytest.mark.parametrize("changed, words", [
    (dict(name="../../up"), "name='../../up' names files: use letters"),
    (dict(reasons="missed"), "reasons is the text 'missed': write .'missed',."),
    (dict(messages=lambda problem: None), "messages of problem .* are None: return"),
    (dict(messages=lambda problem: []), "messages of problem .* are .*: return"),
    (dict(messages=lambda problem: [{"role": "user", "content": None}]), "messages of problem .* are .*: return"),
    (dict(messages=lambda problem: [{"role": "assistant", "content": "a"}]), "the last is the user's"),
])  # fmt: skip
def test_a_task_that_is_not_whole_is_refused(tokenizer, tmp_path, changed, words):
    task = SumTask()
    vars(task).update(changed)
    with pytest.raises(R3Error, match=words):
        run_sums(ScriptedEngine(tokenizer), tokenizer, tmp_path, task=task)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reflection": "mine"}, "reflection='mine': use one of none, fixed, other, own"),
        ({"told": False, "reflection": "own"}, "odd: asked afresh it has no reflection"),
    ],
)
def test_a_condition_that_would_not_do_what_it_says_is_refused(settings, words):
    with pytest.raises(R3Error, match=words):
        Condition(**{"name": "odd"} | settings)


@pytest.mark.parametrize(
    "conditions",
    [
        [Condition("odd"), Condition("odd", temperature=1.0)],
        ["retry", "retry"],
        [Condition("first_try", temperature=1.0)],
    ],
)
def test_two_conditions_of_one_name_are_refused_since_tables_would_pool_them(
    sampler, tmp_path, conditions
):
    one = sampler()
    with pytest.raises(R3Error, match="two conditions have one name"):
        run(one, tmp_path / "out", conditions=conditions)
    assert one.engine.calls == [] and not (tmp_path / "out").exists()


def test_a_policy_without_a_models_name_gets_that_of_the_engine(tiny, tokenizer, tmp_path):
    model = tiny()
    model.config._name_or_path = str(tmp_path / "some-model")
    engine = engine_module.TransformersEngine(model, tokenizer)
    assert set(run_sums(engine, tokenizer, tmp_path / "a").model) == {"some-model"}
    named = run_sums(engine, tokenizer, tmp_path / "b", policy=Policy(model="mine"))
    assert set(named.model) == {"mine"}


def test_a_sampler_reflects_as_the_method_does_unless_told_otherwise(tokenizer):
    assert RolloutSampler(ScriptedEngine(tokenizer), Chat(tokenizer), TASK).reflection_temperature == 1.0


def test_a_condition_of_ones_own_is_one_row(sampler, tmp_path):
    told_twice = Condition("fixed_sampled", reflection="fixed", temperature=1.0)
    table = run(sampler(), tmp_path, conditions=["first_try", told_twice])
    own = table[table.condition == "fixed_sampled"]
    assert len(own) and set(own.reflection) == {TASK.generic_reflection}
    accuracy = accuracy_table(table)
    assert accuracy.set_index("condition").loc["fixed_sampled"].n.max() == len(own)
    assert conditions_figure(accuracy) is not None
