"""Several processes that serve at one address: one has one core's worth of Python, as the interpreter lets one thread run at a time.

They are alike and know nothing of each other; each accepts its own share of the connections. What they count is summed by
`davsp.serve.counters` over files in a folder. If one ends, all end: whatever looks after the command starts it again, and
half a proxy never passes for a whole one.
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from tempfile import TemporaryDirectory
from typing import Any

from davsp.errors import DavspError
from davsp.serve.counters import FOLDER

Serve = Callable[[socket.socket], None]


def run(serve: Serve, count: int, host: str, port: int) -> None:
    """Until SIGINT or SIGTERM, on which the workers answer what is under way and end; a second signal kills them.

    Args:
        serve: what a worker does with its socket; must be picklable, as each is a fresh interpreter (a fork of one that has
            loaded torch may hang).

    Raises:
        DavspError: the address can't be listened at, or a worker ended by itself.
    """
    sockets = bound(host, port, count)
    context, workers, signals = multiprocessing.get_context("spawn"), list[BaseProcess](), list[int]()

    def stop(number: int, frame: Any) -> None:
        signals.append(number)  # first, so that a second signal is one even where it comes in the middle of this
        for worker in workers:
            worker.kill() if len(signals) > 1 else worker.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    with TemporaryDirectory(prefix="davsp-metrics-") as folder:
        os.environ[FOLDER] = folder  # before the workers import what reads it
        try:
            for one in sockets:
                started = context.Process(target=_work, args=(serve, one))
                started.start()
                workers.append(started)
            for one in sockets:
                one.close()  # so that nobody is left waiting at the socket of a worker that ended
            ended = [] if signals else wait([worker.sentinel for worker in workers])
        finally:
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.join()
            del os.environ[FOLDER]
            for number, handler in before.items():
                signal.signal(number, handler)
    if not signals:
        code = next(worker.exitcode for worker in workers if worker.sentinel in ended)
        raise DavspError(f"a worker ended with exit code {code}, so all were ended; look above for why, start again.")


def bound(host: str, port: int, count: int) -> list[socket.socket]:
    """As many sockets at one address, among which Linux spreads the connections; elsewhere the same one as often.

    Raises:
        DavspError: the address can't be listened at.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with _listening(family, address) as alone:  # unshared: fails where another command listens
            address = alone.getsockname()
        if sys.platform != "linux":
            return [_listening(family, address)] * count
        return [_listening(family, address, shared=True) for _ in range(count)]
    except OSError as error:
        raise DavspError(f"--host {host} --port {port} cannot be had ({error.strerror}); give another one.") from error


def _listening(family: int, address: Any, shared: bool = False) -> socket.socket:
    """A socket that names its protocol: `socket.create_server` leaves it out, and asyncio then leaves Nagle's algorithm on, 40 ms a reply."""
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
        sock.listen()
    except OSError:
        sock.close()
        raise
    return sock


def _work(serve: Serve, one: socket.socket) -> None:
    """A worker's life; it ends with the command, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the command passes it on
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        serve(one)
    except DavspError as error:
        sys.exit(f"davsp: {error}")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
