"""A judge behind any server that speaks OpenAI's protocol: hosted services, vLLM, SGLang, llama.cpp, Ollama.

What is not a label is unscored, never guessed: errors, time-outs, cut or filtered replies, refusals and prose are
asked for again a few times, with back-off, and then given up. The key comes from an environment variable that is
named, goes into one header, and nowhere else.
"""

import asyncio
import json
import os
import random
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
from rich.console import Console

from davsp.errors import DavspError
from davsp.judges.base import Keep, PromptJudge, read_reply
from davsp.judges.cache import Finding, VerdictCache
from davsp.judges.prompts import Prompt
from davsp.query import Query

OPENAI = "https://api.openai.com/v1"
LONGEST_BACKOFF = 60.0  # seconds
LONGEST_WAIT = 300.0  # seconds that a server may ask for; a longer Retry-After ends the asking
_AGAIN = {408, 409, 425, 429}
_NOT_THERE = {404, 405}
_FILTERS = (  # in the errors of OpenAI, Azure and OpenRouter
    "content_filter", "content filter", "content_policy", "content management policy", "responsibleaipolicy",
    "moderation", "flagged",
)  # fmt: skip


class Limit:
    """How many requests may be under way at once: halves on a 429, grows back by one for each round of good replies.

    Several 429s to requests that were under way together halve it once.
    """

    def __init__(self, most: int) -> None:
        self.most, self.bound = most, float(most)
        self.under_way, self.era = 0, 0
        self._free = asyncio.Condition()

    async def __aenter__(self) -> int:
        """Wait for a place; the era is handed to `shrink`."""
        async with self._free:
            await self._free.wait_for(lambda: self.under_way < int(self.bound))
            self.under_way += 1
            return self.era

    async def __aexit__(self, *_: object) -> None:
        async with self._free:
            self.under_way -= 1
            self._free.notify(max(0, int(self.bound) - self.under_way))

    def shrink(self, era: int) -> None:
        if era == self.era:
            self.bound, self.era = max(1.0, self.bound / 2), self.era + 1

    def grow(self) -> None:
        self.bound = min(self.most, self.bound + 1 / self.bound)


@dataclass
class _Round:
    """What the tasks of one `judge_all` share."""

    client: httpx2.AsyncClient
    limit: Limit
    keep: Keep
    under_way: set[asyncio.Task[None]] = field(default_factory=set)
    stopping: bool = False


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


