"""What each attack on the pixels lowers, and how it looks for it."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from davsp.attacks.apgd import Losses, SearchResult, apgd
from davsp.attacks.settings import AttackSettings
from davsp.attacks.square import square
from davsp.attacks.surface import Surface
from davsp.vector import HarmfulnessVector


def losses_of(
    attack: str, surface: Surface, vector: HarmfulnessVector | None, progress: Callable[[int], object]
) -> Losses:
    """The loss of each picture under an attack; `progress` is told how many pictures each call took.

    comply, deed (and all that go by them): cross-entropy of the wanted beginnings. hide: max(0, s - mu_minus) / half_gap, in half
    distances between the class means. both: their sum.
    """

    def losses(pictures: Tensor) -> Tensor:
        progress(len(pictures))
        if attack not in ("hide", "both"):
            return surface.comply(pictures)
        assert vector is not None
        harm = ((surface.projection(pictures, vector) - vector.mu_minus) / vector.half_gap()).clamp(min=0)
        return harm if attack == "hide" else surface.comply(pictures) + harm

    return losses


def search(
    attack: str,
    losses: Losses,
    clean: Float[Tensor, "b 3 h w"],
    eps: float,
    settings: AttackSettings,
    at: int,
    delta: Float[Tensor, "3 h w"] | None = None,
) -> SearchResult:
    """The best pictures that an attack finds within eps (white = 1).

    Args:
        at: number of the first picture in the run, so that every batch has draws of its own.
        delta: of `universal`.
    """
    seeds = [settings.seed * 1_000_003 + at + 7_919 * r for r in range(settings.restarts)]
    if attack == "noise":
        noise = 2 * torch.rand(clean.shape, generator=torch.Generator().manual_seed(seeds[0])) - 1
        noisy = (clean + eps * noise.to(clean)).clamp(0, 1)
        with torch.no_grad():
            return SearchResult(noisy, losses(noisy)[:, None], [False] * len(clean))
    if attack == "universal":
        assert delta is not None
        moved = (clean + delta).clamp(0, 1)
        with torch.no_grad():
            return SearchResult(moved, torch.stack([losses(clean), losses(moved)], 1), [False] * len(clean))
    if attack == "square":
        return square(losses, clean, eps, settings.tries, seeds[0])
    best = apgd(losses, clean, eps, settings.steps)
    for seed in seeds[1:]:
        again = apgd(losses, clean, eps, settings.steps, seed)
        better = again.curve[:, -1] < best.curve[:, -1]
        best.pictures[better], best.curve[better] = again.pictures[better], again.curve[better]
    return best
