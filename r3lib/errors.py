"""The one error a user sees: a line that says what is wrong and what to do."""

import difflib
from collections.abc import Iterable


class R3Error(Exception):
    """Bad input or a broken precondition; the command line prints one line and exits with 2."""


class Stale(R3Error):
    """Notebooks of one run were run with different settings, or their files were changed."""


def nearest(word, known: Iterable[str]) -> str:
    """A hint for an unknown `word`: the known one that looks most like it, or the known ones."""
    known = list(known)
    near = difflib.get_close_matches(str(word), known, 1)
    if near:
        return f"did you mean {near[0]!r}?"
    more = ", ..." if len(known) > 20 else ""
    return f"known: {', '.join(known[:20])}{more}"
