"""Many requests to one server that speaks OpenAI's protocol: hosted services, vLLM, SGLang, llama.cpp, Ollama.

Judges ask so, and the engine that answers on a server. A request that fails is sent again a few times, with back-off that
honours Retry-After; what a good reply means is the caller's business. The key comes from an environment variable that is
named, goes into one header, and nowhere else.
"""

import asyncio
import json
import random
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx2

from davsp.errors import DavspError
from davsp.runtime import keys
from davsp.runtime.http import HIGHEST, async_client
from davsp.runtime.limit import Limit

OPENAI = "https://api.openai.com/v1"
LONGEST_BACKOFF = 60.0  # seconds
LONGEST_WAIT = 300.0  # seconds that a server may ask for; a longer Retry-After ends the asking
_AGAIN = {408, 409, 425, 429}
_NOT_THERE = {404, 405}
_FILTERS = (  # in the errors of OpenAI, Azure and OpenRouter
    "content_filter", "content filter", "content_policy", "content management policy", "responsibleaipolicy",
    "moderation", "flagged",
)  # fmt: skip

T = TypeVar("T")
Reply = httpx2.Response | str  # or why there is none
Request = Callable[[int], Mapping[str, Any]]
"""The body to send after so many replies that came but could not be read."""


@dataclass(frozen=True)
class Failure:
    """Why a request brought nothing that can be used, and the server's own words."""

    reason: str
    raw: str = ""


@dataclass
class _Round:
    """What the tasks of one `ask` share."""

    http: httpx2.AsyncClient
    limit: Limit
    path: str
    read: Callable[[Any], Any]
    keep: Callable[[str, Any], None]
    under_way: set[asyncio.Task[None]] = field(default_factory=set)
    reached: bool = False
    stopping: bool = False


