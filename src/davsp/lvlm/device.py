"""Where a model can be put."""

from typing import Any

import torch

from davsp.errors import DavspError, words_of

SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate works these out


def check_device_map(device_map: Any) -> None:
    """As `check_device` for a map that names one device; the others are accelerate's to judge."""
    if not isinstance(device_map, dict) and device_map not in SPREAD:
        check_device(device_map)


def check_device(device: Any) -> None:
    """Raises DavspError unless a tensor can be put on this one device ("cpu", "cuda", "cuda:1") and read back."""
    try:
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # torch says it by RuntimeError, AssertionError, NotImplementedError, by backend
        raise DavspError(
            f"device {str(device)!r} cannot be used here ({words_of(error)}); choose another, such as cpu"
        ) from error
