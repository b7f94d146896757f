"""A conversation that goes on is not computed again: the same tokens, from fewer forward passes."""

from contextlib import nullcontext
from random import Random

import pandas as pd
import pytest
import torch
from conftest import CoinTask, base_model, coin_failures

from r3lib.chat import Chat
from r3lib.conditions import CONDITIONS
from r3lib.engines import SamplingParams
from r3lib.engines.transformers import TransformersEngine
from r3lib.episodes import Policy, run_episodes
from r3lib.sampler import Limits, RolloutSampler

GREEDY = SamplingParams(9, 0.0)


def computed(model):
    """Counts the tokens that go through the model from now on."""
    seen = []
    model.base_model.register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append((args[0] if args else kwargs["input_ids"]).numel()),
        with_kwargs=True,
    )
    return seen


def conversation(engine, prompts, turns, n, seeds, tokens=9):
    """Reflections, then retries that go on from each: (ids of both, log-probs of both)."""
    first = engine.generate(prompts, n, SamplingParams(tokens, 1.0), seeds)
    again = [
        [*prompt, *completion.ids, *turn]
        for prompt, group in zip(prompts, first)
        for completion, turn in zip(group, turns)
    ]
    second = engine.generate(again, 1, SamplingParams(6, 1.0), list(range(len(again))))
    flat = [c for group in first + second for c in group]
    return [c.ids for c in flat], torch.tensor([x for c in flat for x in c.logprobs])


@pytest.mark.parametrize("batch_size", [64, 5])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3"])
def test_going_on_gives_the_tokens_and_log_probs_of_starting_anew(
    tiny, tokenizer, architecture, batch_size
):
    model = tiny(architecture).eval()
    engine = TransformersEngine(model, tokenizer, batch_size)
    engine.end_ids = frozenset(range(0, 600, 9))  # rows end early, at different steps
    prompts = [[*range(5, 40), *range(50, 50 + k)] for k in (3, 9, 1)] + [[7, 8, 9]]
    turns = [[11, 12], [13], [14, 15, 16, 17], [18, 19]]
    given = prompts, turns, 4, [1, 2, 3, 4]
    anew = conversation(engine, *given)
    with engine.keeping():
        kept = conversation(engine, *given)
    assert kept[0] == anew[0]
    assert len({len(ids) for ids in anew[0]}) > 3, "rows that end at different steps"
    torch.testing.assert_close(kept[1], anew[1], atol=1e-5, rtol=1e-4)


def test_only_new_tokens_are_computed(tiny, tokenizer):
    model = tiny().eval()
    engine = TransformersEngine(model, tokenizer)
    engine.end_ids = frozenset([-5])
    prompt = list(range(5, 105))
    seen = computed(model)
    with engine.keeping():
        [group] = engine.generate([prompt], 4, SamplingParams(8, 1.0))
        assert sum(seen) == 100 + 4 * 7
        seen.clear()
        engine.generate([[*prompt, *c.ids, 20, 21] for c in group], 1, SamplingParams(3, 0.0))
    assert sum(seen) == 4 * (1 + 2) + 4 * 2, "the last sampled token, the turn, and two of the retry"


def test_a_second_turn_may_go_back_on_what_was_said(tiny, tokenizer):
    """The end of a reflection that was cut off is written anew; other conditions branch off before it."""
    model = tiny().eval()
    engine = TransformersEngine(model, tokenizer)
    engine.end_ids = frozenset([-5])
    prompts = [[*range(5, 45)], [*range(105, 140)]]
    with engine.keeping():
        first = engine.generate(prompts, 1, GREEDY)
        texts = [[*p, *g[0].ids] for p, g in zip(prompts, first)]
        kept = []
        for turns in ([[61], [62, 63]], [[64, 65], [66]]):
            again = [text[:-3] + turn for text, turn in zip(texts, turns)]
            kept.append(engine.generate(again, 1, GREEDY))
    for turns, found in zip(([[61], [62, 63]], [[64, 65], [66]]), kept):
        again = [text[:-3] + turn for text, turn in zip(texts, turns)]
        for ours, theirs in zip(found, engine.generate(again, 1, GREEDY)):
            assert ours[0].ids == theirs[0].ids


