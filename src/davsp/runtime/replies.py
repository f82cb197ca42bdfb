"""What a server sends back: read up to a size, unpacked up to the same, its JSON, how long it says to wait, its own words."""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

LARGEST = 8 * 2**20
"""Bytes of a reply, packed and unpacked. The longest answer with its reasoning takes a tenth of it."""
WORDS = 200
"""Characters of the server's own words in a message."""

_FILTERS = (  # in the errors of OpenAI, Azure and OpenRouter
    "content_filter", "content filter", "content_policy", "content management policy", "responsibleaipolicy",
    "moderation", "flagged",
)  # fmt: skip
_SPENT = ("insufficient_quota", "billing_hard_limit_reached", "insufficient_balance")


@dataclass(frozen=True)
class Reply:
    """A whole reply.

    Attributes:
        status: of HTTP.
        body: its JSON; None if it holds none that can be read.
        problem: why there is no body; empty if there is one.
        text: the start of what was sent, where that is no JSON.
        wait: seconds that the server asks to wait; None: it says nothing readable.
    """

    status: int
    body: Any
    problem: str = ""
    text: str = ""
    wait: float | None = None

    @property
    def error(self) -> Any:
        """What the body has as its error; None: nothing, as in a good reply."""
        return (self.body.get("error") or None) if isinstance(self.body, dict) else None

    @property
    def refused(self) -> bool:
        """A 429, be it in the status or in the error of a reply with status 200, as OpenRouter sends one."""
        code = self.error.get("code") if isinstance(self.error, dict) else None
        return self.status == 429 or (self.status == 200 and code == 429)

    @property
    def filtered(self) -> bool:
        """The error is of a content filter."""
        return self.error is not None and any(name in str(self.error).lower() for name in _FILTERS)

    @property
    def spent(self) -> bool:
        """The account has no quota or money left, which waiting does not change."""
        names = [self.error.get(name) for name in ("code", "type")] if isinstance(self.error, dict) else []
        return self.status == 402 or any(name in _SPENT for name in names)

    @property
    def wants_other_length(self) -> bool:
        """It refuses `max_tokens` and wants `max_completion_tokens`, as servers of reasoning models do."""
        if self.status not in (400, 422) or self.error is None:
            return False
        told = str(self.error)
        return "max_completion_tokens" in told or ("unsupported_parameter" in told and "max_tokens" in told)

    def words(self, most: int = WORDS) -> str:
        """The server's own words on what went wrong, as `one_line` leaves them; empty if it has none."""
        if self.body is None:
            return one_line(self.text, most)
        error: Any = self.error
        if error is None and self.status != 200 and isinstance(self.body, dict):
            error = next((self.body[name] for name in ("message", "detail") if self.body.get(name)), None)
        if not isinstance(error, dict):
            return "" if error is None else one_line(str(error), most)
        metadata = error.get("metadata")
        behind = metadata.get("raw") if isinstance(metadata, dict) else None  # OpenRouter: what its provider said
        parts = [part for part in (error.get("message"), behind) if isinstance(part, str) and part]
        return one_line(": ".join(parts) or str(error), most)


def one_line(text: str, most: int = WORDS) -> str:
    """A text of foreign make on one line: nothing that a terminal obeys or a file can't hold, and cut."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 8 * most]).split())
    return line if len(line) <= most else f"{line[:most]}…"


def writable(text: str) -> str:
    """A text without white space around it, and with a question mark for each half of a surrogate pair: JSON may hold one, UTF-8 can't."""
    return text.strip().encode(errors="replace").decode()


def told(choice: Any) -> str:
    """What stands in a choice as its error, in words behind a colon; empty if there is none. OpenRouter puts it there."""
    error = choice.get("error") if isinstance(choice, dict) else None
    return f": {Reply(200, {'error': error}).words()}" if error else ""


async def read(response: httpx2.Response) -> Reply:
    """Read a response to its end, or as far as `LARGEST`.

    Raises:
        httpx2.HTTPError: the connection breaks.
    """
    data, status = bytearray(), response.status_code
    wait = retry_after(response.headers.get("retry-after"), datetime.now(UTC))
    async for part in response.aiter_raw():
        data += part
        if len(data) > LARGEST:
            return Reply(status, None, f"sent more than {LARGEST // 2**20} MB", wait=wait)
    try:
        whole = _unpacked(bytes(data), response.headers)
    except ValueError as error:
        return Reply(status, None, str(error), wait=wait)
    try:
        return Reply(status, json.loads(whole), wait=wait)
    except RecursionError:
        return Reply(status, None, "sent JSON that is nested too deep", wait=wait)
    except ValueError:
        return Reply(status, None, "sent no JSON", whole[: 8 * WORDS].decode(errors="replace"), wait)


def _unpacked(data: bytes, headers: Mapping[str, str]) -> bytes:
    """The bytes of a reply that was packed although none such was asked for.

    Raises:
        ValueError: why they can't be unpacked, in words.
    """
    packing = headers.get("content-encoding", "identity").strip().lower()
    if packing in ("", "identity"):
        return data
    if packing not in ("gzip", "x-gzip", "deflate"):
        raise ValueError("sent a reply that is packed, which was not asked for")
    unpack = zlib.decompressobj(47)  # gzip or zlib, as its head says
    try:
        whole = unpack.decompress(data, LARGEST + 1)
    except zlib.error:
        raise ValueError("sent a packed reply that is broken") from None
    if len(whole) > LARGEST:
        raise ValueError(f"sent more than {LARGEST // 2**20} MB")
    if not unpack.eof:
        raise ValueError("sent a packed reply that is broken")
    return whole


def retry_after(header: str | None, now: datetime) -> float | None:
    """The seconds that a Retry-After header asks for, as a number or as a date, 0 to infinity; None if it says nothing readable."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            then = parsedate_to_datetime(header)
            seconds = ((then if then.tzinfo else then.replace(tzinfo=UTC)) - now).total_seconds()
        except (ValueError, TypeError, OverflowError, IndexError):
            return None
    return max(0.0, seconds) if seconds == seconds else None


def sendable(body: Mapping[str, Any]) -> bytes:
    """A body as JSON. Half a surrogate pair in a text, which no JSON of another's make may hold, becomes U+FFFD."""
    text = json.dumps(body, ensure_ascii=False)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
