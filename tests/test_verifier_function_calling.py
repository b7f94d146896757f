"""Function calls: how each model's text is read, what makes a call right, and why the others are wrong."""

import copy
import json
import os
import random
import runpy
import time
from pathlib import Path

import pytest
import trl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from r3lib.errors import R3Error
from r3lib.verifiers.calls_reader import MAX_BLOCKS, MAX_LENGTH, calls
from r3lib.verifiers.function_calling import REASONS, RULES, gold, verify
from r3lib.verifiers.json_calls import MAX_DEPTH, Unread

MEGA = 1_000_000
TOOLS = [  # xlam's form
    {
        "name": "forecast",
        "description": "The weather of the days to come.",
        "parameters": {
            "city": {"type": "str", "description": "where"},
            "days": {"type": "int", "description": "how many"},
            "scale": {"type": "float, optional", "description": "of the map"},
            "tags": {"type": "List[str]", "description": "what else", "default": []},
        },
    },
    {"name": "alert", "description": "Warn.", "parameters": {"on": {"type": "bool", "description": "or off"}}},
    {"name": "now", "description": "The time.", "parameters": {}},
]
PARIS = {"name": "forecast", "arguments": {"city": "Paris", "days": 3}}
ROME = {"name": "forecast", "arguments": {"city": "Rome", "days": 5}}
ALERT = {"name": "alert", "arguments": {"on": True}}
NOW = {"name": "now", "arguments": {}}
WRITTEN = '{"name": "forecast", "arguments": {"city": "Paris", "days": 3}}'


def schema(types, required, wrap=False):
    """A tool f in JSON schema."""
    tool = {"name": "f", "parameters": {"type": "dict", "properties": types, "required": required}}
    return [{"type": "function", "function": tool}] if wrap else [tool]


def dumped(made):
    return json.dumps(made, ensure_ascii=False)


def reason(text, answers=(PARIS,), rule="strict", tools=TOOLS):
    """Why `text` passes or fails."""
    verdict = verify(text, tools, list(answers), rule)
    assert verdict.ok == (verdict.reason == "ok") and verdict.reason in REASONS
    return verdict.reason


def one(value, wanted, declared, rule="strict"):
    """Why a call f(a=value) passes or fails where f(a=wanted) is gold."""
    tools = [{"name": "f", "parameters": {"a": {"type": declared}}}]
    text = json.dumps({"name": "f", "arguments": {"a": value}})
    return reason(text, [{"name": "f", "arguments": {"a": wanted}}], rule, tools)


# ---------------------------------------------------------------- how a text is read

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SYNTAXES = runpy.run_path(str(BENCHMARKS / "call_syntaxes.py"))["SYNTAXES"]


def written(made):
    """`made` in every syntax that can hold it: (name, text)."""
    return [(name, s.render(made)) for name, s in SYNTAXES.items() if s.many or len(made) == 1]


def parameters(call):
    return {"name": call["name"], "parameters": call["arguments"]}


def stringed(call):
    return {"name": call["name"], "arguments": json.dumps(call["arguments"])}


@pytest.mark.parametrize("made", [[PARIS], [NOW], [PARIS, ALERT, NOW, ROME]], ids=["one", "no arguments", "four"])
@pytest.mark.parametrize("rule", RULES)
def test_every_familys_syntax_is_read(made, rule):
    assert len(SYNTAXES) >= 24
    for name, text in written(made):
        assert reason(text, made, rule) == "ok", name
        assert not SYNTAXES[name].typed or calls(text, {"now"}) == made


def assistants_turn(path, call):
    """What a template writes for an assistant's call after a user's turn; None where it has no place for calls."""
    tool = {"name": call["name"], "description": "", "parameters": {"type": "object", "properties": {}}}
    turns = [{"role": "user", "content": "Weather?"}]
    for arguments in (call["arguments"], json.dumps(call["arguments"])):
        function = {"type": "function", "id": "a1", "function": {"name": call["name"], "arguments": arguments}}
        made = {"role": "assistant", "content": "", "tool_calls": [function]}
        try:
            tools = [{"type": "function", "function": tool}]
            options = {"chat_template": path.read_text(), "tools": tools, "bos_token": "", "eos_token": ""}
            (before,), _ = render_jinja_template([turns], **options, add_generation_prompt=True)
            (after,), _ = render_jinja_template([[*turns, made]], **options)
        except (TemplateError, TypeError, ValueError):
            continue
        return after[len(os.path.commonprefix([before, after])) :]
    return None


@pytest.mark.parametrize("call", [PARIS, NOW], ids=["arguments", "no arguments"])
def test_what_the_templates_that_trl_ships_write_for_a_call_is_read(call):
    read = set()
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja")):
        text = assistants_turn(path, call)
        if text and call["name"] in text:
            assert reason(text, [call]) == "ok", (path.stem, text)
            read.add(path.stem)
    families = {"deepseekv3", "gemma4", "glm4moe", "gptoss", "lfm2_v2", "lfm2_2_5", "llama3_1", "llama3_2"}
    assert families | {"muse_glimmer", "nemotron_3_nano", "qwen2_5", "qwen3", "qwen3_5_think", "qwen3_8"} <= read


