"""The supervised start: what it learns from, that it learns, and that R3 then starts from it."""

from random import Random

import pytest
from conftest import CoinTask, coin_failures, small_config, small_lora
from peft import PeftModel

from r3lib.chat import Chat
from r3lib.errors import R3Error
from r3lib.evaluate import accuracy_table, comparisons_table, paper_view
from r3lib.study import Study
from r3lib.tasks import CountdownTask, Task
from r3lib.tasks.countdown import split_of
from r3lib.tasks.function_calling import FunctionCallingTask
from r3lib.trainer import R3Trainer
from r3lib.warm_start import config, examples, warm_start

TASKS = [CountdownTask(count=3, largest=20), FunctionCallingTask()]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_examples_are_conversations_joined_as_episodes_with_labels_on_own_turns_only(tokenizer, task):
    chat = Chat(tokenizer)
    for index, example in enumerate(examples(task, chat, 40, seed=0)):
        turns = task.conversation(Random(f"warm start/0/{index}"))
        whole = [{"role": role, "content": text} for role, text, _ in turns]
        text = tokenizer.apply_chat_template(whole, tokenize=False)
        assert tokenizer.decode(example["input_ids"]) == text
        learned = [i for i, label in zip(example["input_ids"], example["labels"]) if label != -100]
        assert learned == [label for label in example["labels"] if label != -100]
        assert tokenizer.decode(learned) == "".join(f"{text}<|end|>" for _, text, learn in turns if learn)


def test_no_problem_of_another_split_is_in_a_warm_start():
    task, seen = TASKS[0], []
    kept = task.draw
    task.draw = lambda random: seen.append(kept(random)) or seen[-1]
    texts = "".join(task.conversation(Random(index))[0][1] for index in range(200))
    del task.draw
    shown = [p for p in seen if f"{list(p.nums)}, create an equation that equals {p.target}." in texts]
    assert len(shown) >= 150 and {split_of(p) for p in shown} == {"pretrain"}


def test_a_task_without_conversations_and_one_of_four_numbers_are_refused():
    class Mine(Task):
        name = "mine"

    with pytest.raises(R3Error, match="task 'mine' has no generated conversations: set warm_start_steps=0"):
        Mine().conversation(Random(0))
    with pytest.raises(R3Error, match="count=\\(3, 4\\): for a warm start use 3"):
        CountdownTask().conversation(Random(0))


@pytest.fixture
def started(tiny, tokenizer, tmp_path):
    """A trainer after eight steps of warm start on a tiny model, and the folder of its adapter."""
    args = config(tmp_path / "run", 8, 0.02, 8, save_strategy="no")
    trainer = warm_start(tiny(), tokenizer, TASKS[0], small_lora(), args)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    return trainer, tmp_path / "adapter"


def test_a_warm_start_lowers_the_loss(started):
    losses = [row["loss"] for row in started[0].state.log_history if "loss" in row]
    assert len(losses) == 8 and losses[-1] < 0.9 * losses[0]


def test_r3_goes_on_from_the_adapter_of_the_warm_start(started, tiny, tokenizer, tmp_path):
    """At a learning rate of zero the trained adapter is the warm start's; otherwise it has moved."""
    failures = coin_failures(tokenizer, 4)
    warm = dict(PeftModel.from_pretrained(tiny(), started[1]).named_parameters())
    for rate, still in ((1e-12, True), (1e-2, False)):
        model = PeftModel.from_pretrained(tiny(), started[1], is_trainable=True)
        args = small_config(tmp_path / str(rate), max_steps=1, learning_rate=rate)
        trainer = R3Trainer(model, args, CoinTask(count=3, largest=20), failures, None, tokenizer)
        trainer.train()
        moved = [(p - warm[name]).abs().max().item() for name, p in trainer.model.named_parameters() if "lora" in name]
        assert moved and (max(moved) < 1e-6) == still


@pytest.mark.slow
def test_a_study_with_a_warm_start_compares_r3_with_it(tmp_path):
    """The policy is called warm_start, in the comparisons too, and R3's first failures are its own."""
    settings = dict(warm_start_steps=1, steps=1, test_problems=16, train_problems=64)
    study = Study("smoke", "countdown", tmp_path, **settings)
    episodes = study.episodes()
    assert set(episodes.policy) == {"warm_start", "r3"}
    assert set(episodes.adapter) == {"countdown-warm_start", "countdown-r3-0"}
    pairs = comparisons_table(episodes)
    assert {"r3/reflect_retry", "r3/first_try"} <= set(pairs.a[pairs.b.str.startswith("warm_start/")])
    view = paper_view(accuracy_table(episodes)).set_index("policy").column
    assert set(view["warm_start"]) == {"vanilla_first", "vanilla_second"}
