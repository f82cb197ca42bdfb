"""Several processes that share one piece of work, each with the whole model: those of `--num-processes N`, or of torchrun.

Only a gradient of the canvas' size (1.35 MB at 336 pixels), states or finished answers go between them, so there is no wrapper
around the model: every process computes the same state from the same sum. Process 0 alone writes and shows. Who starts them:
`davsp.runtime.launch`.
"""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from davsp.errors import Lost

if TYPE_CHECKING:
    from torch import Tensor

RANK, WORLD = "RANK", "WORLD_SIZE"
LONGEST_WAIT = timedelta(days=2)  # for what process 0 does alone; a process that ends is noticed at once

_alone = False


def rank() -> int:
    """Number of this process, 0 where there is only one."""
    return 0 if _alone else int(os.environ.get(RANK, 0))


def processes() -> int:
    """How many there are."""
    return 1 if _alone else int(os.environ.get(WORLD, 1))


def total(tensor: "Tensor") -> "Tensor":
    """The sum over all processes, the same bits in each; the tensor itself where there is one.

    Raises:
        Lost: another process has ended.
    """
    if processes() == 1:
        return tensor
    import torch.distributed as dist

    result = tensor.detach().clone()
    with _lost():
        _join()
        dist.all_reduce(result)
    return result


def gathered(item: Any) -> list[Any]:
    """What every process gives, in their order.

    Raises:
        Lost: another process has ended.
    """
    if processes() == 1:
        return [item]
    import torch.distributed as dist

    items: list[Any] = [None] * processes()
    with _lost():
        _join()
        dist.all_gather_object(items, item)
    return items


def shared(item: Any) -> Any:
    """What process 0 gives, in all of them; the others' own is passed over.

    Raises:
        Lost: another process has ended.
    """
    if processes() == 1:
        return item
    import torch.distributed as dist

    items = [item if rank() == 0 else None]
    with _lost():
        _join()
        dist.broadcast_object_list(items, src=0)
    return items[0]


def wait() -> None:
    """Go on once all processes are here.

    Raises:
        Lost: another process has ended.
    """
    gathered(None)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is the only one: what it calls shares no work. The others must not come here, and wait behind it."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


@contextmanager
def _lost() -> Iterator[None]:
    """The libraries say by RuntimeError that a connection was closed, with many words and none of the cause."""
    try:
        yield
    except RuntimeError as error:
        raise Lost(
            f"process {rank()} of {processes()} goes no further, for another has ended or is not reached ({str(error)[:200]}); "
            "give the same command again to go on"
        ) from error


@cache
def _join() -> None:
    import torch
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=LONGEST_WAIT)
    atexit.register(dist.destroy_process_group)  # its threads would otherwise abort a process that ends early
