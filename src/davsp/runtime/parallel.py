"""Several processes that share one piece of work, each with the whole model: those of `--num-processes N`, or of torchrun.

Only a gradient of the canvas' size (1.35 MB at 336 pixels), states or finished answers go between them, so there is no wrapper
around the model: every process computes the same state from the same sum. Process 0 alone writes and shows. Who starts them:
`davsp.runtime.launch`.
"""

import atexit
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import count as numbers
from typing import TYPE_CHECKING, Any, TypeVar

from davsp.errors import DavspError, Lost

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import TCPStore

RANK, WORLD = "RANK", "WORLD_SIZE"
LONGEST_WAIT = timedelta(days=2)  # for what process 0 does alone; a process that ends is noticed at once

PART = 2**22  # bytes; a store takes no value of more than 8 MiB

T = TypeVar("T")
_alone = False
_jobs = numbers()


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


def same(value: Any, what: str) -> None:
    """Raises DavspError unless all processes have the same value: they read it from files that all of them must see."""
    if len({repr(one) for one in gathered(value)}) > 1:
        raise DavspError(f"the processes see other {what}; give a folder that all machines share (--out).")


def work(count: int, do: Callable[[int], T]) -> Iterator[tuple[int, T]]:
    """Do `count` pieces of work, each in the process that is free for it first.

    Args:
        count: the same in all processes.
        do: number of a piece -> what comes of it, which can be pickled.

    Yields:
        In process 0 every number and what came of it, in their order, as soon as it is known there; in the others nothing.

    Raises:
        DavspError: another process counts other pieces.
        Lost: another process has ended.
    """
    if processes() == 1:
        for number in range(count):
            yield number, do(number)
        return
    same(count, "pieces of work left")  # nobody has begun before all have counted
    with _lost():
        store, job, at = _store(), next(_jobs), 0
    while (number := _taken(store, job)) < count:
        result = do(number)
        with _lost():
            _put(store, f"{job}/{number}", pickle.dumps(result))
        while rank() == 0 and at < count and _there(store, f"{job}/{at}"):
            yield at, _got(store, f"{job}/{at}")
            at += 1
    wait()  # now all is there
    while rank() == 0 and at < count:
        yield at, _got(store, f"{job}/{at}")
        at += 1


def _taken(store: "TCPStore", job: int) -> int:
    """The next number that nobody has."""
    with _lost():
        return int(store.add(f"{job}/next", 1)) - 1


def _put(store: "TCPStore", key: str, data: bytes) -> None:
    parts = [data[at : at + PART] for at in range(0, len(data), PART)]
    for i, part in enumerate(parts):
        store.set(f"{key}/{i}", part)  # type: ignore[arg-type]  # it takes bytes, too
    store.set(key, str(len(parts)))


def _there(store: "TCPStore", key: str) -> bool:
    with _lost():
        return bool(store.check([key]))


def _got(store: "TCPStore", key: str) -> Any:
    with _lost():
        names = [f"{key}/{i}" for i in range(int(store.get(key)))]
        data = b"".join(store.get(name) for name in names)
        for name in (*names, key):
            store.delete_key(name)
    return pickle.loads(data)


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
def _store() -> "TCPStore":
    """What all processes can write to and read, in process 0."""
    from torch.distributed import TCPStore

    host, first = os.environ["MASTER_ADDR"], rank() == 0
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False) if first else None
    port = shared(store.port if store else None)
    return store or TCPStore(host, port, is_master=False)


@cache
def _join() -> None:
    import torch
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=LONGEST_WAIT)
    atexit.register(dist.destroy_process_group)  # its threads would otherwise abort a process that ends early
