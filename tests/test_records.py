"""Function-calling records: nothing of a source is lost or silently dropped, and no near-duplicate crosses splits."""

import builtins
import json
import logging
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import datasets
import pandas as pd
import pytest

from r3lib.errors import R3Error
from r3lib.tasks import function_calling_records as records
from r3lib.tasks.function_calling_records import FunctionCallingProblem, function_tool, skeleton, split_of
from r3lib.verifiers.function_calling import verify

PLACE = {"type": "str", "description": "A town."}
TOOL = {
    "name": "get_weather",
    "description": "The weather of a place.",
    "parameters": {"place": PLACE, "days": {"type": "int, optional", "description": "How many.", "default": 1}},
}
CLOCK = {"name": "what_time", "description": "The time.", "parameters": {"zone": {"type": "str", "description": ""}}}
CALL = {"name": "get_weather", "arguments": {"place": "Lima", "days": 3}}
NOON = {"name": "what_time", "arguments": {"zone": "UTC"}}
ROWS = [
    {"id": 7, "query": "Weather in Lima for 3 days?", "tools": [TOOL, CLOCK], "answers": [CALL]},
    {"id": 8, "query": "What time is it?", "tools": [CLOCK], "answers": [NOON]},
]
GOOD = FunctionCallingProblem("one", "Weather in Lima?", (TOOL, CLOCK), (CALL,))

needs_bfcl = pytest.mark.skipif(not find_spec("bfcl_eval"), reason=f"run {records.BFCL_INSTALL}")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep what `datasets` caches inside the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def as_text(row):
    return {**row, "tools": json.dumps(row["tools"]), "answers": json.dumps(row["answers"])}


def reasons_of_gold(problem):
    """What both rules say of the answers, against themselves and against BFCL's accepted values."""
    text, tools, plain = json.dumps(list(problem.answers)), list(problem.tools), list(problem.answers)
    golds = [plain, list(problem.possible or plain)]
    return {verify(text, tools, gold, rule).reason for gold in golds for rule in ("strict", "lenient")}


@pytest.mark.parametrize("shape", ["parquet", "json", "jsonl", "lists"])
@pytest.mark.parametrize("folder", [True, False])
def test_a_local_copy_of_xlam_is_read_with_its_tools_as_they_stand(tmp_path, shape, folder):
    rows = ROWS if shape == "lists" else [as_text(row) for row in ROWS]
    path = tmp_path / "xlam" / ("data.jsonl" if shape == "lists" else f"data.{shape}")
    path.parent.mkdir()
    if shape == "parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text(json.dumps(rows) if shape == "json" else "\n".join(map(json.dumps, rows)))
    problems, skipped = records.read(str(path.parent if folder else path))
    assert skipped == [] and [p.id for p in problems] == ["xlam-7", "xlam-8"]
    for problem, row in zip(problems, ROWS):
        assert (problem.query, list(problem.tools), list(problem.answers)) == (
            row["query"],
            row["tools"],
            row["answers"],
        )
        assert reasons_of_gold(problem) == {"ok"}


OPENAI_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "A town."},
                "days": {"type": ["integer", "null"], "default": 1},
                "unit": {"anyOf": [{"type": "string", "enum": ["C", "F"]}, {"type": "null"}]},
                "spot": {"$ref": "#/$defs/Spot"},
                "other": True,
            },
            "required": ["place"],
            "$defs": {"Spot": {"type": "array", "items": {"type": "number"}}},
            "additionalProperties": False,
        },
    },
}
OPENAI_CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather"}}
OPENAI_CALL["function"]["arguments"] = json.dumps({"place": "Lima", "days": 3, "spot": [1.5, 2]})


