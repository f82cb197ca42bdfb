"""Intervals and paired tests of scores that are no plain rates."""

import numpy as np
import pytest

from davsp import metrics
from davsp.benchmarks import bootstrap


def mean(sums):
    return sums[0][:, 0] / sums[0][:, 1]


def test_bootstrap_of_a_mean_is_that_of_metrics():
    rng = np.random.default_rng(0)
    values, groups = rng.random(120), [f"g{i // 3}" for i in range(120)]
    ours = bootstrap.interval([bootstrap.clusters((g, (v, 1.0)) for g, v in zip(groups, values, strict=True))], mean)
    assert ours == pytest.approx(metrics.cluster_bootstrap(values.tolist(), groups), abs=0.005)


def test_bootstrap_is_stratified():
    """Two strata that are constant within have no spread, however far apart they lie."""
    strata = [np.tile([[0.0, 1.0]], (9, 1)), np.tile([[1.0, 1.0]], (9, 1))]
    both = lambda sums: sum(s[:, 0] / s[:, 1] for s in sums)  # noqa: E731
    assert bootstrap.interval(strata, both) == (1.0, 1.0)
    low, high = bootstrap.interval([np.concatenate(strata)], mean)
    assert high - low > 0.3


def test_paired_difference():
    rng = np.random.default_rng(1)
    before = np.stack([rng.random(50), np.ones(50)], 1)
    after = before + np.stack([np.full(50, 0.1) + 0.02 * rng.standard_normal(50), np.zeros(50)], 1)
    change, low, high, p = bootstrap.paired_difference([before], [after], mean)
    assert change == pytest.approx((after - before)[:, 0].mean()) and low < change < high
    assert high - low < 0.03 and p == pytest.approx(1 / (metrics.DRAWS + 1))  # the spread of changes, not of scores
    assert bootstrap.paired_difference([before], [before], mean)[3] == 1.0
    with pytest.raises(ValueError, match="same clusters"):
        bootstrap.paired_difference([before], [after[:7]], mean)


def test_p_of_three_clusters_by_hand():
    """Three clusters that all gained: 2 of the 8 ways to swap them are as extreme."""
    before, after = np.array([[0.0, 1.0]] * 3), np.array([[1.0, 1.0]] * 3)
    assert bootstrap.paired_difference([before], [after], mean)[3] == pytest.approx(0.25, abs=0.03)
