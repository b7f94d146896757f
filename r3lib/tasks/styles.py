"""The style of a reflection, told by what it says and not by its opening, which training may drop.

These are the styles of the conversations on which the embedded model was pretrained; `styles.yaml`
says how each is known.
"""

import re
from collections import Counter
from pathlib import Path

import yaml

SENTENCES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))


def style_of(text: str, task: str) -> str:
    """Name the style of a reflection on the shipped `task`.

    "search" (Countdown) and "worked" (function calling) are known by what they compute. Else it is
    the style of most sentences, the first of equally many: "diagnosis", "hint", "verbose" or
    "vague"; "other" where most are of none.
    """
    for style, pattern in SENTENCES[task]["computed"].items():
        if re.search(pattern, text):
            return style
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s.strip(" .")]
    counts = Counter(_sentence_style(sentence, SENTENCES[task]) for sentence in sentences)
    return counts.most_common(1)[0][0] if counts else "other"


def _sentence_style(sentence: str, known: dict) -> str:
    if re.search(known["hint"], sentence):
        return "hint"
    # what stands before the first placeholder
    if sentence.startswith(tuple(written.split("{")[0] for written in known["verbose"])):
        return "verbose"
    if re.search(known["diagnosis"], sentence):
        return "diagnosis"
    return "vague" if sentence in known["vague"] else "other"