@pytest.mark.parametrize("form", ["OpenAI", "JSON Schema", "no type", "required: null"])
@pytest.mark.parametrize("as_lists", [True, False])
def test_records_in_json_schema_and_openai_form_are_read_as_xlams_are(tmp_path, form, as_lists):
    tool = json.loads(json.dumps(OPENAI_TOOL))
    parameters = tool["function"]["parameters"]
    if form == "no type":
        del parameters["type"]
    if form == "required: null":
        parameters["required"] = None
    written = tool if form == "OpenAI" else tool["function"]
    row = {"id": 1, "query": "Weather in Lima for 3 days?", "tools": [written], "answers": [OPENAI_CALL]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row if as_lists else as_text(row)))
    [problem], skipped = records.read(str(tmp_path / "data.jsonl"))
    assert skipped == [] and reasons_of_gold(problem) == {"ok"}
    assert problem.answers == ({"name": "get_weather", "arguments": {"place": "Lima", "days": 3, "spot": [1.5, 2]}},)
    shown = function_tool(problem.tools[0])["function"]
    assert shown["parameters"]["required"] == ([] if form == "required: null" else ["place"])
    assert shown["parameters"]["type"] == "object" and shown["description"] == "The weather of a place."
    properties = shown["parameters"]["properties"]
    assert properties.keys() == parameters["properties"].keys()
    assert properties["unit"] == parameters["properties"]["unit"] and properties["days"] == {
        "type": ["integer", "null"], "default": 1,
    }  # fmt: skip
    assert shown["parameters"]["$defs"] == parameters["$defs"]


def test_xlams_bare_types_are_read(tmp_path):
    tool = {"name": "f", "description": "", "parameters": {"a": "int", "b": "str, optional", "c": None}}
    row = {"query": "f of 1", "tools": [tool], "answers": [{"name": "f", "arguments": {"a": 1}}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(as_text(row)))
    [problem], skipped = records.read(str(tmp_path / "data.jsonl"))
    assert skipped == [] and problem.tools[0]["parameters"]["a"] == {"type": "int"}
    assert function_tool(problem.tools[0])["function"]["parameters"]["required"] == ["a", "c"]


BROKEN = {
    "malformed: JSONDecodeError": {"tools": "[{"},
    "malformed: R3Error an answer is neither a call nor": {"answers": '[{"nom": "what_time"}]'},
    "malformed: AttributeError": {"query": None},
    "malformed: R3Error the parameters of tool 'get_weather'": {"tools": [{**TOOL, "parameters": "none"}]},
    "no query, no tools or no answers": {"answers": "[]"},
    "the answer calls 'get_wether', which is no tool": {"answers": [{**CALL, "name": "get_wether"}]},
    "the answer gives get_weather undeclared ['town']": {"answers": [{**CALL, "arguments": {"town": "Lima"}}]},
    "two tools of one name": {"tools": [TOOL, TOOL]},
}


@pytest.mark.parametrize("why", BROKEN)
def test_a_broken_record_is_skipped_with_its_id_and_one_logged_line(tmp_path, caplog, why):
    broken = {**ROWS[0], "id": 9, **BROKEN[why]}
    broken = {key: x if isinstance(x, str | int | None) else json.dumps(x) for key, x in broken.items()}
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (*map(as_text, ROWS), broken)))
    with caplog.at_level(logging.WARNING):
        problems, skipped = records.read(str(path))
    [(name, said)] = skipped
    assert len(problems) == 2 and name == f"xlam-{broken['id']}" and said.startswith(why)
    [line] = [r.getMessage() for r in caplog.records if r.name == records.__name__]
    assert "1 of 3 records skipped" in line and name in line and said in line


def test_what_is_accepted_must_be_declared():
    assert "undeclared ['town']" in records.check(replace(GOOD, possible=({"get_weather": {"town": ["Lima", ""]}},)))
    assert "'place' is acceptable" in records.check(replace(GOOD, possible=({"get_weather": {"place": []}},)))
    assert records.check(GOOD) is None


def test_a_set_without_the_columns_is_told_what_is_needed(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"question": "?", "tools": "[]"}')
    with pytest.raises(R3Error, match=r"has columns \['question', 'tools'\]: xlam has query, tools and answers"):
        records.read(str(tmp_path / "data.jsonl"))


def test_the_gated_hub_says_how_to_get_access_and_a_wrong_path_what_is_read(tmp_path, monkeypatch):
    with pytest.raises(R3Error, match=r"check the path: a folder or a \.json"):
        records.read_xlam(str(tmp_path / "missing"))

    def gated(*args, **options):
        raise datasets.exceptions.DatasetNotFoundError("gated")

    monkeypatch.setattr(datasets, "load_dataset", gated)
    with pytest.raises(R3Error, match=r"accept the terms at https.*xlam-function-calling-60k.*hf auth login") as error:
        records.read_xlam("hub")
    assert "\n" not in str(error.value)


