"""The vLLM engine and real vLLM servers, on the embedded model and on SmolLM2: `make test-vllm`.

R3_VLLM_PYTHON names an interpreter whose environment has vLLM. Five times a server starts, which takes up to a minute.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Timer

import pandas as pd
import pytest
import torch
from conftest import BASE_MODEL, CoinTask, base_model, coin_failures, gone, small_config, small_lora
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from r3lib.chat import Chat
from r3lib.engines import SamplingParams
from r3lib.engines.transformers import TransformersEngine
from r3lib.engines.vllm import VLLMEngine
from r3lib.engines.vllm_server import Server
from r3lib.errors import R3Error
from r3lib.study import Study
from r3lib.tasks import CountdownTask
from r3lib.trainer import R3Trainer
from r3lib.training_log import metrics_file
from r3lib.weights import locate, missing

ROOT = Path(__file__).resolve().parents[1]
PYTHON = os.environ.get("R3_VLLM_PYTHON")
OPTIONS = ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "64"]
TIE = 1e-3  # logits as close as this may change places by rounding
GREEDY = ["first_try", "retry", "generic_reflection"]  # conditions without any sampled turn
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not PYTHON, reason="R3_VLLM_PYTHON names no interpreter that has vLLM: make test-vllm"
    ),
]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A function of a model: a server of ours for it, not started yet."""
    return lambda model: Server(
        model, PYTHON, 8, tmp_path_factory.mktemp("log") / "vllm.log", OPTIONS
    )


@pytest.fixture(scope="module")
def server(start):
    with start(BASE_MODEL) as one:
        yield one


@pytest.fixture
def engine(server, tokenizer):
    return VLLMEngine([server.url], tokenizer)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """First prompts and reflection prompts of twelve problems."""
    return prompts_of(tokenizer, 12)


def prompts_of(tokenizer, count):
    chat, task = Chat(tokenizer), CountdownTask()
    failures = coin_failures(tokenizer, count, task)
    asked = [chat.follow(f.prompt_ids, f.attempt_ids, task.reflection_prompt) for f in failures]
    return [f.prompt_ids for f in failures] + asked


