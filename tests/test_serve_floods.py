"""Many and large requests: what is held and decoded at a time is bounded, heads are, and whoever is refused reads why."""

import asyncio
import gc
import json
import socket
import struct
import threading
import time
import weakref
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import httpx2
import pytest
from PIL import Image

from davsp.defenses import SafetyText
from davsp.serve import connections
from davsp.serve.admission import SMALL, Room, read
from davsp.serve.pictures import Budget, decode, decoded
from davsp.serve.refusals import Refusal
from davsp.serve.settings import ServeSettings
from proxy import GOOD, Events, border, client, data_url, image_part, listening, user
from test_serve_pictures import file
from tiny import picture


def test_a_room_is_full_at_once_but_never_for_small_requests():
    room = Room(10 * SMALL)
    with room.seat() as large, room.seat() as other:
        large.resize(8 * SMALL)
        with pytest.raises(Refusal, match="busy"):
            other.resize(3 * SMALL)
        assert other.size == 0
        other.resize(SMALL)
        with room.seat() as small:
            small.resize(SMALL)
            assert room.left == 0
            small.resize(SMALL // 2)
        large.resize(2 * SMALL)
        other.resize(3 * SMALL)
    assert room.left == 10 * SMALL


def test_a_budget_is_kept_in_turn_and_what_is_too_large_goes_alone():
    budget, most, lock, order = Budget(100), [0], threading.Lock(), list[int]()
    now = [0]

    def work(number: int, size: int) -> None:
        with budget.hold(size):
            with lock:
                order.append(number)
                now[0] += min(size, 100)
                most[0] = max(most[0], now[0])
            time.sleep(0.002)
            with lock:
                now[0] -= min(size, 100)

    sizes = [30, 500, 60, 30, 100, 10] * 10
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(len(sizes)), sizes))
    assert most[0] <= 100 and budget.left == 100 and sorted(order) == list(range(60))


def test_a_picture_is_decoded_when_it_is_asked_for_and_given_back_before_the_next():
    budget, limits = Budget(10**6), ServeSettings(upstream="http://u/v1")
    files = [file(picture(seed, (20, 30)), "PNG") for seed in range(3)]
    pictures = decoded(files, limits, budget)
    assert budget.left == 10**6
    next(pictures)
    first = budget.left
    assert first < 10**6
    next(pictures)
    assert budget.left == first
    pictures.close()
    assert budget.left == 10**6


def test_pixels_of_a_request_are_counted_before_any_is_decoded(monkeypatch):
    caller = client(max_request_pixels=2000)
    fits, one = data_url(picture(0, (40, 25))), data_url(Image.new("RGB", (41, 25)))
    assert caller.post(user(image_part(fits), image_part(fits))).status_code == 200
    monkeypatch.setattr("davsp.serve.pictures.flatten", None)
    response = caller.post(user(image_part(fits), image_part(one)))
    assert response.status_code == 400 and "2000 pixels together" in response.json()["error"]["message"]
    assert len(caller.upstream.bodies) == 1


class Slow(SafetyText):
    """Takes its time over pictures, until it is let go."""

    def __init__(self) -> None:
        super().__init__("S")
        self.go, self.begun = threading.Event(), threading.Event()

    def prepare(self, queries: Any) -> Any:
        if queries[0].image is not None:
            self.begun.set()
            assert self.go.wait(20)
        return super().prepare(queries)


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


@contextmanager
def connected(app: Any) -> Iterator[Any]:
    with listening(app) as url:
        port = int(url.split(":")[2].split("/")[0])

        def connect() -> socket.socket:
            return socket.create_connection(("127.0.0.1", port), timeout=20)

        yield connect


def everything(connection: socket.socket) -> bytes:
    data = b""
    while chunk := connection.recv(65536):
        data += chunk
    return data


START = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


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