@pytest.mark.parametrize(
    "text, expected",
    [
        (f"I would call {WRITTEN}.\n<tool_call>{WRITTEN}</tool_call>", "ok"),  # a draft before the tag is not read
        (f"I would call {WRITTEN}.\n```json\n{WRITTEN}\n```", "ok"),
        (f"{WRITTEN}\n<tool_call> is how I call.", "ok"),  # no name after the tag, so the tag marks nothing
        (f"{WRITTEN} No: {WRITTEN}", "wrong_call_count"),  # without a mark every block counts
        (f"<tool_call>{WRITTEN}</tool_call> and {WRITTEN}", "wrong_call_count"),
        (f"{{'a': 1}} [0, 1) {{x}} {{ {WRITTEN}", "invalid_json"),  # what opens before a call must be closed
        (f"{{'a': 1}} [0, 1) {{x}} ( {WRITTEN}", "ok"),
        (f'{WRITTEN}\n{{"name": "forecast", "arguments": {{"ci', "invalid_json"),  # one broken call spoils the text
        (f'{WRITTEN}\n{{"temperature": 3}} [1, 2] {{broken', "ok"),  # no name, so no call
    ],
)
def test_which_blocks_of_a_text_count(text, expected):
    assert reason(text) == expected


CALENDAR = 'Sample:\n```json\n{"name": "demo", "version": 2}\n```'
DATA = ['{"temperature": 21.5}', '[{"name": "Ann", "age": 7}]', '{"name": "model", "parameters": 7000000}', CALENDAR]
DATA += ['It returns {"message": "your name is known"}.', '{"name": "my-app", "version": "1.0.0"}', '{"tool": 1}']
DATA += ['The "name": key is set.', '{"name": "forecast", "description": "", "parameters": {"city": {"type": "str"}}}']
DATA += ["Use {curly} braces.", "{'name': 'a set'}", "f(x) = x + 1", "forecast(city) is a function."]
DATA += ['{"name": "x", "b": }']


@pytest.mark.parametrize("data", DATA)
def test_json_that_is_no_call_is_passed_over(data):
    assert reason(data) == reason(f"```json\n{data}\n```") == "no_call"
    for name, text in written([PARIS]):
        assert reason(f"{data}\n{text}") == reason(f"{text}\n{data}") == "ok", name


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "now"}',
        '{"name": "now", "arguments": ""}',
        '{"name": "now", "arguments": " "}',
        '{"name": "now", "arguments": null}',
        '{"name": "now", "parameters": {}}',
        '{"name": "now", "arguments": "{}"}',
        '{"name": "now", "arguments": "null"}',
        '{"function": "now", "arguments": {}}',
        '{"tool_calls": [{"id": "1", "type": "function", "function": {"name": "now"}}]}',
        '{"function_call": {"name": "now", "arguments": ""}}',
        "now()",
        "[now()]",
        "<|python_tag|>now()<|eom_id|>",
        "<function=now>\n</function>",
        "<function=now>{}</function>",
        "<tool_call>now</tool_call>",
    ],
)
def test_a_tool_without_arguments_may_be_called_in_many_ways(text):
    assert reason(text, [NOW]) == "ok"


@pytest.mark.parametrize("text", ['{"name": "then"}', '{"name": "now", "version": 2}', '{"name": "now", "x": {}}'])
def test_a_name_alone_is_a_call_only_of_a_declared_tool_and_with_nothing_else(text):
    assert reason(text, [NOW]) == "no_call"


@pytest.mark.parametrize("times, expected", [(0, "ok"), (1, "ok"), (2, "ok"), (3, "invalid_json")])
def test_arguments_may_be_encoded_as_a_string_up_to_twice(times, expected):
    arguments = PARIS["arguments"]
    for _ in range(times):
        arguments = json.dumps(arguments)
    assert reason(json.dumps({"name": "forecast", "arguments": arguments})) == expected


BAD = WRITTEN.replace("Paris", "Rome")


@pytest.mark.parametrize(
    "text",
    [
        f"<think>I try <tool_call>{WRITTEN}</tool_call></think>\n<tool_call>{WRITTEN}</tool_call>",
        f"<think>I could write {WRITTEN}</think>\n{WRITTEN}",
        f'<think>format is <tool_call>{{"name": ...}}</tool_call></think>\n<tool_call>{WRITTEN}</tool_call>',
        f"so {BAD} it is</think>{WRITTEN}",
        f"{WRITTEN}<|eom_id|><|start_header_id|>ipython<|end_header_id|>\n\n{BAD}",
        f"{WRITTEN}<|im_end|>\n<|im_start|>assistant\n{BAD}",
        f"<|channel|>analysis<|message|>{BAD}<|end|><|start|>assistant to=functions.forecast<|channel|>commentary json"
        '<|message|>{"city": "Paris", "days": 3}<|call|>',
    ],
)
def test_reasoning_and_what_follows_the_end_of_the_turn_are_not_read(text):
    assert reason(text) == "ok"


def test_a_call_only_inside_reasoning_is_no_call():
    assert reason(f"<think>{WRITTEN}</think>Done.") == reason(f"<think>{WRITTEN}") == "no_call"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Sure: [forecast(city='Paris', days=3)].", "ok"),
        ("I call forecast(city='Paris', days=3) now.", "ok"),
        ("forecast(\n  city = 'Paris',\n  days = 3,\n)", "ok"),
        (f"{WRITTEN}\nforecast(city='Paris', days=3)", "ok"),  # a mention
        ("forecast(city='Paris', days=3)\nforecast(city='Paris', days=3)", "wrong_call_count"),
        ("rain(city='Paris')", "wrong_function"),
        ("forecast(city='Paris', days=3.0)", "wrong_type"),
        ("forecast(city='Paris', days=three)", "invalid_json"),
        ("forecast(city='Paris', days=1+2)", "invalid_json"),
        ("forecast(city='Paris', city='Paris', days=3)", "invalid_json"),
        ("forecast(city=open('x'), days=3)", "invalid_json"),
        ("forecast(city=f'{3}', days=3)", "invalid_json"),
        ("forecast(city='Paris', days=1e999)", "invalid_json"),
        ("forecast(city='Paris', days={1: 2})", "invalid_json"),
        ("forecast(city='Paris', days=3", "invalid_json"),
        ("[forecast(city='Paris', days=3)", "invalid_json"),
        ("<|python_tag|>forecast('Paris', 3)", "invalid_json"),
        ("<|python_tag|>forecast(**{'city': 'Paris'})", "invalid_json"),
        ("<tool_call>forecast</tool_call>", "missing_argument"),
        ("<function=forecast><parameter=city>Paris</parameter>", "invalid_json"),
        ("<function=forecast>{'city': 'Paris'}</function>", "invalid_json"),
        ("<function=forecast><parameter=city>Paris</parameter><parameter=days>x</parameter></function>", "wrong_type"),
        ("<|tool_call>call:forecast{city:Paris}<tool_call|>", "invalid_json"),
        ('[TOOL_CALLS]forecast{"city": "Paris", "days": 4}', "wrong_value"),
    ],
)
def test_the_other_syntaxes_have_the_same_reasons(text, expected):
    assert reason(text) == expected


