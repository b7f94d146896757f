"""Declared arguments: every legal schema gets a verdict, and types are read alike everywhere."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r3lib.errors import R3Error
from r3lib.tasks.function_calling_records import function_tool, to_xlam
from r3lib.verifiers.function_calling import RULES, verify
from r3lib.verifiers.schemas import declared_arguments, is_schema, read_type

TEXT = '{"name": "f", "arguments": {"a": 1}}'
GOLD = [{"name": "f", "arguments": {"a": 1}}]
NONE = type(None)


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
        {"type": "object", "properties": {"a": {"type": "array", "items": [{"type": "integer"}]}}},
        {"type": "object", "properties": {"a": {"type": "array", "items": True}}},
        {"type": "object", "properties": {"a": True}},
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": None},
        {"type": ["object", "null"], "properties": {"a": {"type": ["integer", "null"]}}},
        {"type": "object", "properties": None},
        {"type": "object", "additionalProperties": False},
        {
            "$ref": "#/$defs/A",
            "$defs": {"A": {"type": "object", "properties": {"a": {"type": "integer"}}}},
        },
        {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/A"}},
            "$defs": {"A": {"$ref": "#/$defs/A"}},
        },
        {"type": "object", "properties": {"a": {"$ref": "nowhere"}}},
        {"type": "object", "properties": {"a": {"enum": [1, "x", None]}}},
        {"type": "object", "properties": {"a": {"const": 1}}},
        {"type": "object", "properties": {"a": {"oneOf": [{"type": "integer"}, True]}}},
        {"a": "int"},
        {"a": {"description": "no type"}},
        {"a": None},
        None,
        True,
        [],
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_a_legal_schema_gets_a_verdict(parameters, rule):
    for tool in ({"name": "f", "parameters": parameters}, {"name": "f", "input": 1}):
        for tools in ([tool], [{"type": "function", "function": tool}], json.dumps([tool])):
            assert verify(TEXT, tools, GOLD, rule).ok
            assert verify(TEXT.replace("1", '"x"'), tools, GOLD, rule).reason in (
                "wrong_type",
                "wrong_value",
            )


@pytest.mark.parametrize("parameters", ["a", 7, [1], {"type": "object", "properties": "a"}])
def test_parameters_that_are_no_object_are_a_clear_error(parameters):
    with pytest.raises(R3Error, match="'f' must be an object"):
        verify(TEXT, [{"name": "f", "parameters": parameters}], GOLD)


@pytest.mark.parametrize(
    "spec, kinds",
    [
        ("int or str", {int, str}),
        ("int | str", {int, str}),
        ("Union[int, str]", {int, str}),
        ({"type": ["integer", "string"]}, {int, str}),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, {int, str}),
        ({"oneOf": [{"$ref": "#/$defs/N"}, {"enum": ["x"]}]}, {int, str}),
        ("str | None", {str, NONE}),
        ("Optional[str]", {str, NONE}),
        ("Union[str, None]", {str, NONE}),
        ({"type": "string", "nullable": True}, {str, NONE}),
        ("str, optional", {str}),
        ("typing.List[int]", {list}),
        ("list of integers", {list}),
        ("Callable[[float], float]", set()),
        ("Any", set()),
        ({}, set()),
        (True, set()),
        (None, set()),
    ],
)
def test_types_have_one_reading(spec, kinds):
    definitions = {"$defs": {"N": {"type": "integer"}}}
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"a": spec}, **definitions}}
    assert declared_arguments(tool)["a"].type.kinds == kinds


@pytest.mark.parametrize(
    "written", ["Optional[int]", "int | None", "int or null", "Union[int, None]", "int, optional"]
)
def test_what_may_be_none_may_be_left_out(written):
    assert declared_arguments({"name": "f", "parameters": {"a": {"type": written}}})["a"].optional


def test_the_items_of_a_list_have_types():
    for written in ("List[List[int]]", "array of List[int]"):
        assert read_type(written).items.items.kinds == {int}
    assert read_type("Dict[str, List[int]]").items is None


def test_an_argument_may_be_named_as_a_keyword_of_json_schema():
    for name in ("type", "properties", "required", "items", "default"):
        tool = {"name": "f", "parameters": {name: {"type": "int", "description": ""}}}
        assert not is_schema(tool) and declared_arguments(tool)[name].type.kinds == {int}


NAMES = st.sampled_from(["a", "b", "type", "properties", "name", "items", "required"])
WORDS = st.sampled_from(["object", "array", "string", "integer", "number", "boolean", "null"])
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=2),
)


def containers(inner):
    """Legal JSON Schemas that hold others."""
    return st.fixed_dictionaries(
        {},
        optional={
            "type": st.one_of(WORDS, st.lists(WORDS, min_size=1, max_size=3, unique=True)),
            "properties": st.one_of(st.none(), st.dictionaries(NAMES, inner, max_size=3)),
            "required": st.one_of(st.none(), st.lists(NAMES, max_size=2)),
            "items": st.one_of(inner, st.lists(inner, max_size=2)),
            "prefixItems": st.lists(inner, max_size=2),
            "anyOf": st.lists(inner, min_size=1, max_size=3),
            "oneOf": st.lists(inner, min_size=1, max_size=3),
            "allOf": st.lists(inner, min_size=1, max_size=2),
            "not": inner,
            "enum": st.lists(VALUES, min_size=1, max_size=3),
            "const": VALUES,
            "default": VALUES,
            "nullable": st.booleans(),
            "$ref": st.sampled_from(
                ["#", "#/$defs/x", "#/properties/a", "https://example.org/schema"]
            ),
            "$defs": st.dictionaries(st.just("x"), inner, max_size=1),
            "additionalProperties": inner,
            "description": st.text(max_size=3),
        },
    )


SCHEMAS = st.recursive(st.one_of(st.booleans(), st.just({})), containers, max_leaves=6)


@settings(deadline=None, max_examples=150)
@given(containers(SCHEMAS), st.sampled_from(RULES))
def test_any_legal_schema_gets_a_verdict_and_a_prompt(parameters, rule):
    tool = {"name": "f", "description": "", "parameters": {**parameters, "type": "object"}}
    assert verify(TEXT, [tool], GOLD, rule).ok
    shown = function_tool(to_xlam(tool))["function"]
    assert shown["parameters"]["properties"].keys() == (parameters.get("properties") or {}).keys()
    json.dumps(shown)


@pytest.mark.parametrize("required", [True, 5, "a"])
def test_required_that_is_no_list_is_an_error_that_names_the_tool(required):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": required}
    with pytest.raises(R3Error, match=r"`required` of tool 'f' must be a list of names"):
        verify("f", [{"name": "f", "parameters": schema}], [{"name": "f", "arguments": {"a": 1}}])
