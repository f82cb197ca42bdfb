"""Families that look at a picture in tiles, with the whole of it beside them."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from davsp.errors import DavspError
from davsp.lvlm.base import LVLM
from davsp.lvlm.generating import Canvas
from davsp.lvlm.resample import resample


class TiledLVLM(LVLM):
    """A canvas is a picture at its own size; what the tower looks at is made of it here.

    The squares that a border may have come through the checkpoint's processor without being resampled. They are cut in plain torch,
    and the whole beside their tiles is made by Pillow's own kernel: a gradient goes through both. Every other picture is cut by
    the processor itself, without one.

    Attributes:
        tile: side of a tile in pixels, as the tower takes it.
        squares: sides of the canvases that are cut exactly.
    """

    tile: int
    squares: tuple[int, ...]

    def check_tower(self, sides: set[int]) -> None:
        """Raises DavspError unless the processor's tiles, whose sides are given, are those of the tower."""
        if sides != {self.tile}:
            made = " or ".join(map(str, sorted(sides)))
            raise DavspError(
                f"{self.model_id}'s preprocessor_config.json makes tiles of {made} pixels, its tower takes {self.tile}x{self.tile}: "
                "restore its files"
            )

    def check_canvas(self, height: int, width: int) -> None:
        if height != width or width not in self.squares:
            raise DavspError(
                f"the canvas is {width}x{height} pixels, but {self.model_id} takes squares of {' or '.join(map(str, self.squares))}: use a "
                "prompt made for this model"
            )

    def check_pixels(self, height: int, width: int) -> None:
        """Every picture is taken."""

    def differentiable(self, height: int, width: int) -> bool:
        return height == width and width in self.squares

    def seen(self, width: int, height: int) -> tuple[int, int]:
        return (height, width) if self.undefended == "tile" else (self.tile, self.tile)

    def shown(self, picture: Image.Image) -> Any:
        """As it is; to "stretch", in one tile."""
        if self.undefended == "tile":
            return np.asarray(picture).transpose(2, 0, 1)
        told = self.shown_whole() | {"do_rescale": False, "do_normalize": False}
        return np.asarray(self.image_processor(picture, **told)["pixel_values"]).reshape(3, self.tile, self.tile)

    def shown_whole(self) -> dict[str, Any]:
        """What the image processor is told to give a picture in one tile."""
        return {}

    def looks(self, canvas: Canvas) -> list[Float[Tensor, "_ 3 t t"]]:
        """What the tower looks at of each canvas, in [0, 1].

        Raises:
            DavspError: a gradient is wanted of a canvas that the processor would resample.
        """
        return [self._look(one) for one in canvas]

    def _look(self, one: Float[Tensor, "3 h w"]) -> Float[Tensor, "_ 3 t t"]:
        height, width = one.shape[-2:]
        if self.differentiable(height, width):
            return self.cut(one)
        if one.requires_grad:
            self.check_canvas(height, width)
        picture = Image.fromarray((one * 255).round().byte().permute(1, 2, 0).cpu().numpy())
        tiles = self.image_processor(picture, do_rescale=False, do_normalize=False, **self.options())["pixel_values"]
        return torch.from_numpy(np.asarray(tiles).reshape(-1, 3, self.tile, self.tile)).to(one) / 255

    def options(self) -> dict[str, Any]:
        """What the image processor is told to cut a picture."""
        return {}

    def cut(self, canvas: Float[Tensor, "3 s s"]) -> Float[Tensor, "_ 3 t t"]:
        """Tiles of a square canvas row by row; of several also the whole, behind them."""
        tiles = crops(canvas, self.tile)
        return tiles if len(tiles) == 1 else torch.cat([tiles, self.whole(canvas)])

    def whole(self, canvas: Float[Tensor, "3 s s"]) -> Float[Tensor, "1 3 t t"]:
        """The canvas in one tile, to the bit as the processor resizes it; the gradient is straight-through."""
        if canvas.shape[-1] == self.tile:
            return canvas[None]
        return resample(canvas[None], self.tile, self.image_processor.resample)

    def normal(self, tiles: Float[Tensor, "n 3 t t"]) -> Float[Tensor, "n 3 t t"]:
        """Normalised in the canvas' own precision, cast last."""
        return ((tiles - self.mean) / self.std).to(self.dtype)

    def padded(self, canvas: Canvas) -> Float[Tensor, "b n 3 t t"]:
        """What the tower looks at, normalised, with pictures of zeros behind where there are fewer tiles than another has."""
        looks = [self.normal(one) for one in self.looks(canvas)]
        most = max(map(len, looks))
        return torch.stack([torch.cat([one, one.new_zeros(most - len(one), *one.shape[1:])]) for one in looks])


def crops(picture: Float[Tensor, "3 h w"], tile: int) -> Float[Tensor, "n 3 t t"]:
    """A picture cut into tiles, row by row."""
    channels, height, width = picture.shape
    cut = picture.reshape(channels, height // tile, tile, width // tile, tile)
    return cut.permute(1, 3, 0, 2, 4).reshape(-1, channels, tile, tile)
