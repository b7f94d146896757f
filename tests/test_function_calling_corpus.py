"""Generated function calling: right working, sizes that fit, and nothing held out in what the model was trained on."""

import json
import re
from collections import Counter
from random import Random
from typing import NamedTuple

import corpus_function_calling
import pytest
from corpus_function_calling import (
    BLIND,
    DIRECT,
    STYLES,
    WORKED,
    conversation,
    exercise,
    reflection,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from r3lib.errors import R3Error
from r3lib.tasks.function_calling import FunctionCallingTask
from r3lib.tasks.function_calling_tools import (
    HELD_OUT_PHRASINGS,
    NEW,
    PARTS,
    PHRASINGS,
    SEEN,
    WORDS,
    Case,
    draw,
    split_of,
)
from r3lib.tasks.function_calling_values import DATA
from r3lib.tasks.sources import GENERATED as SPLITS
from r3lib.verifiers.function_calling import verify

TASK, COUNT = FunctionCallingTask(), 3000
style = TASK.style
STEP = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")
APPLY = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


class Talk(NamedTuple):
    """One conversation and the cases that were drawn for it."""

    turns: list
    drawn: list

    @property
    def case(self) -> Case:
        return self.drawn[0]


@pytest.fixture(scope="module")
def corpus():
    original, drawn = corpus_function_calling.draw, []

    def watched(task, random):
        drawn.append(original(task, random))
        return drawn[-1]

    talks = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_function_calling, "draw", watched)
        for index in range(COUNT):
            talks.append(Talk(conversation(TASK, Random(index)), list(drawn)))
            drawn.clear()
    return talks


@pytest.fixture(scope="module")
def cases():
    return [draw(Random(index), "test", part) for part in PARTS for index in range(500)]


def tool_names(case):
    """The candidates' names, both sizes of a sized tool as one."""
    return {re.sub("_(small|large)_", "_", tool["name"]) for tool in case.problem.tools}


def phrasing_of(query, phrasings):
    """The phrasings that a query is in."""
    shapes = {p: re.escape(p).replace(r"\{act\}", "[a-z].*").replace(r"\{Act\}", "[A-Z].*") for p in phrasings}
    return [p for p, shape in shapes.items() if re.fullmatch(shape, query)]


def test_there_are_sixty_tools_in_eight_domains_and_words_of_new_ones_are_known():
    assert len(SEEN) >= 60 and len(DATA["tools"]) >= 8
    names = [tool.name() for tool in SEEN + NEW]
    assert len(set(names)) == len(names)
    assert {word for tool in NEW for word in (tool.verb, tool.noun)} <= WORDS


def test_every_last_answer_is_right_and_every_first_of_several_wrong(corpus):
    for turns, (case, *_) in corpus:
        assert TASK.verify(turns[-1][1], case.problem).ok
        if len(turns) > 2:
            assert not TASK.verify(turns[1][1], case.problem).ok


def test_wrong_attempts_fail_in_every_way_that_the_paper_counts(corpus):
    reasons = Counter(TASK.verify(t.turns[1][1], t.case.problem).reason for t in corpus if len(t.turns) > 2)
    assert {TASK.categories[r] for r, n in reasons.items() if n > 20} == {"format", "tool choice", "parameter choice"}


def test_gold_is_right_under_both_rules(cases):
    for case in cases:
        for rule in ("strict", "lenient"):
            assert verify(json.dumps(case.problem.answers), case.problem.tools, case.problem.answers, rule).ok


def test_steps_are_right_and_end_in_the_value(cases):
    counted = 0
    for value in (v for case in cases for call in case.calls for v in call.values.values() if v.steps):
        if not isinstance(value.value, int):
            assert value.steps[-1].endswith(f" = {value.value}")
            continue
        for a, operator, b, result in (STEP.fullmatch(step).groups() for step in value.steps):
            assert APPLY[operator](int(a), int(b)) == int(result)
            counted += 1
        assert int(result) == value.value
    assert counted > 2000


def test_of_two_sizes_one_fits_and_it_is_the_one_to_call(cases):
    sized = [(case, call) for case in cases for call in case.calls if call.size]
    assert {call.size for _, call in sized} == {"small", "large"} and len(sized) > 200
    for case, call in sized:
        amount = next(iter(call.answer["arguments"].values()))
        fits = {f"at most {call.limit}": amount <= call.limit, f"more than {call.limit}": amount > call.limit}
        sizes = {call.tool.name("small"), call.tool.name("large")}
        described = {tool["name"]: tool["description"] for tool in case.problem.tools if tool["name"] in sizes}
        assert [name for name, text in described.items() if fits.get(text)] == [call.answer["name"]]


