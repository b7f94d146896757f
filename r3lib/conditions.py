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
        if not isinstance(self.name, str) or not self.name:
            raise R3Error(f"a condition's name is {self.name!r}: give it a text")
        if self.reflection not in known:
            raise R3Error(f"{self}: reflection={self.reflection!r}: use one of {', '.join(known)}")
        if self.reflection != "none" and not self.told:
            raise R3Error(f"{self}: asked afresh it has no reflection: drop told=False")
        if not self.temperature >= 0:
            raise R3Error(f"{self}: temperature={self.temperature}: give 0 (greedy) or more")

    def __str__(self) -> str:
        return self.name


FIRST_TRY = Condition("first_try", told=False, training="Does training raise first-try accuracy?")
RESAMPLE = Condition(
    "resample",
    told=False,
    temperature=1.0,
    control="Does reflecting beat asking afresh?",
    color="#56B4E9",
)
RETRY = Condition(
    "retry",
    control="Does reflecting beat a retry without reflection?",
    color="#E69F00",
)
RETRY_SAMPLED = Condition(
    "retry_sampled",
    temperature=1.0,
    control="Does reflecting beat a sampled retry without reflection?",
    color="#8A6100",
)
GENERIC_REFLECTION = Condition(
    "generic_reflection",
    reflection="fixed",
    control="Does an own reflection beat one fixed sentence?",
    color="#009E73",
)
SHUFFLED_REFLECTION = Condition(
    "shuffled_reflection",
    reflection="other",
    control="Does an own reflection beat one written for another problem?",
    color="#CC79A7",
)
REFLECT_RETRY = Condition(
    "reflect_retry",
    reflection="own",
    training="Does training raise second-try success on failures?",
    color="#D55E00",
)
CONDITIONS = (
    FIRST_TRY, RESAMPLE, RETRY, RETRY_SAMPLED, GENERIC_REFLECTION, SHUFFLED_REFLECTION,
    REFLECT_RETRY,
)  # fmt: skip
SECOND_TRIES = CONDITIONS[1:]


def condition(name: str | Condition) -> Condition:
    """The condition of that name; one of your own is taken as it is. R3Error: no such name."""
    if isinstance(name, Condition):
        return name
    for one in CONDITIONS:
        if one.name == name:
            return one
    raise R3Error(f"unknown condition {name!r}: known: {', '.join(map(str, CONDITIONS))}")
