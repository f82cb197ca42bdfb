"""What the proxy adds: latency, throughput and memory before a stub that answers after a set time, direct and through it in turn.

    python perf/proxy.py --out results/perf/proxy.json

Three processes: stub, proxy (tied to one core where the system can), and this one, which asks. Each round asks the stub
itself and through the proxy, and the figures are differences and ratios within a round. Requests are bytes made before,
over kept connections of asyncio, so that asking costs little. A picture is a 640x480 JPEG of blurred noise and grain.
CPU seconds of the proxy a request stand beside, as they hold on a busy machine, too.
"""

import asyncio
import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from PIL import Image

from davsp import VisualSafetyPrompt
from davsp.files import manifest, write_json

TARGETS = {"added_p50_ms": 15.0, "throughput_ratio": 0.9, "memory_growth_mb": 10.0}
STUB = b'{"id":"1","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"ok"},"finish_reason":"stop"}]}'


async def stub(port: int) -> None:
    """Reads a request and answers after as many seconds as stand in its head X-Latency."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
                await asyncio.sleep(float(head.split(b"x-latency: ")[1].split(b"\r\n")[0]))
                size = str(len(STUB)).encode()
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: " + size + b"\r\n\r\n" + STUB
                )
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port, limit=2**20, backlog=512)
    await server.serve_forever()


def proxy(port: int, upstream: int, prompt: str, core: int | None) -> None:
    """`davsp serve` on one core."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    from davsp import cli

    sys.argv = [
        "davsp", "serve", "--prompt", prompt, "--canvas", "336", "--upstream", f"http://127.0.0.1:{upstream}/v1", "--port", str(port),
        "--no-probe", "--plain-names", "--threads", "1" if core is not None else str(os.cpu_count()),
    ]  # fmt: skip
    cli.main()


def jpeg() -> bytes:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize(
        (640, 480), Image.Resampling.BICUBIC
    )
    grain = np.asarray(coarse) + rng.normal(0, 6, (480, 640, 3))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def request(port: int, latency: float, picture: bool) -> bytes:
    content: Any = "what does the picture show?"
    if picture:
        url = "data:image/jpeg;base64," + base64.b64encode(jpeg()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": content}]
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": content}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}X-Latency: {latency}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def ask(port: int, content: bytes, count: int, clients: int) -> tuple[list[float], float]:
    """Seconds of each request, and of all of them together."""
    taken: list[float] = []
    left = iter(range(count))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
        for _ in left:
            start = time.perf_counter()
            writer.write(content)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(head.decode())
            taken.append(time.perf_counter() - start)
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return taken, time.perf_counter() - start


@contextmanager
def processes(prompt: str, core: int | None) -> Iterator[tuple[int, int, psutil.Process]]:
    """Ports of stub and proxy, and the proxy's process."""
    ports = [free_port(), free_port()]
    run = [sys.executable, __file__, "--serve"]
    started = [subprocess.Popen([*run, f"stub {ports[0]}"])]
    started.append(subprocess.Popen([*run, f"proxy {ports[1]} {ports[0]} {-1 if core is None else core} {prompt}"]))
    try:
        for port in ports:
            wait(port)
        yield ports[0], ports[1], psutil.Process(started[1].pid)
    finally:
        for one in started:
            one.terminate()
            one.wait(20)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return int(bound.getsockname()[1])


def wait(port: int) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("a process does not listen")


def cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def compare(
    ports: tuple[int, int], process: psutil.Process, latency: float, picture: bool, count: int, clients: int
) -> dict[str, Any]:
    """One round: the stub itself, then through the proxy."""
    direct, alone = asyncio.run(ask(ports[0], request(ports[0], latency, picture), count, clients))
    before = cpu(process)
    through, together = asyncio.run(ask(ports[1], request(ports[1], latency, picture), count, clients))
    p50, p99 = ((np.quantile(through, q) - np.quantile(direct, q)) * 1e3 for q in (0.5, 0.99))
    return {
        "latency_s": latency, "picture": picture, "clients": clients, "requests": count, "added_p50_ms": float(p50), "added_p99_ms": float(p99),
        "direct_a_second": count / alone, "proxy_a_second": count / together, "throughput_ratio": alone / together,
        "proxy_cpu_ms_a_request": (cpu(process) - before) / count * 1e3,
    }  # fmt: skip


def main(
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
    rounds: int = 3,
    latencies: Annotated[str, typer.Option(help="Of the stub with 64 clients, in seconds.")] = "0.1,0.5,1",
    requests: Annotated[int, typer.Option(help="For memory.")] = 10_000,
    clients: int = 64,
    beside: Annotated[str, typer.Option(help="What else ran.")] = "",
    serve: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure, print, and write."""
    if serve:
        kind, *given = serve.split(" ", 4)
        if kind == "stub":
            asyncio.run(stub(int(given[0])))
        return proxy(int(given[0]), int(given[1]), given[3], int(given[2]) if int(given[2]) >= 0 else None)
    found: dict[str, Any] = {"manifest": manifest(rounds=rounds, beside=beside), "targets": TARGETS}
    with TemporaryDirectory() as folder:
        VisualSafetyPrompt.create(336, 30, "random", text="please be safe").save_pretrained(folder)
        core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else None
        with processes(folder, core) as (up, port, process):
            found["one_client"], found["many_clients"] = [], []
            for number in range(rounds + 1):  # the first warms up
                for picture in (False, True):
                    row = compare((up, port), process, 0.02, picture, 100 if number else 20, 1)
                    found["one_client"] += [row] * (number > 0)
                for latency in map(float, latencies.split(",")):
                    for picture in (False, True):
                        row = compare((up, port), process, latency, picture, clients * (6 if number else 1), clients)
                        found["many_clients"] += [row] * (number > 0)
            found["figures"] = figures(found)
            for found["memory"] in memory(port, process, requests, clients):
                if out:
                    write_json(out, found)  # what there is, should it be stopped
    print(json.dumps([*found["figures"], found["memory"]], indent=1))


def memory(port: int, process: psutil.Process, count: int, clients: int) -> Iterator[dict[str, Any]]:
    """Resident MB of the proxy after each twentieth of the requests, all with a picture."""
    content, resident = request(port, 0.0, True), []
    for done in range(1, 21):
        asyncio.run(ask(port, content, count // 20, clients))
        resident.append(process.memory_info().rss / 2**20)
        yield {
            "requests": done * (count // 20),
            "every": count // 20,
            "resident_mb": resident,
            "growth_mb": resident[-1] - resident[0],
        }


def figures(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Medians over the rounds, a row a setting."""
    table = []
    rows = found["one_client"] + found["many_clients"]
    for key in dict.fromkeys((row["clients"], row["latency_s"], row["picture"]) for row in rows):
        mine = [row for row in rows if (row["clients"], row["latency_s"], row["picture"]) == key]
        names = (
            "added_p50_ms",
            "added_p99_ms",
            "direct_a_second",
            "proxy_a_second",
            "throughput_ratio",
            "proxy_cpu_ms_a_request",
        )
        table.append(
            dict(zip(("clients", "latency_s", "picture"), key, strict=True))
            | {n: round(median(r[n] for r in mine), 3) for n in names}
        )
    return table


if __name__ == "__main__":
    typer.run(main)
