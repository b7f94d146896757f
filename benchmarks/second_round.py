"""A second round of R3 (attempt 5 in docs/results.md): failures of a trained policy, and on from it.

    python benchmarks/second_round.py ADAPTER

The failures that a training uses are the untrained model's, as in the paper. What training does to
first tries does not show in them. Here ADAPTER's own failures on the same training problems are
trained on, from ADAPTER's weights. Prints the new adapter's folder, under results/qwen-again.
"""

import argparse
from functools import cached_property
from pathlib import Path

from r3lib import Study
from r3lib.files import folder_hash
from r3lib.provenance import restart_with_allocator


class SecondRound(Study):
    """A study whose model has the adapter in the folder `start` on it."""

    start: Path

    def model(self, adapter=None, trainable=False):
        return super().model(adapter or self.start, trainable)

    def lora(self):
        return None  # the model has its adapter

    @cached_property
    def model_hash(self):
        return f"{super().model_hash} {folder_hash(self.start)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", type=Path)
    study = SecondRound(
        "qwen", "data/arithmetic.py:Arithmetic", name="qwen-again", max_steps=12,
        learning_rate=1e-4, lr_scheduler_type="constant_with_warmup", warmup_steps=3,
        failures_per_step=32, temperature=1.5, sample_batch=256,
    )  # fmt: skip
    study.start = parser.parse_args().adapter
    print(study.train(1))


if __name__ == "__main__":
    restart_with_allocator()
    main()
