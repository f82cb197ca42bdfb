"""What harmful loads do to other clients of the proxy and to its memory, beside an older checkout.

    python perf/proxy.py --hostile --before ../before/src --out results/perf/proxy_hostile.json

Each load meets a fresh proxy of one worker, warmed up; the two versions take turns. One process sends the load again and again,
`PAUSE` seconds between, each client its whole request first and then reading the reply, as HTTP clients do. A second one asks the
proxy for a text every `APART` seconds, a third the stub itself, which shows what the machine adds. A request that takes longer
delays the next, so a stall counts once. Memory is the proxy's resident one above what it was before the load: its peak, and what
is left `REST` seconds after the proxy has come to rest. A proxy above `MOST` is killed; the row says so.

CPU milliseconds a picture: each pair is two fresh proxies, as two processes of the same code differ by some per cent, too. The
interval of the ratios' median is that of order statistics. What a stub decodes must be the same pixels from both.
"""

import asyncio
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
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psutil

APART, PAUSE, REST = 0.025, 0.1, 5.0  # seconds
LONGEST = 300.0  # seconds that a client waits
MOST = 9e9  # bytes
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nX-Latency: 0\r\n"

# -- what is sent ------------------------------------------------------------------------------------------------------


def request(body: bytes, headers: bytes = b"") -> bytes:
    return HEAD + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body


def chat(content: Any, **more: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": content}], **more}).encode()


TEXT = request(chat("what does the picture show?"))


def pictures(file: bytes, count: int, headers: bytes = b"") -> bytes:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(file).decode()}}
    return request(chat([{"type": "text", "text": "a"}, *[part] * count]), headers)


def png(image: Any, level: int = 1) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()


def solid(mode: str, count: int) -> bytes:
    from PIL import Image  # not for those who only send and ask

    return pictures(png(Image.new(mode, (6000, 6000), (200, 10, 10, 3)[: len(mode)]), 9), count)


def noise() -> bytes:
    import numpy as np
    from PIL import Image

    return pictures(png(Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 1800, 3), np.uint8))), 2)


