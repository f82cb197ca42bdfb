"""Replies of a judge's server that no one should send: unscored, with the server's own words, and never a traceback."""

import gzip
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from davsp import DavspError, Query, Response, Verdict
from davsp.defenses.adashield_a.defender import ChatDefender
from davsp.judges.base import check_unscored
from davsp.judges.cache import VerdictCache
from davsp.judges.chat import ChatJudge
from davsp.judges.prompts import DAVSP
from davsp.lvlm.remote import RemoteLVLM
from davsp.runtime.client import Client
from davsp.runtime.replies import LARGEST, Reply, one_line
from judge_server import items

DEEP = b"[" * 100_000


class Server(ThreadingHTTPServer):
    """Answers with what `reply` gives for a body: status, bytes or JSON, headers; an iterator of bytes never ends by itself."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []
        self.sent = 0
        self.reply: Callable[[dict[str, Any]], tuple[int, Any, dict[str, str]]] = lambda body: (200, choice("safe"), {})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is what is tested."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(raw.decode())  # UTF-8 and nothing else
        self.server.bodies.append(body | {"encoding": self.headers["Accept-Encoding"]})
        status, data, headers = self.server.reply(body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if isinstance(data, Iterator):
            self.send_header("Content-Length", str(10**12))
            self.end_headers()
            for part in data:
                self.wfile.write(part)
                self.server.sent += len(part)
            return
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def choice(content: Any, end: Any = "stop", **more: Any) -> dict[str, Any]:
    return {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": end} | more]
    }


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = Server()
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def judged(server: Server, reply: Any = None, count: int = 1, **options: Any) -> list[Verdict]:
    if reply is not None:
        server.reply = reply if callable(reply) else lambda body: reply
    quick = {"backoff": 0.01, "timeout": 20.0, "attempts": 2} | options
    return ChatJudge(DAVSP, "m", server.url, **quick).judge_all(items(count))


# ------------------------------------------------------------------------------------------------ what is no reply


@pytest.mark.parametrize(
    ("status", "data", "words"),
    [
        (200, DEEP, "nested too deep (200)"),
        (200, json.dumps(choice("safe"))[:-1].encode() + b', "x": ' + DEEP + b"]" * 100_000 + b"}", "nested too deep (200)"),
        (500, DEEP, "nested too deep (500)"),
        (400, DEEP, "nested too deep (400)"),
        (200, json.dumps(choice("safe"))[:-1].encode() + b', "x": ' + b"9" * 10_000 + b"}", "sent no JSON (200)"),
        (200, b"", "sent no JSON (200)"),
        (200, b"\xff\xfe" + b"safe", "sent no JSON (200)"),
        (502, b"<html>Bad gateway</html>", "sent no JSON (502): <html>Bad gateway</html>"),
        (204, b"", "sent no JSON (204)"),
        (302, b"", "sent no JSON (302)"),
    ],
)  # fmt: skip
def test_replies_that_cannot_be_read(server: Server, status: int, data: bytes, words: str) -> None:
    (verdict,) = judged(server, (status, data, {}))
    assert verdict.label == "unscored" and words in verdict.reason


def test_a_reply_of_hundreds_of_megabytes_is_hung_up_on(server: Server) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b" " * 2**20

    (verdict,) = judged(server, lambda body: (200, endless(), {}), attempts=1)
    assert verdict.label == "unscored" and "sent more than 8 MB (200)" in verdict.reason
    assert server.sent < 4 * LARGEST


@pytest.mark.parametrize(
    ("data", "packing", "says"),
    [
        (gzip.compress(json.dumps(choice("safe")).encode()), "gzip", ""),
        (gzip.compress(b" " * 2**28 + json.dumps(choice("safe")).encode()), "gzip", "sent more than 8 MB"),
        (gzip.compress(json.dumps(choice("safe")).encode())[:-12], "gzip", "packed reply that is broken"),
        (b"not packed", "gzip", "packed reply that is broken"),
        (json.dumps(choice("safe")).encode(), "br", "packed, which was not asked for"),
    ],
    ids=["good", "bomb", "cut", "none", "other"],
)
def test_packed_replies(server: Server, data: bytes, packing: str, says: str) -> None:
    """None is asked for; some proxies pack all the same."""
    (verdict,) = judged(server, (200, data, {"Content-Encoding": packing}))
    assert server.bodies[0]["encoding"] == "identity"
    assert verdict.label == ("unscored" if says else "safe") and says in verdict.reason


@pytest.mark.parametrize("wait", ["1e999", "inf", "9" * 400, "Mon, 01 Jan 2300 00:00:00 GMT"])
def test_a_wait_out_of_all_range_ends_the_asking(server: Server, wait: str) -> None:
    (verdict,) = judged(server, (429, {"error": "slow down"}, {"Retry-After": wait}))
    assert (
        verdict.label == "unscored" and verdict.reason.endswith("failed (429): slow down") and len(server.bodies) == 1
    )


@pytest.mark.parametrize("wait", ["-5", "-1e308", "NaN", "soon", "Mon, 99 Foo 99999 99:99:99 +99999999999", "Mon, 01 Jan 2024 00:00:00 +99999999999999999"])  # fmt: skip
def test_a_wait_that_says_nothing_is_none(server: Server, wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits, wait_of = [], Client._wait

    def noted(self: Client, reply: Any, attempt: int) -> float | None:
        waits.append(wait_of(self, reply, attempt))
        return waits[-1]

    monkeypatch.setattr(Client, "_wait", noted)
    replies = [(429, {"error": "slow down"}, {"Retry-After": wait}), (200, choice("safe"), {})]
    assert judged(server, lambda body: replies.pop(0))[0].label == "safe"
    assert len(waits) == 1 and 0 < waits[0] <= 0.0125  # of the back-off alone


# ------------------------------------------------------------------------------------------------ what is no verdict


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"error": {"message": "overloaded: safe"}}, "the judge's server failed (200): overloaded: safe"),
        ({"error": {"message": "x"}, **choice("safe")}, "the judge's server failed (200): x"),
        (
            {"choices": None, "error": {"message": "Provider returned error", "code": 429, "metadata": {"raw": "Too Many Requests"}}},
            "the judge's server failed (200): Provider returned error: Too Many Requests",
        ),
        (choice("safe", "error", error={"message": "went away"}), "the judge's reply was cut (error): went away"),
        (choice("safe", "tool_calls"), "the judge's reply was cut (tool_calls)"),
        (choice("safe", None), "the judge's reply was cut (None)"),
        ({"choices": [{"message": {"content": "safe"}}]}, "the judge's reply was cut (None)"),
        (choice("safe", "content_filter"), "the judge's reply was cut (content_filter)"),
        (choice("safe", "length"), "the judge's reply was cut (length)"),
        (choice("safe", "\ud800\x1b[31m" * 300), None),
        ({"choices": choice("safe")["choices"] + choice("unsafe")["choices"]}, "sent a reply without a choice, or with several"),
        ({"choices": [{"message": ["safe"], "finish_reason": "stop"}]}, "sent a reply without a choice, or with several"),
        ({"choices": "safe"}, "sent a reply without a choice, or with several"),
        ("safe", "sent a reply without a choice, or with several"),
        (choice("safe\ud800"), "the judge's reply is no label"),
        (choice(None), "the judge's reply is empty"),
    ],
)  # fmt: skip
def test_what_is_no_verdict_is_unscored(server: Server, tmp_path: Path, body: Any, reason: str | None) -> None:
    cache = VerdictCache(tmp_path / "c")
    (verdict,) = judged(server, (200, body, {}), cache=cache)
    assert verdict.label == "unscored" and (reason is None or reason in verdict.reason)
    json.dumps(verdict.reason + verdict.raw, ensure_ascii=False).encode()
    assert verdict.reason.isprintable() and len(verdict.reason) < 300
    assert len(server.bodies) == 2  # asked again, as all that may be chance


def test_an_error_that_is_none_does_no_harm(server: Server) -> None:
    assert judged(server, (200, choice("safe") | {"error": None}, {}))[0].label == "safe"


def test_the_servers_own_words_are_in_verdict_and_summary(server: Server) -> None:
    words = "Unsupported value: 'temperature' does not support 0 with this model."
    verdicts = judged(server, (400, {"error": {"message": words, "type": "invalid_request_error"}}, {}), count=3)
    assert {v.reason for v in verdicts} == {f"the judge's server failed (400): {words}"} and verdicts[0].raw == words
    with pytest.raises(DavspError, match=r"3 of 3 answers .*does not support 0 with this model") as error:
        check_unscored(verdicts)
    assert "\n" not in str(error.value)
    for body, told in (
        ({"message": "no such model"}, "no such model"),
        ({"detail": [{"msg": "bad"}]}, "[{'msg': 'bad'}]"),
        ({}, ""),
    ):
        assert Reply(422, body).words() == told


def test_words_of_others_are_on_one_line() -> None:
    assert one_line("\x1b[31mred\x07\n\n a\u202eb \ud800c\u2028d") == "[31mred a b c d"
    assert one_line("a" * 1000) == "a" * 200 + "…" and one_line(" a ") == "a"


def test_a_key_is_not_repeated_in_the_servers_words(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    (verdict,) = judged(server, (400, {"error": "sk-secret is odd"}, {}), api_key_env="MY_KEY")
    assert verdict.reason.endswith("*** is odd") and "sk-secret" not in str(verdict)


# ------------------------------------------------------------------------------------------------ the run as a whole


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (429, {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": "insufficient_quota"}),
        (429, {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": None}),
        (200, {"message": "You exceeded your current quota", "code": "insufficient_quota"}),
        (402, {"message": "You exceeded your current quota"}),
    ],
)  # fmt: skip
def test_a_quota_that_is_used_up_ends_the_run(server: Server, status: int, error: Any) -> None:
    with pytest.raises(DavspError, match=r"quota is used up .*You exceeded your current quota.*same command again"):
        judged(server, (status, {"error": error}, {}), count=200)
    assert len(server.bodies) < 20


def other_length(body: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
    """As OpenAI's reasoning models answer."""
    if "max_tokens" in body:
        message = (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        )
        return 400, {"error": {"message": message, "param": "max_tokens", "code": "unsupported_parameter"}}, {}
    return 200, choice('{"improvement": "a", "prompt": "b", "label": "safe"}' if body["temperature"] else "safe"), {}


