"""One training in as many processes as started it: writes gradients, places, samples. Run by test_processes.py."""

import sys

import torch
from conftest import BASE_MODEL, CoinTask, ScriptedEngine, base_model, coin_failures, small_config
from transformers import AutoTokenizer, TrainerCallback

from r3lib import trainer as r3


class Watch(TrainerCallback):
    """Gradients before each step of the optimizer."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        named = ((n.removeprefix("module."), p) for n, p in model.named_parameters())
        self.steps.append({n: p.grad.clone() for n, p in named if p.requires_grad})


def main(folder: str, steps: str, micro: str, resume: str) -> None:
    torch.manual_seed(0)
    tokenizer, watch, seen = AutoTokenizer.from_pretrained(BASE_MODEL), Watch(), []
    args = small_config(
        f"{folder}/run", max_steps=int(steps), failures_per_step=4, per_device_train_batch_size=int(micro),
        save_strategy="steps", save_steps=1, ddp_backend="gloo", learning_rate=1e-3,
    )  # fmt: skip
    original = r3.rollout

    def watched(prompts, trainer):
        output = original(prompts, trainer)
        rows = zip((p[0]["place"] for p in prompts), output["completion_ids"], output["reward"])
        seen.extend((trainer.state.global_step, *row) for row in rows)
        return output

    r3.rollout = watched
    trainer = r3.R3Trainer(
        base_model(), args, task=CoinTask(count=3, largest=20), failures=coin_failures(tokenizer, 12),
        processing_class=tokenizer, engine=ScriptedEngine(tokenizer), callbacks=[watch],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=r3.last_checkpoint(args.output_dir) if resume == "resume" else None)
    weights = {n: p.detach().clone() for n, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}
    rank = trainer.accelerator.process_index
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    kept = {"gradients": watch.steps, "seen": seen, "weights": weights, "log": log}
    torch.save(kept, f"{folder}/rank-{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
