"""Intervals and tests for success rates, with repeated problems counted once."""

from math import comb
from statistics import NormalDist

import numpy as np

from .errors import R3Error


def wilson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for a rate of k successes in n independent trials, in 0..1."""
    if not 0 <= k <= n or n == 0:
        raise R3Error(f"wilson got k={k}, n={n}: it needs 0 <= k <= n and at least one trial")
    z = NormalDist().inv_cdf((1 + level) / 2)
    center, half = k + z * z / 2, z * (k * (n - k) / n + z * z / 4) ** 0.5
    lo, hi = (center - half) / (n + z * z), (center + half) / (n + z * z)
    return float(lo) if k else 0.0, float(hi) if k < n else 1.0


def rate_interval(successes, clusters, trials=None, level=0.95, draws=2000, seed=0) -> tuple[float, float]:
    """Interval of sum(successes) / sum(trials), arrays of shape (n,); one trial a row by default.

    Wilson's where each row is one trial of a problem of its own (`clusters` holds problem ids), and on the
    number of problems at a rate of 0 or 1; otherwise problems are resampled with all their rows.
    """
    k = np.asarray(successes, float)
    n = np.ones(len(k)) if trials is None else np.asarray(trials, float)
    ids, at = np.unique(np.asarray(clusters), return_inverse=True)
    if len(ids) == len(n) and (n == 1).all():
        return wilson(k.sum(), n.sum(), level)
    if k.sum() in (0, n.sum()):
        return wilson(len(ids) * bool(k.any()), len(ids), level)
    sums = _resample([np.bincount(at, k), np.bincount(at, n)], draws, seed)
    return tuple(np.quantile(sums[0] / sums[1], [(1 - level) / 2, (1 + level) / 2]).tolist())


def rate_difference(a, a_clusters, b, b_clusters, level=0.95, draws=2000, seed=0):
    """(mean(a) - mean(b), lo, hi, p) for 0/1 arrays on sets of problems that may differ.

    Problems of either set are resampled, numerators and denominators together: percentile interval, and a
    two-sided p never below 2 ** (1 - problems), the least of an exact sign test. Where all draws agree the
    interval is Newcombe's, from Wilson's on the numbers of problems.
    """
    if not len(a) or not len(b):
        raise R3Error(f"cannot compare {len(a)} with {len(b)} outcomes: both sides need at least one")
    ids, at = np.unique(np.concatenate([a_clusters, b_clusters]), return_inverse=True)
    columns = []
    for outcomes, where in ((a, at[: len(a)]), (b, at[len(a) :])):
        right = np.bincount(where, np.asarray(outcomes, float), len(ids))
        columns += [right, np.bincount(where, minlength=len(ids))]
    k_a, n_a, k_b, n_b = _resample(columns, draws, seed)
    values = (k_a / np.maximum(n_a, 1) - k_b / np.maximum(n_b, 1))[(n_a > 0) & (n_b > 0)]
    lo, hi = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    p, q = np.mean(a), np.mean(b)
    if lo == hi:
        p_lo, p_hi = rate_interval(a, a_clusters, level=level)
        q_lo, q_hi = rate_interval(b, b_clusters, level=level)
        lo, hi = p - q - np.hypot(p - p_lo, q_hi - q), p - q + np.hypot(p_hi - p, q - q_lo)
    tail = 2 * (1 + min((values <= 0).sum(), (values >= 0).sum())) / (1 + len(values))
    return float(p - q), float(lo), float(hi), float(min(1.0, max(tail, 2.0 ** (1 - len(ids)))))


def mcnemar(a, b) -> float:
    """Exact two-sided p of McNemar's test for paired 0/1 arrays of shape (n,)."""
    differ = np.asarray(a, int) - np.asarray(b, int)
    fewer, more = sorted([int((differ > 0).sum()), int((differ < 0).sum())])
    tail = sum(comb(fewer + more, k) for k in range(fewer + 1))  # of 2 ** (fewer + more), in exact integers
    return min(1.0, 2 * tail / 2 ** (fewer + more))


def holm(ps) -> np.ndarray:
    """Holm's adjusted p values, in the order given."""
    ps = np.asarray(ps, float)
    order = np.argsort(ps)
    adjusted = np.maximum.accumulate(ps[order] * np.arange(len(ps), 0, -1)).clip(max=1.0)
    return adjusted[np.argsort(order)]


def _resample(columns, draws, seed) -> np.ndarray:
    """Sums, shape (columns, draws), over problems drawn anew; equal problems are drawn as one multinomial."""
    rows, counts = np.unique(np.column_stack(columns), axis=0, return_counts=True)
    weights = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), draws)
    return (weights @ rows).T
