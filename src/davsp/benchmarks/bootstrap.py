"""Intervals and paired tests of scores that are no plain rates: sums of accuracies, ratios of means.

Clusters (the pictures that several questions share) are drawn with replacement within their stratum, and the statistic is
computed from the sums of what was drawn. Rates are in `davsp.metrics`, with Wilson's interval and McNemar's test.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from davsp.metrics import CONFIDENCE, DRAWS

Strata = Sequence[NDArray[np.float64]]
"""One array a stratum, (clusters, columns): the sums of each cluster."""

Statistic = Callable[[Sequence[NDArray[np.float64]]], NDArray[np.float64]]
"""From the sums of each stratum, (draws, columns), to the value of each draw, (draws,)."""


def clusters(rows: Iterable[tuple[Hashable, Sequence[float]]]) -> NDArray[np.float64]:
    """The sums of the columns by cluster, (clusters, columns), in the order of first appearance."""
    sums: dict[Hashable, NDArray[np.float64]] = {}
    for name, values in rows:
        row = np.asarray(values, float)
        sums[name] = sums[name] + row if name in sums else row
    return np.array(list(sums.values()))


def value(strata: Strata, statistic: Statistic) -> float:
    """The statistic of all clusters."""
    return float(statistic([stratum.sum(0, keepdims=True) for stratum in strata])[0])


def interval(strata: Strata, statistic: Statistic, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the statistic. Strata of one cluster, or whose clusters are all equal, add no width.

    Args:
        strata: sums by cluster.
        statistic: must be defined for every draw.
        seed: of the draws.
    """
    weights = _weights(tuple(map(len, strata)), seed)
    return _percentiles(statistic([w @ stratum for w, stratum in zip(weights, strata, strict=True)]))


def paired_difference(
    before: Strata, after: Strata, statistic: Statistic, seed: int = 0
) -> tuple[float, float, float, float]:
    """The difference of a statistic measured twice on the same clusters.

    Args:
        before: sums by cluster without the defense.
        after: sums of the same clusters, in the same order, with it.
        statistic: must be defined for every draw.
        seed: of the draws.

    Returns:
        The difference, the low and high end of its 95 % interval (paired cluster bootstrap), and the two-sided p value
        of the test that swaps before and after of each cluster at random (the observed draw is counted in).

    Raises:
        ValueError: the clusters are not the same.
    """
    if [b.shape for b in before] != [a.shape for a in after]:
        raise ValueError("paired_difference needs the same clusters before and after")
    weights = _weights(tuple(map(len, before)), seed)
    draws = [statistic([w @ s for w, s in zip(weights, strata, strict=True)]) for strata in (after, before)]
    observed = value(after, statistic) - value(before, statistic)

    rng = np.random.default_rng(seed + 1)
    masks = [rng.integers(0, 2, (DRAWS, len(stratum))).astype(float) for stratum in before]
    mixed = [b.sum(0) + m @ (a - b) for m, a, b in zip(masks, after, before, strict=True)]
    other = [a.sum(0) + m @ (b - a) for m, a, b in zip(masks, after, before, strict=True)]
    swapped = np.abs(statistic(mixed) - statistic(other)) >= abs(observed) - 1e-9
    p = float((swapped.sum() + 1) / (DRAWS + 1))
    return observed, *_percentiles(draws[0] - draws[1]), p


@lru_cache(maxsize=2)  # the measures of one split are drawn alike
def _weights(sizes: tuple[int, ...], seed: int) -> list[NDArray[np.float64]]:
    """How often each cluster is drawn, (draws, clusters), for strata of these sizes."""
    rng = np.random.default_rng(seed)
    return [rng.multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(float) for n in sizes]


def _percentiles(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
