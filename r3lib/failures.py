"""What goes wrong and what training changes: error types, transitions, and the reflections themselves."""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from random import Random

import pandas as pd

from .episodes import UNTRAINED
from .errors import R3Error
from .evaluate import FIRST, REFLECT, judged
from .stats import rate_interval

STEP = re.compile(r"([0-9]{1,15}) ?([-+*/]) ?([0-9]{1,15}) ?= ?(-?[0-9]{1,15})")
OPERATORS = str.maketrans("×÷−", "*/-")
SIDES = ["attempt", "attempt_reason", "reflection", "retry", "retry_reason"]


def in_categories(episodes: pd.DataFrame, categories: dict[str, str]) -> pd.DataFrame:
    """The episodes with each reason replaced by its category (`Task.categories`), as the paper counts errors."""
    named = {side: episodes[side].replace(categories) for side in ("attempt_reason", "retry_reason")}
    return episodes.assign(**named)


def error_types(episodes: pd.DataFrame, reasons: Sequence[str]) -> pd.DataFrame:
    """Share of each failure reason among all first tries, before and after (the paper's Tables 4, 5).

    Every reason, in the order given, has a row for every policy; intervals as in `accuracy_table`.
    """
    rows = []
    for policy, cell in _rows(episodes, FIRST).groupby("policy", sort=False):
        if unknown := set(cell.attempt_reason) - {"ok", *reasons}:
            raise R3Error(f"first tries failed for {sorted(unknown)}: give all of the task's reasons")
        for reason in reasons:
            hit = cell.attempt_reason == reason
            rows.append([policy, reason, cell.seed.nunique(), len(hit), int(hit.sum()), *_rate(hit, cell)])
    return pd.DataFrame(rows, columns=["policy", "reason", "seeds", "n", "k", "share", "lo", "hi"])


def transitions(episodes: pd.DataFrame) -> pd.DataFrame:
    """Where second tries after a reflection end, by how the first failed: counts for each policy.

    `share` is of the row, i.e. of the failures with that `attempt_reason`; pairs that never occur have n = 0.
    """
    frame = _rows(episodes, REFLECT)
    before, after = (list(frame[c].value_counts().index) for c in ("attempt_reason", "retry_reason"))
    after = [r for r in ["ok", *before, *after] if r in after]
    pairs = [(p, x, y) for p in frame.policy.unique() for x in before for y in dict.fromkeys(after)]
    counts = frame.groupby(["policy", "attempt_reason", "retry_reason"]).size().reindex(pairs, fill_value=0)
    table = counts.rename("n").reset_index()
    return table.assign(share=table.n / table.groupby(["policy", "attempt_reason"]).n.transform("sum"))


def reflection_rows(episodes: pd.DataFrame, style: Callable[[str], str]) -> pd.DataFrame:
    """A row a reflection of reflect_retry: policy, seed, problem_id, text, ok, style, tokens, repetition."""
    frame = _rows(episodes, REFLECT)
    table = frame[["policy", "seed", "problem_id", "reflection", "ok"]].rename(columns={"reflection": "text"})
    tokens = frame.reflection_tokens.astype(int)
    return table.assign(style=table.text.map(style), tokens=tokens, repetition=table.text.map(repetition))


