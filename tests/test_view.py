"""One failure as the notebooks show it: a group of reflections, its mask, the conversation asked."""

import pytest
from conftest import CoinTask, ConstantTask, ScriptedEngine, coin_failures

from r3lib.chat import Chat
from r3lib.conditions import CONDITIONS, condition
from r3lib.errors import R3Error
from r3lib.sampler import Limits, RolloutSampler
from r3lib.view import Group, conversation_of, sample_group


@pytest.fixture
def sampler(tokenizer):
    task = CoinTask(count=3, largest=20)
    return RolloutSampler(ScriptedEngine(tokenizer), Chat(tokenizer), task, Limits(8, 12, 6))


@pytest.fixture
def failures(tokenizer):
    return coin_failures(tokenizer, 6)


def test_rewards_become_advantages_inside_the_group():
    group = Group(None, [], [], [], [0.0, 0.0, 1.0, 0.0], [])
    assert group.advantages == pytest.approx([-0.5, -0.5, 1.5, -0.5], abs=1e-3)
    assert Group(None, [], [], [], [1.0, 1.0], []).advantages == [0, 0]


def test_a_group_is_sampled_in_two_calls_and_judged_by_the_task(sampler, failures):
    groups = [sample_group(sampler, failure, 4) for failure in failures]
    assert len(sampler.engine.calls) == 2 * len(failures)
    assert [sampling.temperature for _, sampling, _ in sampler.engine.calls[:2]] == [1.0, 0.0]
    assert any(len(set(group.rewards)) == 2 for group in groups)
    for group in groups:
        table = group.table()
        judged = [sampler.task.verify(text, group.failure.problem) for text in group.retries]
        assert list(table.verdict) == [verdict.reason for verdict in judged]
        assert list(table.reward) == [verdict.reward for verdict in judged] and len(table) == 4


def test_a_task_that_is_always_right_has_no_variance(sampler, failures):
    sampler = RolloutSampler(sampler.engine, sampler.chat, ConstantTask(True), sampler.limits)
    assert sample_group(sampler, failures[0], 3).rewards == [1, 1, 1]


def test_every_token_has_its_turn_and_only_the_reflection_is_trained(sampler, failures):
    order = ["task", "attempt", "request", "reflection", "request", "retry"]
    for failure in failures:
        group = sample_group(sampler, failure, 4)
        (_, _, [sampled]), (asked, _, retries) = sampler.engine.calls[-2:]
        for index, reflection in enumerate(sampled):
            ids, mask, roles = group.masked(index)
            assert ids == asked[index] + retries[index][0].ids
            assert [i for i, m in zip(ids, mask) if m] == reflection.ids
            turns = [role for i, role in enumerate(roles) if i == 0 or roles[i - 1] != role]
            assert turns == order and len(ids) == len(mask) == len(roles)


@pytest.mark.parametrize("under", CONDITIONS, ids=str)
def test_a_conversation_is_what_the_condition_asks(sampler, failures, under):
    failure, other = failures[:2]
    shown = conversation_of(sampler, failure, under, other)
    sampler.second_tries(under, [failure, other])
    asked = sampler.engine.calls[-1][0][0]
    assert shown.replace("<|end|>\n", "<|end|>") == sampler.chat.tokenizer.decode(asked)
    assert shown.count("<|end|>\n") == shown.count("<|end|>")
    assert (failure.attempt in shown) == under.told


def test_a_condition_with_anothers_reflection_needs_another_failure(sampler, failures):
    with pytest.raises(R3Error, match="needs at least 2 failures"):
        conversation_of(sampler, failures[0], condition("shuffled_reflection"))
