"""A second round of R3: failures mined again, from a trained policy, and training that goes on from it.

    python benchmarks/second_round.py ADAPTER --seed 1 [--set max_steps=8 learning_rate=1.0e-4]

The failures that a training uses are the untrained model's, as in the paper. What training does to
first tries does not show in them. Here ADAPTER's own failures on the same training problems are
trained on, from ADAPTER's weights. Prints the new adapter's folder, under results/qwen-again.
"""

import argparse
from functools import cached_property
from pathlib import Path

import yaml

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
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    settings = {"name": "qwen-again", "max_steps": 8, "learning_rate": 1.0e-4, "save_steps": 1}
    settings |= yaml.safe_load("\n".join(pair.replace("=", ": ", 1) for pair in options.set)) or {}
    study = SecondRound("qwen", "data/arithmetic.py:Arithmetic", **settings)
    study.start = options.adapter
    print(study.train(options.seed))


if __name__ == "__main__":
    restart_with_allocator()
    main()
