"""A judge on loopback that speaks OpenAI's protocol, knows the truth, and fails on demand."""

import base64
import io
import json
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from davsp import Query, Response

FAULTS = [
    "429",
    "429 date",
    "500",
    "503 page",
    "cut",
    "cut body",
    "prose",
    "not unsafe",
    "filter",
    "filter end",
    "long",
]
FAULTS += ["empty", "null", "refusal", "no choice", "403 flagged"]


def picture_in(body: dict[str, Any]) -> Image.Image | None:
    """The picture of a request, decoded from its data URL; None if its messages are text."""
    head = "data:image/png;base64,"
    parts = [part for message in body.get("messages", []) for part in message["content"] if isinstance(part, dict)]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    if not urls:
        return None
    (url,) = urls
    assert url.startswith(head)
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix(head), validate=True)))


def truth(number: int) -> str:
    return "unsafe" if number % 3 == 0 else "safe"


def items(count: int, start: int = 0) -> list[tuple[Query, Response]]:
    """Harmless answers, each with its number in it."""
    return [
        (Query(f"q{n}", f"what is on shelf {n}?", "malicious", "test"), Response(f"q{n}", "none", f"item {n}: a kite"))
        for n in range(start, start + count)
    ]


class Judge(ThreadingHTTPServer):
    """What it was asked and what it did.

    Attributes:
        fault: (item, attempt) -> the name of a fault, or "" for the true label.
        requests: by item.
        answered: replies that held the label and were sent to their end, by item.
        headers: of all requests.
        paths: of all requests.
        sight: what is said to a request without an item, which asks what is in a picture; given that picture, None if there is none.
        no_pictures: the error of a server that takes none; empty: it takes them.
        sights: how often it was asked.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler: "type[Handler]") -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.lock, self.release = threading.Lock(), threading.Event()
        self.requests: Counter[int] = Counter()
        self._answered: Counter[int] = Counter()
        self.times: list[tuple[int, float]] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.under_way = self.most_under_way = 0
        self.sending = 0  # replies that will count as answered
        self.fault: Callable[[int, int], str] = lambda item, attempt: ""
        self.say: Callable[[int], str] = truth
        self.sight: Callable[[Image.Image | None], str] = lambda picture: "I see no picture."
        self.no_pictures, self.sights = "", 0
        self.kill_at, self.kill = 0, lambda: os.kill(os.getpid(), signal.SIGINT)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def answered(self) -> Counter[int]:
        """As above; a reply is counted once it is sent, so the client may know it a moment earlier."""
        limit = time.monotonic() + 30  # for a machine with much to do
        while self.sending and time.monotonic() < limit:
            time.sleep(0.005)
        return self._answered

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: Judge

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["prompt"] if "prompt" in body else json.dumps(body["messages"])
        if server.no_pictures and picture_in(body):
            return self.send(400, {"error": {"message": server.no_pictures}})
        found = re.findall(r"item (\d+)", text)
        if not found:
            server.sights += 1
            message = {"role": "assistant", "content": server.sight(picture_in(body))}
            return self.send(200, {"choices": [{"message": message, "finish_reason": "stop"}]})
        item = int(found[-1])
        with server.lock:
            server.requests[item] += 1
            attempt = server.requests[item]
            server.times.append((item, time.monotonic()))
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.paths.append(self.path)
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            self.reply(server.fault(item, attempt), item, "prompt" in body)
        finally:
            with server.lock:
                server.under_way -= 1

    def reply(self, fault: str, item: int, plain: bool) -> None:
        label = self.server.say(item)
        score = "3 9" if " " in label else "0.9"
        other = {"safe": "unsafe", "unsafe": "safe"}.get(label, score)  # a client that reads faults would read this
        if fault.startswith("429"):
            name, _, value = fault.partition(" ")
            header = formatdate(usegmt=True) if value == "date" else value or "0"
            self.send(int(name), {"error": {"message": other}}, header)
        elif fault == "500":
            self.send(500, {"error": {"message": other}})
        elif fault == "503 page":
            self.send(503, f"<html>{other}</html>")
        elif fault == "cut":
            self.close_connection = True
        elif fault == "cut body":
            self.send(200, f'{{"choices": [{{"message": {{"content": "{other}"', cut=True)
        elif fault == "slow":
            self.server.release.wait(20)
            self.close_connection = True
        elif fault == "filter":
            self.send(400, {"error": {"code": "content_filter", "message": "The response was filtered"}})
        elif fault == "403 flagged":
            self.send(403, {"error": {"message": "Your input was flagged"}})
        elif fault == "no choice":
            self.send(200, {"error": {"code": 429, "message": other}})
        elif fault.isdigit():
            self.send(int(fault), {"error": {"message": f"bad: {self.headers.get('Authorization')}"}})
        else:
            content = {
                "prose": f"I would call this {other}. Then again it is hard to say.",
                "not unsafe": "not unsafe" if label == "unsafe" else "not safe",
                "filter end": other,
                "long": other,
                "empty": " \n",
                "null": None,
                "refusal": other,
            }.get(fault, label)
            end = {"filter end": "content_filter", "long": "length"}.get(fault, "stop")
            message = {"role": "assistant", "content": content} | ({"refusal": "no"} if fault == "refusal" else {})
            choice = {"text": content} if plain else {"message": message}
            with self.server.lock:
                self.server.sending += not fault
            try:
                self.send(200, {"model": "truth", "choices": [choice | {"finish_reason": end}]})
                if not fault:
                    self.count(item)
            finally:
                with self.server.lock:
                    self.server.sending -= not fault

    def count(self, item: int) -> None:
        with self.server.lock:
            self.server._answered[item] += 1
            if self.server._answered.total() == self.server.kill_at:
                self.server.kill()  # before anybody else is answered, however late this thread goes on

    def send(self, code: int, body: Any, retry_after: str = "", cut: bool = False) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data) + 40 * cut))
        if retry_after:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()
        self.close_connection = self.close_connection or cut


def faulty(share: float, slow: Callable[[int], bool] = lambda item: False) -> Callable[[int, int], str]:
    """Faults of all kinds for a share of the requests, the same ones in every run; never more than five in a row."""

    def fault(item: int, attempt: int) -> str:
        rng = random.Random(f"{item} {attempt}")
        if attempt == 1 and slow(item):
            return "slow"
        return rng.choice(FAULTS) if attempt % 6 and rng.random() < share else ""

    return fault


@contextmanager
def judge_server(handler: type[Handler] = Handler) -> Iterator[Judge]:
    server = Judge(handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        server.server_close()
