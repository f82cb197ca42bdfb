"""Pillow's resize in plain torch, with a gradient.

Pillow rounds and clips to 8 bit after each of its two passes; a resize in floats keeps the overshoot of a noisy border and
differs by up to 24 grey levels. Two dense matrices cover every kernel, and avoid the backward of `interpolate`,
which is not deterministic on CUDA.
"""

from functools import lru_cache

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

SUPPORT = {Image.Resampling.BILINEAR: 1.0, Image.Resampling.BICUBIC: 2.0, Image.Resampling.LANCZOS: 3.0}


def resample(canvas: Float[Tensor, "b 3 h w"], side: int, kernel: int) -> Float[Tensor, "b 3 s s"]:
    """A square canvas in [0, 1] resized to `side` as Pillow resizes its 8-bit picture, to the bit.

    The gradient is that of the two linear passes: rounding and clipping are passed straight through.

    Args:
        canvas: values in [0, 1]; what lies between 8-bit levels is rounded first.
        side: of the result, in pixels.
        kernel: `PIL.Image.Resampling` bilinear, bicubic or lanczos.

    Raises:
        ValueError: another kernel.
    """
    kernel = Image.Resampling(kernel)
    if kernel not in SUPPORT:
        raise ValueError(f"no matrix for {kernel.name}")
    weights = matrix(canvas.shape[-1], side, kernel).to(canvas.device)
    levels = _byte(canvas.double() * 255)  # sums of bytes times 22-bit weights are exact in float64
    return (_byte(weights @ _byte(levels @ weights.T)) / 255).to(canvas)


def _byte(x: Tensor) -> Tensor:
    """Rounded half up and clipped to 0 … 255, as Pillow does after each pass; the gradient passes."""
    return x + ((x.detach() + 0.5).floor().clamp(0, 255) - x.detach())


@lru_cache(maxsize=16)
def matrix(size: int, side: int, kernel: Image.Resampling) -> Float[Tensor, "s n"]:
    """Weights of `size` pixels in each of `side`, antialiased, in steps of 2^-22 (Pillow's `precompute_coeffs`)."""
    scale = size / side
    stretch = max(scale, 1.0)
    centre = (torch.arange(side, dtype=torch.float64) + 0.5) * scale
    reach = SUPPORT[kernel] * stretch
    low, high = (centre - reach + 0.5).floor().clamp(min=0), (centre + reach + 0.5).floor().clamp(max=size)
    at = torch.arange(size, dtype=torch.float64)
    weight = _weight((at + 0.5 - centre[:, None]) / stretch, kernel)
    weight = weight * ((at >= low[:, None]) & (at < high[:, None]))
    return (weight / weight.sum(1, keepdim=True) * 2**22).round() / 2**22


def _weight(x: Tensor, kernel: Image.Resampling) -> Tensor:
    x = x.abs()
    if kernel == Image.Resampling.BILINEAR:
        return (1 - x).clamp(min=0)
    if kernel == Image.Resampling.LANCZOS:
        return torch.where(x < 3, torch.sinc(x) * torch.sinc(x / 3), 0)
    near, far = (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2  # a = -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))
