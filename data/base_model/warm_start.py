"""A supervised start for a model that cannot do a task at all, written as a whole model folder.

    python data/base_model/warm_start.py --task countdown --out runs/smol-countdown
    r3 reproduce --profile smol --task countdown --set model=runs/smol-countdown

R3 rewards retries that succeed; where none does, there is nothing to reward. A LoRA learns the
task's generated conversations (TRL's SFTTrainer) and is merged; the folder, in fp32, loads with
plain transformers. With `--answers` it learns right first answers alone, so that whatever it writes
in a reflection is the model's own. `warm_start.json` has what the model was made from. A killed run
resumes when it is repeated.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import corpus_countdown
import corpus_function_calling
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from r3lib import doctor
from r3lib.chat import Chat
from r3lib.checkpoints import last_checkpoint
from r3lib.errors import R3Error
from r3lib.study import Study
from r3lib.tasks import Task
from r3lib.weights import compute_dtype, generation_config, load, precision, training_options

CORPORA = {"countdown": corpus_countdown, "function_calling": corpus_function_calling}
MICRO_BATCH = 4  # rows in a forward


def main() -> int:
    """Make a folder as the command line says; return 0, or 2 for a stated error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", required=True, choices=CORPORA)
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    parser.add_argument(
        "--profile", default="smol", help="names the model, task options, LoRA rank"
    )
    parser.add_argument(
        "--model", help="another model than the profile's, named as there"
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--batch", type=int, default=32, help=f"conversations a step, x {MICRO_BATCH}"
    )
    parser.add_argument("--answers", action="store_true", help="learn no reflection and no retry")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.batch < 1 or options.batch % MICRO_BATCH or options.steps < 1:
        parser.error(f"--steps: 1 or more; --batch: a multiple of {MICRO_BATCH}")
    try:
        chosen = {"model": options.model} if options.model else {}
        study = Study(options.profile, options.task, **chosen)
        doctor.model(doctor.Run(study.profile))
        names = ("steps", "learning_rate", "batch", "seed", "answers")
        settings = {name: getattr(options, name) for name in names}
        print(warm_start(study, options.out, **settings))
    except R3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def warm_start(
    study: Study,
    out: Path,
    steps: int,
    learning_rate: float,
    batch: int,
    seed: int,
    answers: bool = False,
    save_steps: int = 10,
) -> Path:
    """Train the `study`'s model on `steps` x `batch` conversations about its task; return `out`.

    A killed run resumes from its last checkpoint, one every `save_steps`; the folder comes last, by
    a rename. R3Error: `out` is there already, or the killed run had other settings.
    """
    if out.exists():
        raise R3Error(f"{out} is there already: delete it, or give another --out")
    work = out.with_name(f".{out.name}.tmp")
    note = {"model": study.profile.model, "model_hash": study.model_hash, "task": study.task.name}
    note["task_options"] = study.profile.task_options.get(study.task.name, {})
    note["lora"] = study.profile.lora
    note |= {"steps": steps, "learning_rate": learning_rate, "batch": batch, "seed": seed}
    note |= {"answers": answers, "dtype": study.profile.dtype}
    claim(work, note)
    settings = steps, learning_rate, batch, seed, save_steps
    args = config(work / "state", *settings, **precision(compute_dtype(study.dtype)))
    trainer = trainer_of(study, args, answers)
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    trainer.model.save_pretrained(work / "state" / "adapter")
    del trainer  # and its model, before another copy
    whole = AutoModelForCausalLM.from_pretrained(study.model_path, dtype=torch.float32)
    whole = PeftModel.from_pretrained(whole, work / "state" / "adapter")
    whole.merge_and_unload().save_pretrained(work)
    # a training may change ends and padding: these are the model's own
    generation_config(study.model_path).save_pretrained(work)
    AutoTokenizer.from_pretrained(study.model_path).save_pretrained(work)
    for weights in work.glob("*.safetensors"):  # written for their owner alone
        weights.chmod((work / "warm_start.json").stat().st_mode)
    shutil.rmtree(work / "state")
    work.rename(out)
    return out


def claim(work: Path, note: dict) -> None:
    """Write what is about to be made to `work`. R3Error: a killed run there had another `note`."""
    path = work / "warm_start.json"
    if path.exists() and json.loads(path.read_text()) != note:
        raise R3Error(f"{work} is of a run with other settings: delete it, or give another --out")
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(note, indent=1))


def config(
    folder: Path, steps: int, learning_rate: float, batch: int, seed: int, save_steps: int,
    **options,
) -> SFTConfig:
    """Settings of the training: a cosine to zero, on one GPU or the CPU."""
    args = SFTConfig(
        output_dir=str(folder), max_steps=steps, learning_rate=learning_rate, seed=seed,
        lr_scheduler_type="cosine", warmup_steps=0.05, max_length=None,
        per_device_train_batch_size=MICRO_BATCH, gradient_accumulation_steps=batch // MICRO_BATCH,
        logging_steps=1, save_steps=save_steps, save_total_limit=1, report_to="none",
        **(training_options() | options),
    )  # fmt: skip
    args._n_gpu = min(1, args.n_gpu)  # a process trains on one GPU, however many it sees
    return args


def trainer_of(study: Study, args: SFTConfig, answers: bool = False) -> SFTTrainer:
    """The trainer, with as many conversations as `args` has steps for."""
    count = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps
    data = Dataset.from_list(list(examples(study.task, study.chat, count, args.seed, answers)))
    set_seed(args.seed)  # of the adapter's first weights
    model = load(study.model_path, dtype=study.dtype, trainable=True)
    lora, tokenizer = study.lora(), study.tokenizer
    return SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, peft_config=lora)


def examples(
    task: Task, chat: Chat, count: int, seed: int, answers: bool = False
) -> Iterator[dict]:
    """Yield `count` conversations as {"input_ids", "labels"}, joined as episodes are.

    A label is -100 where nothing is to be learned: all but the right answers and own reflections.
    """
    for index in range(count):
        random = Random(f"warm start/{seed}/{index}")
        turns = CORPORA[task.name].conversation(task, random)
        while answers and len(turns) > 2:
            turns = CORPORA[task.name].conversation(task, random)
        ids = chat.prompt([{"role": "user", "content": turns[0][1]}])
        labels = [-100] * len(ids)
        for (_, reply, learn), asked in zip(turns[1::2], [*turns[2::2], None]):
            said = [*chat.tokenizer.encode(reply, add_special_tokens=False), chat.end_id]
            after = chat.follow(ids, said, asked[1]) if asked else ids + said
            labels += said if learn else [-100] * len(said)
            labels += [-100] * (len(after) - len(labels))
            ids = after
        yield {"input_ids": ids, "labels": labels}


if __name__ == "__main__":
    sys.exit(main())
