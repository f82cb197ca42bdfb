"""The processes of `--num-processes` and of torchrun, as forks of the tests' own: what a fresh one imports for seconds is there already."""

import logging
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count as counted
from pathlib import Path
from typing import Any, TypeVar

import pytest
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from command import run
from davsp import cli
from davsp.runtime import launch, parallel

T = TypeVar("T")

# transformers loads weights in threads, and threads of a fork that start torch's own pool at once now and then fail or hang there
# (torch 2.13: "Invalid thread pool!").
ALONE = {"OMP_NUM_THREADS": "1", "HF_DEACTIVATE_ASYNC_LOAD": "1"}


def _work(*command: str) -> None:
    """What `davsp COMMAND` does in a fork, whose output goes where the launcher has put it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a fork has the launcher's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.argv = ["davsp", *command]
    parallel._join.cache_clear()
    try:
        cli.main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def forked(*command: str | Path) -> int:
    """The exit code of `davsp COMMAND`, whose processes are forks."""
    sys.stdout.flush()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks where there are threads, from Python 3.12 on
        for name, value in ALONE.items():
            patch.setenv(name, value)
        patch.setattr(launch, "_entry", lambda words: (_work, tuple(words), "fork"))
        return run(*command)


def forked_nodes(*command: str | Path) -> list[int]:
    """`torchrun --nnodes 2 --nproc-per-node 1 … davsp COMMAND` on what stands for two machines; 0 for each that ended well."""
    sys.stdout.flush()
    port = free_port()
    agents = [_node(port, i, command) for i in (0, 1)]
    return [os.waitstatus_to_exitcode(os.waitpid(agent, 0)[1]) for agent in agents]


def _node(port: int, number: int, command: tuple[str | Path, ...]) -> int:
    """The process that stands for one machine."""
    agent = os.fork()
    if agent:
        return agent
    logging.disable(logging.CRITICAL)
    os.environ |= ALONE
    config = LaunchConfig(
        min_nodes=2, max_nodes=2, nproc_per_node=1, run_id="nodes", rdzv_backend="static", rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs={"rank": number, "timeout": 60}, local_addr="127.0.0.1", max_restarts=0, start_method="fork",
    )  # fmt: skip
    try:
        elastic_launch(config, _work)(*map(str, command))
    except BaseException:
        os._exit(1)
    os._exit(0)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def together(do: Callable[[], T], count: int = 2) -> list[T]:
    """What each of several processes returns, forks that share work."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id="together", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        local_addr="localhost", max_restarts=0, monitor_interval=0.05, start_method="fork",
    )  # fmt: skip
    handlers = {number: signal.getsignal(number) for number in launch.SIGNALS}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            done = elastic_launch(config, _fresh)(do)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return [done[rank] for rank in range(count)]


def _fresh(do: Callable[[], T]) -> T:
    parallel._join.cache_clear()
    return do()


@contextmanager
def shared_by_all(folder: Path) -> Iterator[None]:
    """The processes that begin within it share every job that has a piece for each: nobody ends his first before all others have one.

    A job that one process does alone ends in an error there, and no job at all in a failed assertion here.
    """
    folder.mkdir()
    jobs, work = counted(), parallel.work

    def noting(count: int, do: Callable[[int], Any]) -> Iterator[tuple[int, Any]]:
        job, all_of_them = next(jobs), parallel.processes()

        def noted(number: int) -> Any:
            (folder / f"{job}-{parallel.rank()}").touch()
            ends = time.monotonic() + 60
            while len(list(folder.glob(f"{job}-*"))) < all_of_them:
                assert time.monotonic() < ends, f"{count} pieces, and one process does them alone"
                time.sleep(0.01)
            return do(number)

        return work(count, noted if count >= all_of_them > 1 else do)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "work", noting)
        yield
    assert list(folder.iterdir()), "no job was shared"
