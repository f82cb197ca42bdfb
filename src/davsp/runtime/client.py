"""Many requests to one server that speaks OpenAI's protocol: hosted services, vLLM, SGLang, llama.cpp, Ollama.

Judges ask so, and the engine that answers on a server. A request that fails is sent again a few times, before those that were
not sent yet, with back-off that honours Retry-After; what a good reply means is the caller's business. The key comes from an environment variable that is
named, goes into one header, and nowhere else.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx2

from davsp.errors import DavspError, words_of
from davsp.runtime import keys, replies
from davsp.runtime.http import HIGHEST, async_client
from davsp.runtime.limit import Limit
from davsp.runtime.replies import Reply

OPENAI = "https://api.openai.com/v1"
LONGEST_BACKOFF = 60.0  # seconds
LONGEST_WAIT = 300.0  # seconds that a server may ask for; a longer Retry-After ends the asking
_AGAIN = {408, 409, 425, 429}
_NOT_THERE = {404, 405}

T = TypeVar("T")
Outcome = Reply | str  # or why there is no reply
Request = Callable[[int], Mapping[str, Any]]
"""The body to send after so many replies that came but could not be read."""


@dataclass(frozen=True)
class Failure:
    """Why a request brought nothing that can be used, in one sentence with the server's own words, and all of these."""

    reason: str
    raw: str = ""


