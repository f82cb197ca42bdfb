"""Qwen2-VL: pictures of any size in multiples of 28 pixels, three-axis positions."""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from davsp.errors import DavspError
from davsp.lvlm.base import LVLM, Canvas

THINNEST = 200  # of `smart_resize`
CANVAS = 448  # 256 image tokens; a multiple of 28, and of 32 and 14 besides, so that other families take it too


class Qwen2VLLVLM(LVLM):
    """A tower of dynamic resolution: undefended pictures keep a size of their own, prompts make a square canvas.

    The paper's canvas for Qwen2-VL was not published; see docs/decisions.md.
    """

    processors: tuple[str, ...] = ("Qwen2VLImageProcessor",)

    def __init__(
        self, model: Any, tokenizer: Any, processor: Any, model_id: str, revision: str | None, canvas: int | None
    ):
        super().__init__(model, tokenizer, processor, model_id, revision)
        vision = model.config.vision_config
        self.patch, self.merge, self.frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        cuts = (processor.patch_size, processor.merge_size, processor.temporal_patch_size)
        if cuts != (self.patch, self.merge, self.frames):
            raise DavspError(
                f"{model_id}'s preprocessor_config.json cuts pictures as {cuts} (patch, merge, frames), its config.json "
                f"as {(self.patch, self.merge, self.frames)}: restore its files"
            )
        self.least, self.most = self._bounds()
        unit = self.patch * self.merge
        largest = math.isqrt(self.most) // unit * unit
        self.take_canvas(canvas or min(CANVAS, largest))

    @classmethod
    def ways_of(cls, processor: Any) -> tuple[str, ...]:
        """Its authors' code resizes a picture whole, as its processor does."""
        return ("resize",)

    def image_tokens(self, height: int, width: int) -> int:
        return height * width // (self.patch * self.merge) ** 2

    def check_canvas(self, height: int, width: int) -> None:
        unit = self.patch * self.merge
        if height % unit or width % unit or not self.least <= height * width <= self.most:
            raise DavspError(
                f"the canvas is {width}x{height} pixels, but {self.model_id} takes multiples of {unit} with "
                f"{self.least} to {self.most} pixels in all: use a prompt made for this model"
            )

    def check_pixels(self, height: int, width: int) -> None:
        unit = self.patch * self.merge
        if height % unit or width % unit:
            raise DavspError(f"the canvas is {width}x{height} pixels, but {self.model_id} takes multiples of {unit}")

    def seen(self, width: int, height: int) -> tuple[int, int]:
        if max(width, height) > THINNEST * min(width, height):
            raise DavspError(
                f"a picture of {width}x{height} pixels is too thin: {self.model_id} takes up to 1:{THINNEST}; cut or pad it"
            )
        rows, columns = self._resized(height, width)
        return int(rows), int(columns)

    def _bounds(self) -> tuple[int, int]:
        """The fewest and the most pixels of a canvas."""
        return self.image_processor.size["shortest_edge"], self.image_processor.size["longest_edge"]

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that the checkpoint's processor gives a picture."""
        return smart_resize(height, width, self.patch * self.merge, self.least, self.most)

    def shown(self, picture: Image.Image) -> Any:
        """The checkpoint's own resize: to the nearest multiples of 28 within its bounds of pixels, bicubic."""
        return self._resize(np.asarray(picture).transpose(2, 0, 1))

    def _resize(self, pixels: np.ndarray) -> Any:
        """A picture (3, h, w) of bytes as the checkpoint's processor resizes it."""
        p = self.image_processor
        return p.resize(pixels, p.size, p.resample, self.patch * self.merge)

    def pixel_inputs(self, canvas: Canvas) -> dict[str, Tensor]:
        """Normalised patches in the order that the tower merges them, and each picture's grid."""
        batches = [canvas] if isinstance(canvas, Tensor) else [one[None] for one in canvas]
        normal = [(one - self.mean) / self.std for one in batches]
        patches = torch.cat([patchify(one, self.patch, self.merge, self.frames) for one in normal])
        grid = [[1, one.shape[-2] // self.patch, one.shape[-1] // self.patch] for one in canvas]
        return {"pixel_values": patches.to(self.dtype), "image_grid_thw": torch.tensor(grid, device=self.device)}

    def token_inputs(self, ids: Int[Tensor, "b t"]) -> dict[str, Tensor]:
        """Which tokens are a picture's (1) and which are words (0): the three-axis positions are made of it."""
        return {"mm_token_type_ids": (ids == self.image_token_id).int()}


def patchify(pixels: Float[Tensor, "b 3 h w"], patch: int, merge: int, frames: int) -> Float[Tensor, "n d"]:
    """Patches, `merge` x `merge` neighbours after one another; all frames are the same picture. A view and a permutation."""
    b, c, height, width = pixels.shape
    blocks = pixels.reshape(b, c, height // (merge * patch), merge, patch, width // (merge * patch), merge, patch)
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]  # (b, gh, gw, m, m, c, 1, p, p)
    blocks = blocks.expand(-1, -1, -1, -1, -1, -1, frames, -1, -1)
    return blocks.reshape(b * (height // patch) * (width // patch), c * frames * patch * patch)
