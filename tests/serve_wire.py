"""What tests of a full proxy share: a bare connection to it, a defense that is held up, bytes that can be seen to be let go."""

import asyncio
import socket
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from davsp.defenses import SafetyText
from davsp.serve.admission import read
from proxy import GOOD, Upstream, listening


class Slow(SafetyText):
    """Takes its time over pictures, until it is let go."""

    def __init__(self) -> None:
        super().__init__("S")
        self.go, self.begun = threading.Event(), threading.Event()

    def prepare(self, queries: Any) -> Any:
        if queries[0].image is not None:
            self.begun.set()
            assert self.go.wait(20)
        return super().prepare(queries)


@contextmanager
def connected(app: Any) -> Iterator[Any]:
    with listening(app) as url:
        port = int(url.split(":")[2].split("/")[0])

        def connect() -> socket.socket:
            return socket.create_connection(("127.0.0.1", port), timeout=20)

        yield connect


def everything(connection: socket.socket) -> bytes:
    data = b""
    while chunk := connection.recv(65536):
        data += chunk
    return data


START = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def stopped(upstream: Upstream) -> threading.Event:
    """Keep every answer of an upstream back until the event is set."""
    go = threading.Event()

    async def answer() -> Any:
        while not go.is_set():
            await asyncio.sleep(0.01)
        return GOOD

    upstream.answer = lambda number, body: answer()
    return go


class Tracked(bytearray):
    """One that can be seen to be let go."""


def bodies(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Tracked]]:
    """The body of every request that the proxy reads from now on, for as long as the proxy holds it."""
    held: list[weakref.ref[Tracked]] = []

    async def tracked(*arguments: Any) -> bytearray:
        data = Tracked(await read(*arguments))
        held.append(weakref.ref(data))
        return data

    monkeypatch.setattr("davsp.serve.app.read", tracked)
    return held