def test_what_is_held_out_is_in_no_training_conversation(corpus):
    new = {tool.name() for tool in NEW}
    for case in (case for talk in corpus for case in talk.drawn):
        assert split_of(list(tool_names(case))) == "pretrain" and not tool_names(case) & new
        assert not phrasing_of(case.problem.query, HELD_OUT_PHRASINGS)
    queries = [case.problem.query for talk in corpus for case in talk.drawn]
    assert 0.6 < sum(bool(phrasing_of(query, PHRASINGS)) for query in queries) / len(queries) < 0.8


def test_the_parts_of_the_test_problems_hold_what_they_say(cases):
    new = {tool.name() for tool in NEW}
    for case in cases:
        part = TASK.part(case.problem.id)
        assert bool(tool_names(case) & new) == (part == "tools")
        assert bool(phrasing_of(case.problem.query, HELD_OUT_PHRASINGS)) == (part == "phrasings")
        assert part == "tools" or split_of(list(tool_names(case))) == "test"


def test_problems_are_distinct_repeatable_and_of_their_split():
    first, again, other = (TASK.problems("test", 400, seed) for seed in (0, 0, 1))
    assert len({p.id for p in first}) == 400 and first == again != other
    assert Counter(TASK.part(p.id) for p in first).keys() == {"combinations", "phrasings", "tools"}
    task = FunctionCallingTask(parts={"combinations": 1})
    drawn = {
        split: {frozenset(tool_names(Case(p, ()))) for p in task.problems(split, 300, 0)}
        for split in SPLITS
    }
    for a in SPLITS:
        assert all(a == b or not drawn[a] & drawn[b] for b in SPLITS)


def test_other_parts_and_splits_are_refused():
    with pytest.raises(R3Error, match="unknown 'novel': use .'combinations', 'phrasings', 'tools'"):
        FunctionCallingTask(parts={"novel": 1.0})
    with pytest.raises(R3Error, match="unknown split 'dev'"):
        TASK.problems("dev", 1, 0)


def test_a_style_is_known_from_its_text(corpus):
    for talk in corpus[:500]:
        for name in STYLES:
            assert style(reflection(talk.case, [], Random(0), name)) == name
    assert style("Let me see.") == "other"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (" is to air the bedroom: seconds: 9 * 3600 = 32400, 32400 + 49 = 32449. So air_bedroom.", "worked"),
        ("pay the rent: time: 23:30. So pay_rent.", "worked"),
        ("open the door: time: 09:30 + 25 = 09:55.", "worked"),
        ("water it: person: Eva. So water_small_trees, not water_large_trees.", "worked"),
        ("ould. Each argument has a value, and each value matters. I tried performing the task and the call was wrong.",
         "verbose"),
        ("The value of time was wrong.", "diagnosis"),
        ("Query: book it. The tool book_hall is there. The tool rent_hall too.", "diagnosis"),
        ('", "parameters": {"hours": {"type": "int"}}}]', "other"),
    ],
)  # fmt: skip
def test_a_style_is_told_by_what_a_trained_reflection_says(text, name):
    """Openings are trained away: these are such as the reference's policies write."""
    assert style(text) == name


def test_a_worked_reflection_that_loses_its_opening_is_worked_still(corpus):
    for talk in corpus[:300]:
        text = reflection(talk.case, [], Random(0), "worked").removeprefix(f"{WORKED} ")
        assert style(text) == style(text[5:]) == "worked", text


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=300) | st.text("abc_: .So0123+=", max_size=300))
def test_any_text_has_a_known_style(text):
    assert style(text) in {*STYLES, "other"}


def test_shares_of_the_corpus_are_as_stated(corpus):
    turns = Counter(len(talk.turns) for talk in corpus)
    assert turns[2] / COUNT == pytest.approx(DIRECT, abs=0.03) and turns[4] / COUNT == pytest.approx(BLIND, abs=0.02)
    own = Counter(style(talk.turns[3][1]) for talk in corpus if len(talk.turns) == 6 and talk.turns[3][2])
    for name, share in STYLES.items():
        assert own[name] / own.total() == pytest.approx(share, abs=0.04)


def test_only_worked_reflections_hold_the_values(corpus):
    """A vague, verbose or diagnosing one must not leak what is to be called."""
    for case in (talk.case for talk in corpus[:500]):
        hard = [v for call in case.calls for v in call.values.values() if len(v.steps) > 1]
        for name in ("vague", "verbose", "diagnosis", "hint"):
            text = reflection(case, [], Random(0), name).replace(case.problem.query, "")
            assert not any(re.search(rf"\b{v.value}\b", text) for v in hard)
        text = reflection(case, [], Random(0), "worked")
        assert all(v.steps[-1] in text for v in hard) and all(c.answer["name"] in text for c in case.calls)


def test_an_exercise_asks_for_an_amount_and_is_answered_by_its_steps():
    for index in range(300):
        (_, asked, _), (_, steps, learned) = exercise(Random(index))
        assert re.fullmatch(r"Work out [a-z]+: .+\.", asked) and learned and " = " in steps
        assert all(APPLY[o](int(a), int(b)) == int(r) for a, o, b, r in STEP.findall(steps) if ":" not in steps)
