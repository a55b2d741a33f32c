"""Decisions: the numbers against an independent reference, the rule against simulated nights.

pytest tests/test_stats.py
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.space import Decision
from harness.stats import Difference, Noise, difference, look, paired_interval, pooled_noise

RULE = Decision()


def runs(values: list[float], start: int = 0) -> dict[int, float]:
    return dict(enumerate(values, start))


def test_pooled_variance_is_the_mean_of_group_variances_weighted_by_df() -> None:
    rng = np.random.default_rng(0)
    groups = [rng.normal(3, 0.1, n) for n in (8, 2, 5, 1)]
    noise = pooled_noise([runs(list(g)) for g in groups])
    expected = sum((len(g) - 1) * np.var(g, ddof=1) for g in groups[:3]) / (7 + 1 + 4)
    assert noise.variance == pytest.approx(expected, rel=1e-12)
    assert noise.df == 12
    assert noise.rho == 0.0


def test_one_unstable_setting_does_not_blind_the_night() -> None:
    rng = np.random.default_rng(5)
    groups = [runs(list(rng.normal(3, 0.004, n))) for n in [8] + [2] * 30]
    calm = pooled_noise(groups).sigma
    assert pooled_noise([*groups, runs([2.99, 5.2])]).sigma < 1.5 * calm


def test_seed_correlation_is_found_and_shrunk() -> None:
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 1, 200)
    control = 3 + math.sqrt(0.6) * shared + math.sqrt(0.4) * rng.normal(0, 1, 200)
    candidate = 2 + math.sqrt(0.6) * shared + math.sqrt(0.4) * rng.normal(0, 1, 200)
    a, b = runs(list(control)), runs(list(candidate))
    assert pooled_noise([a, b], [(a, b)]).rho == pytest.approx(0.6, abs=0.12)
    few = ({s: a[s] for s in range(3)}, {s: b[s] for s in range(3)})
    x, y = np.array(list(few[0].values())), np.array(list(few[1].values()))
    widest = max(((x - x.mean()) ** 2).sum(), ((y - y.mean()) ** 2).sum())
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (widest + 6 * 1.0)
    assert pooled_noise([{0: 0.0, 1: math.sqrt(2)}], [few]).rho == pytest.approx(max(0, slope), abs=1e-9)


@given(rho=st.floats(0, 0.95), n=st.integers(1, 8), shift=st.floats(-1, 1))
def test_difference_matches_the_control_variate_formula(rho: float, n: int, shift: float) -> None:
    rng = np.random.default_rng(n)
    c, x = rng.normal(3, 0.1, 10), rng.normal(3 - shift, 0.1, n)
    d = difference(runs(list(c)), runs(list(x)), Noise(0.01, 20, rho))
    assert d.delta == pytest.approx(c.mean() - x.mean() + rho * (c[:n].mean() - c.mean()), abs=1e-12)
    assert d.se == pytest.approx(math.sqrt(0.01 * ((1 - rho**2) / n + (1 - rho) ** 2 / 10)), rel=1e-12)


def test_without_shared_seeds_nothing_is_paired() -> None:
    c, x = runs([3.0, 3.2, 3.1]), runs([2.9, 3.0], start=100)
    d = difference(c, x, Noise(0.01, 20, 0.8))
    assert d.delta == pytest.approx(3.1 - 2.95)
    assert d.se == pytest.approx(math.sqrt(0.01 * (1 / 2 + 1 / 3)))


def test_standard_error_is_honest() -> None:
    """Over many simulated experiments the spread of delta is its standard error, at any correlation."""
    rng = np.random.default_rng(2)
    for rho in (0.0, 0.5, 0.9):
        deltas, n, m = [], 4, 8
        for _ in range(4000):
            seed = rng.normal(0, math.sqrt(rho), m)
            c = seed + rng.normal(0, math.sqrt(1 - rho), m)
            x = seed[:n] + rng.normal(0, math.sqrt(1 - rho), n)
            d = difference(runs(list(c)), runs(list(x)), Noise(1.0, 50, rho))
            deltas.append(d.delta)
        assert np.std(deltas) == pytest.approx(d.se, rel=0.05)
        assert abs(np.mean(deltas)) < 4 * d.se / math.sqrt(len(deltas))


def test_standard_error_holds_where_the_candidate_is_noisier() -> None:
    """Control sd 0.5, candidate sd 1.2, correlated: the stated error is not below the true one."""
    rng = np.random.default_rng(4)
    pairs = []
    for _ in range(60):
        seed = rng.normal(0, 1, 8)
        c = 0.4 * seed + rng.normal(0, 0.3, 8)
        pairs.append((runs(list(c)), runs(list(0.8 * seed + rng.normal(0, 0.9, 8)))))
    noise = pooled_noise([x for _, x in pairs], pairs)
    deltas = [difference(c, {s: x[s] for s in range(4)}, noise).delta for c, x in pairs]
    assert np.std(deltas) < 1.15 * difference(pairs[0][0], {s: pairs[0][1][s] for s in range(4)}, noise).se


def test_bounds_at_each_look() -> None:
    for index in range(4):
        lo, up = RULE.drop[index], RULE.keep[index]
        assert look(lo, index, 10**9, RULE) == "drop"
        assert look(up + 1e-6, index, 10**9, RULE) == "provisional"
        if index < 3:
            assert look((lo + up) / 2, index, 10**9, RULE) == "more"
        assert look(up * 1.1, index, 7, RULE) != "provisional", "few degrees of freedom widen the keep bound"
    assert look(RULE.drop[3] + 1e-3, 3, 7, RULE) == "drop", "the last look decides"


class Stream:
    """A night in numbers: the rule as the product's own functions, the world as Gaussian noise (sigma = 1)."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.control = runs(list(self.rng.normal(0, 1, 14)))
        self.groups = [self.control]

    def decide(self, gain: float) -> tuple[bool, int]:
        x = runs(list(self.rng.normal(-gain, 1, 14)))
        noise = pooled_noise(self.groups)
        for index, n in enumerate(RULE.looks):
            d = difference(self.control, {s: x[s] for s in range(n)}, noise)
            outcome = look(d.z, index, noise.df, RULE)
            if outcome != "more":
                break
        if n > 1:
            self.groups.append({s: x[s] for s in range(n)})
        if outcome != "provisional":
            return False, n
        audit = {s: x[s] for s in range(n, n + RULE.audit_seeds)}
        return difference(self.control, audit, noise).z >= RULE.audit_z, n + RULE.audit_seeds


