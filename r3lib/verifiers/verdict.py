"""What a verifier says of a text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """`ok`, and the reason in one word: "ok" exactly when `ok`, else the name of the error.

    `score`, from 0 to 1, is the reward of a graded verifier; without one it is 1 or 0. ValueError:
    `ok` and the reason disagree (tables count the reason), or the score is out of range.
    """

    ok: bool
    reason: str
    score: float | None = None

    def __post_init__(self):
        if not isinstance(self.reason, str) or not self.reason:
            raise ValueError(f"{self}: the reason is a word for the error, or 'ok'")
        if self.ok != (self.reason == "ok"):
            raise ValueError(f"{self}: the reason is 'ok' exactly when ok is True")
        if self.score is not None and not 0 <= self.score <= 1:
            raise ValueError(f"{self}: the score is a reward from 0 to 1")

    @classmethod
    def of(cls, reason: str) -> "Verdict":
        """The verdict that `reason` names."""
        return cls(reason == "ok", reason)

    @property
    def reward(self) -> float:
        """The reward of the reflection before the judged retry."""
        return float(self.ok) if self.score is None else self.score
