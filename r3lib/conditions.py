"""The conditions of the study, one row each: whatever differs between two of them stands here."""

from dataclasses import dataclass
from typing import Literal, get_args

from .errors import R3Error

Reflects = Literal["none", "fixed", "other", "own"]


@dataclass(frozen=True)
class Condition:
    """How a try is made; the same names stand in code, tables, legends and prose.

    `told`: it goes on in the conversation after the failed try, else it is asked afresh.
    `reflection`: whose comes before it; "fixed" is the task's one sentence. `temperature` is that
    of the try, reflections have the sampler's own. R3Error: it cannot be run as it says.
    """

    name: str
    told: bool = True
    reflection: Reflects = "none"
    temperature: float = 0.0
    control: str = ""  # the question that reflect_retry minus this one answers
    training: str = ""  # the question that trained minus untrained answers
    color: str = "#444444"

    def __post_init__(self):
        known = get_args(Reflects)
        if self.reflection not in known:
            raise R3Error(f"{self}: reflection={self.reflection!r}: use one of {', '.join(known)}")
        if self.reflection != "none" and not self.told:
            raise R3Error(f"{self}: asked afresh it has no reflection: drop told=False")

    def __str__(self) -> str:
        return self.name


FIRST_TRY = Condition("first_try", told=False, training="Does training raise first-try accuracy?")
REFLECT_RETRY = Condition(
    "reflect_retry",
    reflection="own",
    training="Does training raise second-try success on failures?",
    color="#D55E00",
)
CONDITIONS = (
    FIRST_TRY,
    Condition(
        "resample",
        told=False,
        temperature=1.0,
        control="Does reflecting beat asking afresh?",
        color="#56B4E9",
    ),
    Condition(
        "retry",
        control="Does reflecting beat a retry without reflection?",
        color="#E69F00",
    ),
    Condition(
        "retry_sampled",
        temperature=1.0,
        control="Does reflecting beat a sampled retry without reflection?",
        color="#8A6100",
    ),
    Condition(
        "generic_reflection",
        reflection="fixed",
        control="Does an own reflection beat one fixed sentence?",
        color="#009E73",
    ),
    Condition(
        "shuffled_reflection",
        reflection="other",
        control="Does an own reflection beat one written for another problem?",
        color="#CC79A7",
    ),
    REFLECT_RETRY,
)


def condition(name: str | Condition) -> Condition:
    """The condition of that name; one of your own is taken as it is. R3Error: no such name."""
    known = {one.name: one for one in CONDITIONS}
    if isinstance(name, str) and name not in known:
        raise R3Error(f"unknown condition {name!r}: known: {', '.join(known)}")
    return known[name] if isinstance(name, str) else name
