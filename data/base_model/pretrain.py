"""Pretrain the embedded model from a seed, on conversations about both tasks.

    python data/base_model/pretrain.py [--out FOLDER] [--seed 0] [--steps 10000]

It takes an hour or more; a killed run resumes when it is repeated.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from random import Random

import corpus_countdown
import corpus_function_calling
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from r3lib.errors import R3Error
from r3lib.tasks import CountdownTask, FunctionCallingTask
from r3lib.tasks.function_calling_tools import WORDS

HERE = Path(__file__).resolve().parent
END, PAD = "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LEARNED = 30.0  # learned tokens of a conversation, about: the constant by which the loss is divided
LOG_EVERY = 50  # steps


@dataclass(frozen=True)
class PretrainConfig:
    """One setting of the pretraining; `steps` batches of `batch` conversations."""

    seed: int = 0
    steps: int = 10_000
    batch: int = 48
    lr: float = 4e-3
    decay: float = 0.4  # last share of the steps, over which the learning rate falls to zero
    warmup: int = 100
    vocabulary: int = 2000
    hidden: int = 128
    layers: int = 6
    checkpoint_every: int = 250


def main() -> int:
    """Pretrain as the command line says; return 0, or 2 for a stated error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder of the model (default: here)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=PretrainConfig.steps)
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps {options.steps} trains nothing: ask for at least 1")
    config = PretrainConfig(seed=options.seed, steps=options.steps)
    if options.out.resolve() == HERE and config != PretrainConfig():
        parser.error("this would replace the model that is shipped by another: give --out FOLDER")
    try:
        pretrain(options.out, config)
    except R3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def training_task() -> CountdownTask:
    """The embedded model's Countdown: 3 numbers up to 20, targets up to 99."""
    return CountdownTask(count=3, largest=20, largest_target=99)


def conversations(seed: int, start: int = 0) -> Iterator[list[tuple[str, str, bool]]]:
    """Yield conversation number `start`, `start` + 1, ... of the corpus.

    Odd ones are about Countdown. Of the even ones four in ten are exercises in arithmetic, the
    others about function calling. All problems are of the split "pretrain".
    """
    countdown, calling = training_task(), FunctionCallingTask()
    while True:
        random = Random(f"corpus/{seed}/{start}")
        if start % 2:
            yield corpus_countdown.conversation(countdown, random)
        elif start % 20 in (0, 6, 12, 18):
            yield corpus_function_calling.exercise(random)
        else:
            yield corpus_function_calling.conversation(calling, random)
        start += 1


def train_tokenizer(config: PretrainConfig, samples: int = 4000) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose tokens may span words; digits, <tags> and words of tools stand alone.

    So a tool's name shares its tokens with the words that ask for it.
    """
    words = "|".join(sorted({form for word in WORDS for form in (word, word.capitalize())}))
    alone = rf"</?\w+>|\d|\n|(?<![A-Za-z])(?:{words})(?![A-Za-z])"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(alone), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=200,
        show_progress=False,
    )
    corpus = islice(conversations(config.seed), samples)
    texts = (text for conversation in corpus for _, text, _ in conversation)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        chat_template=TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def encode(turns, tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation and, for each, whether it carries loss."""
    ids, learn = [], []
    for role, text, own in turns:
        body = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
        ids += [tokenizer.convert_tokens_to_ids(f"<|{role}|>")] + body
        learn += [False] + [own] * len(body)
    return ids, learn


