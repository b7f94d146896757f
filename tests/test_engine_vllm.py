"""The vLLM engine against servers that only imitate vLLM: requests, failures, starts and stops."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from math import log
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import CoinTask, ScriptedEngine, alive, coin_failures, gone, small_config, small_lora
from fake_vllm import EOS, FakeServer, sample
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback

from r3lib.chat import Chat
from r3lib.engines import SamplingParams, vllm, vllm_server
from r3lib.engines.base import RemoteEngine
from r3lib.engines.vllm import VLLMEngine
from r3lib.engines.vllm_server import Server, interpreter, vllm_engine
from r3lib.errors import R3Error
from r3lib.trainer import R3Trainer
from r3lib.training_log import metrics_file

HERE = Path(__file__).parent
PROMPTS = [[20, 21, 22 + i] for i in range(24)]


@pytest.fixture
def serve():
    """A function that starts fake servers, closed after the test."""
    servers = []

    def start(*args, **options):
        servers.append(FakeServer(*args, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def connect(tokenizer):
    """A function of fake servers or addresses: an engine on them."""

    def engine(*servers):
        return VLLMEngine([s if isinstance(s, str) else s.url for s in servers], tokenizer)

    return engine


def expected(tokenizer, n=3, model="base", most=12):
    """What the fake model gives for PROMPTS, each seeded with its position, as (ids, log-probs)."""
    stops = sorted(Chat(tokenizer).end_ids)
    seeds = [Random(i).getrandbits(48) for i in range(len(PROMPTS))]
    return [
        [sample(p, s + k, model, most, stops) for k in range(n)] for p, s in zip(PROMPTS, seeds)
    ]


def pairs(results):
    return [[(c.ids, c.logprobs) for c in group] for group in results]


def adapter(folder, weights="a"):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_text(weights)
    return folder


def dead_address():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}"


# what is asked and what comes back


def test_samples_come_back_in_order_with_their_log_probs(serve, connect, tokenizer):
    got = connect(serve()).generate(PROMPTS, 3, SamplingParams(12))
    assert pairs(got) == expected(tokenizer)


def test_ids_end_with_an_end_token_exactly_when_finished_whatever_the_models_own_end_token(
    serve, connect, tokenizer
):
    got = sum(connect(serve()).generate(PROMPTS, 8, SamplingParams(12)), [])
    end = Chat(tokenizer).end_ids
    assert {c.finished for c in got} == {True, False}
    assert all(c.finished == (c.ids[-1] in end) and not set(c.ids[:-1]) & end for c in got)
    assert all(c.finished or len(c.ids) == 12 for c in got)
    assert any(EOS in c.ids[:-1] for c in got), (
        "only the ends that we ask for stop a sample, whatever the server knows"
    )


def test_a_request_asks_for_the_whole_distribution(serve, connect):
    server = serve()
    connect(server).generate(PROMPTS[:1], 2, SamplingParams(12, 0.7), seeds=[5])
    [(path, body)] = server.asked
    assert path == "/v1/completions" and body["prompt"] == PROMPTS[0] and body["model"] == "base"
    assert (body["n"], body["max_tokens"], body["temperature"], body["logprobs"]) == (2, 12, 0.7, 0)
    assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (
        1.0,
        0,
        0.0,
        1.0,
    )
    assert body["return_token_ids"] and body["ignore_eos"]


def test_neighbouring_seeds_share_no_sample_and_a_seed_repeats_itself(serve, connect):
    one, two, again = connect(serve()).generate(
        [[20, 21]] * 3, 6, SamplingParams(12), seeds=[5, 6, 5]
    )
    assert one == again and not {tuple(c.ids) for c in one} & {tuple(c.ids) for c in two}


def test_greedy_samples_are_asked_for_once_and_repeated(serve, connect):
    server = serve()
    [group] = connect(server).generate([[20, 21]], 4, SamplingParams(12, 0.0))
    assert len(group) == 4 and len({tuple(c.ids) for c in group}) == 1
    assert [body["n"] for _, body in server.asked] == [1]


def test_at_most_so_many_samples_at_once(serve, connect, monkeypatch):
    monkeypatch.setattr(vllm, "IN_FLIGHT", 8)
    server = serve(delay=0.02)
    connect(server).generate(PROMPTS, 4, SamplingParams(4))
    assert server.busiest == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompts": [[2] * 97]}, "prompt 0 has 97 tokens, not 1 to 96"),
        ({"n": 0}, "n=0"),
        ({"seeds": [1, 2]}, "2 seeds for 1 prompts"),
    ],
)
def test_bad_input_is_refused_before_anything_is_asked(serve, connect, bad, message):
    server = serve()
    with pytest.raises(R3Error, match=message):
        connect(server).generate(
            **(dict(prompts=[[2]], n=1, sampling=SamplingParams(4), seeds=[0]) | bad)
        )
    assert server.asked == []


# what goes wrong


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (400, r"answers 400: .*told to fail.*on two lines"),
        (500, "answers 500"),
        ("drop", r"does not answer \(RemoteProtocolError"),
        ("hang", r"does not answer \(ReadTimeout"),
        ("abort", r"ended a sample early \(abort\)"),
    ],
)
def test_what_fails_is_one_error_that_says_how_to_go_on(
    serve, connect, monkeypatch, fault, message
):
    monkeypatch.setattr(vllm, "TIMEOUT", 0.8)
    monkeypatch.setattr(vllm, "IN_FLIGHT", 1)
    server = serve(faults=[None, fault])
    how = "see the server's log.* start it or give another address, and run again"
    with pytest.raises(R3Error, match=f"/v1/completions {message}.*: {how}") as caught:
        connect(server).generate(PROMPTS, 1, SamplingParams(4))
    assert "\n" not in str(caught.value)
    assert len(server.asked) < len(PROMPTS) / 2, "what was queued is not sent"


def test_nobody_answers(connect):
    with pytest.raises(R3Error, match="does not answer.*start it or give another address"):
        connect(dead_address())


def test_an_address_must_be_one(connect):
    with pytest.raises(R3Error, match="localhost:8000.*does not answer .*UnsupportedProtocol"):
        connect("localhost:8000")


# several servers


def test_prompts_are_spread_over_the_servers(serve, connect, tokenizer):
    one, two = serve(), serve()
    assert pairs(
        connect(one, two.url + "/v1/").generate(PROMPTS, 3, SamplingParams(12))
    ) == expected(tokenizer)
    assert len(one.asked) == len(two.asked) == len(PROMPTS) / 2


# adapters


def test_each_sync_loads_a_new_name_everywhere(serve, connect, tokenizer, tmp_path):
    servers, folders = [serve(), serve()], [adapter(tmp_path / x, x) for x in "ab"]
    engine = connect(*servers)
    assert isinstance(engine, RemoteEngine)
    assert not isinstance(ScriptedEngine(tokenizer), RemoteEngine)
    for count, folder in enumerate(folders, 1):
        engine.sync(folder)
        wanted = expected(tokenizer, model=str(folder))
        assert pairs(engine.generate(PROMPTS, 3, SamplingParams(12))) == wanted
        assert all(len(server.adapters) == count for server in servers)


def test_sync_without_an_adapter_samples_from_the_model(serve, connect, tokenizer, tmp_path):
    engine = connect(serve())
    before = engine.identity()
    engine.sync(adapter(tmp_path / "a"))
    assert engine.identity() != before
    engine.sync(None)
    assert engine.identity() == before
    assert pairs(engine.generate(PROMPTS, 3, SamplingParams(12))) == expected(tokenizer)


def test_new_weights_in_a_folder_and_a_copy_elsewhere_have_names_of_their_own(
    serve, connect, tmp_path
):
    """A server that forgot an adapter reads it again from where its name says."""
    server, folder, copy = serve(), adapter(tmp_path / "a"), adapter(tmp_path / "copy")
    engine = connect(server)
    names, identities = [], []
    for now, weights in ((folder, "a"), (copy, "a"), (folder, "b")):
        (now / "adapter_model.safetensors").write_text(weights)
        engine.sync(now)
        names.append(engine.policy)
        identities.append(engine.identity())
    assert list(server.adapters) == names and len(set(names)) == 3
    assert identities[0] == identities[1] != identities[2]


def test_two_processes_may_sync_the_same(serve, connect, tmp_path):
    server, folder = serve(), adapter(tmp_path / "a")
    one, two = connect(server), connect(server)
    for engine in (one, two, one):
        engine.sync(folder)
    assert list(server.adapters) == [one.policy] == [two.policy]


def test_a_folder_without_an_adapter_is_refused(serve, connect, tmp_path):
    with pytest.raises(R3Error, match="load_lora_adapter answers 404: .*No adapter found"):
        connect(serve()).sync(tmp_path)


# a server of our own


@pytest.fixture
def command(tmp_path):
    """An interpreter that, whatever module it is asked to run, runs the fake server."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{HERE / "fake_vllm.py"}" "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def own(command, tmp_path):
    """A function of arguments: a Server of the fake, stopped after the test."""
    servers = []

    def make(*options):
        options = ["--pids", str(tmp_path / "pids"), *options]
        servers.append(Server("some/model", command, 8, tmp_path / "logs" / "vllm.log", options))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


