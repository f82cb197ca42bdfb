"""Connections: a bound on the head of a request, and an answer that also reaches a client that is still sending.

uvicorn's parser, httptools, keeps a head of any length until it is whole. So the bytes are counted before the parser sees them.
And whoever closes a connection while the other side sends makes its system throw the answer away: what is still coming is read
and dropped first.
"""

import asyncio
import json
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from davsp.serve.refusals import Refusal, body

HEAD = 2**16  # bytes of a request's first line and headers, and of what stands between the chunks of a body
HEAD_SECONDS = 30.0
PIPELINED = 16  # requests that wait on a connection for the reply to one before
UNREAD_SECONDS = 60.0  # that a client may take to read what is kept for it, 64 KiB or a reply that is not a stream
DROPPED = 2**27  # bytes that are read and dropped so that a client reads why
DROPPED_SECONDS = 30.0
DROP = "davsp.drop"
"""The extension of a scope by which an app has the rest of a body dropped."""
REFUSALS = {
    "Request Header Fields Too Large": Refusal(431, f"the head has more than {HEAD} bytes.", "head_too_large"),
    "Request Timeout": Refusal(408, f"the head did not come within {HEAD_SECONDS:g} s.", "head_timeout"),
    "Bad Request": Refusal(400, "the request is not HTTP.", "no_http"),
}
LARGE, SLOW, BROKEN = REFUSALS


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's, for `uvicorn.Config(http=...)`, with a bound on heads: more bytes are a 431, too slow ones a 408.

    Who asks much faster than it reads, or reads nothing, is hung up on.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pending = 0  # bytes since the last head, piece of a body or message was whole; the parser keeps them
        self.head = 0  # bytes of the headers of this request
        self.dropped: int | None = None  # bytes since the connection was refused
        self.left = 0  # bytes of this request's body that are still to come, if it said how many there are
        self.gone: asyncio.Future[None] | None = None  # that they came, or never will
        self.timer: asyncio.TimerHandle | None = None
        self.unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:  # uvloop has transports of its own
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._end_of_drop()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unread = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        if self.unread is not None:
            self.unread.cancel()
            self.unread = None
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self.dropped is not None:
            self.dropped += len(data)
            self.flow.pause_reading()  # others have their turn: uvloop reads a busy connection 32 times in a row
            self.loop.call_soon(self._go_on)
            if self.dropped > DROPPED:
                self.transport.abort()
            elif self.dropped >= self.left:
                self._end_of_drop()
        else:
            self.pending += len(data)
            super().data_received(data)
            if self.pending > HEAD:
                self._refuse(LARGE)
            if self.timer is None and self.timeout_keep_alive_task is None and self._rests():
                self._wait_for_head()  # blank lines, or the rest of a body that was refused, end the other timers

    def _rests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.head = 0
        if self.timer is None:
            self._wait_for_head()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self.pending = 0
        self._stop_timer()
        self.left = next((int(value) for name, value in self.headers if name == b"content-length"), 0)
        self.scope["extensions"] = {DROP: {"drop": self.drop}}
        super().on_headers_complete()
        if len(self.pipeline) > PIPELINED:  # each takes more memory than its bytes
            self._refuse(BROKEN)
            raise ValueError

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.pipeline:  # uvicorn reads on, and so collects more
            self.flow.pause_reading()

    def on_body(self, body: bytes) -> None:
        self.pending = 0
        self.left -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.pending = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Also where a header was too long, which ends the parser."""
        self._refuse(LARGE if self.head > HEAD else BROKEN)

    async def drop(self) -> None:
        """Read and drop what is left of the body, past parser and app: a tenth of the time. The connection must be closed then."""
        if self.left > 0 and not self.transport.is_closing():
            self.dropped, self.gone = 0, self.loop.create_future()
            self.flow.resume_reading()
            await self.gone

    def _go_on(self) -> None:
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def _end_of_drop(self) -> None:
        if self.gone is not None and not self.gone.done():
            self.gone.set_result(None)

    def _count(self, size: int) -> None:
        self.head += size
        if self.head > HEAD:
            raise ValueError  # the parser stops and uvicorn asks for a 400

    def _wait_for_head(self) -> None:
        self.timer = self.loop.call_later(HEAD_SECONDS, self._refuse, SLOW)

    def _stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _refuse(self, reason: str) -> None:
        """Say why, stop writing, and drop what still comes for a while."""
        self._stop_timer()
        if self.transport.is_closing() or self.dropped is not None:
            return
        self.dropped = 0
        if not self._rests():
            return self.transport.close()  # words would land in the middle of a reply
        refusal = REFUSALS[reason]
        content = json.dumps(body(refusal)).encode()
        head = f"HTTP/1.1 {refusal.status} {reason}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(DROPPED_SECONDS, self.transport.abort)


class Drained:
    """An ASGI app whose replies are whole only when the request's body is, too: what the app left unread is read and dropped.

    Args:
        app: the app.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        whole = False
        headers = dict(scope["headers"])
        length = int(headers.get(b"content-length", b"0"))

        async def counted() -> Message:
            nonlocal whole
            message = await receive()
            whole = message["type"] == "http.disconnect" or not message.get("more_body", False)
            return message

        async def drained(message: Message) -> None:
            if whole:
                return await send(message)
            if message["type"] == "http.response.start" and (
                length > HEAD or {b"transfer-encoding", b"expect"} & headers.keys()
            ):
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if not last or b"expect" in headers:  # who expects a 100 and gets an answer sends nothing
                return await send(message)
            await send({**message, "more_body": True})
            await drop()
            await send({"type": "http.response.body", "body": b""})

        async def drop() -> None:
            left, quicker = DROPPED, scope.get("extensions", {}).get(DROP)
            with suppress(TimeoutError):
                async with asyncio.timeout(DROPPED_SECONDS):
                    if quicker and length > HEAD:
                        return await quicker["drop"]()
                    while not whole and left > 0:
                        left -= len((await counted()).get("body", b""))

        await self.app(scope, counted, drained)


SERVER: dict[str, Any] = {
    "log_level": "warning", "access_log": False, "server_header": False, "lifespan": "on", "http": BoundedProtocol,
}  # fmt: skip
"""Options of uvicorn. No access log, as a query string could hold a text."""
