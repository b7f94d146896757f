"""One set of ends: what stops a sample is what a request asks for and what training takes for finished."""

import json
from random import Random

import pandas as pd
import pytest
from conftest import CoinTask, ScriptedEngine, coin_failures, small_config, tiny_model
from fake_vllm import EOS, FakeServer
from test_chat import PLAIN, with_marks, with_template
from transformers import GenerationConfig

from r3lib.artifacts import Recorder
from r3lib.chat import DATE, Chat
from r3lib.engines import Completion, SamplingParams
from r3lib.engines.transformers import TransformersEngine
from r3lib.engines.vllm import VLLMEngine
from r3lib.errors import R3Error
from r3lib.rollout import completions_under
from r3lib.sampler import Reflection, Retry, RolloutSampler
from r3lib.trainer import R3Trainer
from r3lib.verifiers.verdict import Verdict

LLAMA = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|eot_id|>{% endfor %}"
LLAMA += "{% if add_generation_prompt %}<|assistant|>{% endif %}"


class ForeignEnds(ScriptedEngine):
    """Ends what it finishes with any of `ends`, often not the template's own."""

    def __init__(self, tokenizer, ends):
        super().__init__(tokenizer)
        self.ends = sorted(ends)

    def _one(self, random, sampling):
        made = super()._one(random, sampling)
        if not made.finished:
            return made
        return Completion([*made.ids[:-1], random.choice(self.ends)], made.logprobs, True)


@pytest.fixture
def llama(tokenizer):
    """A tokenizer whose template ends a turn with <|eot_id|>, and which has other ends."""
    return with_marks(tokenizer, LLAMA, "<|end_of_text|>", ["<|eom_id|>", "<|end_of_text|>"])


def trained(tokenizer, folder, engine, **changes):
    """A trainer after a step under the tokenizer, and how many of its 8 reflections were cut off."""
    config = small_config(folder, max_steps=1, mask_truncated_completions=True, **changes)
    failures = coin_failures(tokenizer, 4)
    model = tiny_model("llama", len(tokenizer))
    trainer = R3Trainer(model, config, task=CoinTask(), failures=failures, processing_class=tokenizer, engine=engine)
    trainer.train()
    return trainer, sum(not c.finished for group in engine.calls[0][2] for c in group)


@pytest.mark.parametrize("eos", ["<|eot_id|>", "<|end_of_text|>"])
def test_a_reflection_that_ended_is_not_taken_for_cut_off(tokenizer, tmp_path, eos):
    """Whichever of the ends it chose, and whichever of them is the tokenizer's eos."""
    tokenizer = with_marks(tokenizer, LLAMA, eos, ["<|eom_id|>", "<|end_of_text|>"])
    engine = ForeignEnds(tokenizer, Chat(tokenizer).end_ids)
    trainer, cut = trained(tokenizer, tmp_path, engine)
    [logged] = [row for row in trainer.state.log_history if "completions/clipped_ratio" in row]
    assert 0 < cut < 8 and logged["completions/clipped_ratio"] == cut / 8
    assert logged["grad_norm"] > 0
    generation = trainer.model.generation_config
    assert trainer.eos_token_ids == sorted(Chat(tokenizer, generation).end_ids)


