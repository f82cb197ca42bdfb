"""What the proxy adds: latency, throughput and memory before a stub that answers after a set time, direct and through it in turn.

    python perf/proxy.py --out results/perf/proxy.json

Stub, proxy, and this process, which asks, share the machine. With one client the proxy is tied to one core (where the system
can) and has one thread for pictures; with many it has all cores and as many workers, or what --workers and --threads say.
Each round asks the stub itself and through the proxy, and the figures are differences and ratios within a round, of what was
answered in a stretch of time after a start that is not counted. Clients start one after the other over the stub's latency, so
that they do not ask in step. Requests are bytes made before, over kept connections of asyncio, so that asking costs little. A
picture is a 640x480 JPEG of blurred noise and grain.

CPU milliseconds a request of all three stand beside, as they hold on a busy machine, too. From them follow, where there are
many clients, the most requests a second that this machine's cores allow the proxy alone, and all three together, and how
many cores the proxy alone takes for 90 % of what the stub did.

`--hostile` measures something else: what harmful loads do to other clients (perf/hostile.py). So does `--gate`: what a gate costs
beside a border and ECSO (perf/gated.py).
"""

import asyncio
import base64
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from PIL import Image

from davsp import VisualSafetyPrompt
from davsp.runtime.files import manifest, write_json

TARGETS = {"added_p50_ms": 15.0, "throughput_ratio": 0.9, "memory_growth_mb": 10.0}
WARM = 2.0  # seconds
STUB = b'{"id":"1","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"ok"},"finish_reason":"stop"}]}'


async def stub(port: int) -> None:
    """Reads a request and answers after as many seconds as stand in its head X-Latency; with X-Pixels by what it sees."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                body = await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
                await asyncio.sleep(float(head.split(b"x-latency: ")[1].split(b"\r\n")[0]))
                reply = STUB.replace(b"ok", pixels(body)) if b"x-pixels: " in head else STUB
                size = str(len(reply)).encode()
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: "
                    + size
                    + b"\r\n\r\n"
                    + reply
                )
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port, limit=2**20, backlog=512)
    await server.serve_forever()


def pixels(body: bytes) -> bytes:
    """SHA-256 of the picture in a request, decoded."""
    file = base64.b64decode(body.split(b";base64,")[1].split(b'"')[0])
    return hashlib.sha256(Image.open(io.BytesIO(file)).convert("RGB").tobytes()).hexdigest().encode()


def proxy(core: int | None, options: list[str], hidden: list[str]) -> None:
    """`davsp serve`, on one core if one is named, as if the `hidden` packages were not installed."""
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    if core is not None:
        os.sched_setaffinity(0, {core})
    from davsp import cli

    sys.argv = ["davsp", "serve", *options]
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


async def ask(
    port: int, content: bytes, clients: int, left: Iterable[Any], apart: float = 0
) -> list[tuple[float, float]]:
    """When each reply came, and seconds that it took. The clients share what is `left` and start over `apart` seconds."""
    replies: list[tuple[float, float]] = []
    left = iter(left)

    async def client(number: int) -> None:
        await asyncio.sleep(apart * number / clients)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
        for _ in left:
            start = time.perf_counter()
            writer.write(content)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(head.decode())
            end = time.perf_counter()
            replies.append((end, end - start))
        writer.close()

    await asyncio.gather(*map(client, range(clients)))
    return replies


@dataclass
class Served:
    """A stub and a proxy before it."""

    stub_port: int
    port: int
    stub: psutil.Process
    proxy: psutil.Process

    def workers(self) -> list[psutil.Process]:
        return [self.proxy, *self.proxy.children()]

    def cpu(self) -> dict[str, float]:
        """Seconds that each has used, and this process, which asks."""
        return {"proxy": sum(map(cpu, self.workers())), "stub": cpu(self.stub), "client": cpu(psutil.Process())}


@contextmanager
def processes(prompt: str, core: int | None, *options: str, source: Path | None = None) -> Iterator[Served]:
    """They run, warmed up; the proxy from another checkout's `source`, if one is named, without uvloop if that one asks for none."""
    ports, run = [free_port(), free_port()], [sys.executable, __file__, "--serve"]
    options_of_proxy = [
        "--prompt",
        prompt,
        "--canvas",
        "336",
        "--upstream",
        f"http://127.0.0.1:{ports[0]}/v1",
        "--port",
        str(ports[1]),
    ]
    asked_for = (source.resolve().parent / "pyproject.toml").read_text() if source else "uvloop"
    hidden = [] if "uvloop" in asked_for else ["uvloop"]  # uvicorn takes it where it is installed
    proxy_task = json.dumps([core, [*options_of_proxy, "--no-probe", "--plain-names", *options], hidden])
    env = os.environ | ({"PYTHONPATH": str(source.resolve())} if source else {})
    started = [subprocess.Popen([*run, str(ports[0])]), subprocess.Popen([*run, proxy_task], env=env)]
    try:
        for port in ports:
            wait(port)
        served = Served(*ports, *(psutil.Process(one.pid) for one in started))
        asyncio.run(ask(served.port, request(served.port, 0, True), 64, range(256)))
        yield served
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


async def stretch(
    served: Served, through: bool, latency: float, picture: bool, seconds: float, clients: int
) -> dict[str, Any]:
    """Latencies, requests a second and CPU milliseconds a request, over so many seconds after the start."""
    port, start = served.port if through else served.stub_port, time.perf_counter() + WARM + latency
    end = start + seconds

    async def used() -> dict[str, float]:
        await asyncio.sleep(start - time.perf_counter())
        before = served.cpu()
        await asyncio.sleep(end - time.perf_counter())
        return {name: after - before[name] for name, after in served.cpu().items()}

    until_end = iter(lambda: time.perf_counter() < end, False)
    done, cpu = await asyncio.gather(ask(port, request(port, latency, picture), clients, until_end, latency), used())
    seconds_each = [took for at, took in done if start <= at < end]
    each = {f"{name}_cpu_ms": total / len(seconds_each) * 1e3 for name, total in cpu.items()}
    return {"seconds_each": seconds_each, "a_second": len(seconds_each) / seconds, **each}