class Client:
    """A server and how it is asked.

    Args:
        whose: "judge" or "model", for messages.
        base_url: up to and with `/v1`.
        api_key_env: the environment variable with the key; None sends none.
        model: as the server calls it, for messages.
        concurrency: requests under way at most.
        attempts: requests for one answer at most.
        timeout: of a request as a whole, in seconds.
        backoff: the first wait before asking again, in seconds; it doubles, and is drawn from its upper half.
        trust_env: through the proxies that the environment names; otherwise directly.

    Raises:
        DavspError: an address that is none or that holds a password; the variable is empty or no key.
    """

    def __init__(
        self,
        whose: str,
        base_url: str,
        api_key_env: str | None,
        model: str,
        *,
        concurrency: int,
        attempts: int,
        timeout: float,
        backoff: float,
        trust_env: bool = False,
    ) -> None:
        if concurrency < 1 or attempts < 1:
            raise DavspError("concurrency and attempts must be 1 or more.")
        self.whose, self.where, self.model = whose, _address(base_url, whose), model
        self.api_key_env, self.concurrency = api_key_env, concurrency
        self.attempts, self.timeout, self.backoff, self.trust_env = attempts, timeout, backoff, trust_env
        self._bound = float(concurrency)  # what a 429 has left of it, from one `ask` to the next
        keys.read(api_key_env, whose)

    def ask(
        self,
        path: str,
        requests: Mapping[str, Request],
        read: Callable[[Any], T | Failure],
        keep: Callable[[str, T | Failure], None],
    ) -> None:
        """Send all requests, and each again until it brings something or there is no use in it.

        When stopped, or when `keep` raises, what is under way is let finish and kept; nothing new is sent.

        Args:
            path: behind the address: "chat/completions".
            requests: key -> body; a body may change after a reply that could not be read.
            read: the JSON of a reply with status 200 -> what it brings, or a Failure, which is asked for again.
            keep: called once a key, as soon as it is known; a Failure is the last one.

        Raises:
            DavspError: what every other request would get too: no such address, nothing that listens there, a key that is refused.
        """
        _run(self._ask_all(path, requests, read, keep))

    async def _ask_all(
        self,
        path: str,
        requests: Mapping[str, Request],
        read: Callable[[Any], T | Failure],
        keep: Callable[[str, T | Failure], None],
    ) -> None:
        connections = httpx2.Limits(max_connections=self.concurrency)
        async with async_client(connections, self.trust_env, timeout=None, headers=self._headers()) as http:
            current = _Round(http, Limit(self.concurrency, self._bound), path, read, keep)
            tasks = [asyncio.create_task(self._ask_one(current, key, request)) for key, request in requests.items()]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
            finally:
                current.stopping = True
                for task in tasks:
                    if task not in current.under_way:
                        task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                self._bound = current.limit.bound

    async def _ask_one(self, current: "_Round", key: str, request: Request) -> None:
        unread = 0
        for attempt in range(1, self.attempts + 1):
            async with current.limit as era:
                reply, result = await self._try(current, request(unread))
                if not isinstance(result, Failure):
                    current.limit.grow()
                    current.keep(key, result)
                    return
                code = 0 if isinstance(reply, str) else reply.status_code
                unread += code == 200
                if code == 429:
                    current.limit.shrink(era)
            if current.stopping:
                return
            wait = self._wait(reply, attempt)
            if wait is None or attempt == self.attempts:
                if not current.reached:  # with a thousand answers to judge, all would wait as long
                    raise DavspError(
                        f"the {self.whose}'s server {self.where} cannot be reached ({attempt} times {result.reason}); see its "
                        "address and whether it runs, and give the same command again to go on."
                    )
                current.keep(key, result)
                return
            await asyncio.sleep(wait)

    async def _try(self, current: "_Round", body: Mapping[str, Any]) -> tuple[Reply, Any]:
        """One request and what it brings; from here on the task is let finish."""
        me: Any = asyncio.current_task()
        current.under_way.add(me)
        reply = await self._post(current, body)
        result = self._read(reply, current.read)
        if isinstance(result, Failure):
            current.under_way.discard(me)
        return reply, result

    async def _post(self, current: "_Round", body: Mapping[str, Any]) -> Reply:
        """The response, or why there is none."""
        try:
            async with asyncio.timeout(self.timeout):
                reply: Reply = await current.http.post(
                    f"{self.where}/{current.path}",
                    content=json.dumps(body),  # all in ASCII, so that half a surrogate pair in a text is no error
                    headers={"Content-Type": "application/json"},
                )
        except httpx2.ConnectError as error:
            return f"no reply ({type(error).__name__})"
        except TimeoutError:
            reply = f"no reply within {self.timeout:g} s"
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            reply = f"no reply ({type(error).__name__})"
        current.reached = True
        return reply

    def _read(self, reply: Reply, read: Callable[[Any], Any]) -> Any:
        if isinstance(reply, str):
            return Failure(reply)
        code, server = reply.status_code, f"the {self.whose}'s server"
        if code in (401, 403) and not _filtered(_json(reply)):
            mend = f"see the key in {self.api_key_env}" if self.api_key_env else "name the variable that holds one"
            raise DavspError(f"{server} {self.where} refuses the key ({code}); {mend}.")
        if code in _NOT_THERE:
            raise DavspError(
                f"{server} {self.where} does not know {reply.url.path} or the model {self.model!r} ({code}); see its "
                "address, which ends in /v1 for most servers, and the model's name."
            )
        try:
            body = reply.json()
        except ValueError:
            return Failure(f"{server} sent no JSON ({code})")
        if code != 200:
            kind = f"the {self.whose}'s content filter" if _filtered(body) else f"{server} failed"
            return Failure(f"{kind} ({code})", self._without_key(_error(body)))
        return read(body)

    def _wait(self, reply: Reply, attempt: int) -> float | None:
        """Seconds until the next attempt; None if there is no use in one."""
        backoff = min(LONGEST_BACKOFF, self.backoff * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
        if isinstance(reply, str):
            return backoff
        code = reply.status_code
        if 400 <= code < 500 and code not in _AGAIN and not _filtered(_json(reply)):
            return None
        server_wait = retry_after(reply.headers.get("retry-after"), datetime.now(UTC)) if code != 200 else None
        if server_wait is None:
            return backoff
        return server_wait + min(backoff, 1.0) if server_wait <= LONGEST_WAIT else None

    def _without_key(self, text: str) -> str:
        """Servers quote a key that they refuse."""
        secret = keys.read(self.api_key_env, self.whose)
        return text.replace(secret, "***") if secret else text

    def _headers(self) -> dict[str, str]:
        secret = keys.read(self.api_key_env, self.whose)
        return {"Authorization": f"Bearer {secret}"} if secret else {}


def retry_after(header: str | None, now: datetime) -> float | None:
    """The seconds that a Retry-After header asks for, as a number or as a date; None if it says nothing readable."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            then = parsedate_to_datetime(header)
        except ValueError:
            return None
        seconds = ((then if then.tzinfo else then.replace(tzinfo=UTC)) - now).total_seconds()
    return max(0.0, seconds) if seconds == seconds else None


def _address(base_url: str, whose: str) -> str:
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL as error:
        raise DavspError(f"{base_url!r} is no address of the {whose}'s server ({error}).") from error
    if url.scheme not in ("http", "https") or not url.host or (url.port or 0) > HIGHEST:
        raise DavspError(f"{base_url!r} is no address of the {whose}'s server; give one as http://127.0.0.1:8000/v1.")
    if url.userinfo or url.query:
        raise DavspError(
            f"the address of the {whose}'s server holds a password or parameters; a key is read from the environment only."
        )
    return base_url.rstrip("/")


def _json(reply: httpx2.Response) -> Any:
    try:
        return reply.json()
    except ValueError:
        return None


def _error(body: Any) -> str:
    return str(body.get("error", "")) if isinstance(body, dict) else ""


def _filtered(body: Any) -> bool:
    return any(name in _error(body).lower() for name in _FILTERS)


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run it to its end; in a notebook, whose own loop is busy, in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, work).result()