def test_python_names_and_constants_may_be_jsons():
    made = [{"name": "a.b-c", "arguments": {"from": True, "class": [None, False], "x-y": {"true": "true"}}}]
    assert calls('[a.b-c(from=true, class=[null, False], x-y={"true": "true"})]') == made


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = forecast(city='Paris', days=3)", "ok"),
        ("x = forecast(city='Paris', days=3)\ny = forecast(city=x)", "invalid_json"),
        ("forecast(city='Paris', days=3).temperature", "invalid_json"),
        ("forecast(city='Paris', days=3)(1)", "invalid_json"),
        ("forecast(city='Paris', days=3) == 4", "invalid_json"),
        ("I use forecast(city='Paris', days=3).", "ok"),
    ],
)
def test_a_python_call_may_be_assigned_but_is_no_part_of_an_expression(text, expected):
    assert reason(text) == expected


def test_a_value_in_xml_is_read_as_the_type_that_is_wanted():
    text = "<function=f>\n<parameter=a>\n{}\n</parameter>\n</function>"
    values = {"3": [3, "3"], "3.0": [3.0, "3.0"], "True": [True, "True"], "null": [None, "null"], "[1]": [[1], "[1]"]}
    for written_value, readings in values.items():
        for value in readings:
            assert reason(text.format(written_value), [{"name": "f", "arguments": {"a": value}}], tools=[]) == "ok"
    assert reason(text.format("3.0"), [{"name": "f", "arguments": {"a": 3}}], tools=[]) == "wrong_type"


def test_tags_and_fences_inside_a_string_are_only_text():
    made = [{"name": "f", "arguments": {"a": '</tool_call> ```json {"x": "]"} <tool_call> \\" { ['}}]
    for name, text in written(made):
        assert reason(text, made) == "ok", name


@pytest.mark.parametrize(
    "text", ["", "The weather is fine.", None, "forecast('Paris')", "Is it now()?", "{}", "[[]]", "[1]", "{"]
)
@pytest.mark.parametrize("rule", RULES)
def test_a_text_without_an_object_that_has_a_name_is_no_call(text, rule):
    assert reason(text, rule=rule) == "no_call"
    with pytest.raises(Unread, match="no_call"):
        calls(text)


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "now", "arguments": []}',
        '{"name": "now", "arguments": "soon"}',
        '{"name": "now", "arguments": "[]"}',
        '{"name": "now", "arguments": "{"}',
        '{"name": "now", "arguments": "{} {}"}',
        '{"name": 7, "arguments": {}}',
        '{"name": ["now"], "arguments": {}}',
        '[{"name": "now", "arguments": {}}, 7]',
        '[[{"name": "now", "arguments": {}}]]',
    ],
)
def test_a_call_of_the_wrong_shape_is_invalid_json(text):
    assert reason(text, [{"name": "now", "arguments": {}}]) == "invalid_json"


@pytest.mark.parametrize(
    "old, new",
    [
        ("}}", "}"),
        ("}}", ""),
        ("}}", "}}}"),
        ("}}", "}}]"),
        ("}}", "},}"),
        ('{"name', '[{"name'),
        ('{"name', '{{"name'),
        ('{"name', '"name'),
        ('{"name"', '{name"'),
        ('{"name"', "{name"),
        ('"', "'"),
        ('"city"', "city"),
        ("Paris", 'Par"is'),
        ("Paris", "Par\nis"),
        ("Paris", "Par\\xis"),
        ("Paris", "Par\0is"),
        ('name": ', 'name" '),
        (", ", " "),
        ("3", "03"),
        ("3", "٣"),
        ("3", "0x3"),
        ("3", "1_0"),
        ("3", "+3"),
        ("3", "True"),
        ("3", "3 # days"),
        ("3", "1 + 2"),
        ("3", "__import__('os').getpid()"),
    ],
)
def test_broken_json_is_invalid_json(old, new):
    broken = WRITTEN.replace(old, new)
    assert broken != WRITTEN and reason(broken) == "invalid_json"
    assert reason(f"So:\n<tool_call>{broken}</tool_call>\n<tool_call>{WRITTEN}</tool_call>") == "invalid_json"


@pytest.mark.parametrize("cut", range(len('{"name"'), len(WRITTEN)))
def test_a_call_cut_short_is_invalid_json(cut):
    assert reason(WRITTEN[:cut]) == "invalid_json"


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "alert", "name": "forecast", "arguments": {"city": "Paris", "days": 3}}',
        '{"name": "forecast", "arguments": {"city": "Paris", "days": 4, "days": 3}}',
        '{"name": "forecast", "arguments": "{\\"city\\": \\"Paris\\", \\"days\\": 4, \\"days\\": 3}"}',
        '{"name": "forecast", "arguments": {"city": "Paris", "days": 3, "tags": [{"a": 1, "a": 1}]}}',
    ],
)
def test_duplicate_keys_are_invalid_json(text):
    assert reason(text) == "invalid_json"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000])
