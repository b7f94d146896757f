"""What a task is: problems, the conversation about them, and a verifier."""

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
    reasons: tuple[str, ...] = ("wrong",)

    def problems(self, split: str, n: int, seed: int) -> list:
        """Return `n` problems of `split` ("train", "validation" or "test"), a function of the arguments alone."""
        raise TypeError(f"task {type(self).__name__} does not define problems(split, n, seed)")

    def messages(self, problem) -> list[dict]:
        """Return the conversation that asks for a first try: [{"role": ..., "content": ...}, ...]."""
        raise TypeError(f"task {type(self).__name__} does not define messages(problem)")

    def verify(self, text: str, problem) -> Verdict:
        """Judge the text of an answer. Pure: no disk, model or clock."""
        raise TypeError(f"task {type(self).__name__} does not define verify(text, problem)")

    def style(self, reflection: str) -> str:
        """Name the style of a reflection, for the analysis of what training changes."""
        return "other"