@dataclass
class _Round:
    """What the tasks of one `ask` share."""

    http: httpx2.AsyncClient
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
        self.limit = Limit(concurrency)
        self._longest = "max_tokens"  # the field for the longest answer, until the server wants another
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

    @staticmethod
    def ask_several(
        clients: "Sequence[Client]",
        path: str,
        requests: Mapping[str, Request],
        read: Callable[[Any], T | Failure],
        keep: Callable[[str, T | Failure], None],
    ) -> None:
        """As `ask`, of several servers at once: each gets as many of the requests. Where one of them fails, all stop."""
        keys_of = [list(requests)[i :: len(clients)] for i in range(len(clients))]

        async def ask_all() -> None:
            tasks = [
                asyncio.create_task(client._ask_all(path, {key: requests[key] for key in mine}, read, keep))
                for client, mine in zip(clients, keys_of, strict=True)
                if mine
            ]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        _run(ask_all())

    async def _ask_all(
        self,
        path: str,
        requests: Mapping[str, Request],
        read: Callable[[Any], T | Failure],
        keep: Callable[[str, T | Failure], None],
    ) -> None:
        connections = httpx2.Limits(max_connections=self.concurrency)
        async with async_client(connections, self.trust_env, timeout=None, headers=self._headers()) as http:
            current = _Round(http, path, read, keep)
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

    async def _ask_one(self, current: "_Round", key: str, request: Request) -> None:
        unread, keeps = 0, False
        for attempt in range(1, self.attempts + 1):
            async with self.limit.place(first=attempt > 1 and not self.limit.crowded) as era:
                reply, result = await self._try(current, request(unread))
                refused = isinstance(reply, Reply) and reply.refused
                failed = isinstance(result, Failure)
                waited, keeps = keeps, refused and self.limit.least
                if refused or not failed:
                    self.limit.reply(refused, era, waited)
                if not failed:
                    current.keep(key, result)
                    return
                unread += isinstance(reply, Reply) and reply.status == 200 and not refused
                wait = None if attempt == self.attempts else self._wait(reply, attempt)
                if wait is not None and keeps and not current.stopping:
                    await asyncio.sleep(wait)
                    wait = 0.0
            if current.stopping:
                return
            if wait is None:
                if refused:
                    self.limit.gave_up()
                if not current.reached:  # with a thousand answers to judge, all would wait as long
                    raise DavspError(
                        f"the {self.whose}'s server {self.where} cannot be reached ({attempt} times {result.reason}); see its "
                        "address and whether it runs, and give the same command again to go on."
                    )
                current.keep(key, result)
                return
            await asyncio.sleep(wait)

    async def _try(self, current: "_Round", body: Mapping[str, Any]) -> tuple[Outcome, Any]:
        """One request and what it brings; from here on the task is let finish."""
        me: Any = asyncio.current_task()
        current.under_way.add(me)
        named = self._with_length(body)
        reply = await self._post(current, named)
        if isinstance(reply, Reply) and reply.wants_other_length and "max_tokens" in named:
            self._longest = "max_completion_tokens"
            reply = await self._post(current, self._with_length(body))
        result = self._read(reply, current)
        if isinstance(result, Failure):
            current.under_way.discard(me)
        return reply, result

    def _with_length(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The body with its longest answer under the name that this server takes."""
        return {self._longest if name == "max_tokens" else name: value for name, value in body.items()}

    async def _post(self, current: "_Round", body: Mapping[str, Any]) -> Outcome:
        """The reply, or why there is none."""
        try:
            async with asyncio.timeout(self.timeout):
                headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
                async with current.http.stream(
                    "POST", f"{self.where}/{current.path}", content=replies.sendable(body), headers=headers
                ) as response:
                    reply: Outcome = await replies.read(response)
        except httpx2.ConnectError as error:
            return f"no reply ({type(error).__name__}: {words_of(error)})"
        except TimeoutError:
            reply = f"no reply within {self.timeout:g} s"
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            reply = f"no reply ({type(error).__name__}: {words_of(error)})"
        current.reached = True
        return reply

    def _read(self, reply: Outcome, current: "_Round") -> Any:
        if isinstance(reply, str):
            return Failure(reply)
        code, server = reply.status, f"the {self.whose}'s server"
        words = self._without_key(reply.words())
        told = f": {words}" if words else ""
        if reply.spent:
            raise DavspError(
                f"{server} {self.where} says that its quota is used up ({code}{told}); see the account's limits and give the "
                "same command again to go on."
            )
        if code in (401, 403) and not reply.filtered:
            mend = f"see the key in {self.api_key_env}" if self.api_key_env else "name the variable that holds one"
            what = "the key" if code == 401 else "the key, or what it may do"
            raise DavspError(f"{server} {self.where} refuses {what} ({code}{told}); {mend}.")
        if code in _NOT_THERE:
            raise DavspError(
                f"{server} {self.where} does not know /{current.path} or the model {self.model!r} ({code}); see its "
                "address, which ends in /v1 for most servers, and the model's name."
            )
        if reply.problem:
            return Failure(f"{server} {reply.problem} ({code}){told}", self._without_key(reply.text))
        if code != 200 or reply.error is not None:
            kind = f"the {self.whose}'s content filter" if reply.filtered else f"{server} failed"
            return Failure(f"{kind} ({code}){told}", self._without_key(reply.words(1000)))
        return current.read(reply.body)

    def _wait(self, reply: Outcome, attempt: int) -> float | None:
        """Seconds until the next attempt; None if there is no use in one."""
        backoff = min(LONGEST_BACKOFF, self.backoff * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
        if isinstance(reply, str):
            return backoff
        if reply.status != 200 and reply.status < 500 and reply.status not in _AGAIN and not reply.filtered:
            return None
        if (
            reply.refused or reply.status == 200
        ) and not self.limit.least:  # fewer at once relieve a server, not longer waits
            backoff = self.backoff * random.uniform(0.5, 1)
        if reply.wait is None or reply.status == 200:
            return backoff
        return reply.wait + min(backoff, 1.0) / 4 if reply.wait <= LONGEST_WAIT else None

    def _without_key(self, text: str) -> str:
        """Servers quote a key that they refuse."""
        secret = keys.read(self.api_key_env, self.whose)
        return text.replace(secret, "***") if secret else text

    def _headers(self) -> dict[str, str]:
        secret = keys.read(self.api_key_env, self.whose)
        return {"Authorization": f"Bearer {secret}"} if secret else {}


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


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run it to its end; in a notebook, whose own loop is busy, in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, work).result()