def test_bfcl_without_its_package_or_a_whole_file_names_the_command(tmp_path, monkeypatch):
    with pytest.raises(R3Error, match="simple_python.json is missing: .*pip install --no-deps bfcl-eval=="):
        records.read_bfcl(str(tmp_path))
    for folder in (tmp_path, tmp_path / "possible_answer"):
        folder.mkdir(exist_ok=True)
        (folder / "BFCL_v4_simple_python.json").write_text('{"id": "simple_0", "quest')
    with pytest.raises(R3Error, match="simple_python.json or its answers are damaged .*pip install") as error:
        records.read_bfcl(str(tmp_path))
    assert "\n" not in str(error.value)
    monkeypatch.setattr(records, "find_spec", lambda name: None)
    with pytest.raises(R3Error, match="not installed: run `pip install --no-deps bfcl-eval=="):
        records.read_bfcl()


@pytest.fixture(scope="module")
def bfcl():
    return records.read("bfcl")


def schemas():
    folder = Path(find_spec("bfcl_eval").origin).parent / "data"
    for category in records.BFCL:
        for line in (folder / f"BFCL_v4_{category}.json").read_text().splitlines():
            yield from json.loads(line)["function"]


@needs_bfcl
def test_all_of_bfcl_is_read_but_for_seven_records_that_contradict_themselves(bfcl):
    problems, skipped = bfcl
    assert Counter(p.kind for p in problems) == {
        "simple_python": 400, "multiple": 200, "parallel": 200, "parallel_multiple": 198,
        "live_simple": 256, "live_multiple": 1050, "live_parallel": 16, "live_parallel_multiple": 24,
    }  # fmt: skip
    assert {name.rsplit("_", 1)[1]: why.split(" ")[0] for name, why in skipped} == {
        "12": "the", "26": "the", "862-181-3": "the", "964-207-0": "the",  # answers give an undeclared argument
        "106-63-0": "no", "112-68-0": "no", "507-149-4": "no",  # a required argument has no accepted value
    }  # fmt: skip


@needs_bfcl
def test_bfcl_is_read_without_importing_its_package(monkeypatch):
    real = builtins.__import__

    def guarded(name, *rest, **options):
        assert not name.startswith("bfcl_eval")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", guarded)
    assert len(records.read_bfcl()[0]) == 2344


@needs_bfcl
def test_gold_is_right_for_every_bfcl_problem_under_both_rules(bfcl):
    for problem in bfcl[0]:
        assert reasons_of_gold(problem) == {"ok"}, problem.id


@needs_bfcl
def test_gold_gives_every_required_argument(bfcl):
    for problem in bfcl[0]:
        required = {t["name"]: records.to_schema(t)["parameters"]["required"] for t in problem.tools}
        for call in problem.answers:
            assert set(required[call["name"]]) <= set(call["arguments"]), problem.id


@needs_bfcl
def test_every_bfcl_schema_comes_back_exactly_from_the_xlam_form():
    count, written = 0, set()
    for schema in schemas():
        tool = records.to_xlam(schema)
        assert records.to_schema(json.loads(json.dumps(tool))) == schema
        count, written = count + 1, written | {key for s in tool["parameters"].values() for key in s}
    assert count == 6226
    assert {"type", "description", "default", "enum", "items", "properties", "required", "optional"} <= written


@needs_bfcl
def test_bfcl_tools_become_json_schema_for_chat_templates():
    def types(schema):
        yield schema.get("type")
        for inner in [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]:
            yield from types(inner)

    known = {"object", "array", "string", "integer", "number", "boolean", None}
    for schema in schemas():
        made = function_tool(records.to_xlam(schema))["function"]
        assert set(types(made["parameters"])) <= known
        assert made["parameters"]["required"] == schema["parameters"]["required"]
        assert made["parameters"]["properties"].keys() == schema["parameters"]["properties"].keys()


