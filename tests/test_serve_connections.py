"""Bytes that are no request yet, or no longer: heads and what stands between chunks are bounded, and who is slow or does not read is hung up on."""

import json
import threading
from contextlib import suppress

import pytest

from davsp.serve import connections
from davsp.serve.admission import SMALL
from proxy import Events, client, until, user
from serve_wire import START, connected, everything, stopped


@pytest.mark.parametrize(
    "content",
    [
        b"".join(b"X-%d: %s\r\n" % (n, b"a" * 1000) for n in range(70)),
        b"X-A: " + b"a" * 2**17 + b"\r\n",
        b"".join(b"A:\r\n" for _ in range(2**15)),
    ],
    ids=["many", "long", "empty"],
)
@pytest.mark.parametrize("step", [2**20, 1000])
def test_a_head_that_is_too_long_is_a_431(content, step):
    caller = client()
    with connected(caller.proxy.app) as connect, connect() as connection:
        data = START + content + b"Content-Length: 2\r\n\r\n{}"
        for at in range(0, len(data), step):
            connection.sendall(data[at : at + step])
        for _ in range(40):  # still sending
            connection.sendall(b"b" * 2**16)
        reply = everything(connection)
    assert reply.startswith(b"HTTP/1.1 431 ") and reply.count(b"HTTP/1.1") == 1
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"] == "head_too_large"


def test_a_path_that_is_too_long_is_a_431():
    with connected(client().proxy.app) as connect, connect() as connection:
        connection.sendall(b"GET /" + b"a" * 2**17 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert everything(connection).startswith(b"HTTP/1.1 431 ")


def test_a_head_below_the_bound_passes_and_the_next_one_counts_anew():
    caller = client()
    body = json.dumps({"model": caller.model, "messages": [user("q")]}).encode()
    with connected(caller.proxy.app) as connect, connect() as connection:
        for _ in range(3):
            more = b"X-A: " + b"a" * (SMALL - 300) + b"\r\n"
            connection.sendall(START + more + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert b" 200 " in connection.recv(65536)


@pytest.mark.parametrize("flood", [b"2;" + b"e" * 2**18, b"2\r\n{}\r\n0\r\nX-T: " + b"t" * 2**18])
def test_what_stands_between_chunks_is_bounded_too(flood):
    """Extensions of chunks and trailers, which the parser would wait through or keep."""
    with connected(client().proxy.app) as connect, connect() as connection:
        connection.sendall(START + b"Transfer-Encoding: chunked\r\n\r\n" + flood)
        with suppress(ConnectionError):
            assert everything(connection) == b""


def test_a_head_that_comes_too_slowly_is_a_408(monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
    with connected(client().proxy.app) as connect:
        with connect() as connection:
            connection.sendall(START)
            assert everything(connection).startswith(b"HTTP/1.1 408 ")
        with connect() as silent:
            assert everything(silent).startswith(b"HTTP/1.1 408 ")


def test_requests_that_wait_for_a_reply_on_their_connection_are_few():
    """uvicorn keeps each that comes, 3 KB for 25 bytes, and reads on at every reply."""
    caller = client()
    go = stopped(caller.upstream)
    body = json.dumps({"model": caller.model, "messages": [user("q")]}).encode()
    whole = START + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with connected(caller.proxy.app) as connect, connect() as few, connect() as many:
        few.sendall(whole * (connections.PIPELINED + 1))
        many.sendall(whole * (connections.PIPELINED + 2))
        with suppress(ConnectionError):
            assert everything(many) == b""  # nothing is in the middle of a reply
        go.set()
        data = b""
        while data.count(b"a red cake") < connections.PIPELINED + 1:
            data += few.recv(65536)
        few.sendall(whole)
        assert b" 200 " in few.recv(65536)


@pytest.mark.parametrize("more", [b"\r\n", b"d"], ids=["blank line", "rest of a refused body"])
def test_bytes_that_begin_no_head_keep_no_connection(more, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(connections, "DROPPED_SECONDS", 0.1)
    monkeypatch.setitem(connections.SERVER, "timeout_keep_alive", 3600)  # so that uvicorn's own timer ends none
    replied, complete = threading.Event(), connections.BoundedProtocol.on_response_complete
    monkeypatch.setattr(
        connections.BoundedProtocol, "on_response_complete", lambda self: (complete(self), replied.set())
    )
    with connected(client().proxy.app) as connect, connect() as connection:
        connection.sendall(START.replace(b"json", b"xml") + b"Content-Length: %d\r\n\r\n" % (9 if more == b"d" else 0))
        assert b" 415 " in connection.recv(65536)
        assert replied.wait(10)  # no more is read and dropped as the rest of the body
        connection.sendall(more)
        everything(connection)  # a connection that is kept is a timeout here


def test_who_does_not_read_is_hung_up_on(monkeypatch):
    monkeypatch.setattr(connections, "UNREAD_SECONDS", 0.3)
    caller = client()
    closed = Events(*[b"data: " + b"a" * 100_000 + b"\n\n"] * 200)
    caller.upstream.answer = lambda number, body: closed.response()
    body = json.dumps({"model": caller.model, "messages": [user("q")], "stream": True}).encode()
    with connected(caller.proxy.app) as connect, connect() as connection:
        connection.sendall(START + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert closed.closed.wait(10)
        until(lambda: caller.proxy.under_way == 0)


def test_what_is_not_http_is_a_400_in_shape():
    with connected(client().proxy.app) as connect, connect() as connection:
        connection.sendall(b"hello\r\n\r\n")
        reply = everything(connection)
    assert reply.startswith(b"HTTP/1.1 400 ") and b"no_http" in reply
