"""From episodes to the study's tables: accuracy, comparisons, the paper's four columns."""

from collections.abc import Callable

import pandas as pd

from .conditions import CONDITIONS, FIRST_TRY, REFLECT_RETRY
from .conditions import condition as condition_of
from .episodes import UNTRAINED
from .errors import R3Error
from .stats import holm, mcnemar, rate_difference, rate_interval, wilson

FIRST, REFLECT, BOTH = FIRST_TRY.name, REFLECT_RETRY.name, "both_tries"
ACCURACY = "task policy train_task condition split seed n k rate lo hi".split()
COMPARISONS = "question task a b n seeds diff lo hi p".split()
VIEW = "task policy train_task split column n seeds rate lo hi".split()
DRAWS = 10_000
AFTER_BOTH = "Does training raise accuracy after both tries (the paper's 2nd column)?"


def judged(episodes: pd.DataFrame) -> pd.DataFrame:
    """Episodes with a column `ok`, in display order; a second try is judged by `retry_reason`."""
    if episodes.empty:
        raise R3Error("no episodes to evaluate: run the notebook that writes them first")
    reason = episodes.attempt_reason.where(episodes.condition == FIRST, episodes.retry_reason)
    order = {name: str(i) for i, name in enumerate([*map(str, CONDITIONS), UNTRAINED, "r3"])}
    keys = ["task", "policy", "condition", "split", "seed", "problem_id"]
    frame = episodes.assign(ok=reason.eq("ok").fillna(False).astype(bool))
    return frame.sort_values(keys, key=lambda column: column.replace(order), ignore_index=True)


def by_part(episodes: pd.DataFrame, part: Callable[[str], str]) -> pd.DataFrame:
    """The episodes of each part of their split (`Task.part`), as the split "split/part"."""
    parts = episodes.problem_id.map(part)
    return episodes.assign(split=episodes.split + "/" + parts)[parts != ""]


def accuracy_table(episodes: pd.DataFrame) -> pd.DataFrame:
    """One row a (task, policy, condition, split, seed) and one over its seeds, `seed` = "all".

    `train_task` is X for the policy `r3_from_X`, "" if untrained, else `task`. Second tries count
    failures of the same policy's first try. Intervals (95%) are Wilson's for one seed; over seeds,
    problems are resampled with all their rows, which covers the choice of problems, not of seeds.
    """
    rows = []
    cells = judged(episodes).groupby(["task", "policy", "condition", "split"], sort=False)
    for (task, policy, condition, split), cell in cells:
        train_task = "" if policy == UNTRAINED else policy.partition("_from_")[2] or task
        for seed, part in each_seed_and_all(cell):
            row = [task, policy, train_task, condition, split, seed]
            k, n = int(part.ok.sum()), len(part)
            rows.append([*row, n, k, k / n, *rate_interval(part.ok, part.problem_id)])
    return pd.DataFrame(rows, columns=ACCURACY)


def each_seed_and_all(rows: pd.DataFrame) -> list[tuple[int | str, pd.DataFrame]]:
    """(seed, its rows) for every seed, then ("all", rows)."""
    return [*((int(seed), part) for seed, part in rows.groupby("seed")), ("all", rows)]


def pooled(accuracy: pd.DataFrame) -> pd.DataFrame:
    """The rows over all seeds of an accuracy table, with their number of `seeds`."""
    table = accuracy.assign(seeds=accuracy.groupby(ACCURACY[:5]).seed.transform("size") - 1)
    return table[table.seed.astype(str) == "all"]


