"""An OpenAI-compatible server on loopback that serves a model of ours, as vLLM would, and fails on demand."""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from davsp import LVLM
from davsp.query import Question


class ModelServer(ThreadingHTTPServer):
    """What it was asked.

    Attributes:
        lvlm: answers one request at a time, unbatched.
        change: (number of the request, choice) -> the choice that is sent, or a status code in its place.
        usage: what it says it counted; None: nothing.
        bodies, pictures, headers: of all requests, in the order they came; of a request without a picture None.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, lvlm: LVLM) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lvlm, self.lock = lvlm, threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.pictures: list[Image.Image | None] = []
        self.headers: list[dict[str, str]] = []
        self.change: Callable[[int, dict[str, Any]], Any] = lambda number, choice: choice
        self.usage: dict[str, Any] | None = None
        self.under_way = self.most_under_way = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ModelServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        first, *later = body["messages"]
        content = first["content"]
        picture = None if isinstance(content, str) else _picture(content[0]["image_url"]["url"])
        said = content if isinstance(content, str) else content[1]["text"]
        question: Question = (("user", said), *((m["role"], m["content"]) for m in later)) if later else said
        server = self.server
        with server.lock:
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        with server.lock:  # one at a time computes; the others wait, as under way
            number = len(server.bodies)
            server.bodies.append(body)
            server.pictures.append(picture)
            server.headers.append(dict(self.headers))
            choice = self._answer(question, picture, body["max_tokens"])
            server.under_way -= 1
        found = server.change(number, choice)
        good = {"choices": [found]} | ({} if server.usage is None else {"usage": server.usage})
        code, sent = (found, {"error": {"message": "made to fail"}}) if isinstance(found, int) else (200, good)
        data = json.dumps(sent).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _answer(self, question: Question, picture: Image.Image | None, max_tokens: int) -> dict[str, Any]:
        lvlm = self.server.lvlm
        canvas = None if picture is None else lvlm.preprocess([picture])
        ((text, finish),) = lvlm.completions(canvas, [question], max_tokens)
        return {"message": {"role": "assistant", "content": text}, "finish_reason": finish}


def _picture(url: str) -> Image.Image:
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format == "PNG"
    return image.convert("RGB")


@contextmanager
def model_server(lvlm: LVLM) -> Iterator[ModelServer]:
    server = ModelServer(lvlm)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
