"""The style of a reflection, told by what it says and not by its opening, which training may drop.

These are the styles of the conversations on which the embedded model was pretrained.
"""

import re
from collections import Counter
from collections.abc import Callable

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")

COUNTDOWN_VAGUE = (
    "I should read the problem again and be more careful.",
    "I should be more careful next time.",
    "I made a mistake, so I will check my work.",
    "I should think step by step and try another way.",
    "I need to try different operations.",
)
COUNTDOWN_VERBOSE = (
    "I tried solving the problem and got the wrong answer.",
    "The answer was wrong because it did not equal {target}.",
    "To equal {target} the equation has to equal {target}.",
    "I used the numbers {nums} but the answer was wrong.",
    "Each number can only be used once, so each number has to be used once.",
    "Next time I will make sure that the answer is right.",
    "If the answer is not {target} then the answer is wrong.",
)
COMPARED = re.compile(r"[0-9] [-+*/] [0-9]{1,9} = -?[0-9]{1,9}, need [0-9]")
DIAGNOSED = re.compile(r"My equation (gives|was)|I used [0-9]|It is [0-9]+ too (big|small)")

CALLING_VAGUE = (
    "I should read the query again and be more careful.",
    "I should check my call before I answer.",
    "I made a mistake, so I will look at the tools again.",
    "I should think about what was asked.",
    "I need to pay more attention to the details.",
)
CALLING_VERBOSE = (
    "I tried performing the task and the call was wrong.",
    "The call has to do what the query asks.",
    "The query is: {query}",
    "To be right, the call has to be right in every part.",
    "Each argument has a value, and each value matters.",
    "Next time I will make sure that the call is the correct one.",
    "If the call is not what was asked, then it is wrong.",
)
CALLING_DIAGNOSES = (
    "My call was not", "I did not make", "The tool ", "I left out", "The value of", "I do not see",
)  # fmt: skip
COMPUTES = re.compile(r"[0-9] [-+*/] [0-9:]{1,12} = [0-9]")
CHOOSES = re.compile(r"\b[a-z_]{1,40}: [^\n]{1,200}?[.] So [a-z]+_[a-z]+")


def countdown(text: str) -> str:
    """Name the style of a Countdown reflection.

    "search": at least one computed try is compared with the target ("7 + 8 = 15, need 25"). Else
    the style of most of its sentences: "diagnosis" (what the attempt gives or used), "hint" (a good
    first step), "verbose" or "vague" (sentences that name no number of their own); "other" where
    most are of none.
    """
    return "search" if COMPARED.search(text) else most_said(text, _countdown_sentence)


def function_calling(text: str) -> str:
    """Name the style of a function-calling reflection.

    "worked": it computes a step ("9 * 3600 = 32400") or gives the value of an argument ("person:
    Eva") and then the tool ("So book_hall."). Else the style of most of its sentences: "diagnosis"
    (which part was wrong), "hint" (the right tool), "verbose" or "vague"; "other" where most are of
    none.
    """
    worked = COMPUTES.search(text) or CHOOSES.search(text)
    return "worked" if worked else most_said(text, _calling_sentence)


def most_said(text: str, kind: Callable[[str], str]) -> str:
    """The `kind` of most sentences of `text`, the first of equally many; "other" of none."""
    sentences = [s for s in SENTENCE_END.split(text.strip()) if s.strip(" .")]
    counts = Counter(map(kind, sentences))
    return counts.most_common(1)[0][0] if counts else "other"


def _countdown_sentence(sentence: str) -> str:
    if "good first step is" in sentence:
        return "hint"
    if sentence.startswith(_openings(COUNTDOWN_VERBOSE)):
        return "verbose"
    if DIAGNOSED.search(sentence):
        return "diagnosis"
    return "vague" if sentence in COUNTDOWN_VAGUE else "other"


def _calling_sentence(sentence: str) -> str:
    if sentence.startswith("The right tool is"):
        return "hint"
    if sentence.startswith(CALLING_DIAGNOSES):
        return "diagnosis"
    if sentence.startswith(_openings(CALLING_VERBOSE)):
        return "verbose"
    return "vague" if sentence in CALLING_VAGUE else "other"


def _openings(sentences: tuple[str, ...]) -> tuple[str, ...]:
    """What stands before the first placeholder of each sentence."""
    return tuple(sentence.split("{")[0] for sentence in sentences)
