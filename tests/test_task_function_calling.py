"""The function-calling task: the paper's prompt, both rules, sources, splits, and what is said about bad requests."""

import json
from dataclasses import replace
from importlib.util import find_spec
from itertools import combinations

import datasets
import pytest
from conftest import ScriptedEngine
from test_chat import dressed

from r3lib.chat import Chat
from r3lib.errors import R3Error
from r3lib.sampler import RolloutSampler, failures_of
from r3lib.tasks import function_calling_records as records
from r3lib.tasks.function_calling import CATEGORIES, FunctionCallingTask
from r3lib.tasks.function_calling_records import FunctionCallingProblem, split_of
from r3lib.verifiers.function_calling import REASONS, verify

TOOL = {
    "name": "get_weather",
    "description": "The weather of a place.",
    "parameters": {
        "place": {"type": "str", "description": "A town.", "enum": ["Lima", "Cancún"]},
        "days": {"type": "int, optional", "description": "How many.", "default": 1},
    },
}
CALL = {"name": "get_weather", "arguments": {"place": "Cancún"}}
POSSIBLE = ({"get_weather": {"place": ["Cancún", "Cancun"], "days": ["", 1]}},)
PROBLEM = FunctionCallingProblem("one", "Weather in Cancún?", (TOOL,), (CALL,), POSSIBLE)

needs_bfcl = pytest.mark.skipif(not find_spec("bfcl_eval"), reason=f"run {records.BFCL_INSTALL}")


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A local file of 300 xlam records."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = ["".join(pair) for pair in combinations("abcdefghijklmnopqrstuvwxyz", 2)][:300]
    rows = [
        {"query": f"Weather in {word}?", "tools": json.dumps([TOOL]), "answers": json.dumps([CALL])} for word in words
    ]
    (tmp_path / "xlam.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "xlam.jsonl")


def test_the_reflection_prompt_is_the_papers():
    assert FunctionCallingTask().reflection_prompt == (
        "You tried performing the task, but failed in generating the correct tool call. Reflect on what went wrong and "
        "write a short explanation that will help you do better next time."
    )


def test_every_reason_but_ok_has_one_of_the_papers_categories():
    task = FunctionCallingTask()
    assert task.reasons == tuple(CATEGORIES) and {"ok", *task.reasons} == set(REASONS)
    assert [CATEGORIES[r] for r in ("no_call", "wrong_function", "wrong_value")] == [
        "format", "tool choice", "parameter choice",
    ]  # fmt: skip


def test_the_plain_form_of_a_real_source_prints_the_tools_with_all_they_have():
    (message,) = FunctionCallingTask("bfcl").messages(PROBLEM)
    tools, query, request = message["content"].split("\n")
    assert json.loads(tools.removeprefix("Tools: ")) == [TOOL] and "Cancún" in tools
    assert (message["role"], query) == ("user", "Query: Weather in Cancún?")
    assert request == "Answer with a JSON list of calls."


def test_the_plain_form_prints_everything_but_empty_descriptions():
    bare = {**TOOL, "description": "", "parameters": {"place": {"type": "str", "description": ""}}}
    tools = FunctionCallingTask().plain(replace(PROBLEM, tools=(TOOL, bare))).split("\n")[0]
    shown = [TOOL, {"name": "get_weather", "parameters": {"place": {"type": "str"}}}]
    assert json.loads(tools.removeprefix("Tools: ")) == shown


def test_tools_are_json_schema_functions_beside_the_bare_query():
    task = FunctionCallingTask("bfcl")
    (tool,) = task.tools(PROBLEM)
    assert tool["type"] == "function" and tool["function"]["name"] == "get_weather"
    assert tool["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "place": {"type": "string", "description": "A town.", "enum": ["Lima", "Cancún"]},
            "days": {"type": "integer", "description": "How many.", "default": 1},
        },
        "required": ["place"],
    }
    assert task.bare_messages(PROBLEM) == [{"role": "user", "content": "Weather in Cancún?"}]


@pytest.mark.parametrize("rule, reason", [("strict", "wrong_value"), ("lenient", "ok")])
def test_what_else_is_possible_counts_only_under_the_lenient_rule(rule, reason):
    task = FunctionCallingTask("bfcl", rule)
    assert task.verify(json.dumps([CALL]), PROBLEM).reason == "ok"
    assert task.verify(json.dumps([{**CALL, "arguments": {"place": "Cancun"}}]), PROBLEM).reason == reason
    assert task.verify(json.dumps([CALL]), replace(PROBLEM, possible=None)).ok


