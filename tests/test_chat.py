"""Conversations are joined token by token, under the templates of real models, or refused."""

import copy
import json
import re
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from r3lib.chat import DATE, EMPTY, Chat
from r3lib.errors import R3Error
from r3lib.tasks import CountdownProblem, CountdownTask
from r3lib.tasks.function_calling import FunctionCallingTask
from r3lib.tasks.function_calling_records import FunctionCallingProblem
from r3lib.verifiers.reasoning import answer_text

TEMPLATES = Path(find_spec("trl").origin).parent / "chat_templates"
MARK = re.compile(
    r"<[|｜][^<>{}'\" ]+[|｜]>|<(?:start|end)_of_turn>|<\|?turn\|?>|</?think>|\[/?INST\]|</?s>"
)
ENDS = {  # template -> (its end of turn, the tokenizer's eos)
    "qwen2_5": ("<|im_end|>", "<|im_end|>"),
    "qwen3_instruct_2507": ("<|im_end|>", "<|im_end|>"),
    "llama3": ("<|eot_id|>", "<|eot_id|>"),
    "llama3_1": ("<|eot_id|>", "<|eot_id|>"),
    "llama3_2": ("<|eot_id|>", "<|eot_id|>"),
    "phi3": ("<|end|>", "<|endoftext|>"),
    "phi3_5": ("<|end|>", "<|endoftext|>"),
    "gemma": ("<end_of_turn>", "<eos>"),
}
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a place.",
    "parameters": {
        "place": {"type": "str", "description": "A town."},
        "days": {"type": "int, optional", "description": "How many days.", "default": 1},
    },
}
CLOCK = {"name": "what_time", "description": "The time.", "parameters": {}}
QUERY = "What is the weather in Lima for 3 days?"
PROBLEM = FunctionCallingProblem(
    "one", QUERY, (WEATHER, CLOCK), ({"name": "get_weather", "arguments": {"place": "Lima", "days": 3}},)
)
TASK, AGAIN = [{"role": "user", "content": "Reach 24 with 4, 6."}], "Try again."


def dressed(tokenizer, name, eos="<|end|>"):
    """The embedded tokenizer with another model's chat template and the special tokens that this one uses."""
    return with_marks(tokenizer, (TEMPLATES / f"{name}.jinja").read_text(), eos)


def with_marks(tokenizer, template, eos, further=()):
    """The embedded tokenizer with `template`, and with its marks and `further` as special tokens."""
    tokenizer = copy.deepcopy(tokenizer)
    marks = [*tokenizer.all_special_tokens, *sorted(set(MARK.findall(template))), *further]
    named = {"bos_token": "<|begin|>", "eos_token": eos}
    tokenizer.add_special_tokens({"extra_special_tokens": marks, **named})
    tokenizer.chat_template = template
    return tokenizer


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def talk(*replies):
    """The conversation as messages: task, reply, follow-up, reply, follow-up ..."""
    turns = list(TASK)
    for reply in replies:
        turns += [{"role": "assistant", "content": reply}, {"role": "user", "content": AGAIN}]
    return turns


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def test_a_turn_that_was_asked_before_is_not_rendered_again(tokenizer, monkeypatch):
    chat, seen = Chat(tokenizer), []
    render = chat._text
    monkeypatch.setattr(chat, "_text", lambda *a, **k: seen.append(a) or render(*a, **k))
    monkeypatch.setattr("r3lib.chat.MOST_TURNS", 3)
    once = [chat.follow([7], [8], f"again {k}") for k in (0, 0, 1)]
    assert once[0] == once[1] != once[2] and len(seen) == 2 * 2
    fresh = [Chat(tokenizer).follow([7], [8], f"again {k}") for k in range(9)]
    assert [chat.follow([7], [8], f"again {k}") for k in range(9)] == fresh
    assert len(chat._turns) <= 3


