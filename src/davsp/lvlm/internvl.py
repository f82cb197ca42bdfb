"""InternVL 2.5, 3 and 3.5 in transformers' format (the checkpoints whose names end in -hf): tiles and the whole beside them."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from davsp.errors import DavspError
from davsp.lvlm.base import LVLM, Canvas
from davsp.lvlm.resample import resample
from davsp.query import flatten


class InternVLLVLM(LVLM):
    """A tower of square tiles, 448 pixels of 256 tokens each.

    A canvas is one tile, or a square of k x k of them: these are seen exactly, and with them the whole, resampled to one tile.
    An undefended picture comes as a strip: its tiles below one another, the whole last.
    """

    processors = ("GotOcr2ImageProcessor",)

    def __init__(
        self, model: Any, tokenizer: Any, processor: Any, model_id: str, revision: str | None, canvas: int | None
    ):
        super().__init__(model, tokenizer, processor, model_id, revision)
        vision, size = model.config.vision_config, processor.size
        if (size["height"], size["width"]) != tuple(vision.image_size) or size["height"] != size["width"]:
            raise DavspError(
                f"{model_id}'s preprocessor_config.json makes {size['width']}x{size['height']} pixels, its tower takes "
                f"{vision.image_size[1]}x{vision.image_size[0]}, and a tile must be a square: restore its files"
            )
        self.tile = vision.image_size[0]
        self.tile_tokens = int((self.tile // vision.patch_size[0]) ** 2 * model.config.downsample_ratio**2)
        self.canvas = canvas or self.tile
        self.check_canvas(self.canvas, self.canvas)
        self.tokens_per_image = self.image_tokens(self.canvas, self.canvas)
        placeholder = tokenizer.convert_ids_to_tokens(self.image_token_id)
        self.picture_text = (placeholder, f"{tokenizer.start_image_token}{placeholder}{tokenizer.end_image_token}")

    @classmethod
    def ways_of(cls, processor: Any) -> tuple[str, ...]:
        """InternVL's own code cuts tiles, as does its processor; one tile is what a small canvas is to be compared with."""
        return ("tile", "stretch")

    def image_tokens(self, height: int, width: int) -> int:
        side, strip = width // self.tile, height // self.tile
        return self.tile_tokens * (strip if side == 1 else side**2 + 1)

    def check_canvas(self, height: int, width: int) -> None:
        side = width // self.tile
        if height != width or width % self.tile or self._grid(height, width) != (side, side):
            most = int(self.image_processor.max_patches**0.5)
            raise DavspError(
                f"the canvas is {width}x{height} pixels, but {self.model_id} takes squares of 1 to {most} tiles of {self.tile} "
                "pixels a side: use a prompt made for this model"
            )

    def check_pixels(self, height: int, width: int) -> None:
        if width != self.tile or height % self.tile:
            self.check_canvas(height, width)

    def seen(self, width: int, height: int) -> tuple[int, int]:
        columns, rows = self._grid(height, width) if self.undefended == "tile" else (1, 1)
        if (height, width) == (rows * self.tile, columns * self.tile) and rows == columns:
            return height, width
        return self.tile * (rows * columns + (rows * columns > 1)), self.tile

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Columns and rows of the tiles that its processor cuts a picture into."""
        p, tile = self.image_processor, (self.tile, self.tile)
        return get_optimal_tiled_canvas((height, width), tile, p.min_patches, p.max_patches)

    def preprocess(self, images: list[Image.Image]) -> Canvas:
        """The checkpoint's own processor up to its 8-bit tiles, bicubic.

        A picture that `check_canvas` accepts passes unchanged. A tensor where all come out of one size.
        """
        if not images:
            raise DavspError("there is no image to prepare: the list is empty")
        canvases = []
        for image in images:
            rgb, cut = flatten(image), self.undefended == "tile"
            if self.seen(*image.size) == (image.height, image.width):
                tiles = [np.asarray(rgb).transpose(2, 0, 1)]
            else:
                tiles = self.image_processor(rgb, do_rescale=False, do_normalize=False, crop_to_patches=cut)[
                    "pixel_values"
                ]
            canvases.append(torch.from_numpy(np.concatenate(tiles, axis=1).astype(np.float32)) / 255)
        same = all(one.shape == canvases[0].shape for one in canvases)
        return torch.stack(canvases) if same else canvases

    def pixel_inputs(self, canvas: Canvas) -> dict[str, Tensor]:
        """The tiles of each picture after one another, normalised in the canvas' own precision, cast last."""
        batches = [canvas] if isinstance(canvas, Tensor) else [one[None] for one in canvas]
        tiles = torch.cat([self._tiles(batch) for batch in batches])
        return {"pixel_values": ((tiles - self.mean) / self.std).to(self.dtype)}

    def _tiles(self, canvas: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "n 3 t t"]:
        """Tiles row by row; of a square of several also the whole, by Pillow's own kernel, with a straight-through gradient."""
        b, c, height, width = canvas.shape
        tiles = canvas.reshape(b, c, height // self.tile, self.tile, width // self.tile, self.tile)
        tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (b, n, c, t, t)
        if width > self.tile:
            whole = resample(canvas, self.tile, self.image_processor.resample)
            tiles = torch.cat([tiles, whole[:, None]], 1)
        return tiles.flatten(0, 1)
