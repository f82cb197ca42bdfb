"""HTTP clients, and which road a request takes: the proxies of the environment are used only by who asks for them.

A picture and a key that are meant for a server on this machine must not go to the proxy that the shell happens to name.
Certificates of the environment (SSL_CERT_FILE, SSL_CERT_DIR) count in either way.
"""

import os
from typing import Any

import httpx2

from davsp.errors import DavspError, words_of

HIGHEST = 65535
"""The last port; httpx takes a higher one, and the socket raises an OverflowError at it."""
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def async_client(
    limits: httpx2.Limits, trust_env: bool = False, transport: httpx2.AsyncBaseTransport | None = None, **options: Any
) -> httpx2.AsyncClient:
    """A client that goes straight to its server, or with `trust_env` through the proxies that the environment names.

    Args:
        limits: of its connections.
        transport: in place of a real connection, for tests; no proxy then.
        options: see `httpx2.AsyncClient`.

    Raises:
        DavspError: a proxy of the environment that cannot be used.
    """
    if transport is not None or not trust_env:
        transport = transport or httpx2.AsyncHTTPTransport(limits=limits)
        return httpx2.AsyncClient(transport=transport, **options)
    try:
        for address in (os.environ[name] for name in named()):
            if (httpx2.URL(address if "://" in address else f"http://{address}").port or 0) > HIGHEST:
                raise ValueError(f"its port is above {HIGHEST}")
        return httpx2.AsyncClient(limits=limits, **options)
    except (ImportError, ValueError, httpx2.InvalidURL) as error:
        raise DavspError(
            f"the proxy that {' or '.join(named()) or 'the environment'} names cannot be used ({words_of(error)}); correct it, or leave out "
            "--trust-env"
        ) from error


def named() -> list[str]:
    """The variables of the environment that name a proxy, as they are written there."""
    return [name for word in PROXIES for name in (word, word.lower()) if os.environ.get(name)]


def road(trust_env: bool) -> str:
    """A few words on how a server is reached; no address, which may hold a password."""
    if not named():
        return "directly"
    if trust_env:
        return f"as {', '.join(named())} and NO_PROXY say (--trust-env)"
    return f"directly ({', '.join(named())} set, but not used without --trust-env)"
