"""DeepSeek-VL: 1.3B with one SigLIP tower, 7B ("hybrid") with a SAM tower of 1024 pixels beside it."""

from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from davsp.errors import DavspError
from davsp.lvlm.base import LVLM
from davsp.lvlm.resample import resample


class DeepseekVLLVLM(LVLM):
    """A square canvas of the tower's size; undefended pictures are padded to a square in the mean colour."""

    processors: tuple[str, ...] = ("DeepseekVLImageProcessor",)
    pixels = "pixel_values"  # the picture that the canvas is

    def __init__(self, model: Any, *others: Any):
        super().__init__(model, *others)
        vision = model.config.vision_config
        self.canvas, self.low = self._sizes()
        if self.low != vision.image_size:
            raise DavspError(
                f"{self.model_id}'s preprocessor_config.json makes {self.low} pixels, its tower takes "
                f"{vision.image_size}: restore its files"
            )
        self.tokens_per_image = (vision.image_size // vision.patch_size) ** 2

    def _sizes(self) -> tuple[int, int]:
        """Sides of the canvas and of the SigLIP tower's picture."""
        return self.image_processor.size["height"], self.image_processor.size["height"]

    @classmethod
    def ways_of(cls, processor: Any) -> tuple[str, ...]:
        """DeepSeek's own code pads in the mean colour, as its processor does."""
        return ("pad",)

    def shown(self, picture: Image.Image) -> Any:
        """By the checkpoint's own processor: longest side to the canvas, bicubic, padded."""
        return self.image_processor(picture, do_rescale=False, do_normalize=False)[self.pixels][0]


class DeepseekVLHybridLVLM(DeepseekVLLVLM):
    """The canvas is the SAM tower's; the SigLIP tower's picture is made of it, as the processor does."""

    processors = ("DeepseekVLHybridImageProcessor",)
    pixels = "high_res_pixel_values"

    def __init__(self, model: Any, *others: Any):
        super().__init__(model, *others)
        self.high_mean, self.high_std = (
            torch.tensor(x, device=self.device).view(1, 3, 1, 1)
            for x in (self.image_processor.high_res_image_mean, self.image_processor.high_res_image_std)
        )

    def _sizes(self) -> tuple[int, int]:
        return self.image_processor.high_res_size["height"], self.image_processor.size["height"]

    def pixel_inputs(self, canvas: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Both towers' pictures; the small one by Pillow's own kernel and rounding, with a straight-through gradient."""
        low = resample(canvas, self.low, self.image_processor.resample)
        high = (canvas - self.high_mean) / self.high_std
        return {
            "pixel_values": ((low - self.mean) / self.std).to(self.dtype),
            "high_res_pixel_values": high.to(self.dtype),
        }
