"""What loads that mean harm do to other clients of the proxy and to its memory, today's beside an older checkout.

    python perf/proxy.py --hostile --before ../before/src --out results/perf/proxy_hostile.json

Each load meets a fresh proxy of one worker, warmed up; the two versions take turns. While a process of its own sends the load
again and again (`PAUSE` seconds between, each client its whole request first and then reading the reply, as HTTP clients do), a
second process asks the proxy for a text every `APART` seconds, and a third asks the stub itself, which shows what the machine
adds. A request that takes longer delays the next, so a stall counts once. Memory is the proxy's resident one above what it had
before the load: the peak, and what is left `REST` seconds after it has come to rest. A proxy above `MOST` is killed; the row says so.

CPU milliseconds a picture come from stretches of both versions in turn, ratios within a pair; the median's interval is that of
order statistics. What the stub decodes out of requests through both must be the same pixels.
"""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:  # what asks is a small process: no torch
    from PIL import Image

    from proxy import Served

APART, PAUSE, REST = 0.025, 0.1, 5.0  # seconds
LONGEST = 300.0  # seconds that a client waits
MOST = 9e9  # bytes


# -- what is sent ------------------------------------------------------------------------------------------------------


def request(body: bytes, headers: bytes = b"") -> bytes:
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nX-Latency: 0\r\n"
    )
    return head + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body


def chat(content: Any, **more: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": content}], **more}).encode()


TEXT = request(chat("what does the picture show?"))


@dataclass
class Load:
    """So many clients that send the same request at once.

    Attributes:
        wanted: at most so much of a figure of the row; `statuses`: no others. As issue and docs/serve.md say.
    """

    name: str
    clients: int
    make: Callable[[], bytes]
    wanted: dict[str, Any] = field(default_factory=dict)


def objects() -> bytes:
    start = chat("hi")[:-1] + b',"x":[{}'
    return request(start + b",{}" * ((31 * 2**20 - len(start)) // 3) + b"]}")


def pictures(file: bytes, count: int, headers: bytes = b"") -> bytes:
    url = "data:image/png;base64," + base64.b64encode(file).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}] * count
    return request(chat([{"type": "text", "text": "a"}, *parts]), headers)


def solid(mode: str, count: int) -> bytes:
    from PIL import Image

    return pictures(png(Image.new(mode, (6000, 6000), (200, 10, 10, 3)[: len(mode)]), 9), count)


def noise() -> bytes:
    import numpy as np
    from PIL import Image

    return pictures(png(Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 1800, 3), np.uint8)), 1), 2)


