"""Square: random search without a gradient (Andriushchenko et al. 2020, arXiv 1912.00049), to see whether gradients are hidden.

It sees the same losses as the attacks with a gradient; if it breaks what they do not, their gradient is no good.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from davsp.attacks.apgd import ENOUGH, Losses, SearchResult

SHARE = 0.3  # of the pixels that the first squares cover
HALVED = (10, 50, 200, 1000, 2000, 4000, 6000, 8000)  # of 10,000 tries: where the area of the squares is halved


@torch.no_grad()
def square(losses: Losses, clean: Float[Tensor, "b 3 h w"], eps: float, tries: int, seed: int) -> SearchResult:
    """Lower the losses within |x - clean| <= eps and [0, 1], by squares of +eps or -eps a channel.

    Args:
        losses: as in `apgd`; no gradient is asked for.
        tries: losses asked for a picture, the stripes of the start included.
        seed: of all draws.
    """
    rng = torch.Generator().manual_seed(seed)
    b, _, h, w = clean.shape
    stripes = _signs((b, 3, 1, w), rng).to(clean)
    best = (clean + eps * stripes).clamp(0, 1)
    curve = [losses(best)]
    for k in range(1, tries):
        if bool((curve[-1] <= ENOUGH).all()):
            curve += [curve[-1]] * (tries - k)
            break
        share = SHARE / 2 ** sum(k * 10_000 / tries >= at for at in HALVED)
        side = min(max(1, round((share * h * w) ** 0.5)), h, w)
        candidate = best.clone()
        for row in range(b):
            top, left = (int(torch.randint(0, n - side + 1, (), generator=rng)) for n in (h, w))
            place = (row, slice(None), slice(top, top + side), slice(left, left + side))
            candidate[place] = (clean[place] + eps * _signs((3, 1, 1), rng).to(clean)).clamp(0, 1)
        loss = losses(candidate)
        better = loss < curve[-1]
        best[better] = candidate[better]
        curve.append(torch.where(better, loss, curve[-1]))
    return SearchResult(best, torch.stack(curve, 1).float(), [False] * b)


def _signs(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=rng).float() * 2 - 1
