"""Mistral 3 (Mistral Small 3.1 and later, with Pixtral's tower): a picture in rows of tokens, with a mark behind each row."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers.image_utils import ChannelDimension
from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

from davsp.errors import DavspError
from davsp.lvlm.base import LVLM
from davsp.lvlm.generating import Canvas
from davsp.lvlm.qwen2_vl import CANVAS

BREAK, END = "[IMG_BREAK]", "[IMG_END]"


class Mistral3LVLM(LVLM):
    """A tower of dynamic resolution: undefended pictures keep a size of their own, prompts make a square canvas."""

    processors = ("PixtralImageProcessor",)

    def __init__(
        self, model: Any, tokenizer: Any, processor: Any, model_id: str, revision: str | None, canvas: int | None
    ):
        super().__init__(model, tokenizer, processor, model_id, revision)
        self.unit = model.config.vision_config.patch_size * model.config.spatial_merge_size
        size = processor.size
        self.most = size["longest_edge"] or min(size["height"], size["width"])
        marks = [tokenizer.get_vocab().get(mark) for mark in (BREAK, END)]
        if None in marks:
            raise DavspError(
                f"the tokenizer of {model_id} lacks {BREAK} or {END}, with which a picture's rows end: restore its files"
            )
        self.row_end, self.picture_end = marks
        self.take_canvas(canvas or min(CANVAS, self.most // self.unit * self.unit))

    @classmethod
    def ways_of(cls, processor: Any) -> tuple[str, ...]:
        """Mistral's own code resizes a picture whole, as its processor does."""
        return ("resize",)

    def image_tokens(self, height: int, width: int) -> int:
        return (height // self.unit) * (width // self.unit)

    def picture_ids(self, height: int, width: int) -> list[int]:
        row = [self.image_token_id] * (width // self.unit)
        return [*([*row, self.row_end] * (height // self.unit))[:-1], self.picture_end]

    def check_canvas(self, height: int, width: int) -> None:
        self.check_pixels(height, width)
        if max(height, width) > self.most:
            raise self._not_taken(height, width)

    def check_pixels(self, height: int, width: int) -> None:
        if height % self.unit or width % self.unit or not (height and width):
            raise self._not_taken(height, width)

    def _not_taken(self, height: int, width: int) -> DavspError:
        return DavspError(
            f"the canvas is {width}x{height} pixels, but {self.model_id} takes multiples of {self.unit} of up to {self.most} pixels a "
            "side: use a prompt made for this model"
        )

    def seen(self, width: int, height: int) -> tuple[int, int]:
        shape = torch.empty(1, height, width, device="meta")
        rows, columns = get_resize_output_image_size(
            shape, self.most, self.unit, input_data_format=ChannelDimension.FIRST
        )
        if not (rows and columns):
            raise DavspError(f"a picture of {width}x{height} pixels is too thin for {self.model_id}; cut or pad it")
        return rows, columns

    def shown(self, picture: Image.Image) -> Any:
        """The checkpoint's own resize: to multiples of 28 within its longest edge, bicubic."""
        options = {"do_rescale": False, "do_normalize": False, "patch_size": self.unit}
        return self.image_processor(picture, **options)["pixel_values"][0]

    def pixel_inputs(self, canvas: Canvas) -> dict[str, Tensor]:
        """Normalised, each with zeros at its right and below up to the largest, and each one's size."""
        sizes = self.sizes(canvas) or []
        height, width = (max(sides) for sides in zip(*sizes, strict=True))
        normal = [super(Mistral3LVLM, self).pixel_inputs(one)["pixel_values"][0] for one in canvas]
        pixels = [pad(one, (0, width - one.shape[-1], 0, height - one.shape[-2])) for one in normal]
        return {"pixel_values": torch.stack(pixels), "image_sizes": torch.tensor(sizes, device=self.device)}
