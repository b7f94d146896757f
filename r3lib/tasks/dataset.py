"""A task made of what a TRL user has: a data set with a `prompt` column, and a verifier."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import R3Error
from ..verifiers.verdict import Verdict
from .base import Task

REFLECTION_PROMPT = (
    "Your answer is wrong. Reflect on what went wrong and write a short explanation that will help "
    "you do better next time."
)


@dataclass(frozen=True)
class Row:
    """One row of the data set; `values` are its columns, `messages` the conversation."""

    id: str
    messages: list[dict]
    values: Mapping


class DatasetTask(Task):
    """The rows of `dataset`, judged by `verifier(text, row) -> bool | float | Verdict`.

    `dataset` is a `datasets.Dataset` or a list of mappings. Its column `prompt` holds a
    conversation (messages with "role" and "content", the last one of the user) or one question as
    text; `id`, if there, a name that is unique; the other columns are the verifier's. A float is a
    graded reward from 0 to 1, of which only 1 is a success: anything below is a failure that is
    mined and retried.
    """

    name = "dataset"

    def __init__(self, dataset: Sequence, verifier: Callable, reflection_prompt=REFLECTION_PROMPT):
        if hasattr(dataset, "to_dict") and not hasattr(dataset, "features"):  # lists its columns
            raise R3Error("the data set is a DataFrame: give df.to_dict('records')")
        if isinstance(dataset, Mapping):
            splits = ", ".join(map(str, dataset))
            raise R3Error(f"the data set is a mapping of {splits}: give one of them")
        self.rows = list(dataset)  # by which this task is told from others, wherever they lie
        self.verifier = verifier
        self.reflection_prompt = reflection_prompt
        if not callable(verifier):
            raise R3Error(f"verifier={verifier!r} is no function: give verifier(text, row)")

    def problems(self, split: str, n: int | None = None, seed: int = 0) -> list[Row]:
        """Return the first `n` rows (None: all); the data set is one split, whatever its name."""
        if not self.rows:
            raise R3Error("the data set has no rows: give some")
        size = len(self.rows) if n is None else min(n, len(self.rows))
        return [self._row(index) for index in range(size)]

    def messages(self, problem: Row) -> list[dict]:
        """The conversation in the row's `prompt`."""
        return problem.messages

    def verify(self, text: str, problem: Row) -> Verdict:
        """The verifier's verdict, whichever form it has."""
        return as_verdict(self.verifier(text, dict(problem.values)))

    def _row(self, index: int) -> Row:
        values = self.rows[index]
        if not isinstance(values, Mapping) or "prompt" not in values:
            raise R3Error(f"row {index} of the data set has no column 'prompt': add one, or rename")
        messages = values["prompt"]
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if not _is_conversation(messages):
            raise R3Error(
                f"row {index}: prompt is {messages!r:.80}: give text, or messages with role and "
                "content of which the last is the user's"
            )
        return Row(str(values.get("id", index)), list(messages), values)


def as_verdict(value) -> Verdict:
    """Return a bool, float (0 to 1) or Verdict as a Verdict; raises TypeError or ValueError."""
    if isinstance(value, Verdict):
        return value
    if value is True or value is False or type(value).__name__ == "bool":  # NumPy has its own
        return Verdict.of("ok" if value else "wrong")
    if not hasattr(value, "__float__"):
        raise TypeError(f"{value!r:.60} is no bool, float or Verdict")
    score = float(value)
    return Verdict(score == 1, "ok" if score == 1 else "wrong", score)


def _is_conversation(messages) -> bool:
    if not isinstance(messages, Sequence) or not messages:
        return False
    each = all(isinstance(m, Mapping) and isinstance(m.get("content"), str) for m in messages)
    return each and messages[-1].get("role") == "user" and bool(messages[-1]["content"].strip())
