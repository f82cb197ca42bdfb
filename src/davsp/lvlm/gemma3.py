"""Gemma 3: one square canvas, whose tokens look at one another both ways."""

from typing import Any

from jaxtyping import Int
from torch import Tensor

from davsp.errors import DavspError
from davsp.lvlm.base import LVLM


class Gemma3LVLM(LVLM):
    """A SigLIP tower of 896 pixels, pooled to 256 tokens. Undefended pictures are stretched to its square.

    Pan and scan (more crops of a long picture, an option of its processor that is off in the released checkpoints) is not supported.
    """

    processors = ("Gemma3ImageProcessor",)

    def __init__(self, model: Any, *others: Any):
        super().__init__(model, *others)
        size, self.canvas = self.image_processor.size, model.config.vision_config.image_size
        if (size["height"], size["width"]) != (self.canvas, self.canvas):
            raise DavspError(
                f"{self.model_id}'s preprocessor_config.json makes {size['width']}x{size['height']} pixels, its tower takes "
                f"{self.canvas}x{self.canvas}: restore its files"
            )
        if self.image_processor.do_pan_and_scan:
            raise DavspError(
                f"{self.model_id} shows more crops of a long picture (do_pan_and_scan in its preprocessor_config.json), which davsp "
                "does not; set it to false"
            )
        self.tokens_per_image = model.config.mm_tokens_per_image
        ids = [model.config.boi_token_index, self.image_token_id, model.config.eoi_token_index]
        begin, placeholder, end = self.tokenizer.convert_ids_to_tokens(ids)
        self.picture_text = (begin, f"\n\n{begin}{placeholder}{end}\n\n")
        turn = self.tokenizer.get_vocab().get("<end_of_turn>")
        self.eos_token_id = self.eos_token_id if turn is None else turn  # <eos> ends a text, this an answer

    @classmethod
    def ways_of(cls, processor: Any) -> tuple[str, ...]:
        """Gemma's own code stretches a picture, too; of one longer than 2:3 it shows crops besides, which its processor leaves out."""
        return ("stretch",)

    def token_inputs(self, ids: Int[Tensor, "b t"]) -> dict[str, Tensor]:
        """Which tokens are a picture's (1) and which are words (0): the attention mask is made of it."""
        return {"token_type_ids": (ids == self.image_token_id).int()}
