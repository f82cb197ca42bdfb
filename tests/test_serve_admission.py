"""Many and large requests: what is held at a time is bounded and let go, text goes before pictures, and whoever is refused reads why."""

import gc
import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from davsp.serve.admission import SMALL, Room
from davsp.serve.refusals import Refusal
from proxy import GOOD, border, client, data_url, image_part, until, user
from serve_wire import START, Slow, bodies, connected, everything, stopped
from tiny import picture


def test_a_room_is_full_at_once_but_never_for_small_requests():
    room = Room(10 * SMALL)
    with room.seat() as large, room.seat() as other:
        large.resize(8 * SMALL)
        with pytest.raises(Refusal, match="busy"):
            other.resize(3 * SMALL)
        assert other.size == 0
        large.resize(10 * SMALL)  # what it holds already is its own
        large.resize(8 * SMALL)
        other.resize(SMALL)
        with room.seat() as small:
            small.resize(SMALL)
            assert room.left == 0
            small.resize(SMALL // 2)
        large.resize(2 * SMALL)
        other.resize(3 * SMALL)
    assert room.left == 10 * SMALL


def test_text_does_not_wait_behind_pictures():
    defense = Slow()
    caller = client(defense, threads=1)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(caller.post, user(image_part(data_url(picture(n, (20, 20)))))) for n in range(3)]
        assert defense.begun.wait(10)
        assert caller.post(user("hello")).status_code == 200
        assert caller.post(user("x" * 3 * SMALL)).status_code == 200
        assert not any(one.done() for one in waiting)
        defense.go.set()
        assert {one.result().status_code for one in waiting} == {200}


@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"])
def test_a_refusal_reaches_a_client_that_is_still_sending(close):
    caller = client(max_held=2**20)
    size = 20 * 2**20
    with connected(caller.proxy.app) as connect:
        for path, length, status in (
            (b"/v1/chat/completions", size, b"429"),
            (b"/v1/chat/completions", 40 * 2**20, b"413"),
            (b"/v1/completions", size, b"404"),
            (b"/v1/models", size, b"405"),
        ):
            head = START.replace(b"/v1/chat/completions", path) + close + b"Content-Length: %d\r\n\r\n" % length
            with connect() as connection:
                connection.sendall(head)
                for _ in range(length // 2**20):
                    connection.sendall(b" " * 2**20)  # fails if the other side closes
                reply = everything(connection)
            assert reply.split(b" ", 2)[1] == status and b"connection: close" in reply.lower(), reply
            assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"]
        assert caller.proxy.room.left == 2**20 and caller.proxy.under_way == 0


def test_a_refusal_reaches_a_client_that_is_still_sending_chunks():
    caller = client(max_held=2**20)
    with connected(caller.proxy.app) as connect, connect() as connection:
        connection.sendall(START + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(20):
            connection.sendall(b"%x\r\n" % 2**20 + b" " * 2**20 + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        reply = everything(connection)
    assert reply.startswith(b"HTTP/1.1 429 ") and caller.proxy.room.left == 2**20


def test_what_is_too_long_for_a_text_is_refused_as_soon_as_it_is():
    caller = client(max_text=2**16)
    with connected(caller.proxy.app) as connect, connect() as connection:
        connection.sendall(START + b"Content-Length: 20971520\r\n\r\n" + b" " * 2**18)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")  # the rest was not sent
    picture_first = b'{"a": "data:image/png;base64,' + b"QUJD" * 2**16 + b'"}'
    assert client(max_text=2**16).raw(picture_first).json()["error"]["code"] == "invalid_request"


def test_a_small_refused_request_keeps_its_connection():
    caller = client()
    with connected(caller.proxy.app) as connect, connect() as connection:
        for _ in range(3):
            connection.sendall(START.replace(b"json", b"xml") + b"Content-Length: 9\r\n\r\n")
            time.sleep(0.02)
            connection.sendall(b"<a>b</a>\n")
            reply = connection.recv(65536)
            assert b" 415 " in reply and b"close" not in reply.lower()


def test_who_waits_for_a_100_is_refused_without_one():
    caller = client(max_held=2**20)
    with connected(caller.proxy.app) as connect, connect() as connection:
        connection.sendall(START + b"Expect: 100-continue\r\nContent-Length: 20971520\r\n\r\n")
        reply = everything(connection)
        assert reply.startswith(b"HTTP/1.1 429") and b"100 Continue" not in reply


def test_requests_that_hold_no_more_than_fits_are_answered_again():
    caller = client(border(), max_held=2**20, threads=1)
    go = stopped(caller.upstream)
    noise = data_url(picture(1, (300, 300)))  # some 350 KB
    with connected(caller.proxy.app) as connect:
        body = json.dumps({"model": caller.model, "messages": [user(image_part(noise))]}).encode()
        head = START + b"Content-Length: %d\r\n\r\n" % len(body)
        with connect() as first, connect() as second, connect() as third, connect() as fourth:
            for connection in (first, second):
                connection.sendall(head)
            until(lambda: caller.proxy.room.left == 2**20 - 2 * len(body))
            third.sendall(head + body)
            assert b" 429 " in third.recv(65536)
            for connection in (first, second):
                connection.sendall(body)
            until(lambda: len(caller.upstream.bodies) == 2)
            fourth.sendall(head + body)  # what the others hold now is canvases of ten KB
            until(lambda: len(caller.upstream.bodies) == 3)
            go.set()
            assert all(b" 200 " in connection.recv(65536) for connection in (first, second, fourth))
    assert caller.proxy.room.left == 2**20


@pytest.mark.parametrize(
    "messages",
    [
        [user("q")],
        [user(image_part(data_url(picture(1, (9, 9)))))],
        [user(image_part("data:image/png;base64,QUJD"))],
        [user("![](https://a.test/b.png)")],
        ["no message"],
        [user("[" * 120_000)],
        [user("the upstream breaks off")],
    ],
)
def test_a_request_s_bytes_are_let_go_without_the_collector(messages, monkeypatch):
    caller, held = client(max_text=150_000), bodies(monkeypatch)
    caller.upstream.answer = lambda number, body: httpx2.ConnectError("") if "breaks" in str(body) else GOOD
    caller.post(user("warm"))
    gc.collect()
    gc.disable()
    try:
        status = caller.post(*messages).status_code
        assert len(held) == 2, status
        until(lambda: held[1]() is None)  # the thread lets go a moment after its result is there
    finally:
        gc.enable()


def test_who_hangs_up_while_waiting_for_a_thread_leaves_no_bytes_behind(monkeypatch):
    """The pool keeps what waits in it, and the room has counted it as gone."""
    defense, held = Slow(), bodies(monkeypatch)
    caller = client(defense, threads=1)
    body = json.dumps({"model": caller.model, "messages": [user(image_part(data_url(picture(0, (20, 20)))))]}).encode()
    whole = START + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with connected(caller.proxy.app) as connect, connect() as first:
        first.sendall(whole)
        assert defense.begun.wait(10)
        for number in range(5):
            with connect() as other:
                other.sendall(whole)
                until(lambda read=number + 2: len(held) == read)
        until(lambda: not any(one() is not None for one in held[1:]))
        first.close()
        time.sleep(0.2)
        assert caller.proxy.under_way == 1  # its thread still holds the bytes
        defense.go.set()
        until(lambda: caller.proxy.under_way == 0)