def test_what_is_trained_is_what_was_sampled_though_another_end_is_joined(llama):
    """Every trained position holds a sampled token with its log-probability, under every mask."""
    chat = Chat(llama)
    eom, random = llama.convert_tokens_to_ids("<|eom_id|>"), Random(0)
    sampler = RolloutSampler(None, chat, CoinTask())
    [failure] = coin_failures(llama, 1)
    asked = sampler.reflection_prompt(failure)
    for end in ([], [eom], [chat.end_id]):
        ids = [random.randrange(20, 200) for _ in range(5)] + end
        reflection = Completion(ids, [-random.random() for _ in ids], bool(end))
        retry = Completion([30, chat.end_id], [-0.5, -0.25], True)
        prompt = sampler.retry_prompt(failure, ids)
        reflections = [Reflection(failure, asked, reflection)]
        retries = [Retry(prompt, retry, Verdict(True, "ok"))]
        kept = len(ids) - (end == [eom])
        sampled = list(zip(ids, reflection.logprobs))[:kept], list(zip(retry.ids, retry.logprobs))
        for mask, expected in (("reflection+retry", sum(sampled, [])), ("retry", sampled[1])):
            made = completions_under(mask, reflections, retries)
            [row], [logprobs], [trains] = made["completion_ids"], made["logprobs"], made["env_mask"]
            assert asked + row == prompt + retry.ids and len(row) == len(logprobs) == len(trains)
            assert [(t, p) for t, p, on in zip(row, logprobs, trains) if on] == expected
            assert eom not in row
        made = completions_under("reflection", reflections, retries)
        assert made == {"completion_ids": [ids], "logprobs": [reflection.logprobs]}


def test_the_transformers_engine_stops_at_the_ends_of_the_generation_config(tokenizer):
    model = tiny_model("llama", len(tokenizer))
    prompts, sampling = [[20 + i, 30] for i in range(8)], SamplingParams(16)
    free = TransformersEngine(model, tokenizer).generate(prompts, 2, sampling)
    often = max(set(sum((c.ids[:-1] for group in free for c in group), [])), default=5)
    model.generation_config.eos_token_id = [often, 7]
    engine = TransformersEngine(model, tokenizer)
    assert engine.end_ids == Chat(tokenizer).end_ids | {often, 7}
    for before, after in zip(sum(free, []), sum(engine.generate(prompts, 2, sampling), [])):
        stop = next((i for i, t in enumerate(before.ids, 1) if t in engine.end_ids), None)
        assert after.ids == before.ids[:stop] and after.finished == (stop is not None)
    assert any(c.ids[-1] == often for c in sum(engine.generate(prompts, 2, sampling), []))


def test_a_server_is_asked_to_stop_at_every_end(tokenizer):
    server = FakeServer()
    try:
        ends = Chat(tokenizer, GenerationConfig(eos_token_id=[EOS])).end_ids
        engine = VLLMEngine([server.url], tokenizer, end_ids=ends)
        got = sum(engine.generate([[20, 21]], 32, SamplingParams(12)), [])
    finally:
        server.close()
    assert server.asked[0][1]["stop_token_ids"] == sorted(ends)
    assert any(c.ids[-1] == EOS and c.finished for c in got)
    assert not any(EOS in c.ids[:-1] for c in got)


def test_the_trainer_takes_the_arguments_of_the_template(tokenizer, tmp_path):
    template = "{{ style | default('plain') }}" + PLAIN
    tokenizer = with_template(tokenizer, template)
    config = small_config(tmp_path, chat_template_kwargs={"style": "terse"})
    chat, task = Chat(tokenizer, None, {"style": "terse"}), CoinTask(count=3, largest=20)
    model, plain = tiny_model("llama", len(tokenizer)), coin_failures(tokenizer, 4, task)
    terse = [type(f)(**{**vars(f), "prompt_ids": chat.start(task, f.problem)}) for f in plain]
    shared = {"task": task, "processing_class": tokenizer, "engine": ScriptedEngine(tokenizer)}
    trainer = R3Trainer(model, config, failures=terse, **shared)
    asked = trainer.sampler().chat.start(task, terse[0].problem)
    assert asked == terse[0].prompt_ids != plain[0].prompt_ids
    with pytest.raises(R3Error, match="mined with another tokenizer or task"):
        R3Trainer(model, config, failures=plain, **shared)


def test_the_manifest_names_the_date_that_prompts_have(tmp_path):
    Recorder(tmp_path, "01").table(pd.DataFrame({"a": [1]}), "table", "cell")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["prompt_date"] == manifest["artefacts"]["tables/table.csv"]["prompt_date"] == DATE

