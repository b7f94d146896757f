"""What a reflection says most: shared by the tasks that name styles."""

import re
from collections import Counter
from collections.abc import Callable

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def most_said(text: str, kind: Callable[[str], str]) -> str:
    """The `kind` of most sentences of `text`, the first of equally many; "other" of none."""
    sentences = [sentence for sentence in SENTENCE_END.split(text.strip()) if sentence.strip(" .")]
    counts = Counter(map(kind, sentences))
    return counts.most_common(1)[0][0] if counts else "other"
