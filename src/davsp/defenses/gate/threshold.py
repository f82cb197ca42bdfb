"""From the scores of held-out queries to a threshold.

The false refusals of a threshold are bounded without any assumption on how scores are spread (split conformal prediction), only that
the calibration queries are drawn as those that are served:

- marginal: over draws of the calibration set, a benign query is refused with a probability of at most `rate`. The threshold is the
  ceil((n + 1)(1 - rate))-th smallest of n benign scores (Vovk et al. 2005), so n >= 1 / rate - 1.
- with confidence c: of all calibration sets, a share of at least c gives a threshold that refuses at most `rate`. It lets as many of
  the n benign scores pass above it as a binomial of `rate` stays below with probability 1 - c (Wilks 1941), so
  n >= log(1 - c) / log(1 - rate).

Queries of one intent resemble each other, so a promise for queries is weaker for intents that the calibration never met.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import binom

from davsp.errors import DavspError
from davsp.vector import auroc

RATE, CONFIDENCE = 0.005, 0.95


def needed(rate: float = RATE, confidence: float | None = CONFIDENCE) -> int:
    """The fewest benign queries from which a threshold of this rate can be had."""
    if confidence is None:
        return math.ceil(round(1 / rate, 9)) - 1
    return math.ceil(round(math.log(1 - confidence) / math.log(1 - rate), 9))


def check_enough(count: int, rate: float, confidence: float | None) -> None:
    """Raises DavspError if there are too few benign queries; the sentence says how many are needed."""
    if count < (least := needed(rate, confidence)):
        promise = "on average" if confidence is None else f"with {confidence:.0%} confidence"
        raise DavspError(
            f"there are {count} benign queries to calibrate on, but false refusals of {rate:.2%} {promise} need "
            f"at least {least}; give more, or allow a higher rate (--false-refusals)"
        )


def threshold(benign: Sequence[float], rate: float = RATE, confidence: float | None = CONFIDENCE) -> float:
    """The smallest threshold that keeps the promise of the head of this file.

    Args:
        benign: scores of benign queries that nothing was fitted or chosen on.
        rate: share of benign queries that may be refused, in (0, 1).
        confidence: in (0, 1); None: on average over calibration sets.

    Raises:
        DavspError: there are too few (`check_enough`).
    """
    check_enough(len(benign), rate, confidence)
    scores = np.sort(np.asarray(benign, dtype=float))
    if confidence is None:
        return float(scores[math.ceil(round((len(scores) + 1) * (1 - rate), 9)) - 1])
    # ppf is the first count whose probability of being reached from below exceeds 1 - confidence
    above = int(binom.ppf(1 - confidence, len(scores), rate))
    above -= binom.cdf(above, len(scores), rate) > 1 - confidence
    return float(scores[len(scores) - 1 - above])


def counts(
    malicious: Float[np.ndarray, " n"], benign: Float[np.ndarray, " m"], rate: float, confidence: float | None
) -> dict[str, Any]:
    """The threshold from held-out scores, and what it makes of them: the fields of `davsp.prompts.gate.Threshold`."""
    at = threshold(benign.tolist(), rate, confidence)
    return {
        "threshold": at, "benign": len(benign), "malicious": len(malicious),
        "refused_benign": int((benign > at).sum()), "refused_malicious": int((malicious > at).sum()),
        "auroc": auroc(torch.tensor(malicious), torch.tensor(benign)),
    }  # fmt: skip
