"""How well projections tell malicious queries from benign ones, layer by layer."""

from typing import Any

from jaxtyping import Float
from torch import Tensor


def auroc(malicious: Float[Tensor, " n"], benign: Float[Tensor, " m"]) -> float:
    """Probability that a malicious projection is above a benign one; ties count half."""
    difference = malicious[:, None] - benign[None]
    return float((difference > 0).double().mean() + (difference == 0).double().mean() / 2)


def compare(malicious: Float[Tensor, "n l"], benign: Float[Tensor, "m l"]) -> list[dict[str, Any]]:
    """A row a layer: layer (from 1), auroc, the mean projection of each class, and their gap in spreads (d')."""
    rows = []
    for at in range(malicious.shape[1]):
        bad, good = malicious[:, at], benign[:, at]
        spread = float(((bad.var(correction=0) + good.var(correction=0)) / 2).sqrt())
        gap = float(bad.mean() - good.mean())
        row = {"layer": at + 1, "auroc": auroc(bad, good), "mean_malicious": float(bad.mean())}
        rows.append(row | {"mean_benign": float(good.mean()), "gap": gap / max(spread, 1e-12)})
    return rows
