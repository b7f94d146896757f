"""What a task is: problems, the conversation about them, and a verifier."""

from pathlib import Path

from ..verifiers.verdict import Verdict


class Task:
    """Subclass it for a task of your own.

    Define `name`, `reflection_prompt`, `problems`, `messages` and `verify`; the rest has defaults.
    A problem is any object with a string attribute `id` that is unique and stable.
    """

    name: str
    reflection_prompt: str
    retry_prompt = "Use your reflection to try the problem again."
    blind_retry_prompt = "That answer is wrong. Try the problem again."
    generic_reflection = "I should read the problem again and be more careful."
    reasons: tuple[str, ...] = ()  # of failures, in the order of tables; others come after these
    categories: dict[str, str] = {}  # reason -> the paper's coarser category, where it has one

    def problems(self, split: str, n: int, seed: int) -> list:
        """Return `n` problems of a split ("train", "validation", "test"), always the same ones."""
        raise TypeError(f"task {type(self).__name__} does not define problems(split, n, seed)")

    def messages(self, problem) -> list[dict]:
        """Return the conversation that asks for a first try: [{"role", "content"}, ...]."""
        raise TypeError(f"task {type(self).__name__} does not define messages(problem)")

    def question(self, problem) -> str:
        """Return what a second try asks again: by default the last user message of `messages`."""
        return next(m["content"] for m in reversed(self.messages(problem)) if m["role"] == "user")

    def second_turn(self, told: str, problem) -> str:
        """Return the user turn before a second try: `told`, then the question, as in the paper."""
        return f"{told}\n{self.question(problem)}"

    def tools(self, problem) -> list[dict] | None:
        """Return the tools for the chat template, as JSON Schema functions; None: no tools."""
        return None

    def bare_messages(self, problem) -> list[dict]:
        """Return the conversation for a chat template that presents the tools itself."""
        return self.messages(problem)

    def files(self) -> list[Path]:
        """Return the local files that problems are read from: when they change, so do results."""
        return []

    def verify(self, text: str, problem) -> Verdict:
        """Judge the text of an answer. Pure: no disk, model or clock."""
        raise TypeError(f"task {type(self).__name__} does not define verify(text, problem)")

    def style(self, reflection: str) -> str:
        """Name the style of a reflection, for the analysis of what training changes."""
        return "other"

    def part(self, problem_id: str) -> str:
        """Name the part of the test problems that a problem is in; "" for a task without parts."""
        return ""