def test_what_does_not_go_on_starts_anew(tiny, tokenizer):
    engine = TransformersEngine(tiny().eval(), tokenizer)
    engine.end_ids = frozenset([-5])
    with engine.keeping():
        engine.generate([list(range(5, 45))], 1, GREEDY)
        other = engine.generate([list(range(105, 140))], 1, GREEDY)
    assert other == engine.generate([list(range(105, 140))], 1, GREEDY)
    assert engine._kept is None, "nothing is held after the block"


@pytest.mark.parametrize("asked_before", [False, True])
def test_a_question_asked_afresh_is_not_computed_again(tiny, tokenizer, asked_before):
    """After the first tries, or after conversations that went on from them; of some rows alone."""
    model = tiny().eval()
    engine = TransformersEngine(model, tokenizer)
    engine.end_ids = frozenset(range(0, 600, 9))
    prompts = [[5 + k, *range(60, 90 + k)] for k in range(6)]
    afresh, sampled = [prompts[k] for k in (4, 1)], SamplingParams(4, 1.0)
    seen = computed(model)
    with engine.keeping():
        first = engine.generate(prompts, 1, GREEDY)
        if asked_before:
            again = [[*prompts[k], *first[k][0].ids, 31] for k in (1, 2, 4)]
            engine.generate(again, 1, GREEDY)
        seen.clear()
        kept = [engine.generate(afresh, 1, sampled, [7, 8]) for _ in range(2)]
    assert sum(seen) <= 2 * 2 * 3, "the sampled tokens but the last"
    found = engine.generate(afresh, 1, sampled, [7, 8])
    for ours in kept:
        assert [c.ids for [c] in ours] == [c.ids for [c] in found]
        for [one], [other] in zip(ours, found):
            torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs))


def test_some_asked_afresh_and_some_that_go_on_start_anew(tiny, tokenizer):
    engine = TransformersEngine(tiny().eval(), tokenizer)
    engine.end_ids = frozenset([-5])
    prompts = [list(range(5, 45)), list(range(105, 140))]
    with engine.keeping():
        [[first], _] = engine.generate(prompts, 1, GREEDY)
        mixed = [[*prompts[0], *first.ids, 31], prompts[1]]
        found = engine.generate(mixed, 1, GREEDY)
    assert [c.ids for [c] in found] == [c.ids for [c] in engine.generate(mixed, 1, GREEDY)]


@pytest.mark.parametrize(
    "batch_size, anew",
    [(12, [True] + [False] * 7), (6, 2 * ([True] + [False] * 6) + [True])],
    ids=["one batch", "two, whose reflections are swapped at the end"],
)
def test_a_shards_seven_conditions_compute_a_question_once(tokenizer, tmp_path, batch_size, anew):
    """Which calls compute more than half of their prompts; and that the rows are those without keeping."""
    model = base_model().eval()
    engine = TransformersEngine(model, tokenizer, batch_size)
    sampler = RolloutSampler(engine, Chat(tokenizer), CoinTask(count=3, largest=20), Limits(24, 24, 12), 1.0)
    problems = sampler.task.problems("test", 12, 0)
    seen, generate, calls = computed(model), engine.generate, []

    def counted(prompts, *rest):
        before = sum(seen)
        found = generate(prompts, *rest)
        said = sum(len(c.ids) for group in found for c in group)
        calls.append(sum(seen) - before - said > sum(map(len, prompts)) / 2)
        return found

    engine.generate = counted
    kept = run_episodes(sampler, problems, Policy(), tmp_path / "kept")
    assert calls == anew
    engine.keeping = nullcontext
    pd.testing.assert_frame_equal(kept, run_episodes(sampler, problems, Policy(), tmp_path / "anew"))
    assert set(kept.condition) == {one.name for one in CONDITIONS}


def test_some_of_the_rows_go_on(tiny, tokenizer):
    engine = TransformersEngine(tiny().eval(), tokenizer)
    engine.end_ids = frozenset(range(0, 600, 9))
    prompts = [[5 + k, *range(60, 90 + k)] for k in range(6)]
    with engine.keeping():
        first = engine.generate(prompts, 1, GREEDY)
        again = [[*prompts[k], *first[k][0].ids, 31] for k in (4, 1)]
        found = engine.generate(again, 1, GREEDY)
    assert [c.ids for [c] in found] == [c.ids for [c] in engine.generate(again, 1, GREEDY)]


