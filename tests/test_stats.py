"""Intervals and tests against published values, scipy, and their own promise: coverage."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from r3lib.stats import holm, mcnemar, rate_difference, rate_interval, wilson


def test_wilson_equals_a_textbook_value():
    """Newcombe (1998), Table I: 81 of 263 gives 0.2553 to 0.3662."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_wilson_stays_within_0_and_1():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=5e-5)
    assert wilson(10, 10)[1] == 1.0


def test_mcnemar_reads_only_the_pairs_that_differ():
    a = [1] * 10 + [0] * 2 + [1] * 30 + [0] * 30
    b = [0] * 10 + [1] * 2 + [1] * 30 + [0] * 30
    assert mcnemar(a, b) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar(a, b) == mcnemar(b, a) == mcnemar(a[:12], b[:12])
    assert mcnemar([1, 0], [1, 0]) == 1.0


def test_holm_equals_a_worked_example_in_any_order():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert len(holm([])) == 0


def paired_bootstrap(a, b, clusters=None, **options):
    """`rate_difference` of outcomes on the same cases."""
    clusters = np.arange(len(a)) if clusters is None else clusters
    return rate_difference(a, clusters, b, clusters, **options)[:3]


def test_the_paired_bootstrap_agrees_with_scipy():
    random = np.random.default_rng(1)
    a, b = random.random(300) < 0.4, random.random(300) < 0.2
    theirs = scipy_stats.bootstrap(
        (a * 1.0 - b * 1.0,), np.mean, method="percentile", n_resamples=20_000, rng=2
    ).confidence_interval
    diff, lo, hi = paired_bootstrap(a, b, draws=20_000)
    assert diff == pytest.approx(a.mean() - b.mean())
    assert (lo, hi) == pytest.approx(tuple(theirs), abs=0.006)


def test_the_ratio_bootstrap_agrees_with_scipy_on_sums_a_problem():
    random = np.random.default_rng(3)
    ids_a, ids_b = random.integers(0, 150, 260), random.integers(0, 150, 110)
    a, b = random.random(260) < 0.5, random.random(110) < 0.3
    sums = [np.bincount(i, w, 150) for i, w in ((ids_a, a), (ids_a, None), (ids_b, b), (ids_b, None))]
    seen = [s[(sums[1] + sums[3]) > 0] for s in sums]

    def difference(k, n, m, o, axis=-1):
        return k.sum(axis) / n.sum(axis) - m.sum(axis) / o.sum(axis)

    theirs = scipy_stats.bootstrap(
        seen, difference, paired=True, vectorized=True, method="percentile", n_resamples=20_000, rng=4
    ).confidence_interval
    diff, lo, hi, _ = rate_difference(a, ids_a, b, ids_b, draws=20_000)
    assert diff == pytest.approx(a.mean() - b.mean())
    assert (lo, hi) == pytest.approx(tuple(theirs), abs=0.01)


def test_three_copies_of_a_problem_are_not_three_problems():
    random = np.random.default_rng(5)
    a, b = random.random(200) < 0.4, random.random(200) < 0.3
    one = paired_bootstrap(a, b)
    copies = paired_bootstrap(np.tile(a, 3), np.tile(b, 3), np.tile(np.arange(200), 3))
    naive = paired_bootstrap(np.tile(a, 3), np.tile(b, 3))
    assert copies == pytest.approx(one)
    assert naive[2] - naive[1] == pytest.approx((one[2] - one[1]) / np.sqrt(3), rel=0.1)


def test_pairing_narrows_the_interval_of_correlated_outcomes():
    random = np.random.default_rng(6)
    hard = random.random(400)
    a, b = hard < 0.5, (hard < 0.45) | (random.random(400) < 0.02)
    _, lo, hi = paired_bootstrap(a, b)
    _, low, high, _ = rate_difference(a, np.arange(400), b, np.arange(400, 800))
    assert hi - lo < (high - low) / 2


def simulate_seeds(random, problems, rate, spread, seeds=3):
    """0/1 outcomes of several seeds on the same problems, whose difficulty is shared."""
    difficulty = random.beta(rate * spread, (1 - rate) * spread, problems)
    ids = np.tile(np.arange(problems), seeds)
    return random.random(problems * seeds) < difficulty[ids], ids


def test_rate_intervals_over_seeds_cover_where_wilson_does_not():
    random = np.random.default_rng(7)
    covered, naive = 0, 0
    for run in range(400):
        outcomes, ids = simulate_seeds(random, 150, 0.3, 0.5)
        lo, hi = rate_interval(outcomes, ids, seed=run, draws=500)
        covered += lo <= 0.3 <= hi
        lo, hi = wilson(outcomes.sum(), len(outcomes))
        naive += lo <= 0.3 <= hi
    assert 0.92 <= covered / 400 <= 0.98
    assert naive / 400 < 0.85


def test_differences_of_rates_on_different_failures_cover():
    """A policy with three seeds against one with one, each judged on the problems that it fails."""
    random = np.random.default_rng(8)
    covered, rejected = 0, 0
    for run in range(400):
        ids_a = np.concatenate([np.flatnonzero(random.random(300) < 0.45) for _ in range(3)])
        ids_b = np.flatnonzero(random.random(300) < 0.5)
        luck = random.beta(0.3, 0.7, 300)
        a, b = random.random(len(ids_a)) < luck[ids_a], random.random(len(ids_b)) < luck[ids_b]
        _, lo, hi, p = rate_difference(a, ids_a, b, ids_b, seed=run, draws=500)
        covered += lo <= 0 <= hi
        rejected += p < 0.05
    assert 0.92 <= covered / 400 <= 0.98
    assert rejected / 400 <= 0.08


def test_rates_that_no_resampling_moves_still_have_an_interval():
    ids = [0, 0, 1, 1, 2, 2]
    assert rate_interval([0] * 6, ids) == wilson(0, 3)
    assert rate_interval([1] * 6, ids) == wilson(3, 3)
    diff, lo, hi, p = rate_difference([1, 1, 1], [0, 1, 2], [0, 0, 0], [0, 1, 2])
    assert diff == 1.0 and lo < 0.5 and hi == 1.0
    assert p == 0.25


def test_a_rate_of_steps_resamples_whole_reflections():
    """Ten reflections of 50 equal steps each are ten pieces of evidence, not five hundred."""
    lo, hi = rate_interval([50] * 5 + [0] * 5, range(10), trials=[50] * 10)
    assert lo <= 0.2 and hi >= 0.8


def test_one_seed_of_distinct_problems_gets_wilsons_interval():
    assert rate_interval([1, 0, 0, 0], list("abcd")) == wilson(1, 4)


def test_the_same_seed_gives_the_same_interval():
    random = np.random.default_rng(9)
    a, b, ids = random.random(90) < 0.5, random.random(90) < 0.3, np.arange(90) % 40
    assert rate_difference(a, ids, b, ids, seed=1) == rate_difference(a, ids, b, ids, seed=1)
    assert rate_difference(a, ids, b, ids, seed=1) != rate_difference(a, ids, b, ids, seed=2)