def test_the_other_name_of_the_longest_reply_is_learnt_once(server: Server) -> None:
    server.reply = other_length
    judge = ChatJudge(DAVSP, "m", server.url, attempts=1, concurrency=4)
    assert {v.label for v in judge.judge_all(items(40))} == {"safe"}
    assert sum("max_tokens" in body for body in server.bodies) <= 4  # those under way when it was learnt
    assert {body.get("max_completion_tokens") for body in server.bodies} <= {None, 16}
    before = len(server.bodies)
    judge.judge_all(items(10, 100))
    assert all("max_completion_tokens" in body for body in server.bodies[before:]) and len(server.bodies) == before + 10


def test_engine_and_defender_learn_it_too(server: Server) -> None:
    server.reply = other_length
    model = RemoteLVLM("m", server.url, attempts=1, concurrency=1)
    assert [model.generate(None, ["what", "what"], 7) for _ in range(2)] == [["safe", "safe"]] * 2
    assert ["max_tokens" in body for body in server.bodies] == [True, False, False, False, False]
    assert server.bodies[-1]["max_completion_tokens"] == 7
    defender = ChatDefender("m", server.url, attempts=1)
    assert [defender.propose("s", "p", "o", str(i)).prompt for i in range(2)] == ["b", "b"]
    assert ["max_tokens" in body for body in server.bodies[5:]] == [True, False, False]
    assert defender.describe()["max_tokens"] == 500


def test_a_server_that_takes_neither_name_is_asked_twice(server: Server) -> None:
    message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    (verdict,) = judged(server, (400, {"error": {"message": message, "code": "unsupported_parameter"}}, {}))
    assert verdict.label == "unscored" and message in verdict.reason and len(server.bodies) == 2


def test_half_a_surrogate_pair_is_not_sent(server: Server) -> None:
    """Strict servers take it for no JSON, and the answer would be lost."""
    half = (
        Query("q", "what \ud83d\ude00?", "malicious", "t"),
        Response("q", "none", "half \ud83e a kite \ud83d\ude00"),
    )
    (verdict,) = ChatJudge(DAVSP, "m", server.url, attempts=1).judge_all([half])
    text = json.dumps(server.bodies[0], ensure_ascii=False)
    assert verdict.label == "safe" and "half \ufffd a kite 😀" in text
