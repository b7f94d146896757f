"""What a model answers, without its reasoning and what comes after the end of its turn."""

import json
import re
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r3lib.verifiers.function_calling import verify
from r3lib.verifiers.reasoning import (
    MAX_JSON,
    MAX_LENGTH,
    MAX_TAGS,
    answer_text,
)

PAIRS = {
    "think": ("<think>", "</think>"),
    "in capitals": ("<THINK>", "</Think>"),
    "thinking": ("<thinking>", "</thinking>"),
    "thought": ("<thought>", "</thought>"),
    "reasoning": ("<reasoning>", "</reasoning>"),
    "reasoning_content": ("<reasoning_content>", "</reasoning_content>"),
    "mistral": ("[THINK]", "[/THINK]"),
    "cohere": ("<|START_THINKING|>", "<|END_THINKING|>"),
    "gemma 4": ("<|channel>thought\n", "<channel|>"),
}
MESSAGES = {
    "gpt-oss": (
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
    "gpt-oss, no header": ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    "muse": (" to=self<|message|>", "<|eom|><|start|>assistant to=user<|message|>"),
}
ENDS = """<|im_end|> <|endoftext|> <|eot_id|> <|eom_id|> <|end_of_text|> <|eot|> <|return|> <|call|>
<|END_OF_TURN_TOKEN|> <|END_RESPONSE|> <|end|> <|eom|> <end_of_turn> <turn|> <|tool_response>
<end_of_utterance> <eos> </s> <｜end▁of▁sentence｜> <｜User｜> <|user|> <|system|> <|observation|>
<|USER_TOKEN|> [INST] <|im_start|>user <|start_header_id|>user <|start|>user <start_of_turn>user
<|turn>user""".split()
WORDS = st.text("abc <>|/[]\n`", max_size=12).filter(lambda text: not text.endswith("`"))


def shown(text):
    """The answer without the headers that a family writes around it."""
    return re.sub(r"<\|message\|>| to=self", "", answer_text(text))


# ---------------------------------------------------------------- reasoning


@pytest.mark.parametrize("opening, closing", (PAIRS | MESSAGES).values(), ids=PAIRS | MESSAGES)
def test_reasoning_of_every_family_is_removed(opening, closing):
    assert shown(f"{opening}a{closing}b") == "b"
    assert shown(f"{opening}a{closing}b{opening}c{closing}d") in ("bd", "d")
    assert shown(f"{opening}a") == ""
    assert shown(f"{opening}a{closing}") == ""
    assert shown(f"a{closing}b") == "b"


@pytest.mark.parametrize("opening, closing", PAIRS.values(), ids=PAIRS)
def test_pairs_are_removed_wherever_they_stand(opening, closing):
    assert answer_text(f"a{opening}b{closing}c") == "ac"
    assert answer_text(f"a{opening}b") == "a"
    assert answer_text(f"a{opening}b{opening}c{closing}d{closing}e") == "ae"
    assert answer_text(f"a{closing}b{closing}c") == "c"


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<think>\n<think>\nthe prompt opened it too</think>b", "b"),
        ("<think>I must not write <think> again</think>b", "b"),
        ("<think>a [THINK] b <thinking></think>c", "c"),
        ("<think>a <thinking>b</thinking> c", ""),
        ("<think>a</thinking>b", ""),
        ("<think>a</think>b</think>c", "c"),
        ("a<think>b<think>c</think>d<think>e</think>f</think>g", "ag"),
        ("<thinks>a</thinks>", "<thinks>a</thinks>"),
        ("< think>a", "< think>a"),
        ("I think [think]", "I think [think]"),
        ("", ""),
    ],
)
def test_nested_and_mixed_tags(text, answer):
    assert answer_text(text) == answer


@pytest.mark.parametrize("quotes", ["``", '""', "''", "“”", "‘’"])
@pytest.mark.parametrize("tag", ["<think>", "</think>", "[THINK]", "<|im_end|>"])
def test_a_tag_in_quotes_is_only_mentioned(tag, quotes):
    text = f"a {quotes[0]}{tag}{quotes[1]} b"
    assert answer_text(text) == text
    assert answer_text(f"<think>I close with {text}</think>c") == "c"


def test_a_call_on_a_channel_of_tools_is_no_reasoning():
    call = ' to=functions.f<|channel|>commentary json<|message|>{"a": 1}'
    text = f"<|channel|>analysis<|message|>I call f<|end|><|start|>assistant{call}<|call|>"
    assert answer_text(text).endswith(call)
    preamble = "<|channel|>commentary<|message|>I call f.<|end|><|start|>assistant"
    assert answer_text(preamble + call + "<|call|>x") == preamble + call


# ---------------------------------------------------------------- the end of the turn


@pytest.mark.parametrize("end", ENDS)
def test_what_follows_the_end_of_the_turn_is_not_the_answer(end):
    assert answer_text(f"a{end}b") == "a"
    assert answer_text(f"a{end}b</think>c<think>d") == "a"
    assert answer_text(f"<think>not {end} yet</think>a{end}b") == "a"


