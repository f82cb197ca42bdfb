"""LLaVA-NeXT (1.6) and LLaVA-OneVision: the whole of a picture, then tiles of the grid that fits it best ("anyres")."""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers.image_processing_utils import select_best_resolution

from davsp.errors import DavspError
from davsp.lvlm.generating import Canvas
from davsp.lvlm.tiles import TiledLVLM, crops
from davsp.lvlm.undefended import check_made, square


class LlavaNextLVLM(TiledLVLM):
    """Tiles are padded in black to a grid of the checkpoint's list; features of the padding are left out ("unpad") and every row of the rest
    ends with a feature of its own, a line break.

    A canvas is a square that lies in its grid as it is: for LLaVA-NeXT one tile (in the middle of a grid of two, and whole) or 2 x 2.
    """

    processors: tuple[str, ...] = ("LlavaNextImageProcessor",)

    def __init__(
        self, model: Any, tokenizer: Any, processor: Any, model_id: str, revision: str | None, canvas: int | None
    ):
        super().__init__(model, tokenizer, processor, model_id, revision)
        vision, size, crop = model.config.vision_config, processor.size, processor.crop_size
        self.tile, self.side = vision.image_size, vision.image_size // vision.patch_size
        self.check_tower({size["shortest_edge"] or size["height"], (crop and crop["height"]) or self.tile})
        self.grids = [(int(height), int(width)) for height, width in processor.image_grid_pinpoints]
        if self.grids != [tuple(grid) for grid in model.config.image_grid_pinpoints]:
            raise DavspError(
                f"image_grid_pinpoints of {model_id}'s preprocessor_config.json are not those of its config.json: restore its files"
            )
        sides = sorted({min(grid) for grid in self.grids})
        self.squares = tuple(side for side in sides if side % self.tile == 0 and min(self._grid(side, side)) == side)
        self.take_canvas(canvas or self.squares[0])

    @classmethod
    def ways_of(cls, processor: Any) -> tuple[str, ...]:
        """LLaVA's own code cuts tiles, as does its processor. Padded to a square of the canvas' pixels: what a border is compared with."""
        return ("tile", "pad")

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels of the grid that a picture is put into."""
        grid = select_best_resolution((height, width), self.grids)
        if grid is None:
            raise DavspError(f"a picture of {width}x{height} pixels is too thin for {self.model_id}; cut or pad it")
        return grid

    def seen(self, width: int, height: int) -> tuple[int, int]:
        if self.undefended == "tile":
            self._grid(height, width)
            return height, width
        check_made(width, height, self.canvas, self.undefended)
        return self.canvas, self.canvas

    def shown(self, picture: Image.Image) -> Any:
        if self.undefended == "pad":
            red, green, blue = (int(level * 255) for level in self.image_processor.image_mean)
            side = (self.canvas, self.canvas)
            picture = square(picture, (red, green, blue)).resize(side, self.image_processor.resample)
        return np.asarray(picture).transpose(2, 0, 1)

    def image_tokens(self, height: int, width: int) -> int:
        """Of the whole, of the grid without its padding, and a line break a row: `pack_image_features` of transformers' model."""
        grid_height, grid_width = self._grid(height, width)
        rows, columns = (self.side * length // self.tile for length in (grid_height, grid_width))
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        rows, columns = self._shrunk(rows, columns)
        return self.side**2 + rows * columns + rows

    def _shrunk(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of the features that are left of so many."""
        return rows, columns

    def cut(self, canvas: Float[Tensor, "3 s s"]) -> Float[Tensor, "_ 3 t t"]:
        """The whole first, then the tiles of its grid, in whose middle it lies."""
        side = canvas.shape[-1]
        height, width = self._grid(side, side)
        top, left = (height - side) // 2, (width - side) // 2
        laid = pad(canvas, (left, width - side - left, top, height - side - top))
        return torch.cat([self.whole(canvas), crops(laid, self.tile)])

    def pixel_inputs(self, canvas: Canvas) -> dict[str, Tensor]:
        return {
            "pixel_values": self.padded(canvas),
            "image_sizes": torch.tensor(self.sizes(canvas), device=self.device),
        }


class LlavaOnevisionLVLM(LlavaNextLVLM):
    """Grids of up to 6 x 6 tiles, also of one, which is then seen twice, whole. Features of more than nine tiles are shrunk to that many."""

    processors = ("LlavaOnevisionImageProcessor",)

    def _shrunk(self, rows: int, columns: int) -> tuple[int, int]:
        most = int(self.model.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (most * self.side**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)
