"""The authors' file of directions: a dictionary of tensors, read without running anything in it."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from davsp.errors import DavspError
from davsp.runtime.files import read_torch


def directions(path: Path) -> Float[Tensor, "l d"]:
    """What a file of the authors' `get_vector.py` holds, a row a layer, float32.

    Raises:
        DavspError: it is no such file; NaN, infinity or a direction of zeros.
    """
    wanted = "the authors' harmfulness_vector.pt, a dictionary layer_1 to layer_L of one direction each"
    found = read_torch(path, wanted)
    rows = found
    if isinstance(found, dict):
        rows = [found.get(f"layer_{n}") for n in range(1, len(found) + 1)]
    elif not isinstance(found, Tensor) or found.dim() != 2:
        raise DavspError(f"{path} holds no harmfulness vector; give {wanted}.")
    good = [
        isinstance(row, Tensor) and row.layout == torch.strided and row.is_floating_point() and row.dim() == 1
        for row in rows
    ]
    if len(good) < 2 or not all(good) or len({len(row) for row in rows}) > 1:
        raise DavspError(f"{path} holds no harmfulness vector; give {wanted}.")
    rows_together = torch.stack([row.detach().float() for row in rows])
    norm = rows_together.norm(dim=1)
    if not bool((norm.isfinite() & (norm > 0)).all()):
        raise DavspError(f"{path} holds NaN, infinity or a direction of zeros; make it or download it anew.")
    return rows_together