def test_a_message_of_the_assistant_may_follow_the_end_of_another():
    for end in ("<|end|>", "<|eom|>"):
        assert answer_text(f"a{end}<|start|>assistant") == f"a{end}<|start|>assistant"
        assert answer_text(f"a{end}\n<|user|>\nb") == "a"


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL's templates are read")
def test_every_end_of_the_templates_that_trl_ships_is_known():
    import trl

    names = r"end_of_\w+|im_end|eot_id|eom_id|eot|END_OF_TURN_TOKEN|return|call|endoftext"
    end = re.compile(rf"<\|(?:{names})\|>|<end_of_\w+>|<turn\|>|</s>|<｜end\S*sentence｜>")
    templates = list((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    found = {tag for template in templates for tag in end.findall(template.read_text())}
    assert len(found) > 8
    assert {tag for tag in found if answer_text(f"a{tag}b") != "a"} == set()


# ---------------------------------------------------------------- properties


@settings(deadline=None)
@given(st.lists(st.tuples(WORDS, st.sampled_from(list(PAIRS.values())), WORDS)), WORDS, WORDS)
def test_only_what_stands_outside_the_tags_is_left(blocks, last, after):
    text = "".join(f"{kept}\n{a}{reasoning}\n{b}" for kept, (a, b), reasoning in blocks)
    expected = "".join(f"{kept}\n" for kept, _, _ in blocks)
    assert answer_text(f"{text}{last}\n<|im_end|>{after}") == f"{expected}{last}\n"


@settings(deadline=None)
@given(
    st.text(), st.sampled_from([tag for pair in PAIRS.values() for tag in pair] + ENDS), st.text()
)
def test_an_answer_is_made_of_the_text(before, tag, after):
    kept = iter(before + tag + after)
    assert all(char in kept for char in answer_text(before + tag + after))


PIECES = st.sampled_from([tag for pair in PAIRS.values() for tag in pair] + ENDS + list('a <"\\\n'))
TAGGED = st.lists(PIECES, max_size=5).map("".join)
VALUES = st.recursive(
    TAGGED | st.integers() | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TAGGED, inner, max_size=2),
    max_leaves=5,
)


@settings(deadline=None)
@given(
    st.dictionaries(TAGGED, VALUES, min_size=1, max_size=3),
    st.sampled_from([None, 2]),
    st.sampled_from(["", "<think>a</think>", "a</think>"]),
    st.sampled_from(["", *ENDS]),
)
def test_a_tag_inside_a_string_of_a_call_is_text(arguments, indent, reasoning, end):
    call = {"name": "f", "arguments": arguments}
    text = json.dumps([call], ensure_ascii=False, indent=indent)
    after = f"{end}</think>{text}" if end else ""
    assert answer_text(reasoning + text + after) == text
    assert verify(f"{reasoning}<tool_call>{text}{after}", [], [call]).ok


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('{"a": "b</s>c"}</s>d', '{"a": "b</s>c"}'),
        ('[{"a": ["b [INST] c"]}][INST] d', '[{"a": ["b [INST] c"]}]'),
        (
            '<think>{"a": "</think>{"b": "c <s> d"}',
            '{"b": "c <s> d"}',
        ),  # no string: nothing ends it
        ('{"a": "b <think> c\n"}', '{"a": "b '),  # no string of JSON: it is broken across lines
        ('He said "b <think> c", d', 'He said "b '),  # no object
    ],
)
def test_a_tag_outside_of_strings_and_in_what_is_no_json_counts(text, answer):
    assert answer_text(text) == answer


def test_a_tag_in_json_is_text_however_long_the_reasoning_before_it_is():
    call = '{"name": "f", "arguments": {"a": "b <s> c"}}'
    assert answer_text(f"<think>{'a' * 2 * MAX_JSON}</think>{call}") == call


TAGS = [
    *"<[a é",
    "<think",
    "<|",
    *(tag for pair in (PAIRS | MESSAGES).values() for tag in pair),
    *ENDS,
]
TAGS += ['{"a":1,', '{"a":x', '{"":"a', '{"', '"",', '{"a":"<s>",', '{"a":"\\"', "{", "1,"]
TAGS += ["<think></think>", "</think>a<think>", "`<think>`", "<|end|><|start|>assistant"]


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("length", [100_000, MAX_LENGTH])
def test_a_long_text_stalls_nothing(tag, length):
    brackets = tag.count("<") + tag.count("[")
    most = min(MAX_TAGS // brackets, length // len(tag)) if brackets else length // len(tag)
    longest = tag * (length // len(tag))
    for text in (tag * most, longest, ('{"a":' + longest)[:length]):
        start = time.process_time()
        answer_text(text)
        assert time.process_time() - start < 1


def test_a_text_of_too_many_tags_is_no_answer():
    assert answer_text("a" * MAX_LENGTH) and not answer_text("a" * (MAX_LENGTH + 1))
    assert answer_text("a" + "<" * MAX_TAGS) and not answer_text("a" + "<" * (MAX_TAGS + 1))
