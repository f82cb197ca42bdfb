"""Around the requests: names, tokens, keys, counts, streams, slow clients, and an upstream that fails."""

import asyncio
import json
import logging
import re
import socket
from typing import Any

import httpx2
import pytest

from davsp import DavspError
from davsp.serve.app import HASH, Proxy
from davsp.serve.settings import ServeSettings
from proxy import (
    RED,
    Events,
    border,
    client,
    data_url,
    error,
    image_part,
    listening,
    picture_of,
    text_part,
    until,
    user,
)
from tiny import picture

# -- names, hash, token, metrics, logs ---------------------------------------------------------------------------------


def test_the_hash_is_in_the_models_name_and_in_every_head():
    one, other = client(), client(border(1))
    assert one.proxy.hash == client().proxy.hash != other.proxy.hash != client(border(1, "x")).proxy.hash
    assert re.fullmatch(r"m\+davsp-[0-9a-f]{12}", one.model) and one.proxy.hash.startswith(one.model[-12:])
    listed = one.request("GET", "/v1/models")
    assert [m["id"] for m in listed.json()["data"]] == [one.model] and listed.headers[HASH] == one.proxy.hash
    assert one.request("GET", f"/v1/models/{one.model}").json()["id"] == one.model
    assert one.request("GET", "/v1/models/m").status_code == 404
    assert one.post(user("q")).headers[HASH] == one.proxy.hash
    for name in ("m", other.model):
        response = one.post(user("q"), model=name)
        assert response.status_code == 404 and one.model in error(response)["message"]
    plain = client(plain_names=True)
    assert plain.post(user("q"), model="m").status_code == plain.post(user("q")).status_code == 200
    assert plain.post(user("q"), model=other.model).status_code == 404


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ([("authorization", "Bearer tök")], 401), ([], 401), ([("authorization", "Bearer token-")], 401), ([("authorization", "token-1")], 401),
        ([("authorization", "Basic token-1")], 401), ([("authorization", "Bearer token-1"), ("authorization", "Bearer x")], 401),
        ([("authorization", "bearer token-1")], 200), ([("authorization", "Bearer token-1")], 200),
    ],
)  # fmt: skip
def test_token(sent, status, monkeypatch):
    monkeypatch.setenv("PROXY_TOKEN", "token-1")
    caller = client(token_env="PROXY_TOKEN")
    headers = [(name, value.encode()) for name, value in [*sent, ("content-type", "application/json")]]
    response = caller.raw(json.dumps({"model": caller.model, "messages": [user("q")]}).encode(), headers)
    assert response.status_code == status
    assert (
        caller.request("GET", "/metrics", headers=headers).status_code
        == caller.request("GET", "/v1/models", headers=headers).status_code
        == status
    )
    assert caller.request("GET", "/health").json() == {"status": "ok"}
    assert all("authorization" not in request.headers for request in caller.upstream.requests)  # it is the proxy's
    assert (len(caller.upstream.bodies) == 1) == (status == 200)


def test_keys_and_headers_that_go_on(monkeypatch):
    monkeypatch.setenv("UP_KEY", "sk-up")
    client_headers = {
        "content-type": "application/json", "authorization": "Bearer mine", "x-request-id": "7", "cookie": "c=1",
        "connection": "x-hop", "x-hop": "1", "accept-encoding": "gzip",
    }  # fmt: skip
    own, keyed = client(), client(api_key_env="UP_KEY")
    for caller, key in ((own, "Bearer mine"), (keyed, "Bearer sk-up")):
        caller.post(user("q"), headers=client_headers)
        upstream_headers = caller.upstream.requests[0].headers
        assert (
            upstream_headers["authorization"],
            upstream_headers["x-request-id"],
            upstream_headers["accept-encoding"],
        ) == (key, "7", "identity")
        assert (
            upstream_headers["host"] == "upstream.test"
            and "cookie" not in upstream_headers
            and "x-hop" not in upstream_headers
        )


