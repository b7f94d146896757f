"""A policy of profile qwen once more, with room for the working in every answer.

    python benchmarks/room.py vanilla
    python benchmarks/room.py results/qwen/adapters/arithmetic-r3-0 [--problems 256]
    python benchmarks/room.py vanilla --steps

In `data/arithmetic.py` an answer is the number alone, of up to 16 tokens. Here it has up to 96 and
its last number counts, in first tries and in every second try; all else is the same. Is a
reflection then still worth what it was? With --steps there is a first try alone, of up to 256
tokens, and the question asks for the working: what can the model do without being told that it
failed? Episodes go to results/qwen-room.
"""

import argparse
import re
from pathlib import Path

from r3lib import (
    Limits,
    Policy,
    RolloutSampler,
    Study,
    TransformersEngine,
    Verdict,
    accuracy_table,
    load_task,
    run_episodes,
)
from r3lib.conditions import CONDITIONS
from r3lib.config import ROOT

Arithmetic = type(load_task("data/arithmetic.py:Arithmetic"))
ROOM = 96  # tokens of an answer
STEPS = 256  # of one that is asked for its working


class Roomy(Arithmetic):
    """The same problems and questions; an answer may have its working."""

    def verify(self, text, problem):
        numbers = re.findall("-?[0-9]+", text.replace(",", ""))
        if not numbers:
            return Verdict(False, "no_number")
        ok = int(numbers[-1]) == problem.value
        return Verdict(ok, "ok" if ok else "wrong_number")


class Stepwise(Roomy):
    """The same problems; the question asks for the working."""

    def messages(self, problem):
        asked = f"Compute {problem.id}. Work it out step by step, and end with the number."
        return [{"role": "user", "content": asked}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("policy", help="vanilla, or the folder of an adapter")
    parser.add_argument("--problems", type=int, default=480)
    parser.add_argument("--steps", action="store_true", help="first tries that may work it out")
    options = parser.parse_args()
    untrained = options.policy == "vanilla"
    study = Study("qwen", Stepwise() if options.steps else Roomy())
    model = study.model(None if untrained else Path(options.policy))
    engine = TransformersEngine(model, study.tokenizer, end_ids=study.chat.end_ids)
    room, conditions = (STEPS, ["first_try"]) if options.steps else (ROOM, CONDITIONS)
    limits = Limits(room, study.profile.sampling["max_completion_length"], room)
    sampler = RolloutSampler(engine, study.chat, study.task, limits)
    policy = Policy("vanilla" if untrained else "r3", model=study.profile.model)
    out = ROOT / "results" / "qwen-room" / (policy.name + "-steps" * options.steps)
    problems = study.problems("test", options.problems)
    options = {"conditions": conditions, "shard": 64, "log": print}
    print(accuracy_table(run_episodes(sampler, problems, policy, out, **options)))


if __name__ == "__main__":
    main()