def test_the_trainers_retries_go_on_from_its_reflections(tokenizer):
    model = base_model().eval()
    engine = TransformersEngine(model, tokenizer)
    task = CoinTask(count=3, largest=20)
    sampler = RolloutSampler(engine, Chat(tokenizer), task, Limits(24, 24, 12), 1.0)
    failures = coin_failures(tokenizer, 3, task)
    results = []
    for block in (sampler.keeping, nullcontext):
        seen = computed(model)
        with block():
            reflections = sampler.reflect(failures, [1, 2, 3], 4, 1.0)
            retries = sampler.retry(reflections, list(range(12)))
        results.append([r.completion.ids for r in retries])
        counts = sum(seen)
        results.append(counts)
    assert results[0] == results[2]
    assert results[1] < 0.8 * results[3]


@pytest.mark.parametrize("temperature, rows", [(0.0, 2), (1.0, 5)])
def test_greedy_retries_after_equal_reflections_are_computed_once(tokenizer, temperature, rows):
    """What the engine is asked for, and that each reflection has the retry that it has alone."""
    task, asked = CoinTask(count=3, largest=20), []
    engine = TransformersEngine(base_model().eval(), tokenizer)
    sampler = RolloutSampler(engine, Chat(tokenizer), task, Limits(24, 8, 12))
    one, other = sampler.reflect(coin_failures(tokenizer, 2, task), [1, 2])
    generate = engine.generate
    engine.generate = lambda prompts, *rest: asked.append(len(prompts)) or generate(prompts, *rest)
    with sampler.keeping():
        sampler.reflect([one.failure] * 3 + [other.failure] * 2, [7] * 5)
        retries = sampler.retry([one, other, one, one, other], [1, 2, 3, 4, 5], temperature)
    assert asked == [5, rows]
    alone = [
        sampler.retry([r], [seed], temperature)[0]
        for seed, r in enumerate((one, other, one, one, other), 1)
    ]
    assert [r.completion.ids for r in retries] == [r.completion.ids for r in alone]
    assert [r.verdict for r in retries] == [r.verdict for r in alone]


@pytest.mark.parametrize("seed", range(12))
def test_any_conversation_goes_on_as_if_it_began_anew(tiny, tokenizer, seed):
    """Rows of any length, cut anywhere, some of them dropped, turn after turn."""
    random = Random(seed)
    engine = TransformersEngine(tiny().eval(), tokenizer, random.choice([1, 3, 64]))
    engine.end_ids = frozenset(random.sample(range(800), random.choice([1, 80])))
    texts = [
        [random.randrange(5, 800) for _ in range(random.randrange(1, 60))]
        for _ in range(random.randrange(1, 7))
    ]
    found = []
    for block in (engine.keeping, nullcontext):
        random, prompts, said = Random(seed), texts, []
        with block():
            for _ in range(3):
                tokens = SamplingParams(random.choice([1, 2, 9, 30]), 1.0)
                completions = [c for [c] in engine.generate(prompts, 1, tokens)]
                said += [c.ids for c in completions]
                prompts = [
                    [*prompt, *c.ids[: random.randrange(1, 40)], *range(5, 5 + random.randrange(1, 50))]
                    for prompt, c in zip(prompts, completions)
                ]
                prompts = prompts[: max(1, random.randrange(len(prompts) + 1))]
        found.append(said)
    assert found[0] == found[1]


def test_what_failed_half_way_is_not_taken_for_computed(tiny, tokenizer):
    model = tiny().eval()
    engine = TransformersEngine(model, tokenizer)
    engine.end_ids = frozenset([-5])
    with engine.keeping():
        [[first]] = engine.generate([[5, 6, 7]], 1, GREEDY)
        again = [[5, 6, 7, *first.ids, 9, 10, 11]]
        hook = model.base_model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.generate(again, 1, GREEDY)
        hook.remove()
        [[kept]] = engine.generate(again, 1, GREEDY)
    [[anew]] = engine.generate(again, 1, GREEDY)
    assert kept.ids == anew.ids
    torch.testing.assert_close(torch.tensor(kept.logprobs), torch.tensor(anew.logprobs))
