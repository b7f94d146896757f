"""The style of a reflection, told by what it says and not by its opening, which training may drop.

These are the styles of the conversations on which the embedded model was pretrained.
"""

import re
from collections import Counter
from pathlib import Path

import yaml

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
SENTENCES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))

COMPARED = re.compile(r"[0-9] [-+*/] [0-9]{1,9} = -?[0-9]{1,9}, need [0-9]")
COMPUTES = re.compile(r"[0-9] [-+*/] [0-9:]{1,12} = [0-9]")
CHOOSES = re.compile(r"\b[a-z_]{1,40}: [^\n]{1,200}?[.] So [a-z]+_[a-z]+")
HINTS = {
    "countdown": re.compile("good first step is"),
    "function_calling": re.compile(r"\AThe right tool is"),
}
DIAGNOSES = {
    "countdown": re.compile(r"My equation (gives|was)|I used [0-9]|It is [0-9]+ too (big|small)"),
    "function_calling": re.compile(
        r"\A(My call was not|I did not make|The tool |I left out|The value of|I do not see)"
    ),
}


def countdown(text: str) -> str:
    """Name the style of a Countdown reflection.

    "search": at least one computed try is compared with the target ("7 + 8 = 15, need 25"). Else
    the style of most of its sentences: "diagnosis" (what the attempt gives or used), "hint" (a good
    first step), "verbose" or "vague" (sentences that name no number of their own); "other" where
    most are of none.
    """
    return "search" if COMPARED.search(text) else _most_said(text, "countdown")


def function_calling(text: str) -> str:
    """Name the style of a function-calling reflection.

    "worked": it computes a step ("9 * 3600 = 32400") or gives the value of an argument ("person:
    Eva") and then the tool ("So book_hall."). Else the style of most of its sentences: "diagnosis"
    (which part was wrong), "hint" (the right tool), "verbose" or "vague"; "other" where most are of
    none.
    """
    is_worked = COMPUTES.search(text) or CHOOSES.search(text)
    return "worked" if is_worked else _most_said(text, "function_calling")


def _most_said(text: str, task: str) -> str:
    """The style of most sentences of `text`, the first of equally many; "other" of none."""
    sentences = [s for s in SENTENCE_END.split(text.strip()) if s.strip(" .")]
    counts = Counter(_sentence_style(sentence, task) for sentence in sentences)
    return counts.most_common(1)[0][0] if counts else "other"


def _sentence_style(sentence: str, task: str) -> str:
    if HINTS[task].search(sentence):
        return "hint"
    # what stands before the first placeholder
    openings = tuple(written.split("{")[0] for written in SENTENCES[task]["verbose"])
    if sentence.startswith(openings):
        return "verbose"
    if DIAGNOSES[task].search(sentence):
        return "diagnosis"
    return "vague" if sentence in SENTENCES[task]["vague"] else "other"
