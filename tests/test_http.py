"""Which road a request takes: the proxies of the environment are used only by who asks for them."""

import asyncio
import os
import subprocess
import sys

import httpx2
import pytest

from davsp import DavspError
from davsp.lvlm.remote import RemoteLVLM
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


@pytest.mark.parametrize("address", ["socks://127.0.0.1:1080", "http://127.0.0.1:99999", "127.0.0.1:99999", "://"])
def test_a_proxy_that_cannot_be_used_is_one_sentence(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", address)
    async_client(LIMITS)
    with pytest.raises(DavspError, match=r"^the proxy that ALL_PROXY names cannot be used .*leave out --trust-env$"):
        async_client(LIMITS, True)


def test_a_server_at_a_port_that_there_is_not() -> None:
    with pytest.raises(DavspError, match="is no address of the model's server"):
        RemoteLVLM("m", "http://127.0.0.1:99999/v1")


def test_a_proxy_that_gradio_cannot_use() -> None:
    """Gradio builds HTTP clients while it is imported; so it is imported anew, in a process of its own."""
    pytest.importorskip("gradio")
    code = "from davsp.app.server import _gradio; _gradio()"
    environment = os.environ | {"ALL_PROXY": "socks://127.0.0.1:1080"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert (
        done.returncode and "davsp.errors.DavspError: Gradio cannot use the proxy that ALL_PROXY names" in done.stderr
    )


def test_the_road_is_said_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    assert road(False) == road(True) == "directly"
    monkeypatch.setenv("https_proxy", "http://name:secret@proxy.example:1")
    assert road(False) == "directly (https_proxy set, but not used without --trust-env)"
    assert road(True) == "as https_proxy and NO_PROXY say (--trust-env)"
