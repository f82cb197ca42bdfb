"""Several processes on one machine, each with the whole model: `--num-processes N` of train and eval.

Only a gradient of the canvas' size (1.35 MB at 336 pixels) or finished answers go between them, so there is no wrapper around
the model: every process computes the same state from the same sum. Process 0 alone writes and shows.
"""

import atexit
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor

from davsp.errors import DavspError

RANK, WORLD = "RANK", "WORLD_SIZE"


def rank() -> int:
    """Number of this process, 0 where there is only one."""
    return int(os.environ.get(RANK, 0))


def processes() -> int:
    """How many there are."""
    return int(os.environ.get(WORLD, 1))


def device() -> str | None:
    """The GPU of this process; None: whatever is the default."""
    import torch

    return f"cuda:{rank()}" if processes() > 1 and torch.cuda.is_available() else None


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes, the same bits in each; the tensor itself where there is one."""
    if processes() == 1:
        return tensor
    from accelerate.utils import reduce

    _join()
    result: Tensor = reduce(tensor, "sum")
    return result


def gathered(item: Any) -> list[Any]:
    """What every process gives, in their order."""
    if processes() == 1:
        return [item]
    from accelerate.utils import gather_object

    _join()
    items: list[Any] = gather_object([item])
    return items


@cache
def _join() -> None:
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    atexit.register(state.destroy_process_group)  # its threads would otherwise abort a process that ends early


def launch(command: Sequence[str], count: int) -> int:
    """Run `davsp COMMAND` as `count` processes that find each other; returns the exit code of the first that failed.

    Process 0 has the terminal; of another only the last line of its errors is shown, if it fails.

    Raises:
        DavspError: more processes than GPUs, on a machine that has some.
    """
    import torch

    if torch.cuda.is_available() and count > torch.cuda.device_count():
        raise DavspError(f"--num-processes {count} is more than the {torch.cuda.device_count()} GPUs here; give fewer.")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), WORLD: str(count), "LOCAL_WORLD_SIZE": str(count)}
    if "OMP_NUM_THREADS" not in os.environ:
        common["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    with tempfile.TemporaryFile("w+") as errors:
        children = [
            subprocess.Popen(
                [sys.executable, "-m", "davsp.cli", *command],
                env=os.environ | common | {RANK: str(i), "LOCAL_RANK": str(i)},
                stdout=None if i == 0 else subprocess.DEVNULL,
                stderr=None if i == 0 else errors,
            )
            for i in range(count)
        ]
        try:
            code = _wait(children)
        except KeyboardInterrupt:  # the terminal has told the children, too: process 0 saves and says so
            codes = [child.wait() for child in children]
            return codes[0]
        if code and children[0].returncode in (None, 0, -15):
            errors.seek(0)
            print((errors.read().strip().splitlines() or ["a process failed without a word"])[-1], file=sys.stderr)
        return code


def _wait(children: list["subprocess.Popen[bytes]"]) -> int:
    """0 once all are done; as soon as one fails the others are ended, for they would wait for it."""
    while True:
        codes = [child.poll() for child in children]
        failed = [code for code in codes if code]
        if failed or all(code == 0 for code in codes):
            time.sleep(0.5 * bool(failed))  # who fails for the same reason may say so itself
            for child in children:
                if child.poll() is None:
                    child.terminate()
                child.wait()
            return failed[0] if failed else 0
        time.sleep(0.05)
