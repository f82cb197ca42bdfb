"""InternVL 2.5, 3 and 3.5 in transformers' format (the checkpoints whose names end in -hf): one tile."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from davsp.errors import DavspError
from davsp.lvlm.base import LVLM
from davsp.query import flatten


class InternVLLVLM(LVLM):
    """The canvas is one tile, 448 pixels of 256 tokens. Undefended pictures are stretched to it.

    InternVL's own code cuts a picture that is larger, or not square, into up to 12 tiles and adds the whole one: see docs/families.md.
    """

    processors = ("GotOcr2ImageProcessor",)

    def __init__(self, model: Any, *others: Any):
        super().__init__(model, *others)
        vision, size = model.config.vision_config, self.image_processor.size
        if (size["height"], size["width"]) != tuple(vision.image_size) or size["height"] != size["width"]:
            raise DavspError(
                f"{self.model_id}'s preprocessor_config.json makes {size['width']}x{size['height']} pixels, its tower takes "
                f"{vision.image_size[1]}x{vision.image_size[0]}, and a tile must be a square: restore its files"
            )
        self.canvas = vision.image_size[0]
        self.tokens_per_image = int((self.canvas // vision.patch_size[0]) ** 2 * model.config.downsample_ratio**2)
        placeholder = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        begin, end = self.tokenizer.start_image_token, self.tokenizer.end_image_token
        self.picture_text = (placeholder, f"{begin}{placeholder}{end}")

    @classmethod
    def ways_of(cls, processor: Any) -> tuple[str, ...]:
        """One tile; its authors' and its processor's way with larger pictures, many tiles, is not supported."""
        return ("stretch",)

    def preprocess(self, images: list[Image.Image]) -> Float[Tensor, "b 3 h w"]:
        """The checkpoint's own processor for one tile up to its 8-bit picture, bicubic. One of the canvas' size passes unchanged."""
        if not images:
            raise DavspError("there is no image to prepare: the list is empty")
        rgb = [flatten(image) for image in images]
        made = self.image_processor(rgb, do_rescale=False, do_normalize=False, crop_to_patches=False)
        return torch.from_numpy(np.stack(made["pixel_values"]).astype(np.float32)) / 255

    def pixel_inputs(self, canvas: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Normalise in the canvas' own precision, cast last."""
        return {"pixel_values": ((canvas - self.mean) / self.std).to(self.dtype)}
