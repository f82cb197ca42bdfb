"""LLaVA-1.5 and every `LlavaForConditionalGeneration` checkpoint, davsp-mini among them."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from davsp.errors import DavspError
from davsp.lvlm.base import LVLM
from davsp.lvlm.undefended import check_made, square
from davsp.query import flatten


class LlavaLVLM(LVLM):
    """A CLIP-like tower whose patches become tokens of a Llama-like decoder; one canvas size."""

    processors = ("CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor")

    def __init__(self, model: Any, *others: Any):
        super().__init__(model, *others)
        vision = model.config.vision_config
        self.canvas = vision.image_size
        drops_first = model.config.vision_feature_select_strategy == "default"
        has_class_token = vision.model_type == "clip_vision_model"
        self.tokens_per_image = (vision.image_size // vision.patch_size) ** 2 + has_class_token - drops_first

    @classmethod
    def ways_of(cls, processor: Any) -> tuple[str, ...]:
        """LLaVA-1.5's own code pads (`expand2square`); CLIP's processor then cuts, SigLIP's stretches, LLaVA's may pad."""
        if hasattr(processor, "pad_to_square") and processor.do_pad:
            return ("pad",)
        if getattr(processor, "do_center_crop", False):
            return ("pad", "crop")
        return ("pad", "stretch") if processor.size["height"] else ("pad",)

    def seen(self, width: int, height: int) -> tuple[int, int]:
        check_made(width, height, self.canvas, self.undefended)
        return super().seen(width, height)

    def preprocess(self, images: list[Image.Image]) -> Float[Tensor, "b 3 h w"]:
        """The checkpoint's own processor up to its 8-bit picture, bicubic; to "pad", each is a square in the mean colour before.

        A picture of the canvas' size passes unchanged.
        """
        if not images:
            raise DavspError("there is no image to prepare: the list is empty")
        for image in images:
            self.seen(*image.size)
        rgb = [flatten(image) for image in images]
        if self.undefended == "pad":
            red, green, blue = (int(level * 255) for level in self.image_processor.image_mean)  # cut, as LLaVA does
            rgb = [square(picture, (red, green, blue)) for picture in rgb]
        pixels = self.image_processor(rgb, do_rescale=False, do_normalize=False)["pixel_values"]
        return torch.from_numpy(np.stack(pixels).astype(np.float32)) / 255

    def pixel_inputs(self, canvas: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Normalise in the canvas' own precision, cast last."""
        return {"pixel_values": ((canvas - self.mean) / self.std).to(self.dtype)}