def pids(folder):
    """(server, child of the server) of each start."""
    return [tuple(map(int, line.split())) for line in (folder / "pids").read_text().splitlines()]


def test_a_server_starts_once_and_leaves_nothing_behind(own, tokenizer, tmp_path):
    server = own("--dtype", "float32")
    for _ in range(2):
        server.start()
    got = VLLMEngine([server.url], tokenizer).generate(PROMPTS, 3, SamplingParams(12))
    assert pairs(got) == expected(tokenizer)
    [found] = pids(tmp_path)
    assert all(map(alive, found))
    server.stop()
    assert gone(found)
    arguments, setting, *_ = server.log.read_text().splitlines()
    assert (
        "-m vllm.entrypoints.openai.api_server --model some/model --enable-lora --max-lora-rank 8"
        in arguments
    )
    assert (
        "--logprobs-mode processed_logprobs" in arguments
        and "--dtype float32 --host 127.0.0.1" in arguments
    )
    assert setting.endswith("True")


@pytest.mark.parametrize("place, multiprocessing", [("cpu", "0"), ("cuda:0", None)])
def test_what_only_a_cpu_or_a_gpu_needs_is_set_there(own, monkeypatch, place, multiprocessing):
    monkeypatch.setattr(vllm_server, "device", lambda: place)
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    with own("--gpu-memory-utilization", "0.4") as server:
        arguments, _, setting, *_ = server.log.read_text().splitlines()
    assert setting == f"multiprocessing {multiprocessing}"
    on_gpu = place != "cpu"
    assert ("--no-enable-chunked-prefill" in arguments) != on_gpu
    assert ("--gpu-memory-utilization 0.5 --max-model-len auto" in arguments) == on_gpu
    assert "--gpu-memory-utilization 0.4 --host" in arguments, "the last is what vLLM takes"