def test_a_thousand_placebos_keep_at_most_ten() -> None:
    nights = [Stream(number) for number in range(100)]
    keeps = sum(night.decide(0.0)[0] for night in nights for _ in range(10))
    assert keeps <= 10


def test_big_wins_are_found_and_losses_are_cheap() -> None:
    found = [Stream(night).decide(2.0) for night in range(200)]
    assert sum(kept for kept, _ in found) >= 0.7 * len(found)
    harmful = [Stream(night).decide(-1.2) for night in range(200)]
    assert sum(kept for kept, _ in harmful) == 0
    assert np.mean([n for _, n in harmful]) < 1.6


def test_paired_interval_is_the_t_interval() -> None:
    from scipy import stats

    rng = np.random.default_rng(3)
    c, x = rng.normal(3, 0.1, 6), rng.normal(2.9, 0.1, 6)
    delta, se, low, high = paired_interval(runs(list(c)), runs(list(x)) | {99: 0.0})
    expected = stats.ttest_rel(c, x).confidence_interval(0.95)
    assert (delta, low, high) == pytest.approx((np.mean(c - x), expected.low, expected.high), rel=1e-9)
    assert se == pytest.approx(stats.sem(c - x))


def test_identical_runs_do_not_divide_by_zero() -> None:
    noise = pooled_noise([runs([3.0, 3.0, 3.0])])
    assert math.isfinite(difference(runs([3.0, 3.0]), runs([3.0]), noise).z)
    assert Difference(0.0, 1e-9, 1, 2).z == 0.0