class ChatJudge(PromptJudge):
    """A judge asked over HTTP.

    Args:
        prompt: one of `davsp.judges.prompts.CHAT` or `davsp.judges.guard.GUARDS`.
        model: as the server calls it.
        base_url: up to and with `/v1`.
        api_key_env: the environment variable with the key; None sends none.
        cache: see `PromptJudge`.
        concurrency: requests under way at most.
        attempts: requests for one answer at most.
        timeout: of a request as a whole, in seconds.
        backoff: the first wait before asking again, in seconds; it doubles, and is drawn from its upper half.
        temperature: sent to the server.
        console: where progress goes.

    Raises:
        DavspError: an address that is none or that holds a password; the variable is empty or no key.
    """

    def __init__(
        self,
        prompt: Prompt,
        model: str,
        base_url: str = OPENAI,
        api_key_env: str | None = None,
        *,
        cache: VerdictCache | None = None,
        concurrency: int = 8,
        attempts: int = 6,
        timeout: float = 60.0,
        backoff: float = 1.0,
        temperature: float = 0.0,
        console: Console | None = None,
    ) -> None:
        super().__init__(prompt, model, _address(base_url), temperature, cache, console)
        if concurrency < 1 or attempts < 1:
            raise DavspError("concurrency and attempts must be 1 or more.")
        self.api_key_env, self.concurrency = api_key_env, concurrency
        self.attempts, self.timeout, self.backoff = attempts, timeout, backoff
        _key_of(api_key_env)

    def _ask(self, pending: Mapping[str, tuple[Query, str]], keep: Keep) -> None:
        _run(self._ask_all(pending, keep))

    async def _ask_all(self, pending: Mapping[str, tuple[Query, str]], keep: Keep) -> None:
        """One task for each answer. When stopped, what is under way is let finish and kept; nothing new is sent."""
        connections = httpx2.Limits(max_connections=self.concurrency)
        async with httpx2.AsyncClient(timeout=None, limits=connections, headers=self._headers()) as client:
            current = _Round(client, Limit(self.concurrency), keep)
            tasks = [
                asyncio.create_task(self._ask_one(current, key, query, answer))
                for key, (query, answer) in pending.items()
            ]
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

    async def _ask_one(self, current: "_Round", key: str, query: Query, answer: str) -> None:
        request = self._request(query, answer)
        for attempt in range(1, self.attempts + 1):
            async with current.limit as era:
                reply, finding = await self._try(current, request)
                if finding.label != "unscored":
                    current.limit.grow()
                    current.keep(key, finding)
                    return
                if isinstance(reply, httpx2.Response) and reply.status_code == 429:
                    current.limit.shrink(era)
            if current.stopping:
                return
            wait = self._wait(reply, attempt)
            if wait is None or attempt == self.attempts:
                current.keep(key, finding)
                return
            await asyncio.sleep(wait)

    async def _try(self, current: "_Round", request: dict[str, Any]) -> tuple[httpx2.Response | str, Finding]:
        """One request and what it says; from here on the task is let finish."""
        me: Any = asyncio.current_task()
        current.under_way.add(me)
        reply = await self._post(current.client, request)
        finding = self._read(reply)
        if finding.label == "unscored":
            current.under_way.discard(me)
        return reply, finding

    async def _post(self, client: httpx2.AsyncClient, request: dict[str, Any]) -> httpx2.Response | str:
        """The response, or why there is none."""
        try:
            async with asyncio.timeout(self.timeout):
                return await client.post(
                    f"{self.where}/{'' if self.prompt.plain else 'chat/'}completions",
                    content=json.dumps(request),  # all in ASCII, so that half a surrogate pair in an answer is no error
                    headers={"Content-Type": "application/json"},
                )
        except TimeoutError:
            return f"no reply within {self.timeout:g} s"
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            return f"no reply ({type(error).__name__})"

    def _request(self, query: Query, answer: str) -> dict[str, Any]:
        messages = self.prompt.messages(query, answer)
        asked = {"prompt": messages[0]["content"]} if self.prompt.plain else {"messages": messages}
        return {
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.prompt.max_tokens,
        } | asked

    def _read(self, reply: httpx2.Response | str) -> Finding:
        """What a response says.

        Raises:
            DavspError: one that every other request would get too: no such address, or a key that is refused.
        """
        if isinstance(reply, str):
            return Finding("unscored", reply)
        code = reply.status_code
        if code in (401, 403) and not _filtered(_json(reply)):
            mend = f"see the key in {self.api_key_env}" if self.api_key_env else "name the variable with --api-key-env"
            raise DavspError(f"the judge's server {self.where} refuses the key ({code}); {mend}.")
        if code in _NOT_THERE:
            raise DavspError(
                f"the judge's server {self.where} does not know {reply.url.path} or the model {self.model!r} ({code}); "
                "see --base-url, which ends in /v1 for most servers, and --judge-model."
            )
        try:
            body = reply.json()
        except ValueError:
            return Finding("unscored", f"the judge's server sent no JSON ({code})")
        if code != 200:
            kind = "the judge's content filter" if _filtered(body) else "the judge's server failed"
            return Finding("unscored", f"{kind} ({code})", self._without_key(_error(body)))
        return self._read_choice(body)

    def _read_choice(self, body: Any) -> Finding:
        try:
            choice = body["choices"][0]
            message = choice if self.prompt.plain else choice["message"]
            text, refusal = message["text" if self.prompt.plain else "content"], message.get("refusal")
            end = choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            return Finding("unscored", "the judge's server sent a reply without a choice")
        raw = text if isinstance(text, str) else ""
        if refusal:
            return Finding("unscored", "the judge refuses", str(refusal))
        if end in ("length", "content_filter"):
            return Finding("unscored", f"the judge's reply was cut ({end})", raw)
        return read_reply(self.prompt, raw)

    def _wait(self, reply: httpx2.Response | str, attempt: int) -> float | None:
        """Seconds until the next attempt; None if there is no use in one."""
        drawn = min(LONGEST_BACKOFF, self.backoff * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
        if isinstance(reply, str):
            return drawn
        code = reply.status_code
        if 400 <= code < 500 and code not in _AGAIN and not _filtered(_json(reply)):
            return None
        asked = retry_after(reply.headers.get("retry-after"), datetime.now(UTC)) if code != 200 else None
        if asked is None:
            return drawn
        return asked + min(drawn, 1.0) if asked <= LONGEST_WAIT else None

    def _without_key(self, text: str) -> str:
        """Servers quote a key that they refuse."""
        key = _key_of(self.api_key_env)
        return text.replace(key, "***") if key else text

    def _headers(self) -> dict[str, str]:
        key = _key_of(self.api_key_env)
        return {"Authorization": f"Bearer {key}"} if key else {}


def _address(base_url: str) -> str:
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL as error:
        raise DavspError(f"--base-url {base_url!r} is no address ({error}).") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise DavspError(f"--base-url {base_url!r} is no address; give one as http://127.0.0.1:8000/v1.")
    if url.userinfo or url.query:
        raise DavspError("--base-url holds a password or parameters; give keys by --api-key-env only.")
    return base_url.rstrip("/")


def _key_of(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise DavspError(f"the environment variable {variable} is empty; put the judge's key there.")
    if not (key.isascii() and key.isprintable()):
        raise DavspError(f"what is in the environment variable {variable} is no key: it holds odd characters.")
    return key


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