def test_the_interpreter_is_the_named_one_or_the_first_that_has_vllm(monkeypatch):
    monkeypatch.delenv("R3_VLLM_PYTHON", raising=False)
    monkeypatch.setattr(vllm_server, "find_spec", lambda name: None)
    assert interpreter() == str(HERE.parent / ".venv-vllm" / "bin" / "python")
    monkeypatch.setattr(vllm_server, "find_spec", lambda name: object())
    assert interpreter() == sys.executable
    monkeypatch.setenv("R3_VLLM_PYTHON", "/some/python")
    assert interpreter() == "/some/python"


def test_a_server_that_will_not_stop_is_killed(own, tmp_path, monkeypatch):
    server = own("--stubborn")
    server.start()
    monkeypatch.setattr(vllm_server, "GRACE", 0.5)
    server.stop()
    assert gone(pids(tmp_path)[0])


def test_a_dead_server_is_an_error_and_the_next_engine_starts_it_again(
    command, tmp_path, monkeypatch
):
    monkeypatch.setenv("R3_VLLM_PYTHON", str(command))
    ends, log = frozenset([3]), tmp_path / "vllm.log"
    ours = ("some/model", "", f"--pids {tmp_path / 'pids'}", 8, log, ends)
    engine, server = vllm_engine(*ours), vllm_server.own_server(*ours[:1], *ours[2:5])
    [first] = pids(tmp_path)
    os.kill(first[0], signal.SIGKILL)
    server.process.wait(30)
    with pytest.raises(R3Error, match="does not answer.*run again: the run resumes"):
        engine.generate(PROMPTS, 1, SamplingParams(4))
    vllm_engine(*ours).generate(PROMPTS, 1, SamplingParams(4))
    assert gone(first) and len(pids(tmp_path)) == 2
    server.stop()