def comparisons_table(episodes: pd.DataFrame, conditions=CONDITIONS) -> pd.DataFrame:
    """The questions of `conditions`, each a difference of rates a - b with a 95% interval.

    `a`, `b` are "policy/condition"; "both_tries": right at once or rescued by reflect_retry
    (oracle-gated, as in the paper). `n` counts distinct problems, `seeds` those of a. Both sides
    have the same cases, but second tries trained against untrained start from each policy's own
    failures. Intervals resample problems. p is McNemar's (exact) where the sides pair one to one,
    with one seed, else the bootstrap's.
    """
    conditions = [condition_of(name) for name in conditions]
    splits = sorted(set(episodes.split))
    if len(splits) > 1:
        raise R3Error(f"comparisons mix the splits {splits}: pass the episodes of one")
    rows = []
    for task, frame in judged(episodes).groupby("task", sort=False):
        cells = dict(list(frame.groupby(["policy", "condition"], sort=False)))
        policies = frame.policy.unique()
        for policy in policies:
            if {(policy, FIRST), (policy, REFLECT)} <= set(cells):
                tries = cells[policy, FIRST], cells[policy, REFLECT]
                cells[policy, BOTH] = _both_tries(policy, *tries)
        for text, a, b in _questions(policies, conditions):
            if a in cells and b in cells:
                rows.append([text, task, "/".join(a), "/".join(b), *_compare(cells, a, b)])
    table = pd.DataFrame(rows, columns=COMPARISONS)
    return table.assign(p_holm=holm(table.p))


def paper_view(accuracy: pd.DataFrame) -> pd.DataFrame:
    """The paper's four columns (Tables 1, 2) for each policy, from an accuracy table.

    `column` is vanilla_first, vanilla_second, trained_first or trained_second. Second: right at
    once or rescued by reflect_retry; its interval is Wilson's on the problems of one seed (wide
    rather than narrow).
    """
    rows = []
    keys = ["task", "policy", "train_task", "split"]
    for key, cell in pooled(accuracy).groupby(keys, sort=False):
        cell = cell.set_index("condition")
        if not {FIRST, REFLECT} <= set(cell.index):
            continue
        policy = key[1]
        first, second = cell.loc[FIRST], cell.loc[REFLECT]
        _complete(policy, first.n - first.k, second.n)
        rate, seeds = (first.k + second.k) / first.n, first.seeds
        problems = first.n // seeds
        interval = wilson(round(rate * problems), problems)
        who = "vanilla" if policy == UNTRAINED else "trained"
        rows.append([*key, f"{who}_first", first.n, seeds, first.rate, first.lo, first.hi])
        rows.append([*key, f"{who}_second", first.n, seeds, rate, *interval])
    return pd.DataFrame(rows, columns=VIEW)


def _questions(policies, conditions):
    """(question, (policy, condition) a, (policy, condition) b) for every question."""
    training = [(c.training, c.name) for c in reversed(conditions) if c.training]
    training.append((AFTER_BOTH, BOTH))
    controls = [(c.control, c.name) for c in conditions if c.control]
    for policy in sorted(policies, key=UNTRAINED.__eq__):  # the untrained one last
        if policy != UNTRAINED:
            yield from ((text, (policy, name), (UNTRAINED, name)) for text, name in training)
        yield from ((text, (policy, REFLECT), (policy, name)) for text, name in controls)


def _both_tries(policy, first, second) -> pd.DataFrame:
    """First tries, judged right also where the second try after a reflection was."""
    _complete(policy, (~first.ok).sum(), len(second))
    keys = ["seed", "problem_id", "sample"]
    rescued = first[keys].merge(second.loc[second.ok, keys], how="left", indicator=True)
    return first.assign(ok=first.ok | (rescued._merge == "both").to_numpy())


def _complete(policy, failures, second):
    if failures != second:
        what = f"{policy}: {second} of {failures} failures had a second try"
        raise R3Error(f"{what}: finish the evaluation")


def _compare(cells, one, two) -> list:
    """[n, seeds, diff, lo, hi, p] of (policy, condition) `one` minus `two`."""
    a, b = cells[one], cells[two]
    same_policy = one[0] == two[0]
    paired = same_policy or one[1] in (FIRST, BOTH)
    if paired:
        keys = ["seed", "problem_id"] if same_policy else ["problem_id"]
        common = a[keys].merge(b[keys]).drop_duplicates()
        a, b = a.merge(common), b.merge(common)
    *difference, p = rate_difference(a.ok, a.problem_id, b.ok, b.problem_id, draws=DRAWS)
    if paired and a.problem_id.is_unique and b.problem_id.is_unique:
        p = mcnemar(a.ok, b.ok)
    return [len(set(a.problem_id) | set(b.problem_id)), a.seed.nunique(), *difference, p]
