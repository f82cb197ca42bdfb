"""What may happen to a canvas between the defense and the model, inside training: `davsp train --augment`.

A border that was trained on its own pixels alone loses its effect by a shift of one of them (docs/reliability.md). Here a share of the
rows of every step is changed before the model looks. All of it has a gradient: moves and resizes are linear, rounding and JPEG are passed
straight through.
"""

import io
from collections.abc import Callable, Sequence
from random import Random
from typing import get_args

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from davsp.lvlm.resample import resample
from davsp.prompts.base import from_picture, to_bytes
from davsp.training.settings import Augmentation

Change = Callable[[Float[Tensor, "3 s s"]], Float[Tensor, "3 s s"]]

SHARE = 0.75
"""Of the rows that are changed; the others stay as they are."""

FURTHEST = 8
"""Pixels of a shift."""


def draw(kinds: Sequence[str], key: str) -> Change | None:
    """The change of one row, a function of `key` alone; None: it stays as it is.

    Args:
        kinds: of `Augmentation`, at least one; each is as likely.
    """
    chance = Random(key)
    if chance.random() >= SHARE:
        return None
    return DRAWN[chance.choice(list(kinds))](chance)


def changed(canvas: Float[Tensor, "b 3 s s"], changes: Sequence[Change | None]) -> Float[Tensor, "b 3 s s"]:
    """Each row after its change."""
    rows = [row if change is None else change(row) for row, change in zip(canvas, changes, strict=True)]
    return torch.stack(rows)


def shifted(right: float, down: float) -> Change:
    """Moved by whole or half pixels, edges repeated; a half pixel is the mean of its two neighbours.

    Raises:
        ValueError: another fraction of a pixel.
    """
    if (2 * right) % 1 or (2 * down) % 1:
        raise ValueError(f"only whole and half pixels: {right}, {down}")

    def change(row: Float[Tensor, "3 s s"]) -> Float[Tensor, "3 s s"]:
        for axis, by in ((2, right), (1, down)):
            side, at = row.shape[axis], torch.arange(row.shape[axis], device=row.device)
            before, after = ((at - whole).clamp(0, side - 1) for whole in (int(-(-by // 1)), int(by // 1)))
            row = (row.index_select(axis, before) + row.index_select(axis, after)) / 2
        return rounded(row)

    return change


def resized(side: int, kernel: int) -> Change:
    """Resized to `side` pixels and back, as Pillow does it on 8-bit pictures."""
    return lambda row: resample(resample(row[None], side, kernel), row.shape[-1], kernel)[0]


def cropped(pixels: int) -> Change:
    """So many pixels cut off each side, the rest resized to the canvas (bicubic)."""

    def change(row: Float[Tensor, "3 s s"]) -> Float[Tensor, "3 s s"]:
        inner = row[:, pixels:-pixels, pixels:-pixels]
        return resample(inner[None], row.shape[-1], Image.Resampling.BICUBIC)[0]

    return change


def compressed(quality: int) -> Change:
    """As JPEG and back (4:2:0, Pillow's default); the gradient passes as if nothing had happened."""

    def change(row: Float[Tensor, "3 s s"]) -> Float[Tensor, "3 s s"]:
        file = io.BytesIO()
        Image.fromarray(to_bytes(row.detach().cpu())).save(file, "JPEG", quality=quality)
        seen = from_picture(Image.open(file)).to(row)
        return row + (seen - row.detach())

    return change


def gamma(exponent: float) -> Change:
    """Levels to a power; black stays black and has no gradient."""
    return lambda row: rounded(row.clamp(min=1 / 510) ** exponent * (row > 0))


def rounded(row: Float[Tensor, "3 s s"]) -> Float[Tensor, "3 s s"]:
    """To 8-bit levels; the gradient passes."""
    return row + ((row.detach() * 255).round() / 255 - row.detach())


def _shift(chance: Random) -> Change:
    halves = range(-2 * FURTHEST, 2 * FURTHEST + 1)
    return shifted(chance.choice(halves) / 2, chance.choice(halves) / 2)


def _resize(chance: Random) -> Change:
    kernel = chance.choice([Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
    share = chance.uniform(0.75, 1.5)
    return lambda row: resized(round(share * row.shape[-1]), kernel)(row)


DRAWN: dict[str, Callable[[Random], Change]] = {
    "shift": _shift,
    "resize": _resize,
    "jpeg": lambda chance: compressed(chance.randint(50, 95)),
    "crop": lambda chance: cropped(chance.randint(1, 4)),
    "gamma": lambda chance: gamma(chance.uniform(0.8, 1.25)),
}
assert set(DRAWN) == set(get_args(Augmentation))
