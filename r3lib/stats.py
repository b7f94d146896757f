"""Intervals and tests for success rates, with repeated problems counted once."""

import numpy as np
from scipy.stats import binomtest


def wilson(k: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval for a rate of k successes in n independent trials, in 0..1."""
    interval = binomtest(int(k), int(n)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def rate_interval(successes, clusters, trials=None, draws=2000, seed=0) -> tuple[float, float]:
    """95% interval of sum(successes) / sum(trials), arrays of shape (n,); else one trial a row.

    Wilson's where each row is one trial of a problem of its own (`clusters` holds problem ids), and
    on the number of problems at a rate of 0 or 1; otherwise problems are resampled with all their
    rows.
    """
    k = np.asarray(successes, float)
    n = np.ones(len(k)) if trials is None else np.asarray(trials, float)
    ids, at = np.unique(np.asarray(clusters), return_inverse=True)
    if len(ids) == len(n) and (n == 1).all():
        return wilson(k.sum(), n.sum())
    if k.sum() in (0, n.sum()):
        return wilson(len(ids) * bool(k.any()), len(ids))
    right, total = _resample([np.bincount(at, k), np.bincount(at, n)], draws, seed)
    lo, hi = np.quantile(right / total, [0.025, 0.975])
    return float(lo), float(hi)


def rate_difference(a, a_clusters, b, b_clusters, draws=2000, seed=0):
    """(mean(a) - mean(b), lo, hi, p) for 0/1 arrays on sets of problems that may differ.

    Problems of either set are resampled, numerators and denominators together: percentile interval
    (95%), and a two-sided p never below 2 ** (1 - problems), the least of an exact sign test. Where
    all draws agree the interval is Newcombe's, from Wilson's on the numbers of problems.
    """
    ids, at = np.unique(np.concatenate([a_clusters, b_clusters]), return_inverse=True)
    columns = []
    for outcomes, where in ((a, at[: len(a)]), (b, at[len(a) :])):
        columns.append(np.bincount(where, np.asarray(outcomes, float), len(ids)))
        columns.append(np.bincount(where, minlength=len(ids)))
    k_a, n_a, k_b, n_b = _resample(columns, draws, seed)
    drawn = (n_a > 0) & (n_b > 0)
    values = k_a[drawn] / n_a[drawn] - k_b[drawn] / n_b[drawn]
    lo, hi = np.quantile(values, [0.025, 0.975])
    p, q = np.mean(a), np.mean(b)
    if lo == hi:
        p_lo, p_hi = rate_interval(a, a_clusters)
        q_lo, q_hi = rate_interval(b, b_clusters)
        lo = p - q - np.hypot(p - p_lo, q_hi - q)
        hi = p - q + np.hypot(p_hi - p, q - q_lo)
    tail = 2 * (1 + min((values <= 0).sum(), (values >= 0).sum())) / (1 + len(values))
    return float(p - q), float(lo), float(hi), float(min(1.0, max(tail, 2.0 ** (1 - len(ids)))))


def mcnemar(a, b) -> float:
    """Exact two-sided p of McNemar's test for paired 0/1 arrays of shape (n,)."""
    differ = np.asarray(a, int) - np.asarray(b, int)
    pairs = np.count_nonzero(differ)
    return float(binomtest(np.count_nonzero(differ > 0), pairs).pvalue) if pairs else 1.0


def holm(ps) -> np.ndarray:
    """Holm's adjusted p values, in the order given."""
    ps = np.asarray(ps, float)
    order = np.argsort(ps)
    adjusted = np.maximum.accumulate(ps[order] * np.arange(len(ps), 0, -1)).clip(max=1.0)
    return adjusted[np.argsort(order)]


def _resample(columns, draws, seed) -> np.ndarray:
    """Sums, shape (columns, draws), over problems drawn anew; equal problems as one multinomial."""
    rows, counts = np.unique(np.column_stack(columns), axis=0, return_counts=True)
    weights = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), draws)
    return (weights @ rows).T
