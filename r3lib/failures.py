"""What goes wrong and what training changes: error types, transitions, and reflections."""

import re
from collections.abc import Callable, Sequence
from itertools import product
from operator import add, mul, sub
from random import Random

import pandas as pd

from .episodes import UNTRAINED
from .errors import R3Error
from .evaluate import FIRST, REFLECT, each_seed_and_all, judged
from .stats import rate_interval

STEP = re.compile(r"([0-9]{1,15}) ?([-+*/]) ?([0-9]{1,15}) ?= ?(-?[0-9]{1,15})")
OPERATORS = str.maketrans("×÷−", "*/-")
OPERATIONS = {"+": add, "-": sub, "*": mul}
NO_RATE = [float("nan")] * 3
SIDES = ["attempt", "attempt_reason", "reflection", "retry", "retry_reason"]


def in_categories(episodes: pd.DataFrame, categories: dict[str, str]) -> pd.DataFrame:
    """The episodes with each reason replaced by its category (`Task.categories`, the paper's)."""
    return episodes.assign(
        attempt_reason=episodes.attempt_reason.replace(categories),
        retry_reason=episodes.retry_reason.replace(categories),
    )


def error_types(episodes: pd.DataFrame, reasons: Sequence[str]) -> pd.DataFrame:
    """Share of each failure reason among all first tries (the paper's Tables 4, 5).

    Every reason has a row for every policy: those given, in their order, then any others that
    occur. Intervals as in `accuracy_table`.
    """
    first = _rows(episodes, FIRST)
    found = first.attempt_reason[~first.ok].value_counts().index
    rows = []
    for policy, cell in first.groupby("policy", sort=False):
        seeds = cell.seed.nunique()
        for reason in dict.fromkeys([*reasons, *found]):
            hit = cell.attempt_reason == reason
            rows.append([policy, reason, seeds, len(hit), int(hit.sum()), *_rate(hit, cell)])
    return pd.DataFrame(rows, columns=["policy", "reason", "seeds", "n", "k", "share", "lo", "hi"])


def transitions(episodes: pd.DataFrame) -> pd.DataFrame:
    """Where second tries after a reflection end, by how the first failed: counts for each policy.

    `share` is of the row, i.e. of the failures with that `attempt_reason`; pairs that never occur
    have n = 0.
    """
    frame = _rows(episodes, REFLECT)
    before = list(frame.attempt_reason.value_counts().index)
    found = list(frame.retry_reason.value_counts().index)
    after = [reason for reason in dict.fromkeys(["ok", *before, *found]) if reason in found]
    pairs = list(product(frame.policy.unique(), before, after))
    counts = frame.groupby(["policy", "attempt_reason", "retry_reason"]).size()
    table = counts.reindex(pairs, fill_value=0).rename("n").reset_index()
    row = table.groupby(["policy", "attempt_reason"]).n.transform("sum")
    return table.assign(share=table.n / row)


def reflection_rows(episodes: pd.DataFrame, style: Callable[[str], str]) -> pd.DataFrame:
    """A row a reflection: policy, seed, problem_id, text, ok, style, tokens, repetition."""
    frame = _rows(episodes, REFLECT).rename(columns={"reflection": "text"})
    return frame[["policy", "seed", "problem_id", "text", "ok"]].assign(
        style=frame.text.map(style),
        tokens=frame.reflection_tokens.astype(int),
        repetition=frame.text.map(repetition),
    )


def reflection_stats(
    episodes: pd.DataFrame, style: Callable[[str], str], limit: int
) -> pd.DataFrame:
    """What reflections are like, for each policy: a row for all (`style` = "all"), one a style.

    `share` of the style among the policy's reflections and `success` of the second tries after it;
    `truncated`, the share as long as `limit`, the most tokens of a reflection (cut off, or ended by
    the last token); `success_cut`, `success_uncut`, of the second tries after those and the others,
    nan where there are none; each with a 95% interval. Length in tokens; `repetition`, mean of
    `repetition`; `distinct`, different texts a seed over all (the paper's Fig. 2, in numbers).
    """
    rows = []
    for policy, cell in reflection_rows(episodes, style).groupby("policy", sort=False):
        for name in ["all", *cell["style"].value_counts().index]:
            hit = cell["style"].isin([name]) | (name == "all")
            rows.append(
                {"policy": policy, "style": name, "seeds": cell.seed.nunique(), "n": int(hit.sum())}
                | _with_interval("share", hit, cell)
                | _after_reflections(cell[hit], limit)
            )
    return pd.DataFrame(rows)