def test_numbers_that_are_none_are_invalid_json(number):
    assert reason(WRITTEN.replace("3", number)) == "invalid_json"


def test_length_depth_and_number_of_blocks_have_limits():
    deep = '{"name": "f", "arguments": {"a": %s}}'
    assert calls(deep % ("[" * (MAX_DEPTH - 2) + "]" * (MAX_DEPTH - 2)))
    assert reason(deep % ("[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1))) == "invalid_json"
    assert reason(json.dumps({"name": "f", "arguments": "[" * 3999 + "]" * 3999})) == "invalid_json"
    assert reason(WRITTEN.rjust(MAX_LENGTH)) == "ok"
    assert reason(WRITTEN.rjust(MAX_LENGTH + 1)) == "invalid_json"
    assert reason("word " * MAX_LENGTH + f"<tool_call>{WRITTEN}</tool_call>") == "ok"  # the prose before is not read
    assert calls(WRITTEN * MAX_BLOCKS) == [PARIS] * MAX_BLOCKS
    assert reason(WRITTEN * (MAX_BLOCKS + 1)) == "invalid_json"


# ---------------------------------------------------------------- reasons and their precedence


def changed(**arguments):
    return dumped([{"name": "forecast", "arguments": PARIS["arguments"] | arguments}])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "text, expected",
    [
        (dumped([PARIS]), "ok"),
        ("It will rain.", "no_call"),
        (dumped([PARIS])[:-1], "invalid_json"),
        (dumped([PARIS | {"name": "weather"}]), "wrong_function"),
        (dumped([ALERT]), "wrong_function"),
        (dumped([PARIS, ALERT]), "wrong_function"),
        (dumped([PARIS, PARIS]), "wrong_call_count"),
        (dumped([{"name": "forecast", "arguments": {"city": "Paris"}}]), "missing_argument"),
        (dumped([{"name": "forecast", "arguments": {"city": 7, "date": 3}}]), "missing_argument"),
        (changed(month=5, city="Rome"), "unexpected_argument"),
        (changed(scale=1.0), "unexpected_argument"),
        (changed(city="Rome", days="3"), "wrong_type"),
        (changed(days=True), "wrong_type"),
        (changed(days=None), "wrong_type"),
        (changed(days=3.0), "wrong_type"),
        (changed(city=["Paris"]), "wrong_type"),
        (changed(days=4), "wrong_value"),
        (changed(city="Rome"), "wrong_value"),
    ],
)
def test_the_first_reason_that_applies_is_given(text, expected, rule):
    assert reason(text, rule=rule) == expected


@pytest.mark.parametrize("rule", RULES)
def test_the_empty_list_is_an_answer_of_no_calls(rule):
    assert reason("[]", rule=rule) == reason("```json\n[ ]\n```", rule=rule) == "wrong_call_count"
    assert reason("[]", [], rule) == "ok"
    assert reason("No tool fits.", [], rule) == "no_call"
    assert reason(WRITTEN, [], rule) == "wrong_function"


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_calls_is_free_and_their_number_is_not(rule):
    three = [PARIS, ALERT, ROME]
    assert all(reason(dumped(made), three, rule) == "ok" for made in ([ROME, PARIS, ALERT], [ALERT, ROME, PARIS]))
    assert reason(dumped([PARIS, ALERT]), three, rule) == "wrong_call_count"
    assert reason(dumped([PARIS, PARIS, ALERT, ROME]), three, rule) == "wrong_call_count"
    assert reason(dumped([PARIS, PARIS, ALERT]), three, rule) == "wrong_value"  # Rome's pair is a second Paris
    assert reason(dumped([PARIS, ALERT, ALERT]), three, rule) == "wrong_function"  # a second alert cannot be Rome's


def test_several_calls_of_one_function_are_paired_at_best():
    possible = [{"f": {"a": [1, 2]}}, {"f": {"a": [1]}}]  # taken greedily, 1 uses up the first and 2 has no pair
    tools = schema({"a": {"type": "integer"}}, ["a"])
    text = '{"name": "f", "arguments": {"a": 1}} {"name": "f", "arguments": {"a": 2}}'
    assert reason(text, possible, "lenient", tools) == "ok"
    assert reason(text.replace("2", "3"), possible, "lenient", tools) == "wrong_value"
    mixed = [{"name": "f", "arguments": arguments} for arguments in ({"a": 1, "b": 1}, {"a": 2})]
    assert reason(dumped([mixed[1], {"name": "f", "arguments": {"a": 3, "b": 1}}]), mixed, tools=tools) == "wrong_value"


def test_an_unknown_rule_names_the_rules():
    with pytest.raises(R3Error, match="'exact'.*strict, lenient"):
        verify(WRITTEN, TOOLS, [PARIS], "exact")


@pytest.mark.parametrize("answers", ["{}", "7", ["f"], [{"f": [1]}], [{"name": "f"}], [{}], [{"f": {}, "g": {}}]])
def test_malformed_gold_is_a_clear_error(answers):
    for rule in RULES:
        with pytest.raises(R3Error, match="answer"):
            verify(WRITTEN, TOOLS, answers, rule)
    with pytest.raises(R3Error, match="tools"):
        verify(WRITTEN, "{}", [PARIS])


def test_the_arguments_are_not_changed():
    tools = copy.deepcopy(TOOLS)
    answers = [{"forecast": {"city": ["Paris", "paris"], "days": [3], "tags": ["", ["a"]]}}]
    before = copy.deepcopy((tools, answers))
    assert {verify(WRITTEN, tools, answers, rule).reason for rule in RULES} == {"ok"}
    assert (tools, answers) == before
    assert {verify(WRITTEN, json.dumps(tools), json.dumps(answers), rule).reason for rule in RULES} == {"ok"}


# ---------------------------------------------------------------- strict


@pytest.mark.parametrize(
    "value, wanted, declared, expected",
    [
        (1, 1, "int", "ok"),
        (1e2, 100.0, "float", "ok"),
        (1, 1.0, "float", "wrong_type"),
        (1.0, 1, "float", "wrong_type"),
        (1, True, "bool", "wrong_type"),
        (True, 1, "int", "wrong_type"),
        ("1", 1, "int", "wrong_type"),
        (1, "1", "str", "wrong_type"),
        (2, 1.5, "float", "wrong_value"),  # a float may be written 2; it is the value that is wrong
        ("Paris", "paris", "str", "wrong_value"),
        ("a b", "a  b", "str", "wrong_value"),
        ("é", "e\u0301", "str", "wrong_value"),
        ([1, 2], [2, 1], "List[int]", "wrong_value"),
        ([1, 2], [1, 2, 3], "List[int]", "wrong_value"),
        ([1], [1.0], "List[float]", "wrong_type"),
        (["1"], [1], "List[int]", "wrong_type"),
        ([["1"]], [[1]], "List[List[int]]", "wrong_type"),
        (["1"], [1], "list", "wrong_value"),  # the tool does not say what the list holds
        ([], [1], "Tuple[int, str]", "wrong_value"),
        (["b", 2], [1, "a"], "Tuple[int, str]", "wrong_value"),
        ({"b": 2, "a": 1}, {"a": 1, "b": 2}, "Dict[str, int]", "ok"),
        ({"a": True}, {"a": 1}, "dict", "wrong_type"),
        ({"a": 2}, {"a": 1}, "dict", "wrong_value"),
        ("a", ["a"], "Union[str, List[str]]", "wrong_value"),
        (1, None, "Optional[int]", "wrong_value"),
        (None, 1, "Optional[int]", "wrong_value"),
        (None, 1, "int or None", "wrong_value"),
        (1, "x", "Any", "wrong_type"),  # the tool does not say, so gold does
        ("y", "x", "", "wrong_value"),
        ("1", "2", "int", "wrong_value"),  # gold contradicts the tool, so both types are right
        (1, "2", "int", "wrong_value"),
    ],
)
def test_strict_values_are_exact_and_typed(value, wanted, declared, expected):
    assert one(value, wanted, declared) == expected
    assert one(wanted, wanted, declared) == "ok"


def test_strict_wants_an_argument_of_gold_even_where_the_tool_has_a_default():
    full = [{"name": "forecast", "arguments": PARIS["arguments"] | {"tags": ["rain"]}}]
    assert reason(WRITTEN, full) == reason(WRITTEN, full, "lenient") == "missing_argument"
    empty = [{"name": "forecast", "arguments": PARIS["arguments"] | {"tags": []}}]
    assert reason(WRITTEN, empty) == "missing_argument" and reason(WRITTEN, empty, "lenient") == "ok"


def test_strict_takes_the_first_of_bfcls_accepted_values():
    c, h = {"d": [[3], [4]], "e": [""], "g": ["", 5]}, [{"i": [6]}]
    possible = [{"f": {"a": [1, 2], "b": ["", "x"], "c": [c], "h": [h]}}]
    plain = [{"name": "f", "arguments": {"a": 1, "c": {"d": [3]}, "h": [{"i": 6}]}}]
    assert gold(possible) == gold(json.dumps(possible)) == gold(plain) == plain
    assert reason(dumped(plain), possible, tools=[]) == "ok"
    assert reason(dumped(plain).replace("1", "2"), possible, tools=[]) == "wrong_value"
    assert reason(dumped(plain).replace('"a"', '"b": "x", "a"'), possible, tools=[]) == "unexpected_argument"


def test_gold_may_be_written_as_any_call_may():
    assert gold([parameters(PARIS), {"type": "function", "function": stringed(ALERT)}]) == [PARIS, ALERT]


# ---------------------------------------------------------------- lenient

BFCL = schema(
    {
        "n": {"type": "integer"},
        "x": {"type": "float"},
        "s": {"type": "string"},
        "l": {"type": "array", "items": {"type": "string"}},
        "p": {"type": "tuple", "items": {"type": "float"}},
        "d": {"type": "dict", "properties": {}},
        "ds": {"type": "array", "items": {"type": "dict"}},
        "any": {"type": "any"},
    },
    ["n"],
)


@pytest.mark.parametrize(
    "arguments, accepted, expected",
    [
        ({"n": 1}, {"n": [1, 2]}, "ok"),
        ({"n": 2}, {"n": [1, 2]}, "ok"),
        ({"n": 3}, {"n": [1, 2]}, "wrong_value"),
        ({"n": 1.0}, {"n": [1]}, "wrong_type"),
        ({"n": True}, {"n": [1]}, "wrong_type"),
        ({"n": "1"}, {"n": [1]}, "wrong_type"),
        ({"n": "a"}, {"n": ["a"]}, "ok"),  # gold's own type is right, whatever the tool says
        ({"x": 1}, {"x": [1.0]}, "ok"),
        ({"x": 1.0}, {"x": [1]}, "ok"),
        ({"x": 2}, {"x": [1.0]}, "wrong_value"),
        ({"s": "New york, N.Y."}, {"s": ["new_york NY"]}, "ok"),
        ({"s": "'a-b'/c*^"}, {"s": ['"AB"c']}, "ok"),
        ({"s": "a\tb"}, {"s": ["ab"]}, "wrong_value"),
        ({"s": "a;b"}, {"s": ["ab"]}, "wrong_value"),
        ({"s": 5}, {"s": ["5"]}, "wrong_type"),
        ({}, {"s": ["x", ""]}, "ok"),
        ({}, {"s": ["x"]}, "missing_argument"),
        ({"s": ""}, {"s": ["x", ""]}, "ok"),
        ({"n": ""}, {"n": ["", 5]}, "wrong_type"),
        ({}, {"n": ["", 5]}, "ok"),  # BFCL refuses it, as n is required, though it accepts "" for n
        ({"n": 1, "s": "x"}, {"n": [1]}, "unexpected_argument"),
        ({"l": ["A.", "b"]}, {"l": [["a", "B"]]}, "ok"),
        ({"l": ["b", "a"]}, {"l": [["a", "b"]]}, "wrong_value"),
        ({"l": ["a"]}, {"l": [["a", "b"], ["a"]]}, "ok"),
        ({"l": []}, {"l": [["a"], ""]}, "ok"),
        ({"l": []}, {"l": [["a"]]}, "wrong_value"),
        ({"l": [1]}, {"l": [["1"]]}, "wrong_type"),
        ({"l": "a"}, {"l": [["a"]]}, "wrong_type"),
        ({"p": [1.5, 2.0]}, {"p": [[1.5, 2]]}, "ok"),
        ({"p": [1.5, 2]}, {"p": [[1.5, 2.0]]}, "ok"),  # BFCL takes integers for floats only outside lists
        ({"p": [True, 2.0]}, {"p": [[1.0, 2.0]]}, "wrong_type"),
        ({"d": {"k": "A"}}, {"d": [{"k": ["a", "b"]}]}, "ok"),
        ({"d": {"k": "c"}}, {"d": [{"k": ["a", "b"]}]}, "wrong_value"),
        ({"d": {"k": "a"}}, {"d": [{"k": ["a"], "o": ["", 1]}]}, "ok"),
        ({"d": {}}, {"d": [{"k": ["a"]}]}, "wrong_value"),
        ({"d": {"k": "a", "z": 1}}, {"d": [{"k": ["a"]}]}, "wrong_value"),
        ({"d": {"k": 1}}, {"d": [{"k": [True]}]}, "wrong_value"),
        ({"d": {"k": 1.5}}, {"d": [{"k": 1.5}]}, "ok"),  # a slip of BFCL's data: the value is not in a list
        ({"d": {"k": {"i": "A"}}}, {"d": [{"k": [{"i": ["a"]}]}]}, "ok"),
        ({"d": []}, {"d": [{"k": ["a"]}]}, "wrong_type"),
        ({"ds": [{"k": "A"}, {"k": 2}]}, {"ds": [[{"k": ["a"]}, {"k": [1, 2]}]]}, "ok"),
        ({"ds": [{"k": 2}, {"k": "a"}]}, {"ds": [[{"k": ["a"]}, {"k": [1, 2]}]]}, "wrong_value"),
        ({"ds": [{"k": "a"}]}, {"ds": [[{"k": ["a"]}, {"k": [1, 2]}]]}, "wrong_value"),
        ({"any": 5}, {"any": [5]}, "ok"),
        ({"any": None}, {"any": ["", None]}, "ok"),
        ({"any": "5"}, {"any": [5]}, "wrong_type"),
    ],
)
def test_lenient_follows_bfcl(arguments, accepted, expected):
    assert reason(dumped([{"name": "f", "arguments": arguments}]), [{"f": accepted}], "lenient", BFCL) == expected


CITY = {"name": "forecast", "arguments": {"city": "Rome"}}
FEW = {"name": "forecast", "arguments": {"city": "Rome", "days": 1}}
MANY = {"name": "forecast", "arguments": {"city": "Rome", "days": 3}}


@pytest.mark.parametrize(
    "wanted, called, lenient, strict",
    [
        (MANY, CITY, "missing_argument", "missing_argument"),  # leaving out days means 1
        (MANY, FEW, "wrong_value", "wrong_value"),
        (CITY, FEW, "ok", "unexpected_argument"),
        (CITY, MANY, "wrong_value", "unexpected_argument"),  # not the default
        (FEW, CITY, "ok", "missing_argument"),
        (FEW, FEW, "ok", "ok"),
    ],
)
@pytest.mark.parametrize("form", ["xlam", "JSON Schema", "a default as text"])
def test_lenient_takes_an_argument_left_out_as_its_default_and_the_reverse(wanted, called, lenient, strict, form):
    days = {"type": "int", "default": "1" if form == "a default as text" else 1}
    tools = [{"name": "forecast", "parameters": {"city": {"type": "str"}, "days": days}}]
    if form == "JSON Schema":
        types = {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}}
        tools = schema(types, ["city"])
        tools[0]["name"] = "forecast"
    assert reason(dumped([called]), [wanted], "lenient", tools) == lenient
    assert reason(dumped([called]), [wanted], "strict", tools) == strict


