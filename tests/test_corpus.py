"""The Countdown half of the embedded model's corpus: training problems only, right arithmetic, styles as stated."""

import hashlib
import json
import re
import time
from itertools import islice
from random import Random
from typing import NamedTuple

import corpus_countdown
import pytest
from corpus_countdown import (
    BLIND,
    DIRECT,
    FOREIGN,
    MOST_TRIES,
    STYLES,
    reflection,
    solutions,
    wrong_attempt,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pretrain import conversations, training_task

from r3lib.errors import R3Error
from r3lib.tasks import CountdownProblem, CountdownTask, FunctionCallingTask
from r3lib.tasks.countdown import split_of
from r3lib.tasks.styles import SENTENCES
from r3lib.verifiers.countdown import _read, _tokens, answer

TASK, COUNT = training_task(), 10_000
style = TASK.style


def read(equation):
    return _read(_tokens(equation))
STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


class Talk(NamedTuple):
    """One conversation and the problems that were drawn for it."""

    turns: list
    drawn: list

    @property
    def problem(self):
        return self.drawn[0]

    @property
    def reflection(self):
        """Its reflection's text, whether it is this problem's own, and the problem it was written for."""
        if len(self.turns) < 6:
            return None
        _, text, own = self.turns[3]
        return text, own, self.drawn[-1]


@pytest.fixture(scope="module")
def corpus():
    """The first 10,000 conversations about Countdown, with every problem that went into each."""
    draw, drawn = corpus_countdown.draw, []

    def watched(task, random):
        drawn.append(draw(task, random))
        return drawn[-1]

    talks = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_countdown, "draw", watched)
        for turns in islice(conversations(0), 1, 2 * COUNT, 2):
            talks.append(Talk(turns, list(drawn)))
            drawn.clear()
    return talks


@pytest.fixture(scope="module")
def reflections(corpus):
    """(text, own, problem it was written for, talk) of every conversation that reflects."""
    return [(*talk.reflection, talk) for talk in corpus if talk.reflection]


def of_style(reflections, name):
    found = [entry for entry in reflections if style(entry[0]) == name]
    assert len(found) > 500
    return found


def right(step):
    a, op, b, result = step
    return read(f"{a} {op} {b}")[0] == int(result)


def asked(turns):
    """The problem that the first user turn states, read from its text."""
    nums, target = re.match(
        r"Using the numbers \[(.+?)\], create an equation that equals (\d+)\.", turns[0][1]
    ).groups()
    return CountdownProblem(tuple(map(int, nums.split(", "))), int(target))


def test_no_held_out_problem_is_in_the_corpus_not_even_in_a_foreign_reflection(corpus):
    assert {split_of(asked(talk.turns)) for talk in corpus} == {"pretrain"}
    assert {split_of(problem) for talk in corpus for problem in talk.drawn} == {"pretrain"}
    assert all(asked(talk.turns) == talk.problem for talk in corpus)
    assert sum(len(talk.drawn) == 2 for talk in corpus) > 200  # the foreign ones


def test_every_last_answer_is_right_and_every_first_of_several_wrong(corpus):
    for turns, (problem, *_) in corpus:
        assert turns[-1][0] == "assistant" and TASK.verify(turns[-1][1], problem).ok
        if len(turns) > 2:
            assert not TASK.verify(turns[1][1], problem).ok


