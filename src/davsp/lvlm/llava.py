"""LLaVA-1.5 and every `LlavaForConditionalGeneration` checkpoint, davsp-mini among them."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, LlavaForConditionalGeneration

from davsp.errors import DavspError
from davsp.lvlm.base import LVLM


class LlavaLVLM(LVLM):
    """A CLIP-like tower whose patches become tokens of a Llama-like decoder."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, model_id: str, revision: str | None):
        super().__init__(model, tokenizer, model_id, revision)
        self.image_processor = image_processor
        vision = model.config.vision_config
        self.canvas = vision.image_size
        self.image_token_id = model.config.image_token_id
        drops_first = model.config.vision_feature_select_strategy == "default"
        has_class_token = vision.model_type == "clip_vision_model"
        self.tokens_per_image = (vision.image_size // vision.patch_size) ** 2 + has_class_token - drops_first
        self.mean = torch.tensor(image_processor.image_mean, device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor(image_processor.image_std, device=self.device).view(1, 3, 1, 1)

    @classmethod
    def load(
        cls, model_id: str, revision: str | None, tokenizer: Any, device_map: Any, dtype: torch.dtype
    ) -> "LlavaLVLM":
        """Load weights and image processor; whole processors are avoided, for some need torchvision.

        Raises:
            DavspError: the checkpoint lacks weights.
        """
        processor = AutoImageProcessor.from_pretrained(model_id, revision=revision, backend="pil")
        single = str(device_map).split(":")[0] in ("cpu", "cuda", "mps")  # a single device needs no accelerate
        placement = {} if single else {"device_map": device_map}
        loaded: Any = LlavaForConditionalGeneration.from_pretrained(
            model_id, revision=revision or "main", dtype=dtype, output_loading_info=True, **placement
        )
        model, found = loaded
        if missing := sorted(found["missing_keys"]):  # transformers would go on with random numbers
            raise DavspError(f"cannot load model {model_id}: it lacks the weights of {missing[0]}; restore its files")
        if single:
            model = model.to(device_map)
        return cls(model, tokenizer, processor, model_id, revision)

    def preprocess(self, images: list[Image.Image]) -> Float[Tensor, "b 3 h w"]:
        """The checkpoint's own processor up to its 8-bit picture: shortest edge to the canvas, bicubic, centre crop.

        A picture of the canvas' size passes unchanged.
        """
        if not images:
            raise DavspError("there is no image to prepare: the list is empty")
        rgb = [image.convert("RGB") for image in images]
        pixels = self.image_processor(rgb, do_rescale=False, do_normalize=False)["pixel_values"]
        return torch.from_numpy(np.stack(pixels).astype(np.float32)) / 255

    def pixel_inputs(self, canvas: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Normalise in the canvas' own precision, cast last."""
        return {"pixel_values": ((canvas - self.mean) / self.std).to(self.dtype)}
