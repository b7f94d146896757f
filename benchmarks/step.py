"""One R3 step of `R3Trainer` beside stock TRL's, in one run: seconds by part, tokens, memory.

    python benchmarks/step.py [--model base_model] [--groups 32] [--group 8] [--dtype float32]

Stock is TRL's `GRPOTrainer` with the rollout that one writes first: two calls of `generate`, the
retry appended to the reflection, `env_mask` over what is not trained. Both get the same failures,
limits, adapter and dtype. They take turns, each in a process of its own, so that a noisy machine
slows both and peaks of memory are apart; the ratios are the result.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib

import torch
from peft import LoraConfig
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOTrainer

from r3lib import R3Config, R3Trainer, Verdict
from r3lib.chat import Chat
from r3lib.engines.transformers import TransformersEngine
from r3lib.provenance import peak_memory_gib
from r3lib.sampler import Limits, RolloutSampler, mine_failures
from r3lib.tasks import CountdownTask, load_task
from r3lib.weights import locate

MASK = {"stock": "reflection+retry", "ours": "reflection"}


def main() -> None:
    """Measure in turns; print a line a turn, then the medians and their ratios."""
    options = arguments()
    if options.run:
        print(json.dumps(measured(options)))
        return
    found = {"stock": [], "ours": []}
    for turn in range(options.repeats):
        for kind, values in found.items():
            values.append(in_a_process(kind))
            print(f"{turn} {kind:5} {line(values[-1])}", flush=True)
    medians = {
        kind: {name: statistics.median(v[name] for v in values) for name in values[0]}
        for kind, values in found.items()
    }
    for kind, values in medians.items():
        print(f"median {kind:5} {line(values)}")
    shared = ("step", "sampling", "learning", "peak_gib")
    ratios = {name: medians["stock"][name] / medians["ours"][name] for name in shared}
    print(f"stock / ours {line(ratios)}")
    if torch.cuda.is_available() or arguments().beta:  # what follows is of a CPU, without a KL term
        return
    speed = rates()
    print(f"this machine {line(speed)}")
    for kind, values in medians.items():
        print(f"of it {kind:5} {line(shares(values, speed, options.dtype))}")


def rates() -> dict[str, float]:
    """Products in each dtype, in GFLOP/s, and reading of memory, in GB/s: the best of five."""
    size = 2048
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(size, size, dtype=dtype)
        found[f"{dtype} gflops"] = 2 * size**3 / best(lambda: square @ square) / 1e9  # noqa: B023
    large = torch.ones(2**27)  # 512 MiB, more than any cache
    return found | {"read gb/s": large.nbytes / best(large.sum) / 1e9}


def best(run) -> float:
    """Seconds of the fastest of five runs, after one to warm up."""
    run()
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def shares(values: dict, speed: dict, dtype: str) -> dict[str, float]:
    """Parts of the machine's speed that a step reached, and tokens a second.

    2 operations a parameter and token forward, 4 with a LoRA's backward, as if the head were there
    for every token and attention for none; a pass of sampling reads each weight once.
    """
    products = speed[f"torch.{dtype} gflops"] * 1e9
    weights = values["parameters"] * getattr(torch, dtype).itemsize
    sampling, learning = values["sampling"], values["learning"]
    return {
        "sampling_products": 2 * values["parameters"] * values["computed"] / sampling / products,
        "sampling_reads": weights * values["passes"] / sampling / (speed["read gb/s"] * 1e9),
        "learning_products": 4 * values["parameters"] * values["learned"] / learning / products,
        "computed_per_s": values["computed"] / sampling,
        "learned_per_s": values["learned"] / learning,
    }


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="base_model", help="as in a profile")
    parser.add_argument("--task", default="countdown")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--coin", action="store_true", help="a verdict by chance: every group learns")
    parser.add_argument("--beta", type=float, default=0.0, help="of the KL term")
    parser.add_argument("--run", choices=list(MASK), help=argparse.SUPPRESS)
    for name, default in (
        ("groups", 32), ("group", 8), ("attempt", 64), ("reflection", 96), ("retry", 64),
        ("rows", 64), ("steps", 2), ("repeats", 3), ("context", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args(given)


def in_a_process(kind: str, given: list[str] | None = None) -> dict[str, float]:
    """What `measured` gives in a process of its own; `given`: its options, by default ours."""
    given = sys.argv[1:] if given is None else given
    command = [sys.executable, __file__, "--run", kind, *given]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def line(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def measured(options) -> dict[str, float]:
    """Seconds of one step, the first left out, and the peak of memory in GiB."""
    path = locate(options.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, options.dtype))
    return step(model.cuda() if torch.cuda.is_available() else model, tokenizer, options)


def step(model, tokenizer, options) -> dict[str, float]:
    """The same of a model that is loaded."""
    torch.manual_seed(0)
    parameters = model.num_parameters()  # without the adapter
    task = Coin(options.context) if options.coin else load_task(
        options.task, {"countdown": {"source": "generator", "count": 3, "largest": 20}}
    )  # fmt: skip
    failures = mined(model, tokenizer, task, options)
    with tempfile.TemporaryDirectory() as folder:
        trainer = (StockTrainer if options.run == "stock" else R3Trainer)(
            model=model,
            args=config(folder, options),
            task=task,
            failures=failures,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
            processing_class=tokenizer,
        )
        counts = Counts(model, trainer)
        trainer.train()
        steps = [e for e in trainer.state.log_history if "frac_reward_zero_std" in e][1:]
    names = ("seconds_sampling", "seconds_learning", "reflection_tokens", "frac_reward_zero_std")
    sampling, learning, tokens, dead = (statistics.mean(s[name] for s in steps) for name in names)
    return {
        "step": sampling + learning,
        "sampling": sampling,
        "learning": learning,
        "peak_gib": peak_memory_gib(),
        "reflection_tokens": tokens,
        "prompt_tokens": statistics.mean(len(f.prompt_ids) + len(f.attempt_ids) for f in failures),
        "parameters": parameters,
        "dead": dead,
        **{name: value / options.steps for name, value in counts.since_first.items()},
    }


class Counts(TrainerCallback):
    """Tokens `computed` in `passes` of sampling and tokens `learned` from, after the first step."""

    def __init__(self, model, trainer):
        self.since_first = dict.fromkeys(("computed", "passes", "learned"), 0)
        self.steps = 0
        model.get_input_embeddings().register_forward_pre_hook(self.count)
        trainer.add_callback(self)

    def count(self, _module, arguments) -> None:
        if self.steps:
            tokens = arguments[0].numel()
            if torch.is_grad_enabled():
                self.since_first["learned"] += tokens
            else:
                self.since_first["computed"] += tokens
                self.since_first["passes"] += 1

    def on_step_end(self, *_args, **_options) -> None:
        self.steps += 1


class Coin(CountdownTask):
    """Countdown whose verdict is a checksum's parity, so that any model's groups have variance.

    `context`: words before the question, for a longer prompt.
    """

    def __init__(self, context: int = 0):
        super().__init__(count=3, largest=20)
        self.context = context

    def messages(self, problem):
        (asked,) = super().messages(problem)
        return [{**asked, "content": "word " * self.context + asked["content"]}]

    def verify(self, text, problem):
        ok = zlib.crc32(text.encode()) % 2 == 0
        return Verdict(ok, "ok" if ok else "missed_target")


def mined(model, tokenizer, task, options) -> list:
    """The first failures of the model, as many as a step takes, each of its own problem."""
    engine = TransformersEngine(model, tokenizer, 64)
    sampler = RolloutSampler(engine, Chat(tokenizer), task, Limits(options.attempt))
    problems = task.problems("train", 4 * options.groups, seed=0)
    return mine_failures(sampler, problems, k=1, temperature=0.0)[: options.groups]


def config(folder: str, options) -> R3Config:
    return R3Config(
        folder, max_steps=1 + options.steps, failures_per_step=options.groups,
        num_generations=options.group, per_device_train_batch_size=options.rows, seed=1,
        max_completion_length=options.reflection, max_retry_length=options.retry,
        max_attempt_length=options.attempt, retry_temperature=1.0, learning_rate=1e-4,
        lr_scheduler_type="constant", warmup_steps=0, beta=options.beta, loss_type="dr_grpo", mask=MASK[options.run],
        save_strategy="no", report_to="none", disable_tqdm=True,
        bf16=options.dtype == "bfloat16", fp16=False,
    )  # fmt: skip


class StockTrainer(R3Trainer):
    """R3Trainer's checks and metrics around TRL's own rollout by `generate` and learning pass."""

    _prepare_inputs = GRPOTrainer._prepare_inputs
    _compute_loss = GRPOTrainer._compute_loss
    _get_per_token_logps_and_entropies = GRPOTrainer._get_per_token_logps_and_entropies

    def __init__(self, **options):
        super().__init__(**options)
        self.rollout_func = stock_rollout
        torch.backends.cuda.enable_cudnn_sdp(True)  # as torch has it


@torch.no_grad()
def stock_rollout(prompts: list, trainer) -> dict:
    """Two calls of `generate`, each on the whole conversation of every row."""
    started = time.perf_counter()
    args, sampler = trainer.args, trainer.sampler()
    failures = [trainer.failures[trainer.order[prompt[0]["place"]]] for prompt in prompts]
    first = [sampler.reflection_prompt(failure) for failure in failures]
    reflections = generated(trainer, first, args.max_completion_length, args.temperature)
    again = [sampler.retry_prompt(*pair) for pair in zip(failures, reflections)]
    retries = generated(trainer, again, args.max_retry_length, args.retry_temperature)
    texts = [sampler.chat.text(ids) for ids in retries]
    verdicts = [trainer.task.verify(*pair) for pair in zip(texts, (f.problem for f in failures))]
    rest = [turn[len(prompt) :] + ids for turn, prompt, ids in zip(again, first, retries)]
    trained = [len(ids) for ids in reflections]
    trainer.r3_metrics = {
        "retry_success": statistics.mean(v.ok for v in verdicts),
        "truncated_share": 0.0,
        "reflection_tokens": statistics.mean(trained),
        "seconds_sampling": time.perf_counter() - started,
    }
    return {
        "prompt_ids": first,
        "completion_ids": rest,
        "logprobs": None,
        "env_mask": [[1] * n + [0] * (len(ids) - n) for n, ids in zip(trained, rest)],
        "reward": [verdict.reward for verdict in verdicts],
    }


def generated(trainer, prompts: list[list[int]], longest: int, temperature: float) -> list:
    """What `generate` samples after each prompt, up to its end token."""
    model, ends = trainer.accelerator.unwrap_model(trainer.model), sorted(trainer._chat.end_ids)
    width = max(map(len, prompts))
    ids = pad_sequence([torch.tensor(p[::-1]) for p in prompts], batch_first=True).flip(1)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    model.eval()
    out = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=longest,
        eos_token_id=ends, pad_token_id=ends[0], top_k=0, top_p=1.0, **sampling,
    )[:, width:]  # fmt: skip
    model.train()
    rows = []
    for row in out.tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        rows.append(row[:end])
    return rows


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