@pytest.mark.parametrize("host", ["evil.test", "127.0.0.1.evil.test:8100", "localhost.evil.test", ""])
def test_a_page_whose_name_leads_to_loopback_is_refused(host):
    caller = client()
    response = caller.post(user("q"), headers={"content-type": "application/json", "host": host})
    assert response.status_code == 403 and not caller.upstream.requests
    assert caller.post(user("q"), headers={"content-type": "application/json", "host": "[::1]:8100"}).status_code == 200


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"host": "0.0.0.0"}, "token"), ({"host": "::"}, "token"), ({"host": "example.org"}, "token"),
        ({"image_free": "drop"}, "--image-free"), ({"max_pixels": 10**9}, "--max-pixels"), ({"nonsense": 1}, "--nonsense"),
        ({"token_env": "NOT_THERE_X"}, "NOT_THERE_X"), ({"port": 70000}, "--port"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(values, says):
    with pytest.raises(DavspError, match=says):
        ServeSettings.of(**{"upstream": "http://u/v1"} | values)
    assert ServeSettings.of(upstream="http://u/v1", host="::1").loopback


def test_metrics_count_and_neither_they_nor_logs_tell_anything(caplog, capfd):
    caplog.set_level(logging.DEBUG)
    caller = client(max_images=1)
    secret = "zebra-crossing"
    caller.post(user(image_part(RED), text_part(secret)))
    caller.post(user(text_part(secret), image_part("data:image/png;base64,QUJD")))
    caller.post(user(*[image_part(RED)] * 2, text_part(secret)))
    page = caller.request("GET", "/metrics").text
    for line in (
        'davsp_requests_total{status="200"} 1.0', 'davsp_requests_total{status="400"} 2.0', "davsp_pictures_total 1.0",
        'davsp_refused_total{code="image_broken"} 1.0', 'davsp_refused_total{code="too_many_pictures"} 1.0',
        "davsp_under_way 0.0", "davsp_defense_seconds_count 1.0", "davsp_upstream_seconds_count 1.0",
    ):  # fmt: skip
        assert line in page.splitlines()
    out = capfd.readouterr()
    assert secret not in page + caplog.text + out.out + out.err and RED[40:60] not in caplog.text + out.err


# -- what comes back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "status", "says"),
    [
        (httpx2.Response(422, json={"error": {"message": "mine"}}), 422, "mine"),
        (httpx2.Response(503, html="<h1>down</h1>"), 503, "without JSON"),
        (httpx2.Response(200, html="<h1>hi</h1>"), 502, "without JSON"),
        (httpx2.Response(200, content=b'{"a": ', headers={"content-type": "application/json"}), 502, "without JSON"),
        (httpx2.Response(302, headers={"location": "http://elsewhere.test"}), 502, "without JSON"),
        (httpx2.ConnectError("refused"), 502, "cannot be reached"),
        (httpx2.ReadTimeout("slow"), 504, "in time"),
        (httpx2.RemoteProtocolError("odd"), 502, "was reached, but sent no reply (RemoteProtocolError)"),
    ],
)
def test_an_upstream_that_fails(answer, status, says):
    caller = client()
    caller.upstream.answer = lambda number, body: answer
    response = caller.post(user("q"))
    assert (
        response.status_code == status
        and says in response.json()["error"]["message"]
        and len(caller.upstream.bodies) == 1
    )


def test_a_reply_passes_byte_for_byte():
    caller = client()
    whole = b'{"choices": [ ],\n "odd":1.50, "\\u00fc": "\xc3\xbc"}'
    caller.upstream.answer = lambda number, body: httpx2.Response(
        200, content=whole, headers={"content-type": "application/json", "x-more": "1", "set-cookie": "a=b"}
    )
    response = caller.post(user("q"))
    assert response.content == whole and response.headers["x-more"] == "1" and "set-cookie" not in response.headers


CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'


def test_a_stream_passes_byte_for_byte_and_one_that_breaks_says_so():
    caller = client()
    whole = [CHUNK[:10], CHUNK[10:], b": ping\n\n", CHUNK, b"data: [DONE]\n\n"]
    caller.upstream.answer = lambda number, body: Events(*whole).response()
    response = caller.post(user("q"), stream=True)
    assert response.content == b"".join(whole) and response.headers["content-type"].startswith("text/event-stream")
    caller.upstream.answer = lambda number, body: Events(CHUNK, CHUNK[:20], end="break").response()
    broken = caller.post(user("q"), stream=True).content
    assert broken.startswith(CHUNK + CHUNK[:20] + b"\n\ndata: ") and b"[DONE]" not in broken
    assert json.loads(broken.rpartition(b"data: ")[2])["error"]["code"] == "upstream_broken"


