"""Idefics3 and SmolVLM: a picture enlarged or shrunk to one long side, its tiles with their row and column, and the whole."""

from typing import Any

import torch
from torch import Tensor

from davsp.errors import DavspError
from davsp.lvlm.generating import Canvas
from davsp.lvlm.tiles import TiledLVLM


class Idefics3LVLM(TiledLVLM):
    """Every picture is brought to `size.longest_edge` of the checkpoint's processor, so only a square of that side is seen as it is:
    the canvas. SmolVLM's is 2048, 4 x 4 tiles of 512 and the whole; with `size.longest_edge` at 512 it is one tile.
    """

    processors: tuple[str, ...] = ("Idefics3ImageProcessor", "SmolVLMImageProcessor")

    def __init__(
        self, model: Any, tokenizer: Any, processor: Any, model_id: str, revision: str | None, canvas: int | None
    ):
        super().__init__(model, tokenizer, processor, model_id, revision)
        vision, edge = model.config.vision_config, processor.size["longest_edge"]
        self.tile = vision.image_size
        self.check_tower({processor.max_image_size["longest_edge"]})
        self.tile_tokens = (self.tile // vision.patch_size) ** 2 // model.config.scale_factor**2
        if not edge or edge % self.tile or (edge != self.tile and not processor.do_image_splitting):
            raise DavspError(
                f"{model_id} brings pictures to {edge} pixels and then to tiles of {self.tile}, so it sees none as it is; set "
                f"size.longest_edge in its preprocessor_config.json to {self.tile}, or to a multiple with do_image_splitting"
            )
        self.squares = (edge,)
        if canvas not in (None, edge):
            raise DavspError(
                f"{model_id} brings every picture to {edge} pixels, so its canvas is {edge} and not {canvas}; for another one set "
                "size.longest_edge in its preprocessor_config.json, and in that of its server"
            )
        self.fake = getattr(tokenizer, "fake_image_token", "<fake_token_around_image>")
        self.global_mark = getattr(tokenizer, "global_image_token", "<global-img>")
        self.take_canvas(canvas or self.squares[0])

    @classmethod
    def ways_of(cls, processor: Any) -> tuple[str, ...]:
        """Its authors' code is its processor. One tile is what a small canvas is to be compared with."""
        return ("tile", "stretch")

    def differentiable(self, height: int, width: int) -> bool:
        one_tile = self.undefended == "stretch" and (height, width) == (self.tile, self.tile)
        return one_tile or super().differentiable(height, width)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tiles beside the whole; none if the whole is all."""
        if self.differentiable(height, width):
            k = width // self.tile
            return (k, k) if k > 1 else (0, 0)
        _, rows, columns = self.image_processor.get_number_of_image_patches(height, width)
        return rows, columns

    def shown_whole(self) -> dict[str, Any]:
        return {"do_image_splitting": False, "size": {"longest_edge": self.tile}}

    def image_tokens(self, height: int, width: int) -> int:
        rows, columns = self._grid(height, width)
        return self.tile_tokens * (rows * columns + 1)

    def picture_ids(self, height: int, width: int) -> list[int]:
        """Each tile behind its row and column, a line break after a row, and one more before the whole."""
        rows, columns = self._grid(height, width)
        placeholders = self.tokenizer.convert_ids_to_tokens(self.image_token_id) * self.tile_tokens
        text = ""
        for row in range(1, rows + 1):
            text += "".join(f"{self.fake}<row_{row}_col_{i}>{placeholders}" for i in range(1, columns + 1)) + "\n"
        text += "\n" * (rows > 0) + f"{self.fake}{self.global_mark}{placeholders}{self.fake}"
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def pixel_inputs(self, canvas: Canvas) -> dict[str, Tensor]:
        """Tiles, and which of them there are."""
        pixels = self.padded(canvas)
        there = [self.image_tokens(*size) // self.tile_tokens for size in self.sizes(canvas) or []]
        mask = torch.arange(pixels.shape[1])[None] < torch.tensor(there)[:, None]  # (b, n)
        mask = mask[..., None, None].expand(-1, -1, self.tile, self.tile)
        return {"pixel_values": pixels, "pixel_attention_mask": mask.long().to(self.device)}
