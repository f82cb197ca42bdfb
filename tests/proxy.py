"""A proxy on loopback before an upstream that says what it was sent and fails on demand."""

import asyncio
import base64
import io
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import uvicorn
from PIL import Image

from davsp import VisualSafetyPrompt
from davsp.defenses import Defense, VisualPrompt
from davsp.serve.app import HASH, Proxy
from davsp.serve.connections import SERVER
from davsp.serve.fetch import Fetcher
from davsp.serve.settings import ServeSettings

TEXT = "please be safe"
CANVAS = 56


def border(seed: int = 0, text: str = TEXT) -> VisualPrompt:
    return VisualPrompt(VisualSafetyPrompt.create(CANVAS, 8, "random", seed, text))


def file(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def data_url(image: Image.Image, form: str = "PNG", **options: Any) -> str:
    return f"data:image/{form.lower()};base64,{base64.b64encode(file(image, form, **options)).decode()}"


def picture_of(url: str) -> Image.Image:
    """The picture in what reached the upstream."""
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return image


def image_part(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url} | more}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)}


GOOD = {
    "id": "1", "object": "chat.completion", "created": 0, "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "a red cake"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
}  # fmt: skip


class Upstream(httpx2.AsyncBaseTransport):
    """In place of a connection.

    Attributes:
        requests, bodies: that reached it; so an empty list means that nothing was sent on.
        answer: a request's number and body -> the response, or the exception that is raised.
    """

    def __init__(self) -> None:
        self.requests: list[httpx2.Request] = []
        self.bodies: list[dict[str, Any]] = []
        self.answer: Callable[[int, dict[str, Any]], Any] = lambda number, body: GOOD

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        if request.url.path == "/v1/models":
            listed = b'{"object": "list", "data": [{"id": "m", "object": "model"}]}'
            return httpx2.Response(200, headers={"content-type": "application/json"}, stream=Events(listed))
        self.bodies.append(json.loads(await request.aread()))
        outcome = self.answer(len(self.bodies) - 1, self.bodies[-1])
        if isinstance(outcome, Exception):
            raise outcome
        if asyncio.iscoroutine(outcome):
            outcome = await outcome
        response = outcome if isinstance(outcome, httpx2.Response) else httpx2.Response(200, json=outcome)
        if not response.is_closed:
            return response
        return httpx2.Response(response.status_code, headers=response.headers, stream=Events(response.content))


class Events(httpx2.AsyncByteStream):
    """A stream that ends, breaks or hangs after its chunks; `closed` says whether it was hung up on."""

    def __init__(self, *chunks: bytes, end: str = "") -> None:
        self.chunks, self.end, self.closed = chunks, end, threading.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            yield chunk
        if self.end == "break":
            raise httpx2.ReadError("peer closed connection")
        if self.end == "hang":
            await asyncio.sleep(60)

    async def aclose(self) -> None:
        self.closed.set()

    def response(self) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": "text/event-stream; charset=utf-8"}, stream=self)


class Client:
    """Asks a proxy in this thread."""

    def __init__(self, proxy: Proxy, upstream: Upstream) -> None:
        self.proxy, self.upstream = proxy, upstream
        self.model = "m" + proxy.suffix

    def post(self, *messages: Any, headers: dict[str, str] | None = None, **fields: Any) -> httpx2.Response:
        return self.raw(json.dumps({"model": self.model, "messages": list(messages)} | fields).encode(), headers)

    def raw(self, content: bytes, headers: Any = None, path: str = "/v1/chat/completions") -> httpx2.Response:
        headers_or_json = {"content-type": "application/json"} if headers is None else headers
        return self.request("POST", path, content=content, headers=headers_or_json)

    def request(self, method: str, path: str, **options: Any) -> httpx2.Response:
        async def ask() -> httpx2.Response:
            transport = httpx2.ASGITransport(self.proxy.app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://localhost:8100") as http:
                return await http.request(method, path, **options)

        return asyncio.run(ask())

    def sent(self) -> list[dict[str, Any]]:
        """The messages of the last request that reached the upstream."""
        return self.upstream.bodies[-1]["messages"]


def client(defense: Defense | None = None, fetcher: Fetcher | None = None, **settings: Any) -> Client:
    upstream = Upstream()
    options = {"upstream": "http://upstream.test/v1", "canvas": CANVAS} | settings
    return Client(Proxy(defense or border(), ServeSettings.of(**options), upstream, fetcher), upstream)


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """The address of an app that is served on loopback, up to /v1."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        config = uvicorn.Config(app, timeout_graceful_shutdown=1, **SERVER)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join(10)


def until(met: Callable[[], Any]) -> None:
    """Wait for what must come soon; half a minute is for a machine with much to do."""
    end = time.monotonic() + 30
    while not met():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


RED = data_url(Image.new("RGB", (40, 30), "red"))


def error(response: httpx2.Response) -> dict[str, Any]:
    """The error, in OpenAI's shape."""
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == ("server_error" if response.status_code >= 500 else "invalid_request_error")
    assert response.headers["content-type"] == "application/json" and HASH in response.headers
    return body["error"]
