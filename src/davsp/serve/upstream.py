"""The server behind: what goes to it, and what comes back as its own bytes."""

import json
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from davsp.runtime import keys
from davsp.runtime.http import async_client
from davsp.serve.refusals import Refusal, body
from davsp.serve.settings import ServeSettings

HOP = {  # of one connection, or of a body that is no longer the same
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade", "host", "content-length", "expect", "accept-encoding", "authorization", "cookie", "set-cookie",
}  # fmt: skip
CHECKED = (
    2**20
)  # bytes up to which a reply is parsed; of a larger one only both ends are looked at, as all others wait meanwhile
NO_PATH = (404, 405, 501)
A_MODEL = re.compile(rb"\bmodel\b|model_not_found", re.IGNORECASE)  # what is missing is a model, not the path


class Pools(httpx2.AsyncBaseTransport):
    """Several pools of connections, of which a request takes the first that is least busy.

    One pool looks at each of its idle connections at every request; with 64 of them that takes longer than the request itself.

    Args:
        limits: of the connections of each.
    """

    def __init__(self, limits: httpx2.Limits) -> None:
        certificates = httpx2.create_ssl_context()
        self.pools = [httpx2.AsyncHTTPTransport(verify=certificates, limits=limits) for _ in range(16)]
        self.busy = [0] * len(self.pools)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        number = self.busy.index(min(self.busy))
        self.busy[number] += 1
        try:
            return await self.pools[number].handle_async_request(request)
        finally:
            self.busy[number] -= 1

    async def aclose(self) -> None:
        for pool in self.pools:
            await pool.aclose()