def test_sampled_ids_survive_every_join_though_they_would_tokenise_differently(tokenizer):
    chat, text = Chat(tokenizer), "I should be more careful next time."
    sampled = [token for letter in text for token in ids_of(tokenizer, letter)]
    assert ids_of(tokenizer, chat.text(sampled)) != sampled
    start = chat.prompt(TASK)
    second = chat.follow(start, sampled, AGAIN)
    third = chat.follow(second, sampled, AGAIN)
    assert second[: len(start) + len(sampled)] == start + sampled
    assert third[: len(second) + len(sampled)] == second + sampled
    assert tokenizer.decode(third) == tokenizer.apply_chat_template(
        talk(text, text), tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("reply", ["<answer>4 * 6</answer>", ""])
def test_a_reply_that_was_cut_off_gets_exactly_one_end_and_a_finished_one_no_second(tokenizer, reply):
    chat = Chat(tokenizer)
    start, cut_off = chat.prompt(TASK), ids_of(tokenizer, reply)
    joined = chat.follow(start, cut_off, AGAIN)
    assert joined[len(start) :].count(chat.end_id) == 2  # the reply's and the follow-up's
    assert joined == chat.follow(start, [*cut_off, chat.end_id], AGAIN)


@pytest.mark.parametrize("name", ENDS)
def test_joins_equal_the_template_on_the_whole_conversation(tokenizer, name):
    """Real templates: same ids as rendering everything at once, so one start token and one system turn."""
    end, eos = ENDS[name]
    tokenizer = dressed(tokenizer, name, eos)
    chat = Chat(tokenizer)
    assert tokenizer.decode([chat.end_id]) == end
    further = {"<|eom_id|>"} & set(tokenizer.get_added_vocab())
    assert set(tokenizer.convert_ids_to_tokens(list(chat.end_ids))) == {end, eos} | further
    one = chat.follow(chat.prompt(TASK), ids_of(tokenizer, "4 + 6"), AGAIN)
    two = chat.follow(one, [*ids_of(tokenizer, "4 * 6"), chat.end_id], AGAIN)
    assert one == chat.prompt(talk("4 + 6"))
    assert two == chat.prompt(talk("4 + 6", "4 * 6"))
    assert two.count(tokenizer.bos_token_id) == ("llama" in name or "gemma" in name)


def test_a_default_system_prompt_stands_once_at_the_front(tokenizer):
    tokenizer = dressed(tokenizer, "qwen2_5", "<|im_end|>")
    chat = Chat(tokenizer)
    joined = tokenizer.decode(chat.follow(chat.prompt(TASK), ids_of(tokenizer, "4 + 6"), AGAIN))
    assert joined.startswith("<|im_start|>system\nYou are Qwen") and joined.count("You are Qwen") == 1
    own = [{"role": "system", "content": "Be brief."}, *TASK]
    joined = tokenizer.decode(chat.follow(chat.prompt(own), ids_of(tokenizer, "4 + 6"), AGAIN))
    assert joined.startswith("<|im_start|>system\nBe brief.") and "You are Qwen" not in joined


@pytest.mark.parametrize("eos", ["<|end|>", "<|endoftext|>"])
def test_an_eos_that_the_template_adds_to_a_finished_text_is_no_turn(tokenizer, eos):
    chat = Chat(dressed(tokenizer, "phi3", eos))
    joined = chat.tokenizer.decode(chat.follow(chat.prompt(TASK), ids_of(chat.tokenizer, "4 + 6"), AGAIN))
    assert joined.endswith("<|assistant|>\n4 + 6<|end|>\n<|user|>\nTry again.<|end|>\n<|assistant|>\n")


def test_a_template_that_forgets_earlier_answers_is_refused_at_once(tokenizer):
    forgets = (
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}<|{{ m.role }}|>{{ m.content }}<|end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(R3Error, match="rewrites earlier turns"):
        Chat(with_template(tokenizer, forgets))


def test_a_template_that_needs_more_than_text_is_one_line(tokenizer):
    with pytest.raises(R3Error, match="refuses this conversation") as error:
        Chat(dressed(tokenizer, "llava_next"))
    assert "\n" not in str(error.value)


def test_a_role_that_the_template_refuses_is_one_line(tokenizer):
    chat = Chat(dressed(tokenizer, "gemma"))
    with pytest.raises(R3Error, match="(?i)refuses this conversation .*system"):
        chat.prompt([{"role": "system", "content": "Be brief."}, *TASK])


def test_no_chat_template_is_refused(tokenizer):
    with pytest.raises(R3Error, match="has no chat template: use"):
        Chat(with_template(tokenizer, None))


def test_no_end_of_turn_token_is_refused(tokenizer):
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(R3Error, match="has no end-of-turn token"):
        Chat(with_template(tokenizer, plain))


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507", "llama3_1", "llama3_2"])
def test_tools_go_through_a_template_that_takes_them(tokenizer, name):
    chat, task = Chat(dressed(tokenizer, name, ENDS[name][1])), FunctionCallingTask("bfcl")
    start = chat.tokenizer.decode(chat.start(task, PROBLEM))
    for part in ("get_weather", "what_time", "A town.", '"type": "object"', '"required"', QUERY):
        assert start.count(part) >= 1, part
    assert chat.takes_tools and start.count(QUERY) == 1 and task.plain(PROBLEM) not in start


@pytest.mark.parametrize("name", ["phi3", "phi3_5", "gemma", "llama3", None])
def test_a_template_without_tools_gets_the_plain_form(tokenizer, name):
    chat, task = Chat(dressed(tokenizer, name, ENDS[name][1]) if name else tokenizer), FunctionCallingTask("bfcl")
    start = chat.start(task, PROBLEM)
    assert not chat.takes_tools and start == chat.prompt(task.messages(PROBLEM))
    assert task.plain(PROBLEM) in chat.tokenizer.decode(start)


PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
PLAIN += "{% if add_generation_prompt %}<|assistant|>{% endif %}"


@pytest.mark.parametrize(
    "with_tools",
    ["{{ raise_exception('no tools here') }}", "{{ tools[0].function.name }}{{ messages | length }}", "no mention"],
)
def test_a_template_whose_tools_fail_or_change_what_was_said_gets_the_plain_form(tokenizer, with_tools):
    chat = Chat(with_template(tokenizer, "{% if tools %}" + with_tools + "{% endif %}" + PLAIN))
    task = FunctionCallingTask("bfcl")
    assert not chat.takes_tools and chat.start(task, PROBLEM) == chat.prompt(task.messages(PROBLEM))


def test_what_is_shown_is_what_is_asked(tokenizer):
    """The column `prompt`: with tools in the template's words, else the last message alone."""
    task, chat = FunctionCallingTask("bfcl"), Chat(dressed(tokenizer, "qwen2_5", "<|im_end|>"))
    assert chat.shown(task, PROBLEM) == chat.tokenizer.decode(chat.start(task, PROBLEM))
    assert Chat(tokenizer).shown(task, PROBLEM) == task.plain(PROBLEM)
    countdown = CountdownTask(), CountdownProblem((4, 6), 24)
    assert chat.shown(*countdown) == countdown[0].messages(countdown[1])[0]["content"]


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "phi3_5"])
def test_joins_after_tools_equal_the_template_on_the_whole_conversation(tokenizer, name):
    chat, task = Chat(dressed(tokenizer, name, ENDS[name][1])), FunctionCallingTask("bfcl")
    start, wrong = chat.start(task, PROBLEM), '[{"name": "what_time", "arguments": {}}]'
    one = chat.follow(start, ids_of(chat.tokenizer, wrong), AGAIN)
    two = chat.follow(one, ids_of(chat.tokenizer, "I need the weather."), AGAIN)
    assert one[: len(start)] == start and two[: len(one)] == one
    first = task.bare_messages(PROBLEM) if chat.takes_tools else task.messages(PROBLEM)
    whole = chat.tokenizer.apply_chat_template(
        [*first, *talk(wrong, "I need the weather.")[1:]],
        tools=task.tools(PROBLEM) if chat.takes_tools else None, tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    assert two == ids_of(chat.tokenizer, whole)


# all templates that TRL ships: joined as they render, or refused with a way out where there is one

OFF = {"enable_thinking": False}
KEPT = {"preserve_thinking": True}
WAYS = {  # template -> arguments with which it only appends
    **{name: {} for name in ENDS},
    **{f"{name}_training": {} for name in ("qwen2_5", "qwen3_instruct_2507", "llama3", "phi3", "gemma")},
    **{name: {} for name in ("phi3_5_training", "gemma3", "gemma3_training", "qwen2_5_vl", "qwen3_vl")},
    **{name: {} for name in ("qwen2_5_vl_training", "qwen3_vl_training", "cohere", "cohere2")},
    **{name: {} for name in ("cohere_training", "cohere2_training", "diffusion_gemma")},
    **{name: {} for name in ("diffusion_gemma_training", "lfm2", "lfm2_training", "lfm2_v2")},
    **{f"gemma4{version}": {} for version in ("", "_v2", "_v3", "_v4", "_v5")},
    **{name: {} for name in ("lfm2_v2_training", "qwen3_5_nothink", "qwen3_5_nothink_training")},
    **{name: OFF for name in ("qwen3", "qwen3_6", "qwen3_8", "qwen3_8_training", "qwen3_5_think")},
    **{name: OFF for name in ("glm4moe", "glm4moe_training")},
    **{f"nemotron_3_{kind}": OFF for kind in ("nano", "super", "ultra", "5_lightning")},
    **{f"nemotron_3_{kind}_training": OFF for kind in ("nano", "super", "ultra", "5_lightning")},
    **{name: KEPT for name in ("lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl")},
}
REASONING = ("qwen3_training", "qwen3_5_think_training", "qwen3_6_training", "deepseek_r1_distill_training")
NO_WAY = {  # template -> what the refusal says
    **{name: "rewrites earlier turns" for name in ("deepseek_r1_distill", "gptoss", "gptoss_training")},
    **{name: "rewrites earlier turns" for name in ("deepseekv3", "deepseekv3_training", "muse_glimmer")},
    **{name: "rewrites earlier turns" for name in ("muse_glimmer_training", "idefics3", "smolvlm")},
    **{name: "rewrites earlier turns" for name in ("idefics3_training", "smolvlm_training")},
    **{name: "refuses this conversation" for name in ("llava_next", "llava_next_training")},
}


def chat_of(tokenizer, name, arguments=None):
    """A chat under TRL's template `name`, with the arguments under which it only appends."""
    tokenizer = dressed(tokenizer, name, ENDS.get(name, ("", "<|end|>"))[1])
    known = tokenizer.convert_tokens_to_ids("<|user|>") if name == "glm4moe" else None
    given = WAYS.get(name, {}) if arguments is None else arguments
    return Chat(tokenizer, GenerationConfig(eos_token_id=known), given)


def rendered(chat, messages, **options):
    """The template's own rendering of `messages`."""
    clock = datetime.fromisoformat(DATE).strftime
    options |= {"tokenize": False, "add_generation_prompt": True, "strftime_now": clock}
    return chat.tokenizer.apply_chat_template(messages, **options, **chat.chat_template_kwargs)


def joined(chat, first, turns):
    """Text and ids of a conversation as `follow` joins it: `turns` are pairs of reply and user text."""
    ids = chat.prompt(first)
    for reply, told in turns:
        ids = chat.follow(ids, ids_of(chat.tokenizer, reply), told)
    return chat.tokenizer.decode(ids)


def whole_of(first, turns):
    """The same conversation as messages."""
    roles = [(role, text) for pair in turns for role, text in zip(("assistant", "user"), pair)]
    return [*first, *({"role": role, "content": text} for role, text in roles)]


def without_skipped_reasoning(text):
    return re.sub(r"<think>\s*</think>\s*", "", text)


def test_every_template_of_trl_is_in_these_tables():
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == {*WAYS, *REASONING, *NO_WAY}


@pytest.mark.parametrize("name", WAYS)
def test_a_template_of_trl_joins_as_it_renders(tokenizer, name):
    chat, turns = chat_of(tokenizer, name), [("4 + 6", AGAIN), ("4 * 6", "Why?"), ("No.", AGAIN)]
    got, wanted = joined(chat, TASK, turns), rendered(chat, whole_of(TASK, turns))
    if EMPTY.search(rendered(chat, TASK)):  # the prompts keep the block, the template may drop it
        got, wanted = without_skipped_reasoning(got), without_skipped_reasoning(wanted)
    assert "".join(got.split()) == "".join(wanted.split())
    if not name.startswith("glm"):  # whose replies start with a line feed
        assert got == wanted


@pytest.mark.parametrize("name", REASONING)
def test_a_template_that_keeps_all_reasoning_joins_replies_with_it(tokenizer, name):
    chat, reply = chat_of(tokenizer, name), "<think>\n4 times 6\n</think>\n\n4 * 6"
    turns, opened = [(reply, AGAIN), (reply, "Why?")], chat.text([])
    said = [(text.removeprefix(opened), told) for text, told in turns]  # what the prompt has begun is not sampled
    assert joined(chat, TASK, said) == rendered(chat, whole_of(TASK, turns))
    assert chat.text(ids_of(chat.tokenizer, said[0][0])) == reply


@pytest.mark.parametrize("name", [name for name, arguments in WAYS.items() if arguments])
def test_a_refusal_names_the_arguments_with_which_the_template_only_appends(tokenizer, name):
    with pytest.raises(R3Error, match="rewrites earlier turns.*or set chat_template_kwargs=") as error:
        chat_of(tokenizer, name, {})
    named = json.loads(re.search(r"chat_template_kwargs=(\{.*?\})", str(error.value)).group(1))
    assert named == WAYS[name] and chat_of(tokenizer, name, named)


@pytest.mark.parametrize("name", NO_WAY)
def test_a_template_that_always_rewrites_is_refused_in_one_line(tokenizer, name):
    with pytest.raises(R3Error, match=NO_WAY[name]) as error:
        chat_of(tokenizer, name, {})
    assert "\n" not in str(error.value) and "or set chat_template_kwargs" not in str(error.value)


# templates that add or strip white space, Mistral's and Llama 2's among them

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ USER }}{% else %}{{ REPLY }}{% endif %}{% endfor %}"
)
WRITES = {  # how a user's turn and a reply are written
    "v0.1": ("'[INST] ' + m['content'] + ' [/INST]'", "m['content'] + '</s> '"),
    "v0.2": ("'[INST] ' + m['content'] + ' [/INST]'", "m['content'] + '</s>'"),
    "v0.3": ("'[INST] ' + m['content'] + '[/INST]'", "' ' + m['content'] | trim + '</s>'"),
    "llama 2": ("'<s>[INST] ' + m['content'].strip() + ' [/INST]'", "' '  + m['content'].strip() + ' </s>'"),
}
LATE_SYSTEM = (  # as Mistral's v0.3: the system message stands before the last user turn
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and system is defined %}{{ system }} {% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


def mistral(kind):
    user, reply = WRITES[kind]
    return MISTRAL.replace("USER", user).replace("REPLY", reply)


def spaced_tokenizer(template):
    """A tokenizer of characters that marks words as SentencePiece does, a space before the first."""
    letters = ["<s>", "</s>", "[INST]", "[/INST]", "<unk>", "▁", *map(chr, range(33, 127)), "\n"]
    vocabulary = {letter: place for place, letter in enumerate(letters)}
    words = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    marks = ["[INST]", "[/INST]"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens=marks, **named)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("spaced", [False, True])
def test_white_space_that_a_template_adds_or_strips_is_no_rewriting(tokenizer, kind, spaced):
    template = mistral(kind)
    tokenizer = spaced_tokenizer(template) if spaced else with_marks(tokenizer, template, "</s>")
    chat, turns = Chat(tokenizer), [("4+6", AGAIN), ("4*6", "Why?")]
    assert tokenizer.decode([chat.end_id]) == "</s>" and not chat.takes_tools
    got, wanted = joined(chat, TASK, turns), rendered(chat, whole_of(TASK, turns))
    assert "".join(got.split()) == "".join(wanted.split())
    space = " " if kind in ("v0.3", "llama 2") else ""  # the model writes it
    ids = chat.prompt(TASK)
    for reply, told in turns:
        whole = ids_of(tokenizer, rendered(chat, TASK) + space + reply)
        ids = chat.follow(ids, whole[len(chat.prompt(TASK)) :], told)
    assert ids == ids_of(tokenizer, wanted)


def test_a_system_message_that_moves_with_the_last_turn_is_refused_at_the_first_such_prompt(tokenizer):
    chat = Chat(with_marks(tokenizer, LATE_SYSTEM, "</s>"))
    chat.prompt(TASK)
    with pytest.raises(R3Error, match="after a start by system, user: use .*, or put all into one user message"):
        chat.prompt([{"role": "system", "content": "Be brief."}, *TASK])


def test_a_template_that_counts_turns_is_refused(tokenizer):
    for count in ("{{ messages | length }}", "{{ loop.index if loop.index > 3 }}"):
        template = PLAIN.replace("{{ m.content }}", count + "{{ m.content }}")
        with pytest.raises(R3Error, match="rewrites earlier turns"):
            Chat(with_template(tokenizer, template))


# properties

LINE = st.text("ab 4+6*=<>/.,?!\n", min_size=1, max_size=30)
WORDS = LINE.map(str.strip).filter(bool)
PLAIN_WAYS = [name for name in WAYS if not name.startswith("glm")]


@pytest.fixture(scope="session")
def chats(tokenizer):
    """A chat for each template of TRL that joins exactly as it renders."""
    return {name: chat_of(tokenizer, name) for name in PLAIN_WAYS}


@given(name=st.sampled_from(PLAIN_WAYS), told=LINE, turns=st.lists(st.tuples(WORDS, LINE), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_any_conversation_is_joined_as_the_template_renders_it(chats, name, told, turns):
    chat, first = chats[name], [{"role": "user", "content": told}]
    got, wanted = joined(chat, first, turns), rendered(chat, whole_of(first, turns))
    if EMPTY.search(rendered(chat, TASK)):
        got, wanted = without_skipped_reasoning(got), without_skipped_reasoning(wanted)
    assert got == wanted


MADE = st.fixed_dictionaries(
    {
        "begin": st.sampled_from(["", "<s>", "<s>Be brief.\n"]),
        "role": st.sampled_from(["<|{}|>", "<|{}|>\n", "{}: ", "[{}]"]),
        "before": st.sampled_from(["", " ", "\n"]),
        "content": st.sampled_from(["m.content", "m.content | trim", "m.content.strip()"]),
        "after": st.sampled_from(["<|end|>", " <|end|>", "\n<|end|>\n", "</s>", "<|end|></s>\n"]),
        "history": st.sampled_from(["messages"] * 3 + ["messages[-3:]", "messages[:1] + messages[-1:]"]),
    }
)


def made_template(parts):
    """A template of those parts; it forgets earlier turns where it reads less than all messages."""
    header = parts["role"].format("{{ m.role }}")
    turn = f"{header}{{{{ '{parts['before']}' if m.role == 'assistant' else '' }}}}".replace("\n'", "\\n'")
    turn += "{{ " + parts["content"] + " }}" + parts["after"]
    text = parts["begin"] + "{% for m in " + parts["history"] + " %}" + turn + "{% endfor %}"
    opened = parts["role"].format("assistant")
    return text + "{% if add_generation_prompt %}{{ '" + opened.replace("\n", "\\n") + "' }}{% endif %}"


@given(parts=MADE, told=LINE, turns=st.lists(st.tuples(WORDS, LINE), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_a_made_up_template_is_joined_as_it_renders_or_refused_when_it_forgets(tokenizer, parts, told, turns):
    tokenizer = with_marks(tokenizer, made_template(parts), "</s>")
    if parts["history"] != "messages":
        with pytest.raises(R3Error, match="rewrites earlier turns"):
            Chat(tokenizer)
        return
    chat, first = Chat(tokenizer), [{"role": "user", "content": told}]
    wanted = rendered(chat, whole_of(first, turns))
    said = [(parts["before"] + reply, then) for reply, then in turns]
    assert joined(chat, first, said) == wanted


# ends


def token(chat, text):
    return chat.tokenizer.convert_tokens_to_ids(text)


@pytest.mark.parametrize("named", [None, "<|eot_id|>", ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], ["9"]])
def test_ends_are_those_of_template_tokenizer_and_generation_config(tokenizer, named):
    """Llama 3.1's, with an end that only the generation config knows among them."""
    template = (TEMPLATES / "llama3_1.jinja").read_text()
    tokenizer = with_marks(tokenizer, template, "<|eot_id|>", ["<|eom_id|>", "<|end_of_text|>"])
    ids = tokenizer.convert_tokens_to_ids(named) if named else None
    chat = Chat(tokenizer, GenerationConfig(eos_token_id=ids))
    ends = {"<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"} | ({"9"} if named == ["9"] else set())
    assert chat.end_ids == set(tokenizer.convert_tokens_to_ids(sorted(ends)))
    assert tokenizer.decode([chat.end_id]) == "<|eot_id|>"


@pytest.mark.parametrize("end", ["<|eom_id|>", "<|end_of_text|>", "<|eot_id|>", None])
def test_what_is_joined_is_closed_with_the_templates_own_end(tokenizer, end):
    """Whatever end the model chose, and if it chose none, the next prompt is the template's."""
    template = (TEMPLATES / "llama3_1.jinja").read_text()
    chat = Chat(with_marks(tokenizer, template, "<|end_of_text|>", ["<|eom_id|>", "<|end_of_text|>"]))
    reply = ids_of(chat.tokenizer, "4 + 6")
    sampled = [*reply, token(chat, end)] if end else reply
    assert chat.follow(chat.prompt(TASK), sampled, AGAIN) == chat.prompt(talk("4 + 6"))
    assert chat.closed(sampled) == [*reply, chat.end_id] and chat.text(sampled) == "4 + 6"


def test_white_space_before_the_templates_end_is_added_only_to_a_reply_that_was_cut_off(tokenizer):
    chat = Chat(with_marks(tokenizer, mistral("llama 2"), "</s>"))
    reply = ids_of(chat.tokenizer, "4 + 6")
    assert chat.tokenizer.decode(chat.closed(reply)) == "4 + 6 </s>"
    assert chat.closed([*reply, chat.end_id]) == [*reply, chat.end_id]


# text


@pytest.mark.parametrize("special", [False, True])
@given(text=st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "<answer>", "</answer>", "4*6", " ", "{}"])))
@settings(max_examples=20, deadline=None)
def test_text_does_not_depend_on_which_tokens_are_special(tokenizer, special, text):
    text, tags = "".join(text), ["<tool_call>", "</tool_call>", "<answer>", "</answer>"]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(tags, special_tokens=special)
    chat = Chat(tokenizer)
    assert chat.text(ids_of(tokenizer, text)) == text
    assert chat.text([*ids_of(tokenizer, text), chat.end_id]) == text


def test_text_leaves_out_the_end_and_the_padding_behind_it_and_nothing_else(tokenizer):
    chat, reply = Chat(tokenizer), ids_of(tokenizer, "4 * 6 .")
    pad, user = tokenizer.pad_token_id, token(chat, "<|user|>")
    for behind in ([], [chat.end_id], [chat.end_id, pad, pad], [pad]):
        assert chat.text([*reply, *behind]) == "4 * 6 ."
    assert chat.text([user, *reply, user, chat.end_id]) == "<|user|>4 * 6 .<|user|>"
    assert chat.text([chat.end_id]) == chat.text([]) == ""


# clock and chance

CLOCKS = {
    "plain": "{{ strftime_now('%d %b %Y') }}",
    "in a macro": "{% macro today() %}{{ strftime_now('%Y-%m-%d %H:%M') }}{% endmacro %}{{ today() }}",
    "if there": "{% if strftime_now is defined %}{% set date = strftime_now('%B %d') %}{{ date }}{% endif %}",
}


def on(monkeypatch, day):
    """Let transformers' templates think that today is `day`."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.fromisoformat(day)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


@pytest.mark.parametrize("kind", [*CLOCKS, "llama3_2"])
def test_a_prompt_is_the_same_tomorrow(tokenizer, monkeypatch, kind):
    ids = []
    for day in ("2026-11-26", "2026-11-27"):
        on(monkeypatch, day)
        if kind in CLOCKS:
            chat = Chat(with_template(tokenizer, CLOCKS[kind] + PLAIN))
        else:
            chat = chat_of(tokenizer, kind)
        ids.append(chat.follow(chat.prompt(TASK), [5], AGAIN))
    assert ids[0] == ids[1]
    assert "30" in chat.tokenizer.decode(ids[0]) and "26" not in chat.tokenizer.decode(ids[0])


def test_a_template_that_takes_the_date_may_be_given_another(tokenizer):
    chat = chat_of(tokenizer, "llama3_2", {"date_string": "26 Jul 2024"})
    assert "Today Date: 26 Jul 2024" in chat.tokenizer.decode(chat.prompt(TASK))
    assert "Today Date: 30 May 2025" in chat.tokenizer.decode(chat_of(tokenizer, "llama3_2").prompt(TASK))


# arguments of the template


def test_arguments_reach_every_rendering(tokenizer):
    template = "{{ style | default('plain') }}" + PLAIN
    chat = Chat(with_template(tokenizer, template), chat_template_kwargs={"style": "terse"})
    assert chat.tokenizer.decode(chat.prompt(TASK)).startswith("terse")


def test_another_template_may_be_given_as_an_argument(tokenizer):
    bare = with_template(tokenizer, None)
    assert Chat(bare, chat_template_kwargs={"chat_template": PLAIN}).prompt(TASK)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"enable_thinkng": False}, "has 'enable_thinkng', which .* does not read: leave it out"),
        ({"role": 5, "messages": []}, "refuses this conversation .*multiple values"),
    ],
)
def test_an_argument_that_cannot_be_honoured_is_one_line(tokenizer, arguments, said):
    with pytest.raises(R3Error, match=said) as error:
        Chat(tokenizer, chat_template_kwargs=arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["qwen3_5_think_training", "deepseek_r1_distill_training"])
def test_a_reply_of_ours_closes_the_reasoning_that_the_prompt_has_begun(tokenizer, name):
    chat = chat_of(tokenizer, name)
    assert answer_text(chat.text(chat.written("I should check."))).strip() == "I should check."


