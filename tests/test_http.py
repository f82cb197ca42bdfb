"""Which road a request takes: the proxies of the environment are used only by who asks for them."""

import asyncio

import httpx2
import pytest

from davsp import DavspError
from davsp.runtime.http import PROXIES, async_client, road
from judge_server import Judge
from test_chat_judge import server as server  # a fixture

LIMITS = httpx2.Limits(max_connections=1)
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXIES, *map(str.lower, PROXIES), "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


def get(url: str, trust_env: bool) -> int:
    async def ask() -> int:
        async with async_client(LIMITS, trust_env) as http:
            return (await http.get(url)).status_code

    return asyncio.run(ask())


def test_a_proxy_of_the_environment_is_used_by_who_asks_for_it(server: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", NOWHERE)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert get(server.url, False) == 501  # the server itself, which knows POST alone
    with pytest.raises(httpx2.ConnectError):
        get(server.url, True)


def test_a_proxy_that_cannot_be_used_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:1080")
    async_client(LIMITS)
    with pytest.raises(DavspError, match=r"^the proxy that ALL_PROXY names cannot be used .*leave out --trust-env$"):
        async_client(LIMITS, True)


def test_the_road_is_said_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    assert road(False) == road(True) == "directly"
    monkeypatch.setenv("https_proxy", "http://name:secret@proxy.example:1")
    assert road(False) == "directly (https_proxy set, but not used without --trust-env)"
    assert road(True) == "as https_proxy and NO_PROXY say (--trust-env)"