class Upstream:
    """One server that speaks OpenAI's protocol.

    Raises:
        DavspError: the environment variable of its key is empty, or a proxy of the environment cannot be used.
    """

    def __init__(self, settings: ServeSettings, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        self.url = settings.upstream.rstrip("/")
        self.key = keys.read(settings.api_key_env, "upstream")
        self.takes_token = settings.token is not None
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=settings.concurrency)
        timeout = httpx2.Timeout(settings.upstream_timeout, connect=settings.connect_timeout)
        if transport is None and not settings.trust_env:
            transport = Pools(limits)
        self.http = async_client(limits, settings.trust_env, transport, timeout=timeout, follow_redirects=False)
        self.urls, self.waits = dict[str, httpx2.URL](), {"timeout": timeout.as_dict()}

    async def forward(self, request: Request, sent: list[bytes], path: str = "/chat/completions") -> Response:
        """The upstream's reply to a request: its status and bytes; a stream as it comes.

        Args:
            sent: the body in one piece; the list is empty afterwards, so that nobody holds it while the upstream answers.

        Raises:
            Refusal: 502 or 504 if there is no reply, or none that is JSON or a stream of events; 501 if it has no /responses.
        """
        reply = await self._send("POST", path, self._headers(request.headers), sent)
        if path == "/responses" and reply.status_code in NO_PATH:
            return await _about_a_model(reply)
        kind = reply.headers.get("content-type", "").partition(";")[0].strip().lower()
        if reply.status_code == 200 and kind == "text/event-stream":
            return _Stream(reply)
        return Response(await _whole(reply), reply.status_code, _end_to_end(reply.headers))

    async def ask(
        self, method: str, path: str, headers: Mapping[str, str], sent: Any = None
    ) -> tuple[int, Any, httpx2.Headers]:
        """Status, JSON and headers of a request of the proxy's own.

        Raises:
            Refusal: as `forward`.
        """
        content = None if sent is None else [json.dumps(sent).encode()]
        reply = await self._send(method, path, self._headers(headers), content)
        return reply.status_code, json.loads(await _whole(reply)), reply.headers

    async def _send(
        self, method: str, path: str, headers: list[tuple[bytes, bytes]], sent: list[bytes] | None
    ) -> httpx2.Response:
        if sent:
            headers = [*headers, (b"content-length", str(sum(map(len, sent))).encode())]
        content = None if sent is None else _pieces(sent)
        url = self.urls.setdefault(path, httpx2.URL(self.url + path)) if path not in self.urls else self.urls[path]
        request = httpx2.Request(method, url, headers=headers, content=content, extensions=self.waits)
        try:
            return await self.http.send(request, stream=True)
        except httpx2.TimeoutException as error:
            raise Refusal(504, "the upstream did not answer in time.", "upstream_timeout") from error
        except (httpx2.ConnectError, httpx2.ProxyError, OSError) as error:
            raise Refusal(502, "the upstream cannot be reached.", "upstream_unreachable") from error
        except httpx2.HTTPError as error:
            why = f"the upstream was reached, but sent no reply ({type(error).__name__})."
            raise Refusal(502, why, "upstream_broken") from error

    def _headers(self, client_headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
        """The client's, but for those of its connection; its key only if the proxy has none and wants none.

        As bytes, since a value may hold some above ASCII, and without the blanks that may end one.
        """
        dropped = HOP | {name.strip().lower() for name in client_headers.get("connection", "").split(",")}
        headers = {name: value for name, value in client_headers.items() if name.lower() not in dropped}
        headers |= {"content-type": "application/json", "accept-encoding": "identity"}  # bytes that can be handed on
        if self.key:
            headers["authorization"] = f"Bearer {self.key}"
        elif not self.takes_token and "authorization" in client_headers:
            headers["authorization"] = client_headers["authorization"]
        return [(name.encode("latin-1"), value.encode("latin-1").strip(b" \t")) for name, value in headers.items()]


async def _pieces(sent: list[bytes]) -> AsyncIterator[bytes]:
    while sent:
        yield sent.pop(0)


async def _whole(reply: httpx2.Response) -> bytes:
    """All bytes of a reply that must be JSON."""
    try:
        data = b"".join([chunk async for chunk in reply.aiter_raw()])
        if len(data) < CHECKED:
            json.loads(data)
        elif data[:64].lstrip()[:1] + data[-64:].rstrip()[-1:] != b"{}":
            raise ValueError
    except httpx2.TimeoutException as error:
        raise Refusal(504, "the upstream stopped in the middle of its reply.", "upstream_timeout") from error
    except httpx2.HTTPError as error:
        raise Refusal(502, "the upstream broke off its reply.", "upstream_broken") from error
    except (ValueError, RecursionError) as error:
        status = reply.status_code if reply.status_code >= 400 else 502
        raise Refusal(status, f"the upstream answered {reply.status_code} without JSON.", "upstream_no_json") from error
    finally:
        await reply.aclose()
    return data


async def _about_a_model(reply: httpx2.Response) -> Response:
    """A reply of `NO_PATH` if it says that a model is missing. Servers without the path say so in many ways, some without JSON."""
    try:
        data = await _whole(reply)
    except Refusal as refusal:
        if refusal.code != "upstream_no_json":
            raise
        data = b""
    if A_MODEL.search(data):
        return Response(data, reply.status_code, _end_to_end(reply.headers))
    raise Refusal(
        501,
        "the upstream has no /responses; ask by /v1/chat/completions, or put an upstream there that has it.",
        "no_responses",
    )


class _Stream(StreamingResponse):
    """A stream of events as it comes; the upstream's end is closed however ours ends, so that it stops computing."""

    def __init__(self, reply: httpx2.Response) -> None:
        super().__init__(_events(reply), 200, _end_to_end(reply.headers))
        self.reply = reply

    async def __call__(self, *asgi: Any) -> None:
        try:
            await super().__call__(*asgi)
        finally:
            await self.reply.aclose()


async def _events(reply: httpx2.Response) -> AsyncIterator[bytes]:
    """A stream's bytes; where it breaks off, an error in its place, and no [DONE]."""
    try:
        async for chunk in reply.aiter_raw():
            yield chunk
    except (httpx2.HTTPError, OSError):
        broken = Refusal(502, "the upstream broke off its stream.", "upstream_broken")
        yield f"\n\ndata: {json.dumps(body(broken))}\n\n".encode()


def _end_to_end(headers: httpx2.Headers) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in HOP | {"server", "date"}}
