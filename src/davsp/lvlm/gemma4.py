"""Gemma 4: pictures in their own shape within a budget of tokens; patches with the channels last."""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

from davsp.errors import DavspError
from davsp.lvlm.base import LVLM
from davsp.lvlm.generating import Canvas


class Gemma4LVLM(LVLM):
    """Every picture is brought to as many pixels as its budget of soft tokens has (`max_soft_tokens` of the processor: 70 to 1,120), in
    multiples of 48. So there is one square that is seen as it is: 768 pixels at the default of 280.
    """

    processors = ("Gemma4ImageProcessor",)

    def __init__(
        self, model: Any, tokenizer: Any, processor: Any, model_id: str, revision: str | None, canvas: int | None
    ):
        super().__init__(model, tokenizer, processor, model_id, revision)
        vision, config = model.config.vision_config, model.config
        self.patch, self.pool = processor.patch_size, processor.pooling_kernel_size
        if (self.patch, self.pool) != (vision.patch_size, vision.pooling_kernel_size):
            raise DavspError(
                f"{model_id}'s preprocessor_config.json cuts pictures as {(self.patch, self.pool)} (patch, pool), its config.json as "
                f"{(vision.patch_size, vision.pooling_kernel_size)}: restore its files"
            )
        self.unit, self.patches = self.patch * self.pool, processor.max_soft_tokens * self.pool**2
        self.canvas = math.isqrt(self.patches * self.patch**2) // self.unit * self.unit
        if canvas not in (None, self.canvas):
            raise DavspError(
                f"{model_id} brings every picture to the pixels of {processor.max_soft_tokens} tokens, so its canvas is {self.canvas} and "
                f"not {canvas}; for another one set max_soft_tokens in its preprocessor_config.json, and in that of its server"
            )
        self.tokens_per_image = self.image_tokens(self.canvas, self.canvas)
        ids = [config.boi_token_id, self.image_token_id, config.eoi_token_id]
        begin, placeholder, end = tokenizer.convert_ids_to_tokens(ids)
        self.picture_text = (placeholder, f"{begin}{placeholder}{end}")
        turn = tokenizer.get_vocab().get(getattr(tokenizer, "eot_token", None))
        self.eos_token_id = self.eos_token_id if turn is None else turn  # <eos> ends a text, this an answer
        if not processor.do_normalize:
            self.mean, self.std = torch.zeros_like(self.mean), torch.ones_like(self.std)

    @classmethod
    def ways_of(cls, processor: Any) -> tuple[str, ...]:
        """Its processor keeps a picture's shape."""
        return ("resize",)

    def image_tokens(self, height: int, width: int) -> int:
        return (height // self.unit) * (width // self.unit)

    def seen(self, width: int, height: int) -> tuple[int, int]:
        try:
            return get_aspect_ratio_preserving_size(height, width, self.patch, self.patches, self.pool)
        except ValueError as error:
            raise DavspError(
                f"a picture of {width}x{height} pixels is too thin for {self.model_id}: {error}; cut or pad it"
            ) from error

    def check_canvas(self, height: int, width: int) -> None:
        if height % self.unit or width % self.unit or self.seen(width, height) != (height, width):
            raise DavspError(
                f"the canvas is {width}x{height} pixels, but {self.model_id} takes {self.canvas}x{self.canvas}: use a prompt made for this model"
            )

    def check_pixels(self, height: int, width: int) -> None:
        if height % self.unit or width % self.unit or height * width > self.patches * self.patch**2:
            raise DavspError(
                f"the canvas is {width}x{height} pixels, but {self.model_id} takes multiples of {self.unit} with up to "
                f"{self.patches * self.patch**2} pixels in all"
            )

    def shown(self, picture: Image.Image) -> Any:
        p, pixels = self.image_processor, np.asarray(picture).transpose(2, 0, 1)
        return p.aspect_ratio_preserving_resize(pixels, self.patch, self.patches, self.pool, p.resample)

    def pixel_inputs(self, canvas: Canvas) -> dict[str, Tensor]:
        """Patches row by row and where each is, x before y; behind them zeros, at -1."""
        pixels, places = zip(*(self._patches(one) for one in canvas), strict=True)
        return {"pixel_values": torch.stack(pixels).to(self.dtype), "image_position_ids": torch.stack(places)}

    def _patches(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """(n, d) and (n, 2) of a picture (3, h, w), n the budget."""
        p, (rows, columns) = self.patch, (side // self.patch for side in picture.shape[-2:])
        normal = ((picture - self.mean) / self.std)[0].reshape(3, rows, p, columns, p)
        patches = normal.permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)
        at = torch.arange(rows * columns, device=self.device)
        places = torch.stack([at % columns, at // columns], 1)
        spare = self.patches - len(patches)
        return pad(patches, (0, 0, 0, spare)), pad(places, (0, 0, 0, spare), value=-1)

    def token_inputs(self, ids: Int[Tensor, "b t"]) -> dict[str, Tensor]:
        """Which tokens are a picture's (1) and which are words (0): in some sizes, a picture's look at one another both ways."""
        return {"mm_token_type_ids": (ids == self.image_token_id).int()}