def test_a_local_copy_gives_distinct_problems_of_its_split_as_a_function_of_the_arguments(source):
    task = FunctionCallingTask(source)
    first = task.problems("train", 40, 3)
    assert first == FunctionCallingTask(source).problems("train", 40, 3) != task.problems("train", 40, 4)
    assert first[:10] == task.problems("train", 10, 3) and len(set(first)) == 40
    assert {split_of(p) for p in first} == {"train"} and {split_of(p) for p in task.problems("test", 30, 0)} == {"test"}
    with pytest.raises(R3Error, match=r"has \d+ test problems, 300 were asked for: ask for fewer"):
        task.problems("test", 300, 0)


@needs_bfcl
def test_bfcl_gives_problems_of_every_split():
    task, counts = FunctionCallingTask("bfcl"), {"train": 1740, "validation": 86, "test": 518}
    for split, n in counts.items():
        assert {split_of(p) for p in task.problems(split, n, 0)} == {split}
        with pytest.raises(R3Error, match=f"bfcl has {n} {split} problems, {n + 1} were asked for"):
            task.problems(split, n + 1, 0)


def test_options_of_the_generator_have_their_effect():
    test = FunctionCallingTask(parts={"tools": 1, "phrasings": 1}).problems("test", 100, 0)
    assert 30 < sum(p.kind == "tools" for p in test) < 70
    assert {p.kind for p in test} == {"tools", "phrasings"}
    easy, hard = (FunctionCallingTask(hard=h).problems("train", 100, 0) for h in (0.0, 1.0))
    weeks = [sum(" weeks, " in p.query for p in some) for some in (easy, hard)]
    assert weeks[0] == 0 < weeks[1]  # "for 2 weeks, 3 days and 4 hours" takes more than two steps


@pytest.mark.parametrize(
    "source, split, n, said",
    [
        ("generator", "tset", 3, "'tset': use one of pretrain, train, validation, test"),
        ("bfcl", "pretrain", 3, "'pretrain': use one of train, validation, test"),
        ("bfcl", "test", 0, "n=0 asks for no problem"),
    ],
)
def test_an_unknown_split_and_an_empty_request_are_refused(source, split, n, said):
    with pytest.raises(R3Error, match=said):
        FunctionCallingTask(source).problems(split, n, 0)


def test_an_unknown_rule_is_refused():
    with pytest.raises(R3Error, match="unknown rule 'loose': use strict or lenient"):
        FunctionCallingTask(rule="loose")


@pytest.mark.parametrize(
    "name, end", [("qwen2_5", "<|im_end|>"), ("llama3_1", "<|eot_id|>"), ("phi3_5", "<|endoftext|>")]
)
def test_first_tries_and_failures_start_from_the_prompt_of_the_models_family(tokenizer, name, end):
    tokenizer = dressed(tokenizer, name, end)
    runner = RolloutSampler(ScriptedEngine(tokenizer), Chat(tokenizer), FunctionCallingTask("bfcl"))
    tries = runner.first_tries([PROBLEM])
    [failure] = failures_of([PROBLEM], tries, runner)
    assert [failure.prompt_ids] == runner.engine.calls[0][0] == [runner.chat.start(runner.task, PROBLEM)]
    joined = runner.retry_prompt(failure, tries[0][0].ids)
    assert joined[: len(failure.prompt_ids)] == failure.prompt_ids
    plain = runner.task.plain(PROBLEM) in tokenizer.decode(failure.prompt_ids)
    assert plain is (name == "phi3_5") and failure.reason in CATEGORIES


@pytest.mark.parametrize("hard", [-0.1, 1.5])
def test_a_chance_outside_of_0_to_1_is_refused(hard):
    with pytest.raises(R3Error, match="option hard=.*: it is a chance, from 0 to 1"):
        FunctionCallingTask(hard=hard)


@needs_bfcl
def test_the_files_that_problems_come_from_are_named(source, tmp_path):
    """Results depend on their content (`Study`)."""
    assert FunctionCallingTask().files() == [] and FunctionCallingTask(source).files() == [tmp_path / "xlam.jsonl"]
    files = FunctionCallingTask("bfcl").files()
    assert len(files) == 2 * len(records.BFCL) and all(path.is_file() for path in files)
    assert {path.parent.name for path in files} == {"data", "possible_answer"}


@pytest.mark.parametrize("written", ["int, optional", "Optional[int]", "int | None", "int or null", "Union[int, None]"])
def test_what_may_be_left_out_is_not_required_and_has_its_type(written):
    tool = {"name": "f", "description": "", "parameters": {"a": {"type": "int or str"}, "b": {"type": written}}}
    parameters = records.function_tool(tool)["function"]["parameters"]
    assert parameters["required"] == ["a"] and parameters["properties"]["b"] == {"type": "integer"}
    answers = [{"name": "f", "arguments": {"a": 1, "b": 2}}]
    for b, reason in ((3, "wrong_value"), ("2", "wrong_type")):
        text = json.dumps([{"name": "f", "arguments": {"a": 1, "b": b}}])
        assert verify(text, [tool], answers, "lenient").reason == reason