def test_user_turns_are_the_tasks_own_words(corpus):
    for turns, (problem, *_) in corpus:
        assert [role for role, _, _ in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert turns[0][1] == TASK.messages(problem)[0]["content"]
        question = TASK.messages(problem)[0]["content"]
        blind, again = (f"{told}\n{question}" for told in (TASK.blind_retry_prompt, TASK.retry_prompt))
        later = {2: [], 4: [blind], 6: [TASK.reflection_prompt, again]}
        assert [text for _, text, _ in turns[2::2]] == later[len(turns)]


def test_only_right_answers_and_own_reflections_are_learned(corpus):
    for turns, drawn in corpus:
        own = [] if len(turns) < 6 else [len(drawn) == 1]
        wrong_try = [False] if len(turns) > 2 else []
        assert [learn for role, _, learn in turns if role == "assistant"] == [*wrong_try, *own, True]
        assert not any(learn for role, _, learn in turns if role == "user")


def steps_of(text):
    """The steps of a search in pairs, each pair an equation on the given numbers."""
    steps = STEP.findall(text)
    assert all(map(right, steps)) and len(steps) % 2 == 0
    return list(zip(steps[::2], steps[1::2]))


def test_a_search_computes_rightly_says_no_to_all_that_miss_and_yes_to_what_reaches_the_target(reflections):
    endings = set()
    for text, own, problem, talk in of_style(reflections, "search"):
        words = re.findall(r", (yes|no)\.", text)
        hits = [int(last[3]) == problem.target for _, last in steps_of(text)]
        assert [word == "yes" for word in words] == hits and not any(hits[:-1])
        endings.add(text.split(", ")[-1] if hits[-1] else text[text.rindex(", no. ") + 6 :])
        if hits[-1] and own:
            (first, last), equation = steps_of(text)[-1], answer(talk.turns[-1][1])
            assert f"({' '.join(first[:3])})" in equation and read(equation)[0] == int(last[3])
    assert endings == {"yes.", "I did not find it."}


def test_a_search_uses_each_given_number_once_in_every_try_and_repeats_none(reflections):
    longest = 0
    for text, _, problem, _ in of_style(reflections, "search"):
        tries = steps_of(text)
        for first, last in tries:
            used = [first[0], first[2], last[0], last[2]]
            used.remove(first[3])
            assert sorted(map(int, used)) == sorted(problem.nums)
        longest = max(longest, len(tries))
    assert 6 < longest <= MOST_TRIES


def test_diagnoses_state_what_the_attempt_gives_and_by_how_much_it_misses(reflections):
    for text, own, problem, talk in of_style(reflections, "diagnosis"):
        if "gives" in text:
            first, second = STEP.findall(text)
            gap = int(second[3]) - problem.target
            assert right(first) and right(second) and first[3] in (second[0], second[2])
            assert text.endswith(f", not {problem.target}. It is {abs(gap)} too {'big' if gap > 0 else 'small'}.")
        if own and "gives" in text:
            assert read(answer(talk.turns[1][1]))[0] == int(second[3])
        elif own and text.startswith("I used"):
            assert text.startswith(f"I used {', '.join(map(str, read(answer(talk.turns[1][1]))[1]))} but")


def test_hints_name_a_right_first_step_of_a_solution_and_never_the_answer(reflections):
    for text, own, problem, talk in of_style(reflections, "hint"):
        (step,) = STEP.findall(text)
        assert right(step) and text == f"A good first step is {' '.join(step[:3])} = {step[3]}."
        inner = f"({' '.join(step[:3])})"
        assert any(inner in equation for _, equation in solutions(problem.nums, problem.target))
        assert not own or inner in talk.turns[-1][1]


def test_shares_of_kinds_and_styles_are_near_those_stated(corpus, reflections):
    kinds = [len(talk.turns) for talk in corpus]
    assert kinds.count(2) / COUNT == pytest.approx(DIRECT, abs=0.02)
    assert kinds.count(4) / COUNT == pytest.approx(BLIND, abs=0.01)
    assert sum(not own for _, own, _, _ in reflections) / len(reflections) == pytest.approx(FOREIGN, abs=0.01)
    named = [style(text) for text, *_ in reflections]
    assert sum(STYLES.values()) == pytest.approx(1)
    assert {name: named.count(name) / len(named) for name in {*named}} == pytest.approx(STYLES, abs=0.025)


@pytest.mark.parametrize("name", STYLES)
def test_style_recognises_every_reflection_as_what_made_it(name):
    random = Random(5)
    for problem in TASK.problems("pretrain", 300, 5):
        text = reflection(problem, wrong_attempt(problem, random), random, name)
        assert style(text) == name, text


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (", no. 12 + 3 = 15, 15 + 11 = 26, need 25, no. 12 * 3 = 36, 36 - 11 = 25, need 25, yes.", "search"),
        ("9 * 1 = 9, 9 * 11 = 99, need 88, no. 11 + 1 = 12, 12 + 9 = 21, need", "search"),
        (" hours. If the answer is not 76 then the answer is wrong. I used the numbers 3, 4", "verbose"),
        (". Next time I will make sure that the answer is right.", "verbose"),
        ("I tried 3 things. It is 4 too big. My equation gives 3 + 4 = 7, not 3.", "diagnosis"),
        (", no. I did not find it.", "other"),
        ("9 - (8 - 5)</answer>", "other"),
    ],
)
def test_a_style_is_told_by_what_a_trained_reflection_says(text, name):
    """Openings are trained away: these are such as the reference's policies write."""
    assert style(text) == name


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(sorted(STYLES)), st.integers(0, 8))
def test_a_reflection_that_loses_its_opening_keeps_its_style_while_a_whole_sentence_is_left(seed, name, lost):
    random = Random(seed)
    problem = TASK.draw(random)
    text = reflection(problem, wrong_attempt(problem, random), random, name)
    kept = text.split(" ")[lost:]
    rest = " ".join(kept)
    whole = {"search": ", need " in rest, "verbose": rest.count(". ") > 2}.get(name, lost == 0)
    assert not whole or style(rest) == name, rest


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=300) | st.text("0123456789+-*/= .,need", max_size=300))
def test_any_text_has_a_known_style(text):
    assert style(text) in {*STYLES, "other"}


