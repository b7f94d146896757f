"""A supervised start for a model that cannot do a task at all: LoRA on the task's generated conversations.

R3 rewards retries that succeed; where none does, there is nothing to reward. The paper's models need no such start.
"""

from collections.abc import Iterator
from pathlib import Path
from random import Random

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from .chat import Chat
from .tasks import Task
from .weights import training_options

BATCH = 32


def examples(task: Task, chat: Chat, count: int, seed: int) -> Iterator[dict]:
    """`count` conversations as {"input_ids", "labels"}, joined as episodes are; -100 where nothing is to be learned."""
    for index in range(count):
        turns = task.conversation(Random(f"warm start/{seed}/{index}"))
        ids, labels = chat.prompt([{"role": "user", "content": turns[0][1]}]), []
        labels += [-100] * len(ids)
        for (_, reply, learn), asked in zip(turns[1::2], [*turns[2::2], None]):
            said = [*chat.tokenizer.encode(reply, add_special_tokens=False), chat.end_id]
            after = chat.follow(ids, said, asked[1]) if asked else ids + said
            labels += (said if learn else [-100] * len(said)) + [-100] * (len(after) - len(ids) - len(said))
            ids = after
        yield {"input_ids": ids, "labels": labels}


def warm_start(
    model, tokenizer, task: Task, peft_config, args: SFTConfig, chat: Chat | None = None
) -> SFTTrainer:
    """TRL's `SFTTrainer`, ready to `train()` on as many conversations as `args` has steps for.

    `chat` joins them; by default `Chat(tokenizer)`.
    """
    count = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    data = Dataset.from_list(list(examples(task, chat or Chat(tokenizer), count, args.seed)))
    trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, peft_config=peft_config)
    for parameter in trainer.model.parameters():  # TRL casts QLoRA adapters to bf16, where small updates vanish
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def config(folder: Path, steps: int, learning_rate: float, micro_batch: int, **options) -> SFTConfig:
    """Settings of a warm start: 32 conversations a step, `micro_batch` of them in a forward, a cosine to zero."""
    args = SFTConfig(
        output_dir=str(folder), max_steps=steps, learning_rate=learning_rate, lr_scheduler_type="cosine",
        warmup_steps=0.05, per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=max(1, BATCH // micro_batch), max_length=None, logging_steps=1, save_steps=10,
        save_total_limit=1, report_to="none", disable_tqdm=True, **(training_options() | options),
    )  # fmt: skip
    args._n_gpu = min(1, args.n_gpu)  # a process trains on one GPU, however many it sees
    return args
