"""What a server or a proxy in between may do to a finished canvas: compress it, resize it, move it, recolour it.

Each is a function from an 8-bit RGB canvas to one of the same size, without chance.
"""

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps

Change = Callable[[Image.Image], Image.Image]

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "area": Image.Resampling.BOX,  # the mean over what a new pixel covers
}
SHIFTS = (1, 2, 3, 4, 7, 8, 14)
UNTOUCHED = "png"


def changes(canvas: int, patch: int, padding: int) -> dict[str, Change]:
    """All changes by name, gentle ones first within a kind.

    Args:
        canvas: side in pixels.
        patch: side of the model's patches in pixels; shifts by it are among the others.
        padding: width of the border in pixels.
    """
    shifts = sorted({*SHIFTS, patch})
    compressed: Mapping[str, Change] = {
        UNTOUCHED: recoded("PNG"),
        **{f"jpeg-{quality}": recoded("JPEG", quality=quality) for quality in (95, 90, 75, 50)},
        "jpeg-95-444": recoded("JPEG", quality=95, subsampling="4:4:4"),
        "webp-lossless": recoded("WEBP", lossless=True),
        "webp-80": recoded("WEBP", quality=80),
    }
    sides = {f"{canvas - 1}": canvas - 1, "90%": round(0.9 * canvas), "224": 224, "twice": 2 * canvas}
    resized: Mapping[str, Change] = {
        f"resize-{name}-{kind}": there_and_back(side, kind) for name, side in sides.items() for kind in FILTERS
    }
    moved: Mapping[str, Change] = {
        "shift-half": half_shifted(diagonal=False),
        "shift-half-diagonal": half_shifted(diagonal=True),
        **{f"shift-{pixels}": shifted(pixels) for pixels in shifts},
        **{f"shift-{pixels}-diagonal": shifted(pixels, pixels) for pixels in (1, 7)},
        **{f"roll-{pixels}": rolled(pixels) for pixels in (1, patch)},
        "shift-1-border": border_only(shifted(1), padding),
        "shift-1-picture": picture_only(shifted(1), padding),
        **{f"crop-{pixels}": cropped(pixels) for pixels in (1, 2, 4)},
        "frame-1": framed,
    }
    recoloured: Mapping[str, Change] = {
        "gamma-0.9": gamma(0.9),
        "gamma-1.1": gamma(1.1),
        "gamma-1/2.2": gamma(1 / 2.2),
        "6-bit": lambda image: image.point(lambda level: round(round(level / 255 * 63) / 63 * 255)),
        "grey": lambda image: image.convert("L").convert("RGB"),
    }
    return {**compressed, **resized, **moved, **recoloured}


def recoded(format: str, **options: Any) -> Change:
    """Written as a file and read again; what is not said is as Pillow has it (JPEG: 4:2:0)."""

    def change(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, format, **options)
        return Image.open(file).convert("RGB")

    return change


def there_and_back(side: int, kind: str) -> Change:
    """Resized to a square of `side` pixels and back, both by the filter `kind`."""
    return lambda image: image.resize((side, side), FILTERS[kind]).resize(image.size, FILTERS[kind])


def shifted(right: int, down: int = 0) -> Change:
    """Moved by whole pixels; what comes in repeats the edge, what goes out is lost."""

    def change(image: Image.Image) -> Image.Image:
        levels = np.pad(np.asarray(image), ((down, 0), (right, 0), (0, 0)), mode="edge")
        return Image.fromarray(levels[: image.height, : image.width])

    return change


def half_shifted(diagonal: bool) -> Change:
    """Moved right by half a pixel, and down as well if diagonal: the mean with the neighbour, the edge repeated."""

    def change(image: Image.Image) -> Image.Image:
        levels = np.asarray(image).astype(float)
        for axis in (1, 0) if diagonal else (1,):
            first = np.take(levels, [0], axis)
            levels = (levels + np.concatenate([first, levels], axis).take(range(levels.shape[axis]), axis)) / 2
        return Image.fromarray(np.round(levels).astype(np.uint8))

    return change


def rolled(right: int) -> Change:
    """Moved by whole pixels in a circle: nothing is lost, so by a patch each patch is whole, one place on."""
    return lambda image: Image.fromarray(np.roll(np.asarray(image), right, axis=1))


def border_only(change: Change, padding: int) -> Change:
    """The change on the border alone; the picture inside stays as it was."""

    def both(image: Image.Image) -> Image.Image:
        changed = change(image)
        changed.paste(_inside(image, padding), (padding, padding))
        return changed

    return both


def picture_only(change: Change, padding: int) -> Change:
    """The change on the picture inside alone; the border stays as it was."""

    def both(image: Image.Image) -> Image.Image:
        changed = image.copy()
        changed.paste(change(_inside(image, padding)), (padding, padding))
        return changed

    return both


def _inside(image: Image.Image, padding: int) -> Image.Image:
    return image.crop((padding, padding, image.width - padding, image.height - padding))


def cropped(pixels: int) -> Change:
    """So many pixels cut off each side, the rest resized to the canvas (bicubic)."""
    return lambda image: _inside(image, pixels).resize(image.size, Image.Resampling.BICUBIC)


def framed(image: Image.Image) -> Image.Image:
    """A black line of one pixel put around, all of it resized to the canvas (bicubic)."""
    return ImageOps.expand(image, 1, "black").resize(image.size, Image.Resampling.BICUBIC)


def gamma(exponent: float) -> Change:
    """Levels to a power, with white and black where they were."""
    return lambda image: image.point(lambda level: round(255 * (level / 255) ** exponent))