def test_a_style_is_told_in_no_time():
    for text in ("9" * 10**6, "1 + 1 = " * 10**5, "I used " * 10**5, ". " * 10**5):
        started = time.process_time()
        style(text)
        assert time.process_time() - started < 1


def test_text_of_no_style_is_other():
    assert style("") == style("The sky is blue.") == style("I try.") == "other"


def test_solutions_verify_and_exist_for_every_problem():
    for problem in TASK.problems("test", 200, 3):
        found = solutions(problem.nums, problem.target)
        assert found
        for step, equation in found:
            assert right(STEP.fullmatch(step).groups())
            assert TASK.verify(f"<answer>{equation}</answer>", problem).ok


def test_wrong_attempts_are_wrong_in_every_way():
    random, reasons = Random(1), set()
    for problem in TASK.problems("train", 300, 1):
        reasons.add(TASK.verify(f"<answer>{wrong_attempt(problem, random)}</answer>", problem).reason)
    assert reasons == {"invalid_expression", "wrong_numbers", "missed_target"}


def test_a_conversation_depends_on_seed_and_index_alone(corpus):
    assert list(islice(conversations(0, start=81), 0, 20, 2)) == [talk.turns for talk in corpus[40:50]]
    assert list(islice(conversations(0, start=40), 10)) == list(islice(conversations(0), 50))[40:]
    assert list(islice(conversations(1), 1, 10, 2)) != [talk.turns for talk in corpus[:5]]


def test_the_conversations_are_those_that_the_shipped_model_was_trained_on():
    """A change of the corpora makes another model: then train it again and note its new digest."""
    first = json.dumps(list(islice(conversations(0), 2000)))
    assert hashlib.sha256(first.encode()).hexdigest()[:16] == "b2619b01136cf55f"


def test_half_of_the_corpus_is_countdown_three_tenths_function_calling_the_rest_exercises():
    openings = [turns[0][1].split(" ")[0] for turns in islice(conversations(0), 2000)]
    shares = {word: openings.count(word) / 2000 for word in set(openings)}
    assert shares == {"Using": 0.5, "Tools:": 0.3, "Work": 0.2}


def test_the_user_turns_of_the_function_calling_half_are_the_tasks_own_words():
    task, seen = FunctionCallingTask(), set()
    followups = {task.reflection_prompt, task.retry_prompt, task.blind_retry_prompt}
    asked = task.messages(task.problems("train", 1, 0)[0])[0]["content"].split("\n")[2]
    for turns in islice(conversations(0), 2000):
        if turns[0][1].startswith("Tools: "):
            tools, query, form = turns[0][1].split("\n")
            assert query.startswith("Query: ") and form == asked
            for text in (text for _, text, _ in turns[2::2]):
                told, _, question = text.partition("\n")
                assert question == (query.removeprefix("Query: ") if told != task.reflection_prompt else "")
                seen.add(told)
    assert seen == followups


def test_a_task_whose_problems_the_corpus_does_not_know_is_refused():
    with pytest.raises(R3Error, match=r"count=\(3, 4\): the corpus knows 3 numbers: use 3"):
        corpus_countdown.conversation(CountdownTask(), Random(0))


def test_the_generic_reflection_is_a_sentence_of_the_corpus(reflections):
    assert TASK.generic_reflection in SENTENCES["countdown"]["vague"]
    assert TASK.generic_reflection in {text for text, own, *_ in reflections if own}
