"""The proxy itself: who may ask, what is read, defended and sent on, and how it ends."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager
from functools import partial
from typing import Any

import httpx2
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from davsp.defenses import Defense, Gate
from davsp.errors import DavspError
from davsp.serve import calls, gate, messages, refusals
from davsp.serve.admission import SMALL, Room, Seat, admit, read
from davsp.serve.bodies import START, Body
from davsp.serve.canaries import Readiness, Report, border_of
from davsp.serve.connections import Drained
from davsp.serve.counters import Counters
from davsp.serve.fetch import Fetcher
from davsp.serve.pictures import decoded
from davsp.serve.preparation import Preparation, elsewhere
from davsp.serve.protocols import CHAT, RESPONSES, Protocol
from davsp.serve.refusals import Refusal
from davsp.serve.replies import Completion, reply
from davsp.serve.settings import ServeSettings
from davsp.serve.sweep import sweep
from davsp.serve.upstream import Upstream

HASH = "x-davsp-prompt"
GONE = 499  # the client hung up; as nginx counts it
log = logging.getLogger("davsp.serve")


class Proxy:
    """One defense before one upstream.

    Attributes:
        app: for an ASGI server.
        suffix: what the names of the upstream's models carry, so that no cache mixes two defenses.
    """

    def __init__(
        self,
        defense: Defense,
        settings: ServeSettings,
        transport: httpx2.AsyncBaseTransport | None = None,
        fetcher: Fetcher | None = None,
        report: Report | None = None,
    ) -> None:
        self.defense, self.settings = defense, settings
        self.hash = defense.sha256()
        self.suffix = f"+davsp-{self.hash[:12]}"
        self.gate = gate.gate_of(defense)
        self.work = Preparation(defense, settings, self.suffix)
        self.token = settings.token
        self.metrics, self.under_way = Counters(), 0
        self.upstream = Upstream(settings, transport)
        self.ready = Readiness(self.upstream, settings, border_of(defense), report)
        self.fetch = fetcher or Fetcher(settings.allow_hosts, settings.max_picture_bytes, settings.fetch_timeout)
        self.room = Room(settings.max_held)
        self.readers = ThreadPoolExecutor(1, "davsp-small"), ThreadPoolExecutor(1, "davsp-large")
        self.painters = ThreadPoolExecutor(settings.threads, "davsp-pictures")
        self.callers = ThreadPoolExecutor(settings.concurrency, "davsp-calls")
        routes = [
            Route("/v1/chat/completions", _Endpoint(partial(self.defend, CHAT)), methods=["POST"]),
            Route("/v1/responses", _Endpoint(partial(self.defend, RESPONSES)), methods=["POST"]),
            Route("/v1/models", self._route(self._models)),
            Route("/v1/models/{name:path}", self._route(self._models)),
            Route("/metrics", self._route(self._page)),
            Route("/ready", self._route(self._readiness)),
            Route("/health", lambda request: JSONResponse({"status": "ok"})),
        ]
        self.app = Starlette(
            routes=routes,
            lifespan=self._lifespan,
            middleware=[Middleware(Drained)],
            exception_handlers={404: _missing, 405: _missing},
        )
        self.app.router.redirect_slashes = False  # a path that is not served says so, and leads nowhere

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        self.ready.stop()
        await self.upstream.http.aclose()
        await self.fetch.http.aclose()
        for pool in (*self.readers, self.painters, self.callers):
            pool.shutdown(wait=False, cancel_futures=True)

    # -- a request that is defended --------------------------------------------------------------------------------

    async def defend(self, protocol: Protocol, scope: Any, receive: Any, send: Any) -> None:
        """`POST /v1/chat/completions` or `/v1/responses`, from its head to the last byte of the reply."""
        request, status = Request(scope, receive), str(GONE)
        try:
            with self._place() as free:
                response = await self._shaped(request, partial(self._answer, protocol) if free else _busy)
                status = str(response.status_code)
                if isinstance(response, StreamingResponse):
                    return await response(scope, receive, send)
            await response(scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            self.metrics.requests.labels(status).inc()

    @contextmanager
    def _place(self) -> Iterator[bool]:
        """Among the requests under way; False if there are too many."""
        free = self.under_way < self.settings.concurrency
        self.under_way += 1
        self.metrics.under_way.inc()
        try:
            yield free
        finally:
            self.under_way -= 1
            self.metrics.under_way.dec()

    async def _answer(self, protocol: Protocol, request: Request) -> Response:
        with self.room.seat() as seat:
            data = [await read(request, seat, self.settings)]
            return await _unless_gone(request, self._respond(protocol, request, data, seat))

    async def _respond(self, protocol: Protocol, request: Request, inbox: list[bytearray], seat: Seat) -> Response:
        start = time.perf_counter()
        if protocol is RESPONSES and not (self.work.once or self.gate):
            raise Refusal(
                501, f"{self.defense.name} asks the model more than once; ask it by /v1/chat/completions.", "not_served"
            )
        paints = inbox[0].find(START) >= 0
        pool = self.painters if paints else self.readers[len(inbox[0]) > SMALL]
        body, urls, sent = await self._in_thread(pool, self.work.read, protocol, inbox.pop(), paints)
        if body is not None:
            files = await self._fetched(urls, body, seat)
            if self.gate and not self.work.idle(urls):
                box = [(body, files)]
                del body, files
                return await self._through_gate(protocol, request, box, urls, seat, self.gate)
            if not self.work.once and not self.work.idle(urls):
                return await self._ask_repeatedly(request, body, files)
            sent = await self._in_thread(self.painters, self.work.defended, protocol, body, urls, files)
            del body, files
        seat.resize(len(sent[0]))
        self.metrics.pictures.inc(len(urls))
        self.metrics.defense.observe(time.perf_counter() - start)
        start = time.perf_counter()
        response = await self.upstream.forward(request, sent, protocol.path)
        self.metrics.upstream.observe(time.perf_counter() - start)
        return response

    async def _through_gate(
        self,
        protocol: Protocol,
        request: Request,
        box: list[tuple[Body, dict[str, bytes]]],
        urls: list[str],
        seat: Seat,
        through: Gate,
    ) -> Response:
        """The answer of what passes the gate, or a refusal. What is in the box is let go of with the last body."""
        held, value, start = seat.size, box[0][0].value, time.perf_counter()

        async def send(value: dict[str, Any], defense: Defense, last: bool) -> Response:
            body, files = box.pop() if last else box[0]
            body = body._replace(value=value)
            sent = await self._in_thread(self.painters, self.work.defended, protocol, body, urls, files, defense)
            del body, files
            seat.resize(len(sent[0]) + (0 if last else held))
            return await self.upstream.forward(request, sent, protocol.path)

        self.metrics.pictures.inc(len(urls))
        response = await gate.answer(through, protocol, value, self.settings.reasoning_tags, send)
        self.metrics.upstream.observe(time.perf_counter() - start)
        if road := response.headers.get(gate.HEAD):
            self.metrics.gate.labels(road).inc()
        return response

    async def _fetched(self, urls: list[str], body: Body, seat: Seat) -> dict[str, bytes]:
        """The files of pictures that are elsewhere, each in the seat before it is asked for."""
        missing = elsewhere(urls, body)
        seat.resize(seat.size + len(missing) * self.settings.max_picture_bytes)
        return dict(zip(missing, await asyncio.gather(*map(self.fetch, missing)), strict=True))

    async def _ask_repeatedly(self, request: Request, body: Body, fetched: dict[str, bytes]) -> Response:
        """The answer of a defense that asks more than once."""

        async def post(sent: dict[str, Any]) -> tuple[int, Any]:
            status, content, _ = await self.upstream.ask("POST", "/chat/completions", request.headers, sent)
            return status, content

        before, question = calls.split(body.value)
        lvlm = calls.UpstreamLVLM(body.value, before, self.settings.upstream, self.settings.canvas, post)
        try:
            completion = await self._in_thread(
                self.callers, self._completion, body, fetched, question, lvlm, stop=lvlm.stop
            )
        finally:
            lvlm.stop()  # whoever hung up is not asked for again
        return reply(completion, body.value | {"model": body.value["model"] + self.suffix})

    def _completion(self, body: Body, fetched: dict[str, bytes], question: str, lvlm: calls.UpstreamLVLM) -> Completion:
        """Runs in a thread of its own, which waits for the upstream between the calls; the picture stays in the budget meanwhile."""
        longest = calls.longest(body.value, self.settings.max_new_tokens)
        left = messages.without_pictures(body.value["messages"])
        sweep(body.value | {"messages": left}, (), self.settings.max_values)
        files = self.work.files(messages.picture_urls(body.value["messages"]), body, fetched)
        with closing(decoded(files, self.settings, self.work.budget)) as pictures:
            completion = calls.answer(self.defense, lvlm, question, next(pictures, None), longest)
        self.metrics.pictures.inc(len(files))
        return completion

    async def _in_thread(
        self, pool: ThreadPoolExecutor, work: Callable[..., Any], *args: Any, stop: Callable[[], None] | None = None
    ) -> Any:
        """What the work gives. When the client hangs up: what waits in the pool is let go of, what runs counts until it ends."""
        inbox = [args]
        del args
        future = pool.submit(lambda: work(*inbox.pop()))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if stop:
                stop()
            if future.cancel():  # the pool keeps it until its turn comes
                inbox.clear()
            else:
                await asyncio.gather(asyncio.wrap_future(future), return_exceptions=True)
            raise

    # -- the rest --------------------------------------------------------------------------------------------------

    async def _models(self, request: Request) -> Response:
        status, listing, _ = await self.upstream.ask("GET", "/models", request.headers)
        if status != 200 or not isinstance(listing, dict) or not isinstance(listing.get("data"), list):
            raise Refusal(502, f"the upstream answered {status} without a list of models.", "upstream_error")
        models = [model for model in listing["data"] if isinstance(model, dict) and isinstance(model.get("id"), str)]
        listed = [model | {"id": model["id"] + self.suffix} for model in models]
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse(listing | {"data": listed})
        for model in listed:
            if model["id"] == name:
                return JSONResponse(model)
        raise Refusal(404, f"model {name!r} is not served.", "model_not_found", "model")

    async def _readiness(self, request: Request) -> Response:
        ready, why = await self.ready()
        return JSONResponse(why, 200 if ready else 503)

    async def _page(self, request: Request) -> Response:
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4")

    def _route(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            return await self._shaped(request, handler)

        return endpoint

    async def _shaped(self, request: Request, handler: Callable[[Request], Awaitable[Response]]) -> Response:
        """The handler's response, or why there is none; with the hash in its head."""
        try:
            admit(request, self.token, self.settings.loopback)
            response = await handler(request)
        except (Refusal, DavspError) as error:
            refusal = error if isinstance(error, Refusal) else Refusal(500, str(error), "defense")
            self.metrics.refused.labels(refusal.code).inc()
            response = refusals.response(refusal)
            _forget(error)
        except (ClientDisconnect, asyncio.CancelledError):
            raise
        except Exception as error:  # its message could hold what the client sent, so the log gets its place alone
            last = error.__traceback__
            while last and last.tb_next:
                last = last.tb_next
            where = f"{last.tb_frame.f_code.co_filename}:{last.tb_lineno}" if last else "?"
            log.error("%s at %s", type(error).__name__, where)
            self.metrics.refused.labels("internal").inc()
            response = refusals.response(Refusal(500, "the proxy failed; nothing more was sent on.", "internal"))
            _forget(error)
        response.headers[HASH] = self.hash
        return response


def _forget(error: BaseException | None) -> None:
    """Let go of the frames that an error went through: they hold the request's bytes, and the error, until the collector comes."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


class _Endpoint:
    """An ASGI app to Starlette, which would take a method for a function of a request."""

    def __init__(self, app: Callable[[Any, Any, Any], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


async def _unless_gone(request: Request, work: Any) -> Response:
    """The work's result; when the client hangs up, the work is stopped, and with it the request to the upstream."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.gather(watch, task, return_exceptions=True)
        del task, watch  # an error holds this frame, and a task its error


async def _busy(request: Request) -> Response:
    raise Refusal(429, "the proxy is busy; ask again.", "busy")


async def _missing(request: Request, error: Exception) -> Response:
    why = f"{request.method} {request.url.path} is not served: it would reach the model undefended."
    return refusals.response(Refusal(getattr(error, "status_code", 404), why, "not_served"))
