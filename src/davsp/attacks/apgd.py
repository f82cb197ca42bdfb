"""APGD: projected gradient descent in a box around each picture, whose step halves itself (Croce and Hein 2020, arXiv 2003.01690).

Every row is a picture of its own, with its own step size. What is kept is the best picture seen, by its loss after rounding to 8 bit.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from davsp.errors import DavspError

Losses = Callable[[Tensor], Tensor]
"""Pictures (b, 3, h, w) -> a loss for each; carries the gradient."""
MOMENTUM, FALLS = 0.75, 0.75
ENOUGH = 0.01
"""A loss at which a picture counts as won: a wanted beginning of which every token is near certain, a projection at the margin."""


class SearchResult(NamedTuple):
    """The best pictures, and of each its loss at the start and the best one after every step; `dead`: a first gradient of zeros."""

    pictures: Float[Tensor, "b 3 h w"]
    curve: Float[Tensor, "b n"]
    dead: list[bool]


def apgd(
    losses: Losses, clean: Float[Tensor, "b 3 h w"], eps: float, steps: int, seed: int | None = None
) -> SearchResult:
    """Lower the losses within |x - clean| <= eps and [0, 1]; ends before its time once all are `ENOUGH`.

    Args:
        losses: to be lowered.
        clean: where the box stands, values in [0, 1].
        eps: half its side, in pixel units where white is 1.
        steps: gradients a picture, at least 1.
        seed: of a random start in the box; None: the clean pictures.

    Returns:
        The best pictures. The curve has steps + 1 points; `dead` marks losses that are not enough, yet have no gradient.

    Raises:
        DavspError: a loss or gradient that is not finite.
    """
    low, high = (clean - eps).clamp(min=0), (clean + eps).clamp(max=1)
    x = clean if seed is None else low + (high - low) * _uniform(clean, seed)
    loss, gradient = _gradient(losses, x)
    dead = ((gradient.flatten(1) == 0).all(1) & (loss > ENOUGH)).tolist()
    best, best_loss, best_gradient, before = x.clone(), loss.clone(), gradient.clone(), x.clone()
    step = torch.full_like(loss, 2 * eps)
    checks, curve = _checkpoints(steps), [best_loss.clone()]
    falls, then_step, then_best, since = torch.zeros_like(loss), step.clone(), best_loss.clone(), 0
    for k in range(1, steps + 1):
        if bool((best_loss <= ENOUGH).all()):
            curve += [best_loss] * (steps + 1 - k)
            break
        z = _within(x - _wide(step) * gradient.sign(), low, high)
        move = z if k == 1 else x + MOMENTUM * (z - x) + (1 - MOMENTUM) * (x - before)
        before, x, last = x, _within(move, low, high), loss
        loss, gradient = _gradient(losses, x)
        falls += (loss < last).float()
        better = loss < best_loss
        best[better], best_gradient[better] = x[better], gradient[better]
        best_loss = torch.where(better, loss, best_loss)
        curve.append(best_loss.clone())
        if k in checks:
            stuck = (falls < FALLS * (k - since)) | ((step == then_step) & (best_loss >= then_best))
            then_step, then_best, since = step.clone(), best_loss.clone(), k
            step = torch.where(stuck, step / 2, step)
            x, gradient = x.clone(), gradient.clone()
            x[stuck], gradient[stuck], before = best[stuck], best_gradient[stuck], before.clone()
            before[stuck] = best[stuck]
            loss = torch.where(stuck, best_loss, loss)
            falls.zero_()
    return SearchResult(best, torch.stack(curve, 1), dead)


def _checkpoints(steps: int) -> set[int]:
    """Steps at which the step size is looked at: at 22 % of the way, then ever closer, 6 % apart at the end."""
    at = [0.0, 0.22]
    while at[-1] < 1:
        at.append(at[-1] + max(at[-1] - at[-2] - 0.03, 0.06))
    return {round(share * steps + 0.499) for share in at[1:] if share <= 1}


def _gradient(losses: Losses, x: Tensor) -> tuple[Float[Tensor, " b"], Float[Tensor, "b 3 h w"]]:
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        loss = losses(leaf)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    if not bool(loss.isfinite().all()) or not bool(gradient.isfinite().all()):
        raise DavspError("the attack's loss or gradient is not finite: use --dtype float32")
    return loss.detach().float(), gradient


def _within(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, low), high)


def _wide(step: Float[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
    return step[:, None, None, None]


def _uniform(like: Tensor, seed: int) -> Tensor:
    """The same numbers on every device."""
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)