def objects() -> bytes:
    start = chat("hi")[:-1] + b',"x":[{}'
    return request(start + b",{}" * ((31 * 2**20 - len(start)) // 3) + b"]}")


def values() -> bytes:
    words = [f"one of the many words of a list, {number:06}" for number in range(90_000)]
    return request(chat("hi", tools=[{"type": "function", "function": {"name": "f", "parameters": {"enum": words}}}]))


def headers() -> bytes:
    return request(chat("hi"), b"".join(b"X-%d: %s\r\n" % (number, b"a" * 990) for number in range(50_000)))


QUICK, FLAT = {"worst_ms": 250, "peak_mb": 300}, {"worst_ms": 250, "peak_mb": 50, "statuses": ["431"]}
BOMB = {"worst_ms": 250, "peak_mb": 400, "kept_mb": 100}
LOADS: list[tuple[int, str, Callable[[], bytes], dict[str, Any]]] = [
    (1, "31 MiB of empty objects", objects, QUICK),
    (4, "31 MiB of empty objects", objects, QUICK),
    (4, "8 solid RGB PNG of 36 MP", lambda: solid("RGB", 8), BOMB),
    (4, "8 solid RGBA PNG of 36 MP", lambda: solid("RGBA", 8), BOMB),
    (64, "20 MiB of honest pictures", noise, {"peak_mb": 600, "statuses": ["200", "429"]}),
    (1, "50 MB of headers", headers, FLAT),
    (1, "one header of 100 MiB", lambda: request(chat("hi"), b"X-Long: " + b"a" * 100 * 2**20 + b"\r\n"), FLAT),
    (1, "one RGBA PNG of 36 MP", lambda: solid("RGBA", 1), {"peak_mb": 400, "statuses": ["200"]}),
    (4, "4 MiB of prose", lambda: request(chat("It was the best of times. " * 161_000)), {}),
    (4, "3.9 MiB with 90,000 values", values, {}),
]
"""Clients at once, name, request, and the most that is wanted of its figures; `statuses`: no others."""

# -- who sends and who asks, each a process of its own -----------------------------------------------------------------


def reply(connection: socket.socket) -> tuple[str, bytes]:
    """Status and body; raises OSError if the other side ended it before."""
    with connection.makefile("rb") as file:
        status, size = file.readline().decode().split()[1:2], 0
        while line := file.readline().strip().lower():
            size = int(line[16:]) if line.startswith(b"content-length: ") else size
        body = file.read(size)
    if not status:
        raise ConnectionAbortedError
    return status[0], body


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=LONGEST)


def probe(port: int, count: int, longest: float) -> dict[str, Any]:
    """Asks for a text so many times, over at most so many seconds: milliseconds and statuses."""
    took, statuses, connection = list[float](), Counter[str](), None
    turn = start = time.perf_counter()
    while len(took) < count and time.perf_counter() - start < longest:
        time.sleep(max(0, turn - time.perf_counter()))
        asked = time.perf_counter()
        turn = max(turn, asked) + APART
        try:
            connection = connection or connect(port)
            connection.sendall(TEXT)
            status = reply(connection)[0]
        except ConnectionRefusedError:  # the proxy was killed
            break
        except OSError as error:
            status, connection = type(error).__name__, None
        took.append((time.perf_counter() - asked) * 1e3)
        statuses[status] += 1
    at = {"median_ms": median(took), "p99_ms": sorted(took)[int(0.99 * (len(took) - 1))], "worst_ms": max(took)}
    return {"asked": len(took), **{name: round(value, 1) for name, value in at.items()}, "statuses": statuses}


def send(port: int, path: str, clients: int) -> dict[str, Any]:
    """Sends what is in a file from so many clients at once, again and again until this process's input ends."""
    data, seen = Path(path).read_bytes(), dict[str, list[float]]()

    def client() -> None:
        start, broken = time.perf_counter(), ""
        try:
            with connect(port) as connection:
                try:
                    connection.sendall(data)
                except ConnectionError:  # httpx and urllib3 still look for a reply; urllib does not
                    broken = ", send broken"
                status = reply(connection)[0] + broken
        except ConnectionRefusedError:  # the proxy was killed
            return
        except OSError as error:
            status = type(error).__name__
        seen.setdefault(status, []).append(time.perf_counter() - start)

    def repeat() -> None:
        while True:
            threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
            for one in threads:
                one.start()
            for one in threads:
                one.join()
            time.sleep(PAUSE)

    threading.Thread(target=repeat, daemon=True).start()
    sys.stdin.read()
    return {
        status: {"count": len(took), "median_s": round(median(took), 3), "worst_s": round(max(took), 3)}
        for status, took in seen.copy().items()
    }


def started(role: str, *arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, json.dumps([role, *arguments])]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


# -- one load ----------------------------------------------------------------------------------------------------------


@contextmanager
def watched(proxy: psutil.Process) -> Iterator[dict[str, Any]]:
    """Megabytes above those at the beginning, every 10 ms: `peak_mb`, and `kept_mb`, the last."""
    idle, ended = proxy.memory_info().rss, threading.Event()
    memory: dict[str, Any] = {"peak_mb": 0.0, "kept_mb": 0.0, "idle_mb": round(idle / 1e6, 1), "killed": False}

    def watch() -> None:
        while not ended.wait(0.01) and not memory["killed"]:
            resident = proxy.memory_info().rss
            memory["kept_mb"] = round((resident - idle) / 1e6, 1)
            memory["peak_mb"] = max(memory["peak_mb"], memory["kept_mb"])
            if resident > MOST:
                proxy.kill()
                memory["killed"] = True

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield memory
    finally:
        ended.set()
        thread.join()


def measure(served: Any, path: str, clients: int, count: int = 200, longest: float = 90) -> dict[str, Any]:
    """One row: the load in a file against `proxy.Served`, and what others notice of it."""
    with watched(served.proxy) as memory:
        load = started("send", served.port, path, clients)
        probes = [started("probe", port, count, longest) for port in (served.port, served.stub_port)]
        through, direct, replies = (json.loads(one.communicate()[0]) for one in (*probes, load))
        for _ in range(120):  # it may have work left
            before = served.cpu()["proxy"]
            time.sleep(1)
            if served.cpu()["proxy"] - before < 0.1:
                break
        time.sleep(REST)
    return {"probe": through, "stub": direct, "replies": replies, **memory}


def missed(row: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Which of the wanted figures a row misses."""
    statuses = {status.partition(",")[0] for status in row["replies"]}
    too_much = {name for name, most in wanted.items() if name != "statuses" and (row | row["probe"])[name] > most}
    return sorted(too_much | ({"statuses"} if statuses - {*wanted.get("statuses", statuses)} else set()))


def show(row: dict[str, Any]) -> None:
    """In 80 columns."""
    times = "median {median_ms:.0f}, p99 {p99_ms:.0f}, worst {worst_ms:.0f} ms"
    print(f"{row['clients']} x {row['load']}, {row['version']}{', KILLED' * row['killed']}")
    print(f"  others: {times.format(**row['probe'])}, {row['probe']['statuses']}")
    print(f"  the stub: {times.format(**row['stub'])}")
    print(f"  memory: peak +{row['peak_mb']:.0f} MB, kept {row['kept_mb']:+.0f} MB")
    for status, one in row["replies"].items():
        print(f"  {one['count']} x {status}, median {one['median_s']:.2f}, worst {one['worst_s']:.2f} s")
    print(*[f"  MISSED: {', '.join(row['missed'])}"] * bool(row["missed"]), flush=True)


# -- CPU ---------------------------------------------------------------------------------------------------------------


def pixels(port: int, jpeg: bytes) -> dict[str, str]:
    """SHA-256 of the canvas that the stub decoded, by the picture that was sent."""
    from PIL import Image

    rgb = Image.open(io.BytesIO(jpeg))
    images = {"grey": rgb.convert("L"), "small": rgb.resize((50, 41)), "tall": rgb.transpose(Image.Transpose.ROTATE_90)}
    images["transparent"] = Image.merge("RGBA", [*rgb.split(), rgb.convert("L")])
    seen = {}
    for name, file in {"jpeg": jpeg, **{name: png(image) for name, image in images.items()}}.items():
        with connect(port) as connection:
            connection.sendall(pictures(file, 1, b"X-Pixels: 1\r\n"))
            status, body = reply(connection)
        seen[name] = json.loads(body)["choices"][0]["message"]["content"] if status == "200" else body.decode()
    return seen


def ratio(spent: dict[str, list[float]]) -> dict[str, float]:
    """Medians, and that of new / before over the pairs with its 95 % interval, NaN below six pairs."""
    from scipy.stats import quantile_test

    ratios = [new / before for new, before in zip(spent["new"], spent["before"], strict=True)]
    low, high = map(float, quantile_test(ratios, p=0.5).confidence_interval(0.95))
    medians = {f"{name}_ms": median(each) for name, each in spent.items()}
    return {**medians, "ratio": median(ratios), "low": low, "high": high}


# -- all ---------------------------------------------------------------------------------------------------------------


def main(out: Path | None, before: Path | None, only: str, beside: str, pairs: int = 9, seconds: float = 4) -> None:
    """Measure, print and write; `only` is a part of a load's name with its clients ("4 x 31"), or "cpu"."""
    from davsp import VisualSafetyPrompt
    from davsp.runtime.files import manifest, write_json
    from proxy import jpeg, processes, stretch

    commit = before and subprocess.check_output(["git", "-C", str(before), "rev-parse", "HEAD"], text=True).strip()
    versions: dict[str, Path | None] = {"new": None} if before is None else {"before": before, "new": None}
    spent: dict[int, dict[str, list[float]]] = {clients: {name: [] for name in versions} for clients in (16, 64)}
    result: dict[str, Any] = {"manifest": manifest(beside=beside, before=commit), "rows": []}

    def write() -> None:
        if out:
            write_json(out, result)

    with TemporaryDirectory() as folder:
        VisualSafetyPrompt.create(336, 30, "random", text="please be safe").save_pretrained(folder)
        path = Path(folder, "load")
        for clients, name, make, wanted in LOADS:
            if only not in f"{clients} x {name}":
                continue
            path.write_bytes(make())
            for version, source in versions.items():
                with processes(folder, None, "--workers", "1", source=source) as served:
                    time.sleep(1)
                    row = measure(served, str(path), clients)
                    served.proxy.kill()  # as it may have much left to do
                facts = {"load": name, "clients": clients, "bytes": path.stat().st_size, "version": version}
                lacks = missed(row, wanted) if version == "new" else []
                result["rows"].append({**facts, **row, "wanted": wanted, "missed": lacks})
                show(result["rows"][-1])
                write()
        for pair in range(pairs if before and only in "cpu" else 0):
            with ExitStack() as stack:
                both = {
                    name: stack.enter_context(processes(folder, None, "--workers", "1", source=source))
                    for name, source in sorted(versions.items(), reverse=bool(pair % 2))
                }
                result["pixels"] = {name: pixels(served.port, jpeg()) for name, served in both.items()}
                result["same_pixels"] = result["pixels"]["before"] == result["pixels"]["new"]
                for clients in spent:
                    for name, served in both.items():
                        one = asyncio.run(stretch(served, True, 0, True, seconds, clients))
                        spent[clients][name].append(one["proxy_cpu_ms"])
            if pair + 1 == pairs:
                result["cpu"] = [{"clients": clients, **ratio(each), "each": each} for clients, each in spent.items()]
                write()
    for row in result.get("cpu", []):
        print("CPU of a 640x480 JPEG, {clients} clients: {before_ms:.2f} ms before, {new_ms:.2f} new,".format(**row))
        print("  ratio {ratio:.3f} ({low:.3f} to {high:.3f}); the same pixels:".format(**row), result["same_pixels"])


if __name__ == "__main__":
    role, *arguments = json.loads(sys.argv[1])
    print(json.dumps({"probe": probe, "send": send}[role](*arguments)), flush=True)
    os._exit(0)  # past clients that still wait