@needs_bfcl
def test_a_local_folder_of_bfcl_is_the_package(bfcl):
    folder = Path(find_spec("bfcl_eval").origin).parent / "data"
    assert records.read(str(folder)) == bfcl


@needs_bfcl
def test_a_system_message_stands_before_the_question(bfcl):
    [problem] = [p for p in bfcl[0] if p.id == "live_multiple_967-209-0"]
    first, second = problem.query.split("\n\n")
    assert first.startswith("You should deliver the user question") and second.startswith("I'd like to speak")


@pytest.mark.parametrize(
    "written, made",
    [
        ("str", {"type": "string"}),
        ("int, optional", {"type": "integer"}),
        ("Optional[float]", {"type": "number"}),
        ("List[int]", {"type": "array", "items": {"type": "integer"}}),
        ("List[List[str]]", {"type": "array", "items": {"type": "array", "items": {"type": "string"}}}),
        ("Tuple[int, str]", {"type": "array", "items": {"type": ["string", "integer"]}}),
        ("Dict[str, List[int]]", {"type": "object"}),
        ("Union[int, str]", {"type": ["string", "integer"]}),
        ("int or str", {"type": ["string", "integer"]}),
        ("int | None", {"type": "integer"}),
        ("list of strings", {"type": "array", "items": {"type": "string"}}),
        ("Callable[[float], float]", {}),
    ],
)
def test_xlams_types_become_json_schemas(written, made):
    tool = {"name": "f", "description": "", "parameters": {"x": {"type": written, "enum": [1]}}}
    assert function_tool(tool)["function"]["parameters"]["properties"] == {"x": {"enum": [1], **made}}


def test_only_arguments_without_a_default_that_are_not_optional_are_required():
    arguments = {"a": {"type": "int"}, "b": {"type": "int", "default": 1}, "c": {"type": "int, optional"}}
    tool = {"name": "f", "description": "", "parameters": arguments}
    assert function_tool(tool)["function"]["parameters"]["required"] == ["a"]


SAME = [
    "Book 3 tables for 'Ann Lee' at 7:30, please!",
    "book 12 tables for \"Bob\" at 19:45 please",
    "Book two tables for ‘Cleo’ at 8 -- please.",
    '"Book 1,200 tables for \'x\' at 2024-01-05, please"',
]  # fmt: skip


def test_near_duplicates_share_a_skeleton_and_so_a_split():
    assert {skeleton(query) for query in SAME} == {"book # tables for # at # please"}
    assert len({split_of(replace(GOOD, id=query, query=query)) for query in SAME}) == 1


def test_skeletons_keep_what_is_asked():
    assert skeleton("What's the user's name?") == "what s the user s name"
    assert skeleton("¿Qué hora es en Cancún?") == "qué hora es en cancún"
    assert skeleton("Someone weighs often") == "someone weighs often"
    different = (
        "Find flights to Oslo",
        "Find flights to Lima",
        "Find a flight to Lima",
        '"Find hotels"',
        '"Find cars"',
    )
    assert len(set(map(skeleton, different))) == 5


def test_the_splits_share_queries_as_in_the_paper():
    words = list(map("".join, product("abcdefghij", repeat=4)))
    drawn = Counter(split_of(replace(GOOD, query=f"find {word}")) for word in words)
    assert {split: n / drawn.total() for split, n in drawn.items()} == pytest.approx(records.SPLITS, abs=0.02)


@needs_bfcl
def test_no_bfcl_test_query_has_the_words_of_a_query_in_another_split(bfcl):
    """Independent of the skeleton: the set of purely alphabetic words, of queries with more than five."""
    words = [({w for w in p.query.lower().split() if w.isalpha()}, split_of(p)) for p in bfcl[0]]
    test, rest = ([w for w, s in words if (s == "test") == wanted] for wanted in (True, False))
    assert not {frozenset(w) for w in test if len(w) > 5} & {frozenset(w) for w in rest}


def test_problems_are_hashed_by_id_and_compared_by_content():
    other = replace(GOOD, query="Weather in Rome?")
    assert hash(GOOD) == hash(other) and GOOD != other and len({GOOD, other, replace(GOOD)}) == 2
