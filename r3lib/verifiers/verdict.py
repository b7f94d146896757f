"""What a verifier says of a text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """`ok`, and the reason in one word: "ok" exactly when `ok`, else the name of the error.

    `score`, from 0 to 1, is the reward of a graded verifier; without one it is 1 or 0.
    """

    ok: bool
    reason: str
    score: float | None = None

    @classmethod
    def of(cls, reason: str) -> "Verdict":
        """The verdict that `reason` names."""
        return cls(reason == "ok", reason)

    @property
    def reward(self) -> float:
        """The reward of the reflection before the judged retry."""
        return float(self.ok) if self.score is None else self.score
