"""Conversations are joined token by token, under the templates of real models, or refused."""

import copy
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from r3lib.chat import Chat
from r3lib.errors import R3Error
from r3lib.tasks import CountdownProblem, CountdownTask
from r3lib.tasks.function_calling import FunctionCallingTask
from r3lib.tasks.function_calling_records import FunctionCallingProblem

TEMPLATES = Path(find_spec("trl").origin).parent / "chat_templates"
MARK = re.compile(r"<[|｜][^<>{}'\" ]+[|｜]>|<(?:start|end)_of_turn>|</?think>")
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
    template = (TEMPLATES / f"{name}.jinja").read_text()
    tokenizer = copy.deepcopy(tokenizer)
    marks = [*tokenizer.all_special_tokens, *sorted(set(MARK.findall(template)))]
    tokenizer.add_special_tokens({"extra_special_tokens": marks, "bos_token": "<|begin|>", "eos_token": eos})
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


def test_joining_leaves_its_arguments_alone(tokenizer):
    chat, start, reply = Chat(tokenizer), [5, 6], [7, 8]
    chat.follow(start, reply, AGAIN)
    assert (start, reply) == ([5, 6], [7, 8])


def test_text_drops_special_tokens_only(tokenizer):
    chat = Chat(tokenizer)
    assert chat.text([*ids_of(tokenizer, "<answer>4 * 6</answer>"), chat.end_id]) == "<answer>4 * 6</answer>"


@pytest.mark.parametrize("name", ENDS)
def test_joins_equal_the_template_on_the_whole_conversation(tokenizer, name):
    """Real templates: same ids as rendering everything at once, so one start token and one system turn."""
    end, eos = ENDS[name]
    tokenizer = dressed(tokenizer, name, eos)
    chat = Chat(tokenizer)
    assert tokenizer.decode([chat.end_id]) == end
    assert chat.end_ids == {chat.end_id, tokenizer.eos_token_id}
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


def test_phi_may_close_a_turn_with_either_of_its_ends(tokenizer):
    tokenizer = dressed(tokenizer, "phi3_5", "<|endoftext|>")
    chat = Chat(tokenizer)
    start, reply = chat.prompt(TASK), [*ids_of(tokenizer, "4 + 6"), tokenizer.eos_token_id]
    assert chat.follow(start, reply, AGAIN)[len(start) :].count(chat.end_id) == 1  # the follow-up's alone


@pytest.mark.parametrize("eos", ["<|end|>", "<|endoftext|>"])
def test_an_eos_that_the_template_adds_to_a_finished_text_is_no_turn(tokenizer, eos):
    chat = Chat(dressed(tokenizer, "phi3", eos))
    joined = chat.tokenizer.decode(chat.follow(chat.prompt(TASK), ids_of(chat.tokenizer, "4 + 6"), AGAIN))
    assert joined.endswith("<|assistant|>\n4 + 6<|end|>\n<|user|>\nTry again.<|end|>\n<|assistant|>\n")


@pytest.mark.parametrize("name", ["qwen3", "qwen3_8", "glm4moe", "deepseek_r1_distill", "deepseekv3", "gptoss"])
def test_templates_that_slip_thinking_into_a_turn_or_strip_it_are_refused(tokenizer, name):
    with pytest.raises(R3Error, match="rewrites earlier turns"):
        Chat(dressed(tokenizer, name))


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


def test_a_task_without_tools_starts_as_ever(tokenizer):
    task, problem = CountdownTask(), CountdownProblem((4, 6), 24)
    for chat in (Chat(tokenizer), Chat(dressed(tokenizer, "qwen2_5", "<|im_end|>"))):
        assert chat.start(task, problem) == chat.prompt(task.messages(problem))


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