def served(caller: Any) -> Any:
    return listening(caller.proxy.app)


def talk(url: str, content: bytes) -> socket.socket:
    """An open connection that has sent this."""
    port = int(url.split(":")[2].split("/")[0])
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(content)
    return connection


def head(length: int, host: str = "localhost") -> bytes:
    return f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n".encode()


def test_a_client_that_hangs_up_stops_the_upstream():
    caller, events, waiting = client(), Events(CHUNK, end="hang"), []

    async def never() -> Any:
        waiting.append("begun")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            waiting.append("stopped")
            raise

    caller.upstream.answer = lambda number, body: events.response() if body.get("stream") else never()
    with served(caller) as url:
        for fields in ({"stream": True}, {}):
            body = json.dumps({"model": caller.model, "messages": [user("q")]} | fields).encode()
            with talk(url, head(len(body)) + body) as connection:
                if fields:
                    assert b"200 OK" in connection.recv(4096)
                else:
                    until(lambda: waiting)
            until(events.closed.is_set if fields else lambda: waiting == ["begun", "stopped"])
        until(lambda: caller.proxy.under_way == 0)


def test_slow_clients_and_too_many():
    caller = client(concurrency=1)
    with served(caller) as url, httpx2.Client(trust_env=False, timeout=60) as http:
        with talk(url, head(1000) + b"{"):
            until(lambda: caller.proxy.under_way == 1)
            busy = http.post(f"{url}/chat/completions", json={})
            assert busy.status_code == 429 and busy.headers["retry-after"] == "1" and error(busy)["code"] == "busy"
        until(lambda: caller.proxy.under_way == 0)
        assert http.post(f"{url}/chat/completions", json={}).status_code == 400
    slower = client(body_timeout=0.3)
    with served(slower) as url, talk(url, head(1000) + b"{") as slow:
        assert b"408" in slow.recv(4096).splitlines()[0]
    assert not caller.upstream.requests and not slower.upstream.requests


def test_many_at_once_are_all_defended():
    caller, images = client(threads=2), [picture(seed, (50, 50)) for seed in range(12)]

    async def ask_all() -> None:
        transport = httpx2.ASGITransport(caller.proxy.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as http:
            bodies = [
                {"model": caller.model, "messages": [user(image_part(data_url(image)))], "n": i}
                for i, image in enumerate(images)
            ]
            responses = await asyncio.gather(*(http.post("/v1/chat/completions", json=body) for body in bodies))
            assert {one.status_code for one in responses} == {200}

    asyncio.run(ask_all())
    defense = border()
    for body in caller.upstream.bodies:
        sent = picture_of(body["messages"][0]["content"][0]["image_url"]["url"])
        assert sent.tobytes() == defense.paint(images[body["n"]]).tobytes()


def test_a_proxy_of_its_own_settings_needs_an_address_of_the_upstream():
    with pytest.raises(DavspError, match="--upstream"):
        ServeSettings.of()
    assert isinstance(client().proxy, Proxy)


@pytest.mark.parametrize(
    "body",
    [
        r'{"model": "m", "messages": [{"role": "user", "content": "\ud83d"}]}', r'{"model": "m", "messages": [], "\ud83d": 1}',
        r'{"model": "\ud83d", "messages": []}', r'{"model": "m", "messages": [{"role": "\ud83d", "content": "a"}]}',
    ],
)  # fmt: skip
def test_half_a_surrogate_pair_is_a_400_in_shape(body):
    caller = client()
    for path in ("/v1/chat/completions", "/v1/responses"):
        response = caller.raw(body.encode(), path=path)
        assert response.status_code == 400 and error(response)["code"] == "no_character"
    assert not caller.upstream.requests


def test_of_a_large_reply_both_ends_are_looked_at(monkeypatch):
    """The parser would stop all other requests meanwhile."""
    monkeypatch.setattr("davsp.serve.upstream.CHECKED", 20)
    caller = client()
    for content, status in ((b' {"a": [1, 2, 3, 4, 5, 6]}\n', 200), (b'{"a": [1, 2, 3, 4, 5, 6]', 502)):
        caller.upstream.answer = lambda number, body, content=content: httpx2.Response(200, content=content)
        assert caller.post(user("q")).status_code == status
