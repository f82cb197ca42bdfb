"""Who may ask, and how a body is read."""

import asyncio
import hmac
import json
from typing import Any

from starlette.requests import Request

from davsp.runtime.loopback import names_loopback
from davsp.serve.refusals import Refusal, bad
from davsp.serve.settings import ServeSettings


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


async def read_json(request: Request, settings: ServeSettings) -> Any:
    """The body of a request.

    Raises:
        Refusal: 415 if it is not said to be plain JSON, 413 if it is too long, 408 if it comes too slowly, 400 if it is no JSON.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "the body must be sent as Content-Type: application/json.", "content_type")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refusal(415, "the body must be sent without Content-Encoding.", "content_encoding")
    large = Refusal(413, f"the body has more than {settings.max_body} bytes.", "body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > settings.max_body:
        raise large
    data = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout):
            async for chunk in request.stream():
                data += chunk
                if len(data) > settings.max_body:
                    raise large
        return json.loads(data)
    except TimeoutError as error:
        raise Refusal(408, f"the body did not come within {settings.body_timeout:g} s.", "body_timeout") from error
    except (ValueError, RecursionError) as error:
        raise bad("the body is not JSON.") from error
