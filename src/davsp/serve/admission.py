"""Who may ask, and how a body is read."""

import asyncio
import hmac
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request

from davsp.runtime.loopback import names_loopback
from davsp.serve.bodies import START, too_much_text
from davsp.serve.refusals import Refusal
from davsp.serve.settings import ServeSettings

SMALL = 2**16  # bytes of a request that there is always room for, as many as may be under way


def admit(request: Request, token: str | None, loopback: bool) -> None:
    """Raises Refusal unless the request brings the token, once; without one, unless its Host names this machine."""
    if token is None:
        if loopback and not names_loopback(request.headers.get("host", "")):
            raise Refusal(
                403, "the proxy is asked by another name than localhost; give it a token (--token-env).", "host"
            )
        return
    authorizations = request.headers.getlist("authorization")
    kind, _, credentials = authorizations[0].partition(" ") if len(authorizations) == 1 else ("", "", "")
    if not hmac.compare_digest(credentials.strip().encode(), token.encode()) or kind.lower() != "bearer":
        raise Refusal(
            401, "the Authorization header must hold the proxy's token, once: Bearer TOKEN.", "invalid_api_key"
        )


class Room:
    """The bytes of requests that a worker holds. Who does not fit is told at once and waits outside.

    Args:
        size: in bytes.
    """

    def __init__(self, size: int) -> None:
        self.left = size

    @contextmanager
    def seat(self) -> "Iterator[Seat]":
        """What one request holds, given back at the end of a `with`."""
        seat = Seat(self)
        try:
            yield seat
        finally:
            seat.resize(0)


class Seat:
    """Some bytes of a room, none at first."""

    def __init__(self, room: Room) -> None:
        self.room, self.size = room, 0

    def resize(self, size: int) -> None:
        """Hold so many bytes in all. Raises Refusal (429) if they don't fit; a small request is never refused for others' large ones."""
        if size > max(self.size, SMALL) and size - self.size > self.room.left:
            raise Refusal(429, "the proxy holds as many large requests as it can; ask again.", "busy")
        self.room.left -= size - self.size
        self.size = size


async def read(request: Request, seat: Seat, settings: ServeSettings) -> bytearray:
    """The body of a request, which takes as much of the seat.

    Raises:
        Refusal: 415 if it is not said to be plain JSON, 413 if it is too long, 408 if it comes too slowly, 429 if there is no room.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "the body must be sent as Content-Type: application/json.", "content_type")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refusal(415, "the body must be sent without Content-Encoding.", "content_encoding")
    length = request.headers.get("content-length", "0")
    expected = int(length) if length.isdecimal() else 0
    _check_length(expected, seat, settings)
    data, most = bytearray(), settings.max_text
    try:
        async with asyncio.timeout(settings.body_timeout):
            async for chunk in request.stream():
                data += chunk
                _check_length(max(expected, len(data)), seat, settings)
                if len(data) > most:  # once: what has no picture so far is text, and the rest need not come
                    if data.find(START) < 0:
                        raise too_much_text(settings.max_text)
                    most = settings.max_body
        return data
    except TimeoutError as error:
        raise Refusal(408, f"the body did not come within {settings.body_timeout:g} s.", "body_timeout") from error


def _check_length(length: int, seat: Seat, settings: ServeSettings) -> None:
    if length > settings.max_body:
        raise Refusal(413, f"the body has more than {settings.max_body} bytes.", "body_too_large")
    seat.resize(length)