def compare(served: Served, latency: float, picture: bool, seconds: float, clients: int) -> dict[str, Any]:
    """One round: the stub itself, then through the proxy."""
    direct, through = (asyncio.run(stretch(served, way, latency, picture, seconds, clients)) for way in (False, True))
    p50, p99 = (
        (np.quantile(through["seconds_each"], q) - np.quantile(direct["seconds_each"], q)) * 1e3 for q in (0.5, 0.99)
    )
    return {
        "latency_s": latency, "picture": picture, "clients": clients, "requests": len(through["seconds_each"]),
        "added_p50_ms": float(p50), "added_p99_ms": float(p99), "direct_a_second": direct["a_second"],
        "proxy_a_second": through["a_second"], "throughput_ratio": through["a_second"] / direct["a_second"],
        **{name: through[name] for name in ("proxy_cpu_ms", "stub_cpu_ms", "client_cpu_ms")},
    }  # fmt: skip


def main(
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
    rounds: int = 3,
    latencies: Annotated[str, typer.Option(help="Of the stub with many clients, in seconds.")] = "0.1,0.5,1",
    seconds: Annotated[float, typer.Option(help="That each stretch is measured.")] = 10,
    requests: Annotated[int, typer.Option(help="For memory.")] = 10_000,
    clients: int = 64,
    workers: Annotated[int | None, typer.Option(help="Of the proxy with many clients; left out: one a core.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of each worker; left out: the proxy's default.")] = None,
    beside: Annotated[str, typer.Option(help="What else ran.")] = "",
    hostile: Annotated[bool, typer.Option("--hostile", help="Measure harmful loads in place of all this.")] = False,
    gate: Annotated[bool, typer.Option("--gate", help="Measure what a gate costs in place of all this.")] = False,
    before: Annotated[Path | None, typer.Option(help="With --hostile: `src` of a checkout to compare with.")] = None,
    only: Annotated[str, typer.Option(help="With --hostile: part of the names of loads, or cpu; left out: all.")] = "",
    serve: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure, print, and write."""
    if serve:
        task = json.loads(serve)
        return asyncio.run(stub(task)) if isinstance(task, int) else proxy(*task)
    if hostile:
        import hostile as loads

        return loads.main(out, before, only, beside)
    if gate:
        import gated

        return gated.main(out, 20, beside)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    options = ["--workers", str(workers or cores), *(["--threads", str(threads)] if threads else [])]
    facts = {"seconds": seconds, "cores": cores, "many_clients_options": options}
    result: dict[str, Any] = {"manifest": manifest(rounds=rounds, beside=beside, **facts), "targets": TARGETS}
    with TemporaryDirectory() as folder:
        VisualSafetyPrompt.create(336, 30, "random", text="please be safe").save_pretrained(folder)
        one = min(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else None
        with processes(folder, one, "--threads", "1") as served:
            each = [(number, picture) for number in range(rounds) for picture in (False, True)]
            result["one_client"] = [compare(served, 0.02, picture, seconds, 1) for _, picture in each]
        with processes(folder, None, *options) as served:
            result["many_clients"] = [
                compare(served, float(latency), picture, seconds, clients)
                for _ in range(rounds)
                for latency in latencies.split(",")
                for picture in (False, True)
            ]
            result["figures"] = figures(result, cores)
            for result["memory"] in memory(served, requests, clients):
                if out:
                    write_json(out, result)  # what there is, should it be stopped
    print(json.dumps([*result["figures"], result["memory"]], indent=1))


def memory(served: Served, count: int, clients: int) -> Iterator[dict[str, Any]]:
    """Resident MB of the proxy, all workers together, after each twentieth of the requests, all with a picture."""
    content, resident = request(served.port, 0.0, True), []
    for done in range(1, 21):
        asyncio.run(ask(served.port, content, clients, range(count // 20)))
        resident.append(sum(one.memory_info().rss for one in served.workers()) / 2**20)
        yield {
            "requests": done * (count // 20),
            "every": count // 20,
            "resident_mb": resident,
            "growth_mb": resident[-1] - resident[0],
        }


def figures(result: dict[str, Any], cores: int) -> list[dict[str, Any]]:
    """Medians over the rounds, a row a setting, and what CPU milliseconds bound."""
    table = []
    rows = result["one_client"] + result["many_clients"]
    setting = ("clients", "latency_s", "picture")
    for key in dict.fromkeys(tuple(row[name] for name in setting) for row in rows):
        mine = [row for row in rows if tuple(row[name] for name in setting) == key]
        medians = {name: median(row[name] for row in mine) for name in mine[0] if name not in setting}
        if key[0] > 1:  # with one, the proxy has one core
            together = medians["proxy_cpu_ms"] + medians["stub_cpu_ms"] + medians["client_cpu_ms"]
            medians["bound_proxy_alone_a_second"] = cores * 1e3 / medians["proxy_cpu_ms"]
            medians["bound_all_three_a_second"] = cores * 1e3 / together
            goal = TARGETS["throughput_ratio"] * medians["direct_a_second"]
            medians["cores_for_target"] = goal * medians["proxy_cpu_ms"] / 1e3
        table.append(dict(zip(setting, key, strict=True)) | {name: round(value, 3) for name, value in medians.items()})
    return table


if __name__ == "__main__":
    typer.run(main)
