"""Pretraining of the embedded model on a tiny scale: resuming, loss, tokenizer, schedule; and the model that ships."""

import json
from dataclasses import asdict
from itertools import islice

import pretrain
import pytest
import torch
from conftest import BASE_MODEL
from hypothesis import given
from hypothesis import strategies as st
from pretrain import (
    PretrainConfig,
    batches,
    build_model,
    conversations,
    encode,
    loss_of,
    rate,
    save_state,
    train_tokenizer,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from r3lib.chat import Chat
from r3lib.errors import R3Error

TINY = PretrainConfig(steps=30, batch=4, warmup=5, vocabulary=400, hidden=64, layers=1, checkpoint_every=10)


@pytest.fixture(scope="module")
def words():
    """A small tokenizer, trained as the embedded one is."""
    return train_tokenizer(TINY, samples=300)


@pytest.fixture
def train(words, monkeypatch):
    """A function that pretrains to a folder and is killed at the call of `loss_of` or `save_state` given."""

    def train(out, loss_call=None, save_call=None):
        with monkeypatch.context() as patch:
            patch.setattr(pretrain, "train_tokenizer", lambda config: words)
            patch.setattr(pretrain, "loss_of", killed_at(loss_call, loss_of))
            patch.setattr(pretrain, "save_state", killed_at(save_call, save_state))
            pretrain.pretrain(out, TINY, log=lambda line: None)

    return train


def killed_at(call, function):
    calls = []

    def wrapped(*args, **options):
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **options)

    return wrapped


@pytest.mark.parametrize("changed", [["--steps", "2"], ["--seed", "1"]])
def test_another_model_does_not_take_the_place_of_the_shipped_one(monkeypatch, capsys, changed):
    monkeypatch.setattr("sys.argv", ["pretrain.py", *changed])
    monkeypatch.setattr(pretrain, "pretrain", None)
    with pytest.raises(SystemExit):
        pretrain.main()
    assert "give --out FOLDER" in capsys.readouterr().err


def assert_same_weights(a, b):
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def whole(train, tmp_path):
    train(tmp_path / "whole")
    return tmp_path / "whole"


def test_a_killed_pretraining_goes_on_to_the_very_same_weights(train, whole, tmp_path):
    """Killed in step 24, after the checkpoint of step 20; and in saving the state of the last step."""
    for name, kill in (("learning", dict(loss_call=24)), ("saving", dict(save_call=3))):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / name, **kill)
        assert torch.load(tmp_path / name / "state" / "state.pt")["step"] == 20
        train(tmp_path / name)
        assert_same_weights(tmp_path / name, whole)


def test_a_finished_pretraining_is_not_repeated(train, whole):
    before = (whole / "model.safetensors").read_bytes()
    train(whole, loss_call=1)
    assert (whole / "model.safetensors").read_bytes() == before


def test_a_checkpoint_of_other_settings_is_refused_and_the_model_kept(train, whole):
    before = (whole / "model.safetensors").read_bytes()
    with pytest.raises(R3Error, match="state.pt is of a training with other settings: delete it"):
        pretrain.pretrain(whole, PretrainConfig(seed=7))
    assert (whole / "model.safetensors").read_bytes() == before


def test_until_it_has_ended_the_model_that_was_there_stays(train, tmp_path):
    (tmp_path / "model.safetensors").write_text("the old one")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, loss_call=24)
    assert (tmp_path / "model.safetensors").read_text() == "the old one"