def test_lenient_pairs_calls_that_differ_by_a_default():
    tools = [{"name": "g", "parameters": {"type": {"type": "str", "default": "game"}}}]
    wanted = [{"name": "g", "arguments": {"type": kind}} for kind in ("beta", "game")]
    empty = {"name": "g", "arguments": {}}
    assert reason(dumped([empty, empty]), wanted, "lenient", tools) == "missing_argument"
    assert reason(dumped([empty, wanted[0]]), wanted, "lenient", tools) == "ok"


@pytest.mark.parametrize("spec", ["int", {"type": "int"}, {"type": "int, optional"}, {"type": "Optional[int]"}])
def test_an_argument_of_gold_without_a_default_may_not_be_left_out(spec):
    text, answers = '{"name": "f", "arguments": {}}', [{"name": "f", "arguments": {"type": 5}}]
    for rule in RULES:
        assert reason(text, answers, rule, [{"name": "f", "parameters": {"type": spec}}]) == "missing_argument"
        for wrap in (False, True):
            assert reason(text, answers, rule, schema({"type": {"type": "integer"}}, [], wrap)) == "missing_argument"


@pytest.mark.parametrize(
    "value, wanted, declared, expected",
    [
        ("PARIS", "Paris", "str", "ok"),
        (3, 3.0, "float", "ok"),
        ([3, 1], [3.0, 1.5], "List[float]", "wrong_value"),
        (["a b"], ["A-B"], "List[str]", "ok"),
        ({"a": "X", "b": [1]}, {"b": [1], "a": "x"}, "Dict[str, Any]", "ok"),
        ({"a": ["x"]}, {"a": ["x", "y"]}, "dict", "wrong_value"),
        ([{"a": 1}], [{"a": 2}], "List[Dict[str, int]]", "wrong_value"),
        ([{"a": 1}], [{"a": 1}], "List[Dict[str, int]]", "ok"),
        ("", "", "str", "ok"),
    ],
)
def test_lenient_compares_a_plain_gold_alike(value, wanted, declared, expected):
    assert one(value, wanted, declared, "lenient") == expected