def test_requests_that_hold_no_more_than_fits_are_answered_again():
    caller = client(border(), max_held=2**20, threads=1)
    slow = threading.Event()

    async def answer() -> Any:
        while not slow.is_set():
            await asyncio.sleep(0.01)
        return GOOD

    caller.upstream.answer = lambda number, body: answer()
    noise = data_url(picture(1, (300, 300)))  # some 350 KB
    with connected(caller.proxy.app) as connect:
        body = json.dumps({"model": caller.model, "messages": [user(image_part(noise))]}).encode()
        head = START + b"Content-Length: %d\r\n\r\n" % len(body)
        with connect() as first, connect() as second, connect() as third, connect() as fourth:
            for connection in (first, second):
                connection.sendall(head)
            time.sleep(0.2)
            third.sendall(head + body)
            assert b" 429 " in third.recv(65536)
            for connection in (first, second):
                connection.sendall(body)
            while len(caller.upstream.bodies) < 2:
                time.sleep(0.01)
            fourth.sendall(head + body)  # what the others hold now is canvases of ten KB
            while len(caller.upstream.bodies) < 3:
                time.sleep(0.01)
            slow.set()
            assert all(b" 200 " in connection.recv(65536) for connection in (first, second, fourth))
    assert caller.proxy.room.left == 2**20


class Tracked(bytearray):
    """One that can be seen to be let go."""


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
    caller, held = client(max_text=150_000), []
    caller.upstream.answer = lambda number, body: httpx2.ConnectError("") if "breaks" in str(body) else GOOD

    async def tracked(*arguments: Any) -> bytearray:
        data = Tracked(await read(*arguments))
        held.append(weakref.ref(data))
        return data

    monkeypatch.setattr("davsp.serve.app.read", tracked)
    caller.post(user("warm"))
    gc.collect()
    gc.disable()
    try:
        status = caller.post(*messages).status_code
        end = time.monotonic() + 2  # the thread lets go a moment after its result is there
        while held[1]() is not None and time.monotonic() < end:
            time.sleep(0.01)
        assert len(held) == 2 and held[1]() is None, status
    finally:
        gc.enable()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@cache
