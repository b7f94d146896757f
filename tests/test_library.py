"""docs/library.md: its code trains and evaluates, its defaults are those of R3Config."""

import re
import zlib
from pathlib import Path

from conftest import CoinTask, small_config, small_lora

from r3lib import R3Trainer
from r3lib.r3_config import R3Config

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "library.md").read_text()
_, HELD_OUT, OWN_TASK = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


class FewCoins(CoinTask):
    """A dozen problems, however many are asked for."""

    def problems(self, split, n, seed):
        return super().problems(split, min(n, 12), seed)


def test_the_example_trains_and_compares_trained_with_untrained(
    model, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    known = dict(model=model, tokenizer=tokenizer, task=FewCoins(count=3, largest=20))
    known |= dict(args=small_config(tmp_path / "run", max_steps=1), lora=small_lora())
    exec(OWN_TASK, known)
    assert known["trainer"].state.global_step == 1
    assert set(known["accuracy"].policy) == {"vanilla", "r3"}
    sides = set(zip(known["comparisons"].a, known["comparisons"].b))
    assert ("r3/reflect_retry", "vanilla/reflect_retry") in sides
    assert set(known["episodes"].model) == {"base_model"}


def test_held_out_rows_are_answered_in_every_condition(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"id": f"sum-{n}", "prompt": f"{n} + 1 ="} for n in range(16)]
    known = dict(verify=lambda text, row: zlib.crc32(f"{text} {row['id']}".encode()) % 2 == 0, held_out=rows[12:])
    args = small_config(tmp_path / "run", max_attempt_length=8, max_steps=1)
    known["trainer"] = R3Trainer(
        model, args, verifier=known["verify"], train_dataset=rows[:12],
        processing_class=tokenizer, peft_config=small_lora(),
    )  # fmt: skip
    exec(HELD_OUT, known)
    first, *_ = known["accuracy_table"](known["episodes"]).query("condition == 'first_try'").n
    assert first == 4
    assert set(known["episodes"].problem_id) <= {row["id"] for row in rows[12:]}


def test_the_table_of_defaults_is_that_of_the_config(tmp_path):
    config = R3Config(str(tmp_path), use_cpu=True).to_dict()
    rows = re.findall(r"^\| (`.*?`) \| (.*?) \|", PAGE, re.MULTILINE)
    named = [(re.findall(r"`(\w+)`", names), values.split(", ")) for names, values in rows]
    told = {name: value for names, values in named for name, value in zip(names, values, strict=True)}
    assert len(told) == 18
    for name, value in told.items():
        known = config[name]
        assert value == known or float(value) == known, name
    assert told["retry_temperature"] == "0.0"