def png(image: "Image.Image", level: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()


def values() -> bytes:
    words = [f"one of the many words of a list, {number:06}" for number in range(90_000)]
    function = {"name": "f", "parameters": {"type": "object", "properties": {"word": {"enum": words}}}}
    return request(chat("hi", tools=[{"type": "function", "function": function}]))


def loads() -> list[Load]:
    small = {"worst_ms": 250, "peak_mb": 300}
    flat = {"worst_ms": 250, "peak_mb": 50, "statuses": ["431"]}
    prose = "It was the best of times, it was the worst of times. " * (4 * 2**20 // 53 - 10)
    return [
        Load("31 MiB of empty objects", 1, objects, small),
        Load("31 MiB of empty objects", 4, objects, small),
        Load("8 solid RGB PNG of 36 MP", 4, lambda: solid("RGB", 8), {"worst_ms": 250, "peak_mb": 400}),
        Load("8 solid RGBA PNG of 36 MP", 4, lambda: solid("RGBA", 8), {"worst_ms": 250, "peak_mb": 400}),
        Load("20 MiB of honest pictures", 64, noise, {"peak_mb": 600, "statuses": ["200", "429"]}),
        Load("50 MB of headers", 1, lambda: request(chat("hi"), b"".join(b"X-%d: %s\r\n" % (n, b"a" * 990) for n in range(50_000))), flat),
        Load("one header of 100 MiB", 1, lambda: request(chat("hi"), b"X-Long: " + b"a" * 100 * 2**20 + b"\r\n"), flat),
        Load("one RGBA PNG of 36 MP", 1, lambda: solid("RGBA", 1), {"peak_mb": 400, "statuses": ["200"]}),
        Load("4 MiB of prose", 4, lambda: request(chat(prose))),
        Load("3.9 MiB with 90,000 values", 4, values),
    ]  # fmt: skip


# -- who sends and who asks, each a process of its own -----------------------------------------------------------------


def reply(connection: socket.socket) -> tuple[str, bytes]:
    """Status and body.

    Raises:
        OSError: the other side ended it before.
    """
    with connection.makefile("rb") as file:
        status = file.readline().decode().split()[1:2]
        size = 0
        while line := file.readline().strip().lower():
            if line.startswith(b"content-length: "):
                size = int(line[16:])
        body = file.read(size)
    if not status:
        raise ConnectionAbortedError
    return status[0], body


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=LONGEST)


def probe(port: int, count: int, longest: float) -> dict[str, Any]:
    """Asks for a text so many times, over at most so many seconds; what came, and in what time."""
    took, statuses, connection = list[float](), Counter[str](), None
    turn = start = time.perf_counter()
    while len(took) < count and time.perf_counter() - start < longest:
        time.sleep(max(0, turn - time.perf_counter()))
        turn = max(turn, asked := time.perf_counter()) + APART
        try:
            connection = connection or connect(port)
            connection.sendall(TEXT)
            status = reply(connection)[0]
        except OSError as error:
            status, connection = type(error).__name__, None
        took.append(time.perf_counter() - asked)
        statuses[status] += 1
    return {"took": took, "statuses": statuses}


def send(port: int, path: str, clients: int) -> dict[str, Any]:
    """Sends what is in a file from so many clients at once, again and again until this process's input ends."""
    data, seen, begun = Path(path).read_bytes(), list[tuple[str, float]](), [0]

    def client() -> None:
        start, broken = time.perf_counter(), ""
        try:
            with connect(port) as connection:
                try:
                    connection.sendall(data)
                except ConnectionError:  # httpx and urllib3 look for a reply then; urllib does not
                    broken = ", send broken"
                status = reply(connection)[0] + broken
        except OSError as error:
            status = type(error).__name__
        seen.append((status, time.perf_counter() - start))

    def repeat() -> None:
        while True:
            begun[0] += clients
            threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
            for one in threads:
                one.start()
            for one in threads:
                one.join()
            time.sleep(PAUSE)

    threading.Thread(target=repeat, daemon=True).start()
    sys.stdin.read()
    return {"seen": seen.copy(), "begun": begun[0]}


def started(role: str, *arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, json.dumps([role, *arguments])]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    return dict(json.loads(process.communicate()[0]))


# -- one load ----------------------------------------------------------------------------------------------------------


class Memory:
    """Resident bytes of a proxy, looked at every 10 ms."""

    def __init__(self, served: "Served") -> None:
        self.proxy, self.workers = served.proxy, served.workers()
        self.idle = self.peak = self.now()
        self.killed = self.ended = False

    def now(self) -> int:
        try:
            return sum(one.memory_info().rss for one in self.workers)
        except psutil.Error:  # killed
            return 0

    def above_idle(self, size: int) -> float:
        return round((size - self.idle) / 1e6, 1)

    @contextmanager
    def watched(self) -> Iterator[None]:
        thread = threading.Thread(target=self._watch)
        thread.start()
        try:
            yield
        finally:
            self.ended = True
            thread.join()

    def _watch(self) -> None:
        while not (self.ended or self.killed):
            self.peak = max(self.peak, self.now())
            if self.peak > MOST:
                self.proxy.kill()
                self.killed = True
            time.sleep(0.01)


def measure(served: "Served", path: str, clients: int, count: int, longest: float) -> dict[str, Any]:
    """One row: the load in a file, and what others notice of it."""
    time.sleep(1)
    memory = Memory(served)
    with memory.watched():
        load = started("send", served.port, path, clients)
        probes = [started("probe", port, count, longest) for port in (served.port, served.stub_port)]
        through, direct = map(result, probes)
        sent = result(load)
        rest(served)
    kept = memory.above_idle(memory.now())
    by_status: dict[str, list[float]] = {}
    for status, seconds in sent["seen"]:
        by_status.setdefault(status, []).append(seconds)
    return {
        "probe": figures(through), "stub": figures(direct),
        "replies": {name: {"count": len(took), "median_s": round(median(took), 3), "worst_s": round(max(took), 3)} for name, took in by_status.items()},
        "unanswered_at_the_end": sent["begun"] - len(sent["seen"]),
        "peak_mb": memory.above_idle(memory.peak), "kept_mb": kept, "idle_mb": round(memory.idle / 1e6, 1), "killed": memory.killed,
    }  # fmt: skip


def rest(served: "Served") -> None:
    """Until the proxy does nothing any more, at most two minutes, and `REST` seconds more."""
    for _ in range(120):
        before = sum(served.proxy.cpu_times()[:2])
        time.sleep(1)
        if sum(served.proxy.cpu_times()[:2]) - before < 0.1:
            break
    time.sleep(REST)


def figures(asked: dict[str, Any]) -> dict[str, Any]:
    took = sorted(asked["took"])
    at = {"median_ms": median(took), "p99_ms": took[int(0.99 * (len(took) - 1))], "worst_ms": took[-1]}
    return {"asked": len(took), **{name: round(1e3 * value, 1) for name, value in at.items()}, **{"statuses": asked["statuses"]}}  # fmt: skip


def missed(row: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Which of the wanted figures a row misses."""
    has = {"worst_ms": row["probe"]["worst_ms"], "peak_mb": row["peak_mb"]}
    statuses = {name.partition(",")[0] for name in row["replies"]}
    return [n for n, most in wanted.items() if (statuses - {*most} if n == "statuses" else has[n] > most)]


# -- CPU ---------------------------------------------------------------------------------------------------------------


def cpu(served: dict[str, "Served"], pairs: int, seconds: float, clients: int) -> dict[str, Any]:
    """CPU milliseconds a picture of both versions in turn, and the ratio new / before."""
    import asyncio

    from proxy import stretch

    spent: dict[str, list[float]] = {name: [] for name in served}
    for number in range(pairs):
        for name in sorted(served, reverse=bool(number % 2)):
            one = asyncio.run(stretch(served[name], True, 0, True, seconds, clients))
            spent[name].append(round(one["proxy_cpu_ms"], 3))
    medians = {f"{name}_ms": median(each) for name, each in spent.items()}
    return {"clients": clients, "pairs": pairs, **medians, **ratio(spent), "each": spent}


def ratio(spent: dict[str, list[float]]) -> dict[str, Any]:
    """Median of new / before over the pairs with its 95 % interval (of order statistics: six pairs at least, or it has no bounds)."""
    from scipy.stats import quantile_test

    ratios = [new / before for new, before in zip(spent["new"], spent["before"], strict=True)]
    interval = quantile_test(ratios, p=0.5).confidence_interval(0.95)
    bounds = (interval.low, interval.high) if len(ratios) >= 6 else (None, None)
    return {"ratio": median(ratios), "low": bounds[0], "high": bounds[1]}


def pixels(served: "Served") -> dict[str, str]:
    """SHA-256 of the canvas that the stub decoded, by the picture that was sent."""
    from PIL import Image

    from proxy import jpeg

    wide = Image.open(io.BytesIO(jpeg()))
    shapes = {
        "grey": wide.convert("L"),
        "tall": wide.transpose(Image.Transpose.ROTATE_90),
        "small": wide.resize((50, 41)),
    }
    transparent = Image.merge("RGBA", [*wide.split(), wide.convert("L")])
    files = {"jpeg": jpeg(), **{name: png(image, 1) for name, image in (shapes | {"transparent": transparent}).items()}}
    seen = {}
    for name, file in files.items():
        with connect(served.port) as connection:
            connection.sendall(pictures(file, 1, b"X-Pixels: 1\r\n"))
            status, body = reply(connection)
        if status != "200":
            raise RuntimeError(f"{name}: {status} {body.decode()}")
        seen[name] = json.loads(body)["choices"][0]["message"]["content"]
    return seen


# -- all ---------------------------------------------------------------------------------------------------------------


def main(out: Path | None, before: Path | None, only: str, beside: str, count: int = 200, longest: float = 90) -> None:
    """Measure, print and write; `only` is a part of the loads' names, or "cpu"."""
    from davsp import VisualSafetyPrompt
    from davsp.runtime.files import manifest, write_json
    from proxy import processes

    versions = {"new": None} if before is None else {"before": before, "new": None}
    found: dict[str, Any] = {"manifest": manifest(beside=beside, before=commit(before)), "rows": []}
    with TemporaryDirectory() as folder:
        VisualSafetyPrompt.create(336, 30, "random", text="please be safe").save_pretrained(folder)
        for load in loads():
            if only in f"{load.clients} x {load.name}":
                path = Path(folder, "load")
                path.write_bytes(load.make())
                facts = {
                    "load": load.name,
                    "clients": load.clients,
                    "bytes": path.stat().st_size,
                    "wanted": load.wanted,
                }
                for name, source in versions.items():
                    with processes(folder, None, "--workers", "1", source=source) as served:
                        row = measure(served, str(path), load.clients, count, longest)
                        served.proxy.kill()  # as it may have much left to do
                    lacks = missed(row, load.wanted) if name == "new" else None
                    found["rows"].append({"version": name, **facts, **row, "missed": lacks})
                    show(found["rows"][-1])
                    if out:
                        write_json(out, found)
        if before and only in "cpu":
            with (
                processes(folder, None, "--workers", "1", source=before) as old,
                processes(folder, None, "--workers", "1") as new,
            ):
                found["pixels"] = {"before": pixels(old), "new": pixels(new)}
                found["same_pixels"] = found["pixels"]["before"] == found["pixels"]["new"]
                found["cpu"] = [cpu({"before": old, "new": new}, 9, 4, clients) for clients in (16, 64)]
            for row in found["cpu"]:
                print("CPU of a 640x480 JPEG:", {name: row[name] for name in row if name != "each"})
            print("the same pixels:", found["same_pixels"])
            if out:
                write_json(out, found)


def commit(source: Path | None) -> str | None:
    """Of a checkout."""
    if source is None:
        return None
    return subprocess.check_output(["git", "-C", str(source), "rev-parse", "HEAD"], text=True).strip()


def show(row: dict[str, Any]) -> None:
    """In 80 columns."""
    probe, times = row["probe"], "median {median_ms:.0f}, p99 {p99_ms:.0f}, worst {worst_ms:.0f} ms"
    print(f"{row['clients']} x {row['load']}, {row['version']}{', KILLED' * row['killed']}")
    print(f"  another client: {probe['asked']} asked, {times.format(**probe)}")
    print(f"  the stub itself: {times.format(**row['stub'])}")
    print(f"  memory above idle: peak {row['peak_mb']:.0f}, kept {row['kept_mb']:.0f} MB")
    for status, one in row["replies"].items():
        print(f"  {one['count']} x {status}: median {one['median_s']:.2f}, worst {one['worst_s']:.2f} s")
    if row["missed"]:
        print(f"  MISSED: {', '.join(row['missed'])}")
    sys.stdout.flush()


if __name__ == "__main__":
    role, *arguments = json.loads(sys.argv[1])
    print(json.dumps({"probe": probe, "send": send}[role](*arguments)), flush=True)
    os._exit(0)  # past clients that still wait
