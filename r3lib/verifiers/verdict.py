"""What a verifier says of a text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """`ok`, and the reason in one word: "ok" exactly when `ok`, else the name of the error."""

    ok: bool
    reason: str

    @classmethod
    def of(cls, reason: str) -> "Verdict":
        """The verdict that `reason` names."""
        return cls(reason == "ok", reason)
