"""InternVL 2.5, 3 and 3.5 in transformers' format (the checkpoints whose names end in -hf): tiles and the whole beside them."""

from math import isqrt
from typing import Any

import torch
from torch import Tensor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from davsp.errors import DavspError
from davsp.lvlm.generating import Canvas
from davsp.lvlm.tiles import TiledLVLM


class InternVLLVLM(TiledLVLM):
    """A tower of square tiles, 448 pixels of 256 tokens each. A canvas is one tile, or a square of k x k of them."""

    processors = ("GotOcr2ImageProcessor",)

    def __init__(
        self, model: Any, tokenizer: Any, processor: Any, model_id: str, revision: str | None, canvas: int | None
    ):
        super().__init__(model, tokenizer, processor, model_id, revision)
        self.tile, self.tile_tokens = self._tiles()
        self.check_tower({processor.size["height"], processor.size["width"]})
        most = isqrt(processor.max_patches)
        self.squares = tuple(
            k * self.tile for k in range(1, most + 1) if self._grid(k * self.tile, k * self.tile) == (k, k)
        )
        if not self.squares:
            raise DavspError(
                f"{model_id}'s preprocessor_config.json cuts no square into as many tiles a row as a column (min_patches "
                f"{processor.min_patches}, max_patches {processor.max_patches}); restore its files"
            )
        self.take_canvas(canvas or self.squares[0])
        self._put_marks()

    def _tiles(self) -> tuple[int, int]:
        """Side of a tile in pixels, and its placeholders."""
        vision = self.model.config.vision_config
        side = vision.image_size[0]
        return side, int((side // vision.patch_size[0]) ** 2 * self.model.config.downsample_ratio**2)

    def _put_marks(self) -> None:
        placeholder = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        begin, end = self.tokenizer.start_image_token, self.tokenizer.end_image_token
        self.picture_text = (placeholder, f"{begin}{placeholder}{end}")

    @classmethod
    def ways_of(cls, processor: Any) -> tuple[str, ...]:
        """InternVL's own code cuts tiles, as does its processor; one tile is what a small canvas is to be compared with."""
        return ("tile", "stretch")

    def image_tokens(self, height: int, width: int) -> int:
        return self.tile_tokens * self._looks_at(height, width)

    def _looks_at(self, height: int, width: int) -> int:
        """How many tiles the tower sees of a picture, the whole among them."""
        columns, rows = self._grid(height, width)
        return rows * columns + (rows * columns > 1)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Columns and rows of the tiles that its processor cuts a picture into."""
        p, tile = self.image_processor, (self.tile, self.tile)
        return get_optimal_tiled_canvas((height, width), tile, p.min_patches, p.max_patches)

    def shown_whole(self) -> dict[str, Any]:
        return {"crop_to_patches": False}

    def options(self) -> dict[str, Any]:
        return {"crop_to_patches": True}

    def pixel_inputs(self, canvas: Canvas) -> dict[str, Tensor]:
        """The tiles of each picture after one another."""
        return {"pixel_values": self.normal(torch.cat(self.looks(canvas)))}