def hostile_files() -> dict[str, bytes]:
    """Small pictures in files that make their reader unpack, keep or repeat much."""
    png, jpeg = file(picture(0, (8, 8)), "PNG"), file(Image.new("RGB", (512, 512)), "JPEG", progressive=True)
    start, idat = png[:33], png[33:]
    scan = jpeg[jpeg.rfind(b"\xff\xc4") : -2]

    def segment(marker: int, data: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data

    def text(number: int) -> bytes:
        return chunk(b"zTXt", b"k%d\0\0" % number + zlib.compress(b"a" * (2**20 - 8)))

    return {
        "texts": start + b"".join(map(text, range(60))) + idat,
        "texts behind": png[:-12] + b"".join(map(text, range(60))) + png[-12:],
        "chunks": start + chunk(b"abCd", b"") * 200_000 + idat,
        "IDATs": png[:-12].replace(idat[:-12], chunk(b"IDAT", idat[8:20]) + chunk(b"IDAT", b"") * 200_000 + png[-12:]),
        "EXIF": jpeg[:2] + segment(0xE1, b"Exif\0\0" + b"x" * 600) * 20_000 + jpeg[2:],
        "comments": jpeg[:2] + segment(0xFE, b"") * 500_000 + jpeg[2:],
        "reserved": jpeg[:2] + b"\xff\x02" * 500_000 + jpeg[2:],
        "fill": jpeg[:2] + b"\xff" * 2_000_000 + jpeg[2:],
        "scans": jpeg[:-2] + scan * 3000 + jpeg[-2:],
    }


@pytest.mark.parametrize("name", hostile_files())
def test_a_file_of_ever_so_many_pieces_is_refused(name):
    """Each took seconds or hundreds of megabytes."""
    with pytest.raises(Refusal) as refusal:
        decode(hostile_files()[name], ServeSettings(upstream="http://u/v1"))
    assert refusal.value.code == ("image_broken" if name.startswith("texts") else "image_pieces")


def test_a_photo_with_a_film_behind_it_and_a_picture_in_it_passes():
    """Phones put films behind pictures and small pictures before them, in which the marker of a scan stands by chance."""
    inner, film = file(picture(0, (9, 9)), "JPEG"), b"\xff\xda\0\0" * 1000
    jpeg = file(picture(1, (30, 20)), "JPEG", progressive=True, exif=b"Exif\0\0" + inner * 20)
    limits = ServeSettings(upstream="http://u/v1")
    assert decode(jpeg + film, limits).tobytes() == decode(jpeg, limits).tobytes()


def test_requests_that_wait_for_a_reply_on_their_connection_are_few():
    """uvicorn keeps each that comes, 3 KB for 25 bytes, and reads on at every reply."""
    caller = client()
    go = threading.Event()

    async def answer() -> Any:
        while not go.is_set():
            await asyncio.sleep(0.01)
        return GOOD

    caller.upstream.answer = lambda number, body: answer()
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
    with connected(client().proxy.app) as connect, connect() as connection:
        connection.sendall(START.replace(b"json", b"xml") + b"Content-Length: %d\r\n\r\n" % (9 if more == b"d" else 0))
        assert b" 415 " in connection.recv(65536)
        monkeypatch.setattr(connections, "DROPPED_SECONDS", 0.1)
        time.sleep(0.2)
        connection.sendall(more)
        start = time.monotonic()
        everything(connection)
        assert time.monotonic() - start < 4  # uvicorn's own timer, 5 s, is off


def test_who_does_not_read_is_hung_up_on(monkeypatch):
    monkeypatch.setattr(connections, "UNREAD_SECONDS", 0.3)
    caller = client()
    closed = Events(*[b"data: " + b"a" * 100_000 + b"\n\n"] * 200)
    caller.upstream.answer = lambda number, body: closed.response()
    body = json.dumps({"model": caller.model, "messages": [user("q")], "stream": True}).encode()
    with connected(caller.proxy.app) as connect, connect() as connection:
        connection.sendall(START + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert closed.closed.wait(10)
        end = time.monotonic() + 5
        while caller.proxy.under_way and time.monotonic() < end:
            time.sleep(0.01)
        assert caller.proxy.under_way == 0


def test_what_is_not_http_is_a_400_in_shape():
    with connected(client().proxy.app) as connect, connect() as connection:
        connection.sendall(b"hello\r\n\r\n")
        reply = everything(connection)
    assert reply.startswith(b"HTTP/1.1 400 ") and b"no_http" in reply


def test_who_hangs_up_while_waiting_for_a_thread_leaves_no_bytes_behind(monkeypatch):
    """The pool keeps what waits in it, and the room has counted it as gone."""
    defense, held = Slow(), []
    caller = client(defense, threads=1)

    async def tracked(*arguments: Any) -> bytearray:
        data = Tracked(await read(*arguments))
        held.append(weakref.ref(data))
        return data

    monkeypatch.setattr("davsp.serve.app.read", tracked)
    body = json.dumps({"model": caller.model, "messages": [user(image_part(data_url(picture(0, (20, 20)))))]}).encode()
    whole = START + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with connected(caller.proxy.app) as connect, connect() as first:
        first.sendall(whole)
        assert defense.begun.wait(10)
        for _ in range(5):
            with connect() as other:
                other.sendall(whole)
                time.sleep(0.1)
        end = time.monotonic() + 5
        while time.monotonic() < end and any(one() is not None for one in held[1:]):
            time.sleep(0.01)
        assert len(held) == 6 and not any(one() is not None for one in held[1:])
        first.close()
        time.sleep(0.2)
        assert caller.proxy.under_way == 1  # its thread still holds the bytes
        defense.go.set()
        while caller.proxy.under_way and time.monotonic() < end + 5:
            time.sleep(0.01)
        assert caller.proxy.under_way == 0


def test_of_a_large_reply_both_ends_are_looked_at(monkeypatch):
    """The parser would stop all other requests meanwhile."""
    monkeypatch.setattr("davsp.serve.upstream.CHECKED", 20)
    caller = client()
    for content, status in ((b' {"a": [1, 2, 3, 4, 5, 6]}\n', 200), (b'{"a": [1, 2, 3, 4, 5, 6]', 502)):
        caller.upstream.answer = lambda number, body, content=content: httpx2.Response(200, content=content)
        assert caller.post(user("q")).status_code == status
