"""LLaVA-1.5 and every `LlavaForConditionalGeneration` checkpoint, davsp-mini among them."""

from typing import Any

from PIL import Image

from davsp.lvlm.base import LVLM
from davsp.lvlm.undefended import check_made, square


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

    def shown(self, picture: Image.Image) -> Any:
        """By the checkpoint's own processor, bicubic; to "pad", it is a square in the mean colour before."""
        if self.undefended == "pad":
            red, green, blue = (int(level * 255) for level in self.image_processor.image_mean)  # cut, as LLaVA does
            picture = square(picture, (red, green, blue))
        return super().shown(picture)