def test_several_processes_start_no_server_each(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(R3Error, match="several processes share vLLM servers.*servers=ADDRESS"):
        vllm_engine("some/model", "", "", 8, tmp_path / "log", frozenset([3]))


def test_a_server_that_cannot_start_says_why(own):
    with pytest.raises(
        R3Error, match=r"does not start, the last lines of .*no weights \| Engine core"
    ) as caught:
        own("--broken").start()
    assert "\n" not in str(caught.value)


def test_a_server_that_is_never_ready_is_stopped(own, monkeypatch):
    monkeypatch.setattr(vllm_server, "STARTUP", 1.0)
    server = own("--silent")
    with pytest.raises(R3Error, match="not up after 1 s: see .*vllm.log"):
        server.start()
    assert server.process is None


def test_a_missing_interpreter_is_refused():
    with pytest.raises(
        R3Error, match="no Python that has vLLM at nowhere/python: .*, or name another in R3_VLLM_PYTHON"
    ):
        Server("m", "nowhere/python")


@pytest.mark.skipif(not vllm_server.WITH_US, reason="there is no setpriv here")
def test_the_server_ends_when_we_are_killed(command, tmp_path):
    code = "import sys, time; from r3lib.engines.vllm_server import Server\n"
    code += "Server('m', sys.argv[1], log=sys.argv[2], options=['--pids', sys.argv[3]]).start(); time.sleep(60)"
    arguments = [str(command), str(tmp_path / "log"), str(tmp_path / "pids")]
    parent = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=HERE.parent)
    deadline = time.monotonic() + 120
    while not ((tmp_path / "pids").exists() and pids(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    [found] = pids(tmp_path)
    parent.kill()
    parent.wait()
    assert gone(found[:1])
    os.kill(found[1], signal.SIGKILL)  # a child of the fake, which vLLM would end itself


# training


class OffPolicy(ScriptedEngine):
    """A scripted engine whose log-probs are `shift` below those of `model`."""

    def __init__(self, tokenizer, model, shift):
        super().__init__(tokenizer)
        self.model, self.shift = model, shift

    def generate(self, prompts, n, sampling, seeds=None):
        groups = super().generate(prompts, n, sampling, seeds)
        return [[self._scored(p, c) for c in group] for p, group in zip(prompts, groups)]

    @torch.no_grad()
    def _scored(self, prompt, completion):
        logits = self.model(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1]
        chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor(completion.ids)[:, None])[
            :, 0
        ]
        return replace(completion, logprobs=(chosen - self.shift).tolist())


class Remote(OffPolicy):
    """The same in another process: it keeps the name and the weights of each adapter that it was given."""

    def __init__(self, *args):
        super().__init__(*args)
        self.synced = []

    def sync(self, adapter):
        self.synced.append(adapter and (adapter.name, load_file(adapter / "adapter_model.safetensors")))


class Gradients(TrainerCallback):
    """Keeps the gradient before each optimizer step."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.seen.append(torch.cat(grads).clone())


def train(tiny, tokenizer, folder, kind, shift, **changes):
    """Train with an engine of `kind` on an adapted tiny model; return engine, trainer, gradients, metrics."""
    model, task, gradients = tiny(), CoinTask(count=3, largest=20), Gradients()
    engine = kind(tokenizer, model, shift)
    trainer = R3Trainer(
        model, small_config(folder, **changes), task=task, failures=coin_failures(tokenizer, 4, task),
        peft_config=small_lora(), processing_class=tokenizer, engine=engine, callbacks=[gradients],
    )  # fmt: skip
    trainer.train()
    lines = metrics_file(trainer.args).read_text().splitlines()
    return engine, trainer, gradients.seen, [json.loads(line) for line in lines]


def test_each_rollout_samples_from_the_adapter_as_it_stands(tiny, tokenizer, tmp_path):
    engine, trainer, _, _ = train(tiny, tokenizer, tmp_path, Remote, 0.0, max_steps=3)
    assert [name for name, _ in engine.synced] == ["step-000000", "step-000001", "step-000002"]
    assert [folder.name for folder in (tmp_path / "synced").iterdir()] == ["step-000002"], (
        "older ones are removed"
    )
    raised = [
        sum(float(w.abs().sum()) for n, w in weights.items() if "lora_B" in n)
        for _, weights in engine.synced
    ]
    assert raised[0] == 0 < raised[1] != raised[2]


@pytest.mark.parametrize("given", [True, False])
def test_a_given_adapter_samples_what_is_mined(tiny, tokenizer, tmp_path, given):
    """A fresh one changes nothing yet, so that the model's own failures are mined."""
    model = get_peft_model(tiny(), small_lora(init_lora_weights=False)) if given else tiny()
    engine = Remote(tokenizer, model, 0.0)
    rows = [{"prompt": [{"role": "user", "content": f"Say {n}."}]} for n in range(4)]
    R3Trainer(
        model, small_config(tmp_path, max_attempt_length=8), verifier=lambda text, row: False, train_dataset=rows,
        peft_config=None if given else small_lora(), processing_class=tokenizer, engine=engine,
    )  # fmt: skip
    assert [synced and synced[0] for synced in engine.synced] == (["step-000000"] if given else [None])


def test_after_training_and_after_a_resume_of_all_of_it_the_sampler_is_of_the_last_weights(
    tiny, tokenizer, tmp_path
):
    kept = {"save_strategy": "steps", "save_steps": 1}
    _, trainer, _, _ = train(tiny, tokenizer, tmp_path, Remote, 0.0, **kept)
    trained = {n: p.detach() for n, p in trainer.model.named_parameters() if "lora_B" in n}
    again = R3Trainer(
        tiny(), small_config(tmp_path, **kept), task=trainer.task, failures=trainer.failures,
        peft_config=small_lora(), processing_class=tokenizer, engine=Remote(tokenizer, tiny(), 0.0),
    )  # fmt: skip
    again.resume_or_train()
    for one in (trainer, again):
        before = len(one._engine.synced)
        one.sampler()
        name, weights = one._engine.synced[-1]
        assert (len(one._engine.synced), name) == (before + 1, "step-000002")
        for key, value in trained.items():
            torch.testing.assert_close(weights[key.replace(".default", "")], value)


@pytest.mark.parametrize("mask", ["reflection", "reflection+retry"])
@pytest.mark.parametrize(("ratio", "weight"), [(1.0, 1.0), (2.0, 2.0), (0.5, 0.5), (10.0, 3.0)])
def test_the_loss_is_weighed_by_the_truncated_importance_ratio(
    tiny, tokenizer, tmp_path, ratio, weight, mask
):
    options = dict(max_steps=1, mask=mask)
    *_, [plain], [before] = train(
        tiny, tokenizer, tmp_path / "own", OffPolicy, log(ratio), **options
    )
    *_, [weighed], [after] = train(
        tiny, tokenizer, tmp_path / "remote", Remote, log(ratio), **options
    )
    assert plain.norm() > 0
    torch.testing.assert_close(weighed, plain * weight, rtol=1e-3, atol=1e-6)
    assert (
        after["importance_ratio"] == pytest.approx(weight, rel=1e-4)
        and "importance_ratio" not in before
    )


def test_a_remote_engine_without_an_adapter_to_train_is_refused(tiny, tokenizer, tmp_path):
    model, failures = tiny(), coin_failures(tokenizer, 2)
    with pytest.raises(R3Error, match="takes adapters.*give a peft_config"):
        R3Trainer(
            model, small_config(tmp_path), task=CoinTask(count=3, largest=20), failures=failures,
            processing_class=tokenizer, engine=Remote(tokenizer, model, 0.0),
        )  # fmt: skip