def reflection_stats(episodes: pd.DataFrame, style: Callable[[str], str], limit: int) -> pd.DataFrame:
    """What reflections are like, for each policy: a row for all (`style` = "all") and one for each style.

    `share` of the style among the policy's reflections and `success` of the retries after it; `truncated`, the
    share as long as `limit`, the most tokens of a reflection (cut off, or ended by the last token), and the
    success of the retries after those (`success_cut`) and after the others (`success_uncut`), nan where there
    are none; each with a 95% interval. Length in tokens; `repetition`, the mean share of word 3-grams that came
    before in the same reflection; `distinct`, different texts a seed over all (the paper's Fig. 2, in numbers).
    """
    rows = []
    for policy, cell in reflection_rows(episodes, style).groupby("policy", sort=False):
        for name in ["all", *cell["style"].value_counts().index]:
            hit = cell["style"].isin([name]) | (name == "all")
            part = cell[hit]
            cut = part.tokens >= limit
            rates = [*_rate(hit, cell), *_rate(part.ok, part), *_rate(cut, part)]
            rates += [*_rate(part.ok[cut], part[cut]), *_rate(part.ok[~cut], part[~cut])]
            texts = [part.tokens.mean(), part.tokens.median(), part.repetition.mean()]
            texts.append(part.groupby("seed").text.nunique().sum() / len(part))
            rows.append([policy, name, cell.seed.nunique(), len(part), *rates, *texts])
    shares = ("share", "success", "truncated", "success_cut", "success_uncut")
    rates = [name + end for name in shares for end in ("", "_lo", "_hi")]
    texts = ["mean_tokens", "median_tokens", "repetition", "distinct"]
    return pd.DataFrame(rows, columns=["policy", "style", "seeds", "n", *rates, *texts])


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
    steps = [m.groups() for piece in pieces if (m := STEP.fullmatch(piece.strip("()[]$` ")))]
    return sum(_holds(*step) for step in steps), len(steps)


def arithmetic_table(episodes: pd.DataFrame) -> pd.DataFrame:
    """Share of right steps inside reflections, for each policy and seed and over its seeds ("all").

    `n` reflections, `with_steps` of them with at least one step; the interval resamples problems.
    """
    frame, rows = _rows(episodes, REFLECT), []
    steps = pd.DataFrame(frame.reflection.map(arithmetic_share).tolist(), frame.index, ["right", "steps"])
    for policy, cell in frame.join(steps).groupby("policy", sort=False):
        for seed, part in [*((int(s), p) for s, p in cell.groupby("seed")), ("all", cell)]:
            some, right, total = part[part.steps > 0], part.right.sum(), part.steps.sum()
            rate = [float("nan")] * 3
            if total:
                rate = [right / total, *rate_interval(some.right, some.problem_id, some.steps)]
            rows.append([policy, seed, len(part), len(some), right, total, *rate])
    columns = ["policy", "seed", "n", "with_steps", "right", "steps", "share", "lo", "hi"]
    return pd.DataFrame(rows, columns=columns)


def reflection_examples(episodes: pd.DataFrame, n: int, seed: int, after: str = "r3") -> pd.DataFrame:
    """Up to `n` problems that both policies failed, with both reflections side by side (the paper's Fig. 2).

    Columns: problem_id, prompt, and attempt, attempt_reason, reflection, retry, retry_reason, each with
    `_before` and `_after`. `after` names the trained policy; of several seeds the first is taken.
    """
    frame = _rows(episodes, REFLECT).drop_duplicates(["policy", "problem_id"])
    old, new = (frame.loc[frame.policy == p, ["problem_id", "prompt", *SIDES]] for p in (UNTRAINED, after))
    both = old.merge(new.drop(columns="prompt"), on="problem_id", suffixes=("_before", "_after"))
    if both.empty:
        both_policies = f"{UNTRAINED} and {after!r}"
        raise R3Error(f"no problem was failed by both {both_policies}: evaluate them on the same ones")
    chosen = Random(seed).sample(range(len(both)), min(n, len(both)))
    return both.iloc[chosen].reset_index(drop=True)


def _rows(episodes, condition) -> pd.DataFrame:
    frame = judged(episodes)
    if (frame := frame[frame.condition == condition]).empty:
        raise R3Error(f"the episodes hold no {condition} rows: run that condition first")
    return frame


def _rate(hit, cell) -> list[float]:
    """Share of `hit` among the rows of `cell` with its interval; nan where there is no row."""
    if cell.empty:
        return [float("nan")] * 3
    return [float(hit.mean()), *rate_interval(hit, cell.problem_id)]


def _holds(a: str, operator: str, b: str, result: str) -> bool:
    x, y, z = Fraction(a), Fraction(b), Fraction(result)
    if operator == "/":
        return y != 0 and x / y == z
    return {"+": x + y, "-": x - y, "*": x * y}[operator] == z
