"""GLM-4.1V, 4.5V and 4.6V: Qwen2-VL's patches behind bounds and a resize of its own."""

from typing import Any

import numpy as np
from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize

from davsp.lvlm.qwen2_vl import Qwen2VLLVLM


class Glm4vLVLM(Qwen2VLLVLM):
    """Its processor counts a picture's pixels once for each of its two frames, and first enlarges what is thinner than a patch."""

    processors = ("Glm4vImageProcessor", "Glm46VImageProcessor")

    def _bounds(self) -> tuple[int, int]:
        size = self.image_processor.size
        return -(-size["shortest_edge"] // self.frames), size["longest_edge"] // self.frames

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        size, unit = self.image_processor.size, self.patch * self.merge
        edges = size["shortest_edge"], size["longest_edge"]
        return smart_resize(self.frames, height, width, self.frames, unit, *edges)

    def _resize(self, pixels: np.ndarray) -> Any:
        p = self.image_processor
        return p.resize(pixels, p.size, p.resample, self.patch * self.merge, self.frames)
