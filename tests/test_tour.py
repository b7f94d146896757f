"""The tour's group: it has variance where any has, its turns join to the very tokens, and only reflections learn."""

from types import SimpleNamespace

import pytest
from conftest import CoinTask, ConstantTask, ScriptedEngine, coin_failures

from r3lib.chat import Chat
from r3lib.errors import R3Error
from r3lib.sampler import Limits, RolloutSampler
from r3lib.tour import Group, first_with_variance, sample_groups


@pytest.fixture
def runner(tokenizer):
    task = CoinTask(count=3, largest=20)
    return RolloutSampler(ScriptedEngine(tokenizer), Chat(tokenizer), task, Limits(8, 12, 6))


@pytest.fixture
def groups(runner, tokenizer):
    return sample_groups(runner, coin_failures(tokenizer, 6), 4)


def of(*rewards):
    verdicts = ["ok" if reward else "missed_target" for reward in rewards]
    return Group(SimpleNamespace(), [], [], [], [], verdicts)


def test_the_first_group_with_variance_is_taken_and_those_without_are_counted():
    groups = [of(0, 0, 0), of(1, 1, 1), of(0, 1, 0), of(1, 0, 0)]
    group, said = first_with_variance(groups)
    assert group is groups[2] and said.startswith("2 of 4 groups have no variance")


def test_without_any_variance_the_first_group_is_shown_and_it_is_said():
    groups = [of(0, 0), of(1, 1)]
    group, said = first_with_variance(groups)
    assert group is groups[0] and group.advantages == [0, 0] and group.shown == [0]
    assert said.startswith("2 of 2 groups have no variance") and "advantages are all 0" in said


def test_a_rewarded_and_an_unrewarded_reflection_are_shown_with_opposite_advantages():
    group = of(0, 0, 1, 0)
    rewarded, unrewarded = group.shown
    assert (rewarded, unrewarded) == (2, 0)
    assert group.advantages[rewarded] == pytest.approx(1.5, abs=1e-3)
    assert group.advantages[unrewarded] == pytest.approx(-0.5, abs=1e-3)
    assert sum(group.advantages) == pytest.approx(0)


def test_all_groups_are_sampled_in_two_calls_and_judged_by_the_task(runner, groups):
    assert len(groups) == 6 and len(runner.engine.calls) == 2
    assert any(len(set(group.rewards)) == 2 for group in groups)
    for group in groups:
        table = group.table(runner)
        judged = [runner.task.verify(text, group.failure.problem).reason for text in table.retry]
        assert list(table.verdict) == judged == group.verdicts and len(table) == 4


def test_every_token_of_a_conversation_has_its_turn_and_only_the_reflection_is_trained(runner, groups):
    order = ["task", "attempt", "request", "reflection", "request", "retry"]
    for group in groups:
        for index, reflection in enumerate(group.reflections):
            ids, mask, roles = group.masked(index)
            assert len(ids) == len(mask) == len(roles)
            asked = runner.retry_prompt(group.failure, reflection.ids) + group.retries[index].ids
            assert ids == asked
            assert [i for i, m in zip(ids, mask) if m] == reflection.ids
            turns = [role for i, role in enumerate(roles) if i == 0 or roles[i - 1] != role]
            assert turns == order


def test_no_failure_is_one_line(runner):
    with pytest.raises(R3Error, match="every first try is right"):
        sample_groups(runner, [], 8)


def test_a_task_that_is_always_right_has_groups_without_variance(runner, tokenizer):
    groups = sample_groups(
        RolloutSampler(runner.engine, runner.chat, ConstantTask(True), runner.limits), coin_failures(tokenizer, 2), 3
    )
    assert all(group.rewards == [1, 1, 1] for group in groups)
