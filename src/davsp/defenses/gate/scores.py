"""What a gate sees of a query: one pass of the model over a defended query, without an answer.

s(x) = v . h_l, the projection of the last input token's state (`davsp.vector`); r(x), the mean log-likelihood of the refusal at the
answer's place, its end token included, with the refusal's own tokens before each (teacher-forced, so one pass tells it).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from davsp.lvlm import LVLM, Canvas
from davsp.query import Question

RIDGE = 1e-3


class Look(NamedTuple):
    """Scores of a batch.

    Attributes:
        projection: s(x).
        refusal: r(x) in nats a token; None where the pass ended at the layer.
    """

    projection: Float[Tensor, " b"]
    refusal: Float[Tensor, " b"] | None


def look(
    lvlm: LVLM,
    canvas: Canvas | None,
    questions: Sequence[Question],
    layer: int,
    direction: Float[Tensor, " d"],
    refusal: str | None = None,
) -> Look:
    """The scores of defended queries, on the CPU.

    Args:
        canvas, questions: as `LVLM.states`.
        layer, direction: of the projection; the direction is a unit vector.
        refusal: whose likelihood is asked for; None: the pass ends at the layer.

    Raises:
        DavspError: a layer that the model does not have, or a query that it has no room for.
    """
    with torch.no_grad():
        seen = look_at(lvlm, canvas, questions, layer, direction, refusal)
    return Look(seen.projection.cpu(), None if seen.refusal is None else seen.refusal.cpu())


def look_at(
    lvlm: LVLM,
    canvas: Canvas | None,
    questions: Sequence[Question],
    layer: int,
    direction: Float[Tensor, " d"],
    refusal: str | None = None,
) -> Look:
    """As `look`, where the model is, and with the gradient to a canvas that requires it: what an attacker lowers."""
    if refusal is None:
        state, likelihood = lvlm.states(canvas, questions, [layer])[:, 0], None
    else:
        step = lvlm.step(canvas, questions, layer, [refusal] * len(questions))
        assert step.answer_loss is not None
        state, likelihood = step.state, -step.answer_loss.float()
    return Look(state.float() @ direction.to(state.device, torch.float32), likelihood)


def combined(malicious: Float[np.ndarray, "n k"], benign: Float[np.ndarray, "m k"]) -> tuple[float, ...]:
    """Weights of k scores by logistic regression of the class, both classes counted alike.

    A small ridge (`RIDGE`, on standardised scores) keeps the weights finite where the classes are parted by a plane.
    """
    from scipy.optimize import minimize

    features = np.concatenate([malicious, benign])
    mean, spread = features.mean(0), features.std(0)
    x = (features - mean) / np.where(spread > 0, spread, 1)
    signs = np.concatenate([np.ones(len(malicious)), -np.ones(len(benign))])
    weight = np.concatenate([np.full(len(malicious), 0.5 / len(malicious)), np.full(len(benign), 0.5 / len(benign))])

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = signs * (x @ w[:-1] + w[-1])
        slope = -signs * weight / (1 + np.exp(np.clip(margin, -500, 500)))
        ridge = RIDGE * np.append(w[:-1], 0)
        return float(weight @ np.logaddexp(0, -margin) + ridge @ w / 2), np.append(slope @ x, slope.sum()) + ridge

    w = minimize(loss, np.zeros(x.shape[1] + 1), jac=True).x[:-1] / np.where(spread > 0, spread, 1)
    return tuple(map(float, w))