def _after_reflections(part, limit) -> dict:
    """Success, truncation, length and repetition of some rows of `reflection_rows`."""
    cut = part.tokens >= limit
    return {
        **_with_interval("success", part.ok, part),
        **_with_interval("truncated", cut, part),
        **_with_interval("success_cut", part.ok[cut], part[cut]),
        **_with_interval("success_uncut", part.ok[~cut], part[~cut]),
        "mean_tokens": part.tokens.mean(),
        "median_tokens": part.tokens.median(),
        "repetition": part.repetition.mean(),
        "distinct": part.groupby("seed").text.nunique().sum() / len(part),
    }


def _with_interval(name, hit, cell) -> dict:
    return dict(zip((name, f"{name}_lo", f"{name}_hi"), _rate(hit, cell), strict=True))


def repetition(text: str) -> float:
    """Share of word 3-grams that already occurred in the text; 0 for fewer than two of them."""
    words = text.split()
    grams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def arithmetic_share(reflection: str) -> tuple[int, int]:
    """(right, total) of the steps `a op b = c` in a text: whole numbers, one of + - * /, exact.

    A step that is part of a longer chain ("9 - 2 * 3 = 3", "1 + 2 = 3 + 4") is not counted.
    """
    words = reflection.translate(OPERATORS).replace("\n", " ; ").split()
    text = " ".join(";" if any(map(str.isalpha, word)) else word for word in words)
    pieces = re.split(r"[,.;:!?](?= |$)", text)
    found = [STEP.fullmatch(piece.strip("()[]$` ")) for piece in pieces]
    steps = [match.groups() for match in found if match]
    return sum(_holds(*step) for step in steps), len(steps)


def arithmetic_table(episodes: pd.DataFrame) -> pd.DataFrame:
    """Share of right steps inside reflections, for each policy and seed and over its seeds ("all").

    `n` reflections, `with_steps` of them with at least one step; the interval resamples problems.
    """
    frame = _rows(episodes, REFLECT)
    counts = frame.reflection.map(arithmetic_share).tolist()
    frame = frame.join(pd.DataFrame(counts, frame.index, ["right", "steps"]))
    rows = []
    for policy, cell in frame.groupby("policy", sort=False):
        for seed, part in each_seed_and_all(cell):
            some = part[part.steps > 0]
            right, total = some.right.sum(), some.steps.sum()
            rate = NO_RATE
            if total:
                rate = [right / total, *rate_interval(some.right, some.problem_id, some.steps)]
            rows.append([policy, seed, len(part), len(some), right, total, *rate])
    columns = ["policy", "seed", "n", "with_steps", "right", "steps", "share", "lo", "hi"]
    return pd.DataFrame(rows, columns=columns)


def reflection_examples(episodes: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """Up to `n` problems that both policies failed, with both reflections (the paper's Fig. 2).

    Columns: problem_id, prompt, and attempt, attempt_reason, reflection, retry, retry_reason, each
    with `_before` (untrained) and `_after` (r3); of several seeds the first is taken.
    """
    frame = _rows(episodes, REFLECT).drop_duplicates(["policy", "problem_id"])
    old = frame.loc[frame.policy == UNTRAINED, ["problem_id", "prompt", *SIDES]]
    new = frame.loc[frame.policy == "r3", ["problem_id", *SIDES]]
    both = old.merge(new, on="problem_id", suffixes=("_before", "_after"))
    chosen = Random(seed).sample(range(len(both)), min(n, len(both)))
    return both.iloc[chosen].reset_index(drop=True)


def _rows(episodes, condition) -> pd.DataFrame:
    frame = judged(episodes)
    frame = frame[frame.condition == condition]
    if frame.empty:
        raise R3Error(f"the episodes hold no {condition} rows: run that condition first")
    return frame


def _rate(hit, cell) -> list[float]:
    """Share of `hit` among the rows of `cell` with its interval; nan where there is no row."""
    if cell.empty:
        return NO_RATE
    return [float(hit.mean()), *rate_interval(hit, cell.problem_id)]


def _holds(a: str, operator: str, b: str, result: str) -> bool:
    if operator == "/":
        return int(b) != 0 and int(a) == int(b) * int(result)
    return OPERATIONS[operator](int(a), int(b)) == int(result)
