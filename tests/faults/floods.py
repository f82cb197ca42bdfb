"""More than the proxy takes, from clients that send it whole and read then; others ask for a text all the while.

In small: what such loads take in time and memory is measured by perf/hostile.py.
"""

import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from faults import Seen
from proxy import border, client, data_url, image_part, listening, user
from tiny import picture

MIB = 2**20
HELD, BODY, CLIENTS = 2 * MIB, 8 * MIB, 12
HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
)


def sized(body: bytes, more: bytes = b"") -> bytes:
    return HEAD + more + b"Content-Length: %d\r\n\r\n" % len(body) + body


def chunked(body: bytes) -> bytes:
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"


def chat(model: str, *content: Any, more: bytes = b"") -> bytes:
    return json.dumps({"model": model, "messages": [user(*content)]}).encode()[:-1] + more + b"}"


def noise(rng: random.Random) -> list[Any]:
    return [image_part(data_url(picture(1, (200, 150))))] * rng.randint(1, 4)


LOADS: dict[str, tuple[Callable[[str, random.Random], bytes], set[str]]] = {
    "a body that does not fit": (lambda model, rng: sized(b" " * rng.randint(3 * MIB, BODY)), {"429"}),
    "a body that is too large": (lambda model, rng: sized(b" " * rng.randint(BODY + 1, 12 * MIB)), {"413"}),
    "one that is too large, in chunks": (
        lambda model, rng: chunked(b" " * rng.randint(BODY + 1, 12 * MIB)), {"413", "429"},
    ),
    "a long header": (lambda model, rng: sized(b"{}", b"X: " + b"a" * rng.randint(70_000, 3 * MIB) + b"\r\n"), {"431"}),
    "many headers": (lambda model, rng: sized(b"{}", b"X-A: bcdefg\r\n" * rng.randint(6000, 60_000)), {"431"}),
    "a long path": (lambda model, rng: b"GET /" + b"a" * rng.randint(70_000, MIB) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", {"431"}),
    "many values": (
        lambda model, rng: sized(chat(model, "q", more=b', "x": [{}' + b",{}" * rng.randint(110_000, 400_000) + b"]")), {"400", "429"},
    ),
    "deep JSON": (lambda model, rng: sized(chat(model, "q", more=b', "x": ' + b"[" * rng.randint(70, MIB))), {"400", "429"}),
    "pictures": (lambda model, rng: sized(chat(model, *noise(rng))), {"200", "429"}),
    "a client that hangs up": (lambda model, rng: sized(b" " * BODY)[: rng.randint(1, 3 * MIB)], {"hung up"}),
}  # fmt: skip
"""Name -> the request, and the statuses that it may get."""


def run(seed: int, count: int) -> Seen:
    """So many requests from a dozen clients at once."""
    seen, lock = Seen(), threading.Lock()
    caller = client(border(), threads=1, max_held=HELD, max_body=BODY)
    names = [list(LOADS)[number % len(LOADS)] for number in range(count)]
    random.Random(seed).shuffle(names)
    with listening(caller.proxy.app) as url:
        port, ended = int(url.split(":")[2].split("/")[0]), threading.Event()

        def flood(number: int) -> None:
            make, allowed = LOADS[names[number]]
            status = sent(port, make(caller.model, random.Random(f"{seed} {number}")), hang_up=allowed == {"hung up"})
            with lock:
                seen.tried += 1
                seen.outcomes[f"{names[number]}: {status}"] += 1
                if status not in allowed:
                    seen.broken.append(f"number {number}, {names[number]}: {status}")

        with ThreadPoolExecutor(1) as other, ThreadPoolExecutor(CLIENTS) as pool:
            texts = other.submit(probe, port, caller.model, ended)
            list(pool.map(flood, range(count)))
            ended.set()
            for status, often in texts.result().items():
                seen.outcomes[f"a text of another client: {status}"] += often
                if status != "200":
                    seen.broken.append(f"another client's text got {status}, {often} times")
        until = time.monotonic() + 30  # for a machine with much to do
        while (left := (caller.proxy.room.left, caller.proxy.under_way)) != (HELD, 0) and time.monotonic() < until:
            time.sleep(0.02)
        if left != (HELD, 0):
            seen.broken.append(f"afterwards {left[0]} of {HELD} bytes were free and {left[1]} requests under way")
    return seen


def probe(port: int, model: str, ended: threading.Event) -> Counter[str]:
    """Another client, which asks for a text again and again."""
    statuses, text = Counter[str](), sized(chat(model, "what is it"))
    while not ended.wait(0.02):
        statuses[sent(port, text)] += 1
    return statuses


def sent(port: int, data: bytes, hang_up: bool = False) -> str:
    """The status that a client sees which reads once it has sent all, or what went wrong."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(data)
            if hang_up:
                return "hung up"
            with connection.makefile("rb") as reply:
                return reply.readline().decode().split()[1]
    except (OSError, IndexError) as error:
        return f"no reply ({type(error).__name__})"