def test_muon_moves_matrices_as_torchs_own_does():
    """Which works in bf16: directions agree to its precision."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(48, 16)), torch.nn.Parameter(torch.ones(16, 48))] for _ in "ab")
    options = dict(weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    optims = pretrain.Muon(ours, lr=0.1), torch.optim.Muon(theirs, lr=0.1, **options)
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optim in optims:
            optim.step()
    for a, b in zip(ours, theirs):
        assert (a - b).norm() < 0.03 * (a - 1).norm()


def test_what_is_saved_loads_with_plain_transformers(whole, words):
    tokenizer, model = AutoTokenizer.from_pretrained(whole), AutoModelForCausalLM.from_pretrained(whole)
    assert Chat(tokenizer).end_id == tokenizer.eos_token_id == model.config.eos_token_id
    assert model.config.vocab_size == len(tokenizer) == TINY.vocabulary
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    text = "<answer>(14 / 7) + 13</answer>"
    assert tokenizer.encode(text) == words.encode(text)
    record = json.loads((whole / "pretraining.json").read_text())
    assert record["config"]["steps"] == TINY.steps and record["config"]["seed"] == TINY.seed


def test_pretraining_lowers_the_loss(whole, words):
    torch.manual_seed(0)
    rows = [encode(turns, words) for turns in islice(conversations(9), 16)]
    before, after = (
        loss_of(m, rows, 1.0) for m in (build_model(TINY, words), AutoModelForCausalLM.from_pretrained(whole))
    )
    assert after < 0.8 * before


def test_only_own_turns_carry_loss_and_their_ends_do_too(words):
    turns = [("user", "3 and 4?", False), ("assistant", "bad", False), ("user", "no", False), ("assistant", "7", True)]
    ids, learn = encode(turns, words)
    assert words.decode([i for i, own in zip(ids, learn) if own]) == "7<|end|>"
    assert len(ids) == len(learn)
    assert words.decode(ids) == "<|user|>3 and 4?<|end|><|assistant|>bad<|end|><|user|>no<|end|><|assistant|>7<|end|>"


def test_the_corpus_is_encoded_just_as_an_episode_is_joined(words):
    chat = Chat(words)
    for turns in islice(conversations(0), 60):
        ids = chat.prompt([{"role": "user", "content": turns[0][1]}])
        for (_, reply, _), (_, text, _) in zip(turns[1::2], turns[2::2]):
            ids = chat.follow(ids, words.encode(reply), text)
        assert encode(turns, words)[0] == [*ids, *words.encode(turns[-1][1]), chat.end_id]


def test_the_loss_is_the_summed_surprise_of_learned_tokens_over_a_constant(words):
    torch.manual_seed(0)
    model = build_model(TINY, words)
    rows = [encode(turns, words) for turns in islice(conversations(0), 5)]
    surprise = 0.0
    for ids, learn in rows:  # one at a time: no padding
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        surprise -= sum(logprobs[at - 1, ids[at]].item() for at in range(1, len(ids)) if learn[at])
    assert loss_of(model, rows, tokens=120.0).item() == pytest.approx(surprise / 120, rel=1e-5)


def test_batches_resume_anywhere_and_hold_every_conversation_once(words):
    config = PretrainConfig(steps=40, batch=2)
    every = list(batches(config, words, 0))
    assert len(every) == 40 and all(len(rows) == 2 for rows in every)
    assert list(batches(config, words, 21)) == every[21:]
    seen = sorted(row[0] for rows in every[:32] for row in rows)
    assert seen == sorted(encode(turns, words)[0] for turns in islice(conversations(0), 64))


def test_the_learning_rate_warms_up_holds_and_falls_to_zero():
    config = PretrainConfig(steps=1000, warmup=100, decay=0.4)
    assert [rate(step, config) for step in (0, 49, 99)] == pytest.approx([0.01, 0.5, 1.0])
    assert {rate(step, config) for step in range(99, 601)} == {1.0}
    assert [rate(step, config) for step in (700, 800, 999)] == pytest.approx([0.75, 0.5, 0.0025])


def test_digits_and_tags_stand_alone(words, tokenizer):
    for one in (words, tokenizer):
        pieces = one.convert_ids_to_tokens(one.encode("<answer>(128 * 7) - 90</answer>"))
        assert pieces[0] == "<answer>" and pieces[-1] == "</answer>"
        assert "".join(piece for piece in pieces if piece.isdigit()) == "128790"
        assert all(len(piece) == 1 for piece in pieces if any(c.isdigit() for c in piece))
        assert (
            sum("<" in token for token in one.get_vocab() if token.isascii() and len(token) > 1 and "|" not in token)
            <= 2
        )


@given(text=st.text())
def test_any_text_round_trips(words, text):
    assert words.decode(words.encode(text, add_special_tokens=False)) == text


def test_the_tokenizer_is_a_function_of_the_seed():
    first, second = (train_tokenizer(TINY, samples=100) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()


def test_the_model_that_ships_is_small_and_knows_its_template(model, tokenizer):
    """At most 8 MB of weights and 4M parameters; its own encoding is what it was trained on; it has a card."""
    assert (BASE_MODEL / "README.md").exists()
    assert json.loads((BASE_MODEL / "pretraining.json").read_text())["config"] == asdict(PretrainConfig())
    parameters = sum(p.numel() for p in model.parameters())
    assert 1e6 <= parameters <= 4e6 and 2 * parameters <= 8e6
    assert Chat(tokenizer).end_ids == {tokenizer.eos_token_id}
    rows = [encode(turns, tokenizer) for turns in islice(conversations(123), 64)]
    with torch.no_grad():
        surprise = loss_of(model, rows, tokens=sum(sum(learn) for _, learn in rows)).item()
    assert surprise < 1.0  # nats a learned token; a model that did not learn is near 6