def build_model(config: PretrainConfig, tokenizer) -> LlamaForCausalLM:
    """A small Llama with grouped-query attention and tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden,
            intermediate_size=3 * config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.hidden // 32,
            num_key_value_heads=config.hidden // 64,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batches(config: PretrainConfig, tokenizer, step: int) -> Iterator[list]:
    """Yield encoded batches from `step` on.

    The conversations of 16 batches are sorted by length and cut into batches, which are shuffled.
    """
    window = 16
    count = window * config.batch
    for block in range(step // window, math.ceil(config.steps / window)):
        corpus = islice(conversations(config.seed, block * count), count)
        rows = sorted((encode(turns, tokenizer) for turns in corpus), key=lambda row: len(row[0]))
        order = Random(f"order/{config.seed}/{block}").sample(range(window), window)
        for place, index in enumerate(order):
            if step <= block * window + place < config.steps:
                yield rows[index * config.batch : (index + 1) * config.batch]


def loss_of(model, rows, tokens: float) -> torch.Tensor:
    """Summed cross-entropy of the learned tokens of `rows`, divided by the constant `tokens`."""
    ids = pad_sequence([torch.tensor(ids) for ids, _ in rows], batch_first=True)
    learn = pad_sequence([torch.tensor(learn) for _, learn in rows], batch_first=True)[:, 1:]
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[learn]
    logits, targets = model.lm_head(hidden), ids[:, 1:][learn]
    return F.cross_entropy(logits, targets, reduction="sum") / tokens


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz steps (Jordan et al., 2024), for matrices.

    As torch.optim.Muon with its update scaled to AdamW's size, but in fp32 and with matrices of one
    shape together: its bf16 products one at a time take most of a training step on a CPU.
    """

    def __init__(self, matrices, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(matrices, defaults)

    @torch.no_grad()
    def step(self) -> None:
        """Update every matrix from its gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list] = {}
            for matrix in group["params"]:
                shapes.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in shapes.items():
                update = orthogonal(torch.stack([self._momentum(m, group) for m in matrices]))
                size = group["lr"] * 0.2 * max(shape) ** 0.5  # root mean square of AdamW's updates
                for matrix, change in zip(matrices, update):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=size)

    def _momentum(self, matrix, group) -> torch.Tensor:
        """The gradient of `matrix` with Nesterov's look ahead."""
        buffer = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
        buffer.lerp_(matrix.grad, 1 - group["momentum"])
        return matrix.grad.lerp(buffer, group["momentum"])


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps that bring the singular values of each matrix near 1.

    `x`: shape (n, rows, columns).
    """
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
    return x


def optimizers(model, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    return [
        Muon(matrices, lr=config.lr),
        torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, config: PretrainConfig) -> float:
    """Learning-rate factor: linear warm-up, constant, linear to zero in the last `decay` share."""
    left = (config.steps - step) / (config.decay * config.steps)
    return min(1.0, (step + 1) / config.warmup, left)


def pretrain(out: Path, config: PretrainConfig = PretrainConfig(), log=print) -> None:
    """Train, then save the model to `out`.

    A killed run goes on from its last checkpoint in `out`/state. Until a run has ended, what was in
    `out` before stays there. R3Error: the checkpoint is of another `config`.
    """
    state_file = out / "state" / "state.pt"
    state = load_state(state_file, config)
    torch.manual_seed(config.seed)
    tokenizer = train_tokenizer(config)
    model = build_model(config, tokenizer)
    optims = optimizers(model, config)
    step, lines = 0, []
    if state:
        model.load_state_dict(state["model"])
        for optim, saved in zip(optims, state["optimizers"]):
            optim.load_state_dict(saved)
        step, lines = state["step"], state["log"]
        log(f"resuming at step {step}")
    first, progress = step, Progress(config, log)
    model.train()
    for step, rows in enumerate(batches(config, tokenizer, first), first + 1):
        loss = learn_from(rows, model, optims, config, step - 1)
        progress.add(rows, loss)
        if step % LOG_EVERY == 0:
            lines.append({"step": step, "loss": round(progress.report(step, first), 4)})
        if step % config.checkpoint_every == 0 or step == config.steps:
            save_state(state_file, config, model, optims, step, lines)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    record = {"config": asdict(config), "log": lines}
    (out / "pretraining.json").write_text(json.dumps(record, indent=1))


def learn_from(rows, model, optims, config: PretrainConfig, step: int) -> float:
    """Update the model from a batch; return its loss, summed over the learned tokens."""
    for optim in optims:
        for group in optim.param_groups:
            group["lr"] = config.lr * rate(step, config)
    loss = loss_of(model, rows, tokens=config.batch * LEARNED)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optim in optims:
        optim.step()
        optim.zero_grad(set_to_none=True)
    return loss.item() * config.batch * LEARNED


class Progress:
    """The mean loss since the last report, and the pace."""

    def __init__(self, config: PretrainConfig, log):
        self.config, self.log, self.started = config, log, time.time()
        self.tokens, self.loss = 0, 0.0

    def add(self, rows, loss: float) -> None:
        """Count a batch and its summed loss."""
        self.tokens += sum(sum(learn) for _, learn in rows)
        self.loss += loss

    def report(self, step: int, first: int) -> float:
        """Log where the training, which began after step `first`, is; return the mean loss."""
        mean, steps = self.loss / self.tokens, self.config.steps
        pace = (time.time() - self.started) / (step - first)
        eta = pace * (steps - step) / 60
        self.log(f"step {step}/{steps}  loss {mean:.4f}  {pace:.2f} s/step  ETA {eta:.0f} min")
        self.tokens, self.loss = 0, 0.0
        return mean


def load_state(path: Path, config: PretrainConfig) -> dict | None:
    """The training state in `path`, None without one. R3Error: it is of another `config`."""
    if not path.exists():
        return None
    state = torch.load(path, weights_only=True)
    if state["config"] != asdict(config):
        why = f"{path} is of a training with other settings"
        raise R3Error(f"{why}: delete it, or train elsewhere (--out)")
    return state


def save_state(path: Path, config: PretrainConfig, model, optims, step: int, lines: list) -> None:
    """Write the training state aside and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "model": model.state_dict(),
        "optimizers": [optim.state_dict() for optim in optims],
        "step": step,
        "log": lines,
        "config": asdict(config),
    }
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


if __name__ == "__main__":
    sys.exit(main())