def save_adapter(folder, seed, model=None):
    """A random adapter of `model` (the embedded one): the PeftModel, its folder."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=8,
        lora_alpha=8,
        target_modules="all-linear",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model or base_model(), config)
    adapted.save_pretrained(folder)
    return adapted.eval(), folder


def assert_equal(got, wanted):
    for one, other in zip(sum(got, []), sum(wanted, []), strict=True):
        assert one.ids == other.ids and one.finished == other.finished
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-3)


def assert_greedy(got, model, tokenizer, prompts, most):
    """`got` is the greedy text of `model`: it may leave it only where the two best logits are a tie up to rounding.

    After such a tie a text is not compared; half of the texts at least have to be equal to the end.
    """
    wanted, whole = (
        TransformersEngine(model, tokenizer).generate(prompts, 1, SamplingParams(most, 0.0)),
        0,
    )
    for prompt, [one], [other] in zip(prompts, got, wanted, strict=True):
        same = len(os.path.commonprefix([one.ids, other.ids]))
        assert one.logprobs[:same] == pytest.approx(other.logprobs[:same], abs=2e-3)
        if one.ids == other.ids:
            whole += 1
            continue
        with torch.no_grad():
            best = model(torch.tensor([prompt + other.ids[:same]])).logits[0, -1].topk(2)
        assert {one.ids[same], other.ids[same]} == set(best.indices.tolist())
        assert best.values[0] - best.values[1] < TIE
    assert whole >= len(prompts) / 2


def teacher_forced(model, prompt, ids, temperature):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


def test_greedy_text_is_that_of_transformers_token_for_token(engine, model, tokenizer, prompts):
    got = engine.generate(prompts, 2, SamplingParams(40, 0.0))
    assert_equal(
        got, TransformersEngine(model, tokenizer).generate(prompts, 2, SamplingParams(40, 0.0))
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_end_at_end_tokens_and_log_probs_are_at_the_temperature(
    engine, model, prompts, temperature
):
    got = engine.generate(prompts, 4, SamplingParams(12, temperature))
    flat = [(p, c) for p, group in zip(prompts, got) for c in group]
    assert {c.finished for _, c in flat} == {True, False}
    for prompt, c in flat:
        assert c.finished == (c.ids[-1] in engine.end_ids) and not set(c.ids[:-1]) & engine.end_ids
        assert c.finished or len(c.ids) == 12
        assert c.logprobs == pytest.approx(
            teacher_forced(model, prompt, c.ids, temperature), abs=2e-3
        )


def test_a_seed_repeats_its_samples_and_its_neighbour_has_others(engine, prompts):
    asked = [prompts[-1]] * 3  # the request to reflect, which has many answers
    one, two, again = engine.generate(asked, 4, SamplingParams(24), seeds=[5, 6, 5])
    assert [c.ids for c in one] == [c.ids for c in again] != [c.ids for c in two]


def test_samples_whose_prompts_together_are_longer_than_a_step_of_the_server(engine, prompts):
    """Chunked prefill would read one of them in two steps, of which vLLM dies on a CPU."""
    long = [prompt * 8 for prompt in prompts]
    assert sum(map(len, long)) > 2 * 2048
    got = engine.generate(long, 1, SamplingParams(2))
    assert all(1 <= len(c.ids) <= 2 for [c] in got)


def test_an_adapter_swap_changes_the_output_as_peft_says(engine, tokenizer, prompts, tmp_path):
    answers = []
    for seed in (1, 2, 3, 4):  # more than the server holds at once
        adapted, folder = save_adapter(tmp_path / str(seed), seed)
        engine.sync(folder)
        answers.append(engine.generate(prompts, 1, SamplingParams(24, 0.0)))
        shutil.rmtree(folder)
        assert_equal(
            answers[-1],
            TransformersEngine(adapted, tokenizer).generate(prompts, 1, SamplingParams(24, 0.0)),
        )
    assert [c.ids for c in sum(answers[0], [])] != [c.ids for c in sum(answers[1], [])]


@pytest.mark.skipif(
    bool(missing("smollm2")), reason="the weights of SmolLM2 are not installed: make install"
)
def test_real_weights_greedy_text_is_that_of_transformers_before_and_after_adapter_swaps(
    start, tmp_path
):
    path = locate("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = prompts_of(tokenizer, 3)
    with start(path) as server:
        engine = VLLMEngine([server.url], tokenizer)
        answers = [engine.generate(prompts, 1, SamplingParams(40, 0.0))]
        assert_greedy(answers[0], real_weights(), tokenizer, prompts, 40)
        for seed in (1, 2):
            adapted, folder = save_adapter(tmp_path / str(seed), seed, real_weights())
            engine.sync(folder)
            answers.append(engine.generate(prompts, 1, SamplingParams(16, 0.0)))
            assert_greedy(answers[-1], adapted, tokenizer, prompts, 16)
    first = [[c.ids[:16] for c in sum(answer, [])] for answer in answers]
    assert first[0] != first[1] != first[2] != first[0]


def real_weights():
    return AutoModelForCausalLM.from_pretrained(locate("smollm2"), dtype=torch.float32)


def test_two_servers_share_a_batch_and_give_what_one_gives(
    server, engine, start, tokenizer, prompts, tmp_path
):
    _, folder = save_adapter(tmp_path / "adapter", 4)
    with start(BASE_MODEL) as second:
        both = VLLMEngine([server.url, second.url], tokenizer)
        for sampler in (engine, both):
            sampler.sync(folder)
        for sampling in (SamplingParams(24, 0.0), SamplingParams(12, 1.0)):
            before = [answers(one) for one in (server, second)]
            got = both.generate(prompts, 2, sampling)
            assert [answers(one) - n for one, n in zip((server, second), before)] == [
                len(prompts) / 2
            ] * 2
            assert_equal(got, engine.generate(prompts, 2, sampling))


def answers(server):
    """How many requests for completions a server has answered, by its log."""
    return server.log.read_text().count('"POST /v1/completions HTTP/1.1" 200')


STUDY = """
import json, sys, psutil
from r3lib.study import Study
study = Study("smoke", "countdown", sys.argv[1], **json.loads(sys.argv[2]), engine="vllm")
paths = {"baseline": study.baseline(), "mine": study.mine(), "train": study.train(0), "evaluate": study.evaluate(0)}
servers = [p.pid for p in psutil.Process().children(recursive=True) if "vllm" in " ".join(p.cmdline())]
left = {"pids": servers}
print(json.dumps(left | {name: str(path) for name, path in paths.items()}))
"""


def test_a_study_runs_through_a_server_of_its_own_that_ends_with_it(tmp_path):
    """In a process of its own, with default options; where nothing is sampled the rows are those of transformers."""
    settings = {"test_problems": 24, "train_problems": 64, "max_steps": 2}
    done = subprocess.run([sys.executable, "-c", STUDY, str(tmp_path / "vllm"), json.dumps(settings)], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    left = json.loads(done.stdout.splitlines()[-1])
    assert left["pids"] and gone(left["pids"])

    study = Study("smoke", "countdown", tmp_path / "transformers", **settings)
    pd.testing.assert_frame_equal(pd.read_parquet(left["mine"]), pd.read_parquet(study.mine()))
    theirs, ours = (pd.read_parquet(path) for path in (left["baseline"], study.baseline()))
    theirs, ours = (table[table["condition"].isin(GREEDY)] for table in (theirs, ours))
    pd.testing.assert_frame_equal(theirs, ours)
    assert set(ours["condition"]) == set(GREEDY)

    trained = pd.read_parquet(left["evaluate"])
    assert set(trained["policy"]) == {"r3"} and (trained["condition"] == "first_try").sum() == 24
    steps = pd.read_json(Path(left["train"]) / "metrics.jsonl", lines=True)
    assert list(steps["step"]) == [1, 2] and steps["importance_ratio"].to_list() == pytest.approx(
        [1, 1], abs=1e-3
    )


def test_an_adapter_of_too_high_a_rank_is_refused(engine, tmp_path):
    get_peft_model(base_model(), small_lora(r=16)).save_pretrained(tmp_path)
    with pytest.raises(R3Error, match="rank 16 is greater than max_lora_rank 8"):
        engine.sync(tmp_path)


def test_three_steps_of_r3(engine, model, tokenizer, tmp_path):
    task = CoinTask(count=3, largest=20)
    trainer = R3Trainer(
        model, small_config(tmp_path, max_steps=3), task=task, failures=coin_failures(tokenizer, 4, task),
        peft_config=small_lora(), processing_class=tokenizer, engine=engine,
    )  # fmt: skip
    trainer.train()
    rows = [json.loads(line) for line in metrics_file(trainer.args).read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["importance_ratio"] == pytest.approx(1.0, abs=1e-3) for row in rows), (
        "on policy, up to rounding"
    )
    assert any(row["grad_norm"] > 0 for row in rows)


def test_a_server_killed_in_mid_batch_is_an_error_and_starts_again(
    server, engine, tokenizer, prompts
):
    wanted = engine.generate(prompts, 1, SamplingParams(24, 0.0))
    Timer(0.2, server.process.kill).start()
    with pytest.raises(R3Error, match="does not answer.*the run resumes"):
        for _ in range(100):
            engine.generate(prompts, 2, SamplingParams(24))
    server.process.wait(30)
    server.start()
    got = VLLMEngine([server.url], tokenizer).generate(prompts, 1, SamplingParams(24, 0.0))
    assert_equal(got, wanted)
