"""Noise added to the picture: the visual prompt of earlier work (UniGuard, ESIII), and the paper's ablation."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from pydantic import Field
from torch import Tensor

from davsp.errors import DavspError
from davsp.prompts.base import (
    Prompt,
    PromptConfig,
    Start,
    check_files,
    check_range,
    from_picture,
    read_delta,
    sealed,
    start_values,
)
from davsp.query import flatten
from davsp.runtime.config import read_config
from davsp.runtime.files import to_json, write_all

CONFIG, TENSORS = "noise_config.json", "noise.safetensors"


class NoiseConfig(PromptConfig):
    """The fields of `noise_config.json`."""

    eps: float = Field(gt=0, le=1)


class AdditiveNoise(Prompt):
    """x' = clamp(x + delta, 0, 1) with |delta| <= eps, on the whole canvas. Default eps 32/255."""

    kind = "additive"

    def __init__(self, delta: Float[Tensor, "3 s s"], eps: float, text: str = "", config: dict[str, Any] | None = None):
        fields = NoiseConfig(canvas=delta.shape[-1], eps=eps, safety_text=text).model_dump()
        super().__init__(delta, text, fields | (config or {}))
        self.eps = eps

    @classmethod
    def create(
        cls, canvas: int, eps: float = 32 / 255, start: Start = "grey", seed: int = 0, text: str = ""
    ) -> "AdditiveNoise":
        """No noise ("grey"), uniform noise within eps ("random"), or plus eps everywhere ("white")."""
        if canvas < 1 or not 0 < eps <= 1:
            raise DavspError(
                f"noise of {eps} on a canvas of {canvas} pixels is impossible: take eps in (0, 1], canvas > 0"
            )
        shade = start_values(start, canvas, seed)
        delta = torch.zeros_like(shade) if start == "grey" else (2 * shade - 1) * eps
        return cls(delta, eps, text)

    def resize(self, images: list[Image.Image]) -> Float[Tensor, "b 3 s s"]:
        """Shortest edge to the canvas (bicubic), centre crop: what CLIP's processor does, and no padding before, as in UniGuard's code."""
        return torch.stack([from_picture(fill(flatten(image), self.canvas)) for image in images])

    def apply(self, interior: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b 3 s s"]:
        """Add the noise and clamp to [0, 1]."""
        return (interior + self.delta).clamp(0, 1)

    @torch.no_grad()
    def project_(self) -> "AdditiveNoise":
        """Clamp delta to [-eps, eps] in place."""
        self.delta.clamp_(-self.eps, self.eps)
        return self

    # -- at rest ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `noise_config.json` and `noise.safetensors`; all or nothing. What is saved is in 8-bit levels.

        There is no picture: noise has signs, and only shows on the picture it is added to.

        Raises:
            DavspError: delta is beyond eps, or the folder can't be written.
        """
        from safetensors.torch import save

        check_range(self.delta, -self.eps - 1e-6, self.eps + 1e-6, "this prompt")
        config = NoiseConfig.model_validate(self.config | {"safety_text": self.text}).model_dump()
        contents = {TENSORS: save({"delta": self.quantised().delta.cpu().contiguous()})}
        write_all(folder, contents | {CONFIG: to_json(sealed(config, contents)).encode()})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "AdditiveNoise":
        """Load what `save_pretrained` wrote.

        Raises:
            DavspError: a file is missing or broken; an unknown field; a tensor of another shape, NaN or beyond eps.
        """
        folder = Path(folder)
        config = read_config(folder / CONFIG, NoiseConfig)
        delta = read_delta(folder / TENSORS, config.canvas)
        half_level = 0.5 / 255 + 1e-6  # rounding to 8 bit may step over eps by that much
        check_range(delta, -config.eps - half_level, config.eps + half_level, str(folder / TENSORS))
        check_files(folder, config.files)
        return cls(delta, config.eps, config.safety_text, config.model_dump(exclude={"files"}))


def fill(picture: Image.Image, size: int) -> Image.Image:
    """Shortest edge to `size` by bicubic resampling, then the centre `size` x `size`."""
    width, height = picture.size
    short = min(width, height)
    # The long edge is cut, not rounded, as the CLIP image processor does it.
    resized = picture.resize((int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return resized.crop((left, top, left + size, top + size))