# ---------------------------------------------------------------- no text stalls it

CALL = '{"name": "forecast", "arguments": %s}'
LIST = CALL % '{"city": "Paris", "days": [%s]}'
UNITS = ["{", "[", '"', "\\", "<tool_call>", "```json", "```", "\n", "\0", "\ud800", "😀", "٣", "name", "}", "]"]
UNITS += [" ", '{"', '["', "[{", "{}", "[]", "[[]]", '{"a":', "[{},", '"\\"', "{'", '"name":', '{"name":', "``\n"]
UNITS += ["1e999,", "f(", "\nf()", "\nf(a=1)", "[f(", "f('", "<function=", "<function=f>{", "<tool_call>f", "a(\n"]
UNITS += ["<function=f><parameter=a>", "<tool_call>f<arg_key>a</arg_key>", "to=functions.f {", "[TOOL_CALLS]f{"]
UNITS += ['<tool_call>{"a', "\nf(a=-", "\nf(a=[", '<|tool_call>call:f{a:<|"|>', "a:", "aaaa", '["name","arguments"]']
UNITS += ["<｜tool▁call▁begin｜>f", '"name":"']
ADVERSARIAL = {f"a megabyte of {unit!a}": unit * (MEGA // len(unit)) for unit in UNITS}
ADVERSARIAL |= {f"all that is read is {unit!a}": unit * (MAX_LENGTH // len(unit)) for unit in UNITS}
ADVERSARIAL |= {f"inside a call, {unit!a}": (LIST % (unit * (9800 // len(unit)))) for unit in UNITS}
ADVERSARIAL |= {f"as a string, {unit!a}": LIST % json.dumps(unit * (3000 // len(unit))) for unit in UNITS}
ADVERSARIAL |= {f"an open call, then {unit!a}": CALL[:-3] + "[" + unit * (MEGA // len(unit)) for unit in UNITS}
ADVERSARIAL |= {f"before a call, {unit!a}": unit * (9800 // len(unit)) + BAD for unit in UNITS}
ADVERSARIAL |= {f"in Python, {unit!a}": f"forecast(city={unit * (3800 // len(unit))}, days=3)" for unit in UNITS}
ADVERSARIAL |= {f"for Gemma, {unit!a}": "<|tool_call>call:f{a:" + unit * (9000 // len(unit)) for unit in UNITS}
ADVERSARIAL |= {
    "a long list in Python": "forecast(city=[" + "1," * 1900 + "])",
    "many arguments in Python": "forecast(" + "city=1," * 500 + ")",
    "a long sum in Python": "forecast(city=" + "1+" * 1900 + "1)",
    "10,000 deep": LIST % ("[" * 10_000 + "]" * 10_000),
    "10,000 objects deep": CALL % ('{"a":' * 10_000 + "1" + "}" * 10_000),
    "100,000 digits": LIST % ("9" * 100_000),
    "4,000 digits": LIST % ("9" * 4000),
    "many numbers": LIST % ("1," * 4900)[:-1],
    "many floats": LIST % ("1.5," * 2400)[:-1],
    "many lists": LIST % ("[1]," * 2400)[:-1],
    "many keys": CALL % json.dumps(dict.fromkeys(map(str, range(900)), 1)),
    "many calls": "[" + ",".join([CALL % "{}"] * 240) + "]",
    "repeated keys": CALL % ("{" + ",".join(['"a":1'] * 1600) + "}"),
    "a call, then a megabyte": WRITTEN + " " * MEGA,
    "a megabyte string": CALL % json.dumps({"city": "a" * MEGA}),
}


def judged(*what):
    """The verdict, after a second of the processor at most; the goal, 10 ms, is in benchmarks/verifiers.py."""
    start = time.process_time()
    verdict = verify(*what)
    assert time.process_time() - start < 1
    return verdict


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_an_adversarial_text_is_rejected_and_stalls_nothing(name, rule):
    assert not judged(ADVERSARIAL[name], TOOLS, [PARIS], rule).ok


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "value", ["1," * 900, '"ab",' * 350, '"%s",' % ("é-" * 900), "[[1],[2]]," * 170, '{"a":[1]},' * 170]
)
def test_five_large_calls_are_paired_without_a_stall(value, rule):
    text = "[" + ",".join([LIST % value[:-1]] * 5) + "]"
    verdict = judged(text, TOOLS, [PARIS, PARIS, ROME, ROME, ROME], rule)
    assert verdict.reason == "wrong_type" and len(text) < MAX_LENGTH


@pytest.mark.parametrize("unit", ['```json\n[{"a": 1, ', '```json\n{"x": [\n', "/```json[["])
def test_data_that_never_ends_stalls_nothing(unit):
    text = (unit * 9900)[:9900]
    assert not judged(text, [{"name": "f", "parameters": {}}], [{"name": "f", "arguments": {}}]).ok


# ---------------------------------------------------------------- properties

NAMES = st.sampled_from(["a", "name", "type", "city", "größe", "required", "arguments"])
WORDS = st.text(st.sampled_from('abcABC019 ,._{}[]"\\é😀\n\u2028`<>;:'), max_size=9)
SCALARS = {
    "str": WORDS,
    "int": st.integers(-(10**20), 10**20),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "bool": st.booleans(),
}
VALUES = SCALARS | {
    "List[int]": st.lists(SCALARS["int"], max_size=3),
    "List[str]": st.lists(WORDS, max_size=3),
    "Dict[str, Any]": st.dictionaries(NAMES, st.one_of(*SCALARS.values()), max_size=3),
    "List[Dict]": st.lists(st.dictionaries(NAMES, WORDS, max_size=2), max_size=2),
}


@st.composite
def problems(draw):
    """Random tools and one to four calls of theirs: (tools, calls)."""
    tools = []
    for name in draw(st.lists(st.sampled_from(["f", "g.h", "name"]), min_size=1, max_size=3, unique=True)):
        types = draw(st.dictionaries(NAMES, st.sampled_from(sorted(VALUES)), max_size=4))
        tools.append({"name": name, "parameters": {arg: {"type": kind} for arg, kind in types.items()}})
    made = []
    for tool in draw(st.lists(st.sampled_from(tools), min_size=1, max_size=4)):
        arguments = {arg: draw(VALUES[spec["type"]]) for arg, spec in tool["parameters"].items()}
        made.append({"name": tool["name"], "arguments": arguments})
    return tools, made


def possible_answers(made):
    """The same gold in BFCL's form."""

    def wrap(value):
        if isinstance(value, dict):
            return {key: [wrap(item)] for key, item in value.items()}
        return [wrap(item) for item in value] if isinstance(value, list) else value

    return [{call["name"]: {arg: [wrap(value)] for arg, value in call["arguments"].items()}} for call in made]


@settings(deadline=None, max_examples=100)
@given(problems(), st.randoms(use_true_random=False))
@example(([], [{"name": "f", "arguments": {"a": "\ud800"}}]), random.Random(0))
def test_gold_is_ok_under_both_rules_in_every_format(problem, rng):
    tools, made = problem
    shuffled = rng.sample(made, len(made))
    for rule in RULES:
        for name, text in rng.sample(written(shuffled), 8):
            assert reason(text, made, rule, tools) == "ok", name
    assert reason(dumped(gold(made)), made, "lenient", tools) == "ok"


@settings(deadline=None, max_examples=100)
@given(problems())
def test_gold_of_bfcl_is_ok_under_both_rules(problem):
    tools, made = problem
    possible = possible_answers(made)
    for rule in RULES:
        assert reason(dumped(gold(possible)), possible, rule, tools) == "ok"


@settings(deadline=None)
@given(problems(), st.integers(1, 10**6))
def test_gold_cut_short_or_unbalanced_is_invalid_json(problem, at):
    tools, made = problem
    text = dumped(made)
    cut = 8 + at % (len(text) - 8)  # after [{"name"
    assert reason(text[:cut] if cut < len(text) else text[1:], made, tools=tools) == "invalid_json"
    assert reason(text[:-1], made, tools=tools) == reason(text[1:], made, tools=tools) == "invalid_json"


PIECES = [
    "{",
    "}",
    "[",
    "]",
    '"',
    "\\",
    ":",
    ",",
    '"name"',
    '"name":',
    '"arguments":',
    "{}",
    "[]",
    "1",
    "é",
    "<tool_call>",
]
PIECES += ["```json", "\n", " ", WRITTEN, '{"name": "forecast", "arguments": {', "<|python_tag|>", "NaN", "name"]


@settings(deadline=None, max_examples=500)
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join)), st.sampled_from(RULES))
def test_any_text_gets_a_verdict(text, rule):
    verdict = reason(text, rule=rule)
    try:
        made = calls(text)
    except Unread as error:
        assert verdict == str(error) and verdict in ("no_call", "invalid_json")
    else:
        assert verdict not in ("no_call", "invalid_json") and calls(dumped(made)) == made


@pytest.mark.parametrize("text", ["def f(a=1): pass", "```python\ndef f(a=1):\n    return a\n```"])
def test_a_definition_of_the_tool_is_no_call(text):
    tools = [{"name": "f", "parameters": {"a": {"type": "int"}}}]
    assert verify(text, tools, [{"name": "f", "arguments": {"a": 1}}]).reason == "no_call"


def test_the_form_of_a_call_as_prompts_give_it_does_no_harm():
    form = '{"name": <function-name>, "arguments": <args-json-object>}'
    right = {"name": "f", "arguments": {"a": 1}}
    tools = [{"name": "f", "parameters": {"a": {"type": "int"}}}]
    assert verify(f"The format {form} is used.\n{json.dumps(right)}", tools, [right]).ok
    assert verify(f"The format {form} is used.", tools, [right]).reason == "no_call"
