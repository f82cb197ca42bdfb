"""Servers that answer oddly: a judge whose verdicts must be neither lost nor made up, and an upstream behind the proxy."""

import asyncio
import gzip
import json
import random
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import httpx2

from davsp.defenses import ECSO
from davsp.judges.chat import ChatJudge
from davsp.judges.prompts import DAVSP
from faults import Seen, session, shapeless
from faults.bodies import change
from judge_server import FAULTS, Handler, Judge, items, judge_server, truth
from proxy import GOOD, Events, border, client, data_url, image_part, text_part, user
from tiny import picture

Sent = tuple[int, bytes, Mapping[str, str]]
"""Status, body and headers; a status of 0: the body is all that goes over the wire."""


def verdict(label: Any, end: Any = "stop", **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": label} | more
    return {"model": "truth", "choices": [{"index": 0, "message": message, "finish_reason": end}], "usage": {}}


def ok(value: Any, **headers: str) -> Sent:
    return 200, value if isinstance(value, bytes) else json.dumps(value).encode(), headers


@cache
def bomb() -> bytes:
    return gzip.compress(b" " * 20_000_000)


DEEP = b"[" * 100_000
DRESSED: dict[str, str] = {  # the label as models write it; what is made of it is the truth, or nothing
    "bold": "**{t}**", "point": "{T}.", "quoted": '"{t}"', "blanks": "  {t}  \n", "explained": "{t}\n\nExplanation: it is not {o}",
    "thought before": "<think>this looks {o}</think>{t}", "thought, lines": "<think>\n{o}\n</think>\n\n{t}", "thought open": "<think>{o}", "no": "not {o}",
    "both": "{o} or {t}", "answer": "Answer: {t}", "JSON": '{{"label": "{t}"}}', "twice": "{t} {t}", "joined": "un safe", "NUL": "{t}\0", "long": "{t}" + " " * 100_000,
    "zero width": "\u200b{t}", "another alphabet": "s\u0430fe", "ligature": "sa\ufb01e", "wide": "ｕｎｓａｆｅ", "turned": "\u202e{t}", "a mark": "<|im_start|>{t}",
}  # fmt: skip
ODD: dict[str, Callable[[str, str], Sent]] = {
    "reasoning is no verdict": lambda t, o: ok(verdict(None, reasoning_content=o)),
    "empty beside reasoning": lambda t, o: ok(verdict("", reasoning=o)),
    "cut": lambda t, o: ok(verdict(o, "length")),
    "no end": lambda t, o: ok(verdict(o, None)),
    "ended by an error": lambda t, o: ok(verdict(o, "error")),
    "ended by a list": lambda t, o: ok(verdict(o, ["stop"])),
    "parts": lambda t, o: ok(verdict([{"type": "text", "text": o}])),
    "refusal": lambda t, o: ok(verdict(o, refusal="I can't")),
    "two choices": lambda t, o: ok({"choices": [*verdict(o)["choices"], *verdict(t)["choices"]]}),
    "an error beside": lambda t, o: ok({"error": {"message": "x"}} | verdict(o)),
    "an error, 429": lambda t, o: ok({"choices": None, "error": {"code": 429, "message": o}}),
    "choices are a text": lambda t, o: ok({"choices": o}),
    "choices are an object": lambda t, o: ok({"choices": {"0": verdict(o)}}),
    "a message that is a list": lambda t, o: ok({"choices": [{"message": [o], "finish_reason": "stop"}]}),
    "a list": lambda t, o: ok([verdict(o)]),
    "a word": lambda t, o: ok(o),
    "null": lambda t, o: ok(None),
    "nothing": lambda t, o: ok(b""),
    "HTML": lambda t, o: ok(b"<html>" + o.encode(), **{"Content-Type": "text/html"}),
    "events": lambda t, o: ok(b"data: " + json.dumps(verdict(o)).encode() + b"\n\ndata: [DONE]\n\n"),
    "no UTF-8": lambda t, o: ok(json.dumps(verdict("QQ")).encode().replace(b"QQ", b"\xff" + o.encode())),
    "UTF-16": lambda t, o: ok(json.dumps(verdict(t)).encode("utf-16")),
    "half a surrogate": lambda t, o: ok(verdict("\ud83d " + o)),
    "deep": lambda t, o: ok(json.dumps(verdict(o)).encode()[:-1] + b', "x": ' + DEEP),
    "deep, and an error": lambda t, o: (500, DEEP, {}),
    "a number too long": lambda t, o: ok(json.dumps(verdict(o)).encode()[:-1] + b', "x": ' + b"9" * 10_000 + b"}"),
    "packed": lambda t, o: ok(gzip.compress(json.dumps(verdict(t)).encode()), **{"Content-Encoding": "gzip"}),
    "packed, and broken": lambda t, o: ok(b"none", **{"Content-Encoding": "gzip"}),
    "packed, and huge": lambda t, o: ok(bomb(), **{"Content-Encoding": "gzip"}),
    "packed in an unknown way": lambda t, o: ok(b"none", **{"Content-Encoding": "zstd"}),
    "huge": lambda t, o: ok(b" " * 9_000_000),
    "an error in HTML": lambda t, o: (502, b"bad gateway " + o.encode(), {}),
    "no such status": lambda t, o: (0, b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n", {}),
    "no HTTP": lambda t, o: (0, b"\0\1garbage\r\n\r\n", {}),
    "a broken header": lambda t, o: (0, b"HTTP/1.1 200 OK\r\nX: a\0b\r\n\r\n", {}),
    "shorter than it says": lambda t, o: (0, b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n" + json.dumps(verdict(o)).encode(), {}),
    "longer than it says": lambda t, o: (0, b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n" + json.dumps(verdict(o)).encode(), {}),
    **{f"wait: {wait[:24]}": partial(lambda w, t, o: (429, b"{}", {"Retry-After": w}), wait)
       for wait in ("nan", "-1e308", "soon", "Mon, 99 Foo 99999 99:99:99 +99999999999", "Mon, 01 Jan 2024 00:00:00 +99999999999999999")},
}  # fmt: skip
FINAL: dict[str, Callable[[str, str], Sent]] = {  # after these nothing is asked again: that answer stays unscored
    "elsewhere": lambda t, o: (307, b"", {"Location": "http://127.0.0.1:9/"}),
    "a mistake": lambda t, o: (400, json.dumps({"error": {"message": f"bad {o}"}}).encode(), {}),
    "too large": lambda t, o: (413, b"", {}),
    "wait: for ever": lambda t, o: (429, b"{}", {"Retry-After": "inf"}),
    "wait: a long number": lambda t, o: (429, b"{}", {"Retry-After": "9" * 400}),
}
LONGEST = 5
"""Faults in a row at the most; one that is asked six times has the label then."""


class OddHandler(Handler):
    """The judge of tests/judge_server.py with more faults; each names the wrong label wherever there is room."""

    def reply(self, fault: str, item: int, plain: bool) -> None:
        true, other = truth(item), {"safe": "unsafe", "unsafe": "safe"}[truth(item)]
        if fault in DRESSED:
            sent = ok(verdict(DRESSED[fault].format(t=true, o=other, T=true.capitalize())))
        elif fault in ODD or fault in FINAL:
            sent = (ODD | FINAL)[fault](true, other)
        elif fault.startswith("changed"):
            sent = ok(changed(verdict(true), random.Random(fault)))
        else:
            return super().reply(fault, item, plain)
        status, data, headers = sent
        if status:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
        self.wfile.write(data)
        self.close_connection = self.close_connection or not status


def changed(reply: dict[str, Any], rng: random.Random) -> bytes:
    """A reply with its JSON changed, and sometimes its bytes."""
    whole = {"reply": json.loads(json.dumps(reply))}
    for _ in range(rng.randint(1, 3)):
        change(whole["reply"] if isinstance(whole["reply"], dict) and whole["reply"] else whole, rng)
    data = json.dumps(whole.get("reply")).encode()
    at = rng.randrange(len(data))
    return data if rng.random() < 0.8 else data[:at] + rng.randbytes(2) + data[at + 1 :]


def judge(seed: int, count: int) -> Seen:
    """So many answers judged by a server of which 30 % of the replies are faults, one kind after the other for a start."""
    seen, kinds = Seen(), [*DRESSED, *ODD, *FINAL, *FAULTS]
    drawn = dict[tuple[int, int], str]()

    def fault(item: int, attempt: int) -> str:
        rng = random.Random(f"{seed} {item} {attempt}")
        if attempt == 1 and item < len(kinds):
            name = kinds[item]
        elif attempt > LONGEST or rng.random() > 0.3:
            name = ""
        else:
            name = rng.choice([*kinds, *[f"changed {seed} {item} {attempt}"] * 20])
        drawn[item, attempt] = name
        return name

    with judge_server(OddHandler) as server:
        server.fault = fault
        asks = ChatJudge(DAVSP, "m", server.url, backoff=0.01, timeout=20.0, concurrency=16, attempts=LONGEST + 1)
        verdicts = asks.judge_all(items(count))
        _count(seen, server, verdicts, drawn)
    return seen


def _count(seen: Seen, server: Judge, verdicts: Any, drawn: Mapping[tuple[int, int], str]) -> None:
    for item, one in enumerate(verdicts):
        names = [drawn[item, attempt] for attempt in range(1, server.requests[item] + 1)]
        seen.tried += len(names)
        seen.outcomes["replies that were faults"] += sum(name != "" for name in names)
        kind = "right" if one.label == truth(item) else "unscored" if one.label == "unscored" else "made up"
        seen.outcomes[f"verdicts {kind}{', as the server wants it' * (kind == 'unscored' and names[-1] in FINAL)}"] += 1
        if kind == "made up":
            seen.broken.append(f"item {item}: {one.label} was made up after {names}; {one.raw[:200]!r}")
        if kind == "unscored" and names[-1] not in FINAL:
            seen.broken.append(f"item {item}: lost after {names}: {one.reason}")
        if server.answered[item] > 1:
            seen.broken.append(f"item {item}: asked again although its verdict was there, {names}")


# -- an upstream behind the proxy ------------------------------------------------------------------------------------------

TEXTS = ("a red cake", "Yes.", "no", "", "\ud83d half", "x" * 5000)
ERRORS: list[type[Exception]] = [
    httpx2.ConnectError, httpx2.ReadTimeout, httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError, OSError,
]  # fmt: skip


def said(rng: random.Random) -> dict[str, Any]:
    """A good answer."""
    whole = json.loads(json.dumps(GOOD))
    whole["choices"][0]["message"]["content"] = rng.choice(TEXTS)
    return whole


class Given(NamedTuple):
    """What an upstream does with a request: status, bytes and how their stream ends; an error in place of all."""

    status: int
    data: bytes
    headers: Mapping[str, str] = {}
    events: Events | None = None
    error: Exception | None = None

    def act(self) -> Any:
        """As `proxy.Upstream.answer` wants it."""
        if self.events or self.error:
            return self.error or self.events.response()  # type: ignore[union-attr]
        return httpx2.Response(self.status, content=self.data, headers=self.headers)


def answer(rng: random.Random, good: float) -> Given:
    """A good answer, a bad one, a stream, or none at all.

    Args:
        good: the share of good ones.
    """
    kind = rng.randrange(2, 8)
    if rng.random() < good:
        return Given(200, json.dumps(said(rng)).encode())
    if kind < 4:
        return Given(rng.choice([200, 200, 200, 400, 429, 500]), changed(said(rng), rng))
    if kind == 4:
        status, data, headers = rng.choice([one for one in ODD.values() if one("", "")[0]])("no", "yes")
        return Given(status, data, {name: value for name, value in headers.items() if name != "Content-Encoding"})
    if kind == 5:
        return Given(0, b"", error=rng.choice(ERRORS)("made to fail"))
    chunks = [
        b"data: " + changed(said(rng), rng) + rng.choice([b"\n\n", b"\r\n\r\n", b""]) for _ in range(rng.randrange(4))
    ]
    chunks.append(rng.randbytes(9))
    return Given(200, b"".join(chunks), events=Events(*chunks, end=rng.choice(["", "break"])))


def upstream(seed: int, count: int) -> Seen:
    """So many requests to proxies whose upstream answers so: passed as it is, or an error in shape; no answer is made up."""
    seen = Seen()
    asyncio.run(_ask_all(seen, random.Random(seed), count))
    return seen


async def _ask_all(seen: Seen, rng: random.Random, count: int) -> None:
    callers = {"chat": client(border()), "responses": client(border()), "ECSO": client(ECSO(border()))}
    image = data_url(picture(1, (9, 9)))
    for number in range(count):
        kind = rng.choice([*callers])
        caller, replies, sent = callers[kind], random.Random(rng.random()), list[Given]()

        def reply(
            at: int, body: Any, kind: str = kind, replies: random.Random = replies, sent: list[Given] = sent
        ) -> Any:
            sent.append(answer(replies, 0.8 if kind == "ECSO" else 0.2))
            return sent[-1].act()

        caller.upstream.answer = reply
        messages = [user(text_part("what is it"), image_part(image))]
        body = {"model": caller.model, "stream": rng.random() < 0.5}
        body |= {"input": "what is it"} if kind == "responses" else {"messages": messages}
        path = "/v1/responses" if kind == "responses" else "/v1/chat/completions"
        async with session(caller) as http:
            got = await http.post(path, json=body)
        seen.tried += 1
        problem = _wrong(kind, got, sent)
        seen.outcomes[f"{kind}: {'answered' if got.status_code == 200 else got.status_code}"] += 1
        if problem:
            told = [one.error or (one.status, one.data[:500], one.events and one.events.end) for one in sent]
            seen.broken.append(f"number {number}, {kind}: {problem}; {told}")


def _wrong(kind: str, got: httpx2.Response, sent: list[Given]) -> str:
    last = sent[-1]
    if kind == "ECSO" and got.status_code == 200:
        texts = [json.loads(one.data)["choices"][0]["message"]["content"] for one in sent]
        given = {(text or "").strip().encode(errors="replace").decode() for text in texts}
        return "" if _text(got) in given else "an answer that nobody gave"
    if last.events and kind != "ECSO":
        right = got.content.startswith(last.data) and (got.content == last.data) == (last.events.end == "")
        return "" if right and last.events.closed.is_set() else "a stream that is not the upstream's"
    if (got.status_code, got.content) == (last.status, last.data):
        return "" if _is_json(got.content) else "a reply that is no JSON was passed on"
    return shapeless(got)


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def _text(got: httpx2.Response) -> str:
    """The answer in a reply of the proxy's own, streamed or not."""
    if not got.headers["content-type"].startswith("text/event-stream"):
        return str(got.json()["choices"][0]["message"]["content"])
    events = [json.loads(line[6:]) for line in got.text.splitlines() if line.startswith("data: {")]
    return "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])
