"""`davsp serve --workers 2`: both answer, what they count is summed, and they end together."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx2
import psutil
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from davsp import DavspError
from davsp.serve import workers
from davsp.serve.settings import ServeSettings
from proxy import CANVAS, GOOD, border, data_url, image_part, listening, picture_of, user
from tiny import picture

SLEEPERS = Path(__file__).parent / "sleepers.py"


@contextmanager
def sleeping(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A command with two workers that only sleep, and their process ids."""
    start = [sys.executable, str(SLEEPERS), *arguments]
    with subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as command:
        try:
            yield command, [int(command.stdout.readline()) for _ in range(2)]
        finally:
            command.kill()


def gone(pids: list[int]) -> bool:
    end = time.monotonic() + 20
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(psutil.pid_exists, pids))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all(number):
    with sleeping() as (command, pids):
        command.send_signal(number)
        assert command.wait(20) == 0 and gone(pids) and command.stderr.read() == ""


def test_a_second_signal_kills_those_that_do_not_end():
    with sleeping("deaf") as (command, pids):
        command.send_signal(signal.SIGTERM)
        # of two signals that come before the first is heard the system keeps one
        assert [command.stdout.readline() for _ in pids] == ["told\n"] * 2
        time.sleep(0.3)
        assert command.poll() is None
        command.send_signal(signal.SIGTERM)
        assert command.wait(20) == 0 and gone(pids)


def test_a_worker_that_dies_takes_all_along():
    with sleeping() as (command, pids):
        os.kill(pids[1], signal.SIGKILL)
        assert command.wait(20) == 1 and gone(pids)
        assert "a worker ended with exit code -9, so all were ended" in command.stderr.read()


def test_workers_outlive_no_command():
    with sleeping() as (command, pids):
        command.kill()
        assert gone(pids)


def test_an_address_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(DavspError, match="give another one"):
        workers.bound("127.0.0.1", listener.getsockname()[1], 2)
    with pytest.raises(DavspError, match="--host nowhere"):
        workers.bound("nowhere.invalid", 0, 2)


def test_two_workers_do_not_join_two_others():
    """Sockets that share an address would else take half of each other's connections, under another defense."""
    first = workers.bound("127.0.0.1", 0, 2)
    assert all(one.proto == socket.IPPROTO_TCP for one in first)  # else asyncio leaves Nagle's algorithm on
    with pytest.raises(DavspError, match="give another one"):
        workers.bound("127.0.0.1", first[0].getsockname()[1], 2)
    for one in first:
        one.close()


def test_threads_are_shared_among_the_workers(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    given = {"upstream": "http://x/v1"}
    assert [ServeSettings.of(workers=n, **given).threads for n in (1, 2, 8)] == [4, 2, 1]
    assert ServeSettings.of(workers=2, threads=3, **given).threads == 3
    with pytest.raises(DavspError, match="--workers"):
        ServeSettings.of(workers=0, **given)


@pytest.mark.slow
def test_the_command_with_two_workers(tmp_path):
    border().prompt.save_pretrained(tmp_path)
    bodies = []

    async def chat(request: Request) -> JSONResponse:
        bodies.append(await request.json())
        return JSONResponse(GOOD)

    with (
        listening(Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])) as upstream,
        command(tmp_path, upstream) as (process, url),
        ExitStack() as stack,
    ):
        clients = [stack.enter_context(httpx2.Client(base_url=url, timeout=60)) for _ in range(16)]
        images = [picture(seed, (40, 30)) for seed in range(16)]
        for client, image in zip(clients, images, strict=True):
            body = {"model": "m", "messages": [user(image_part(data_url(image)))]}
            assert client.post("/v1/chat/completions", json=body).json() == GOOD
        pictures = [picture_of(body["messages"][0]["content"][0]["image_url"]["url"]) for body in bodies]
        assert [image.tobytes() for image in pictures] == [border().paint(image).tobytes() for image in images]
        serving = [child for child in psutil.Process(process.pid).children() if open_connections(child)]
        assert len(serving) == 2 and sum(map(open_connections, serving)) == 16
        for client in clients:  # whichever worker is asked
            page = client.get("/metrics").text.splitlines()
            assert {'davsp_requests_total{status="200"} 16.0', "davsp_pictures_total 16.0"} <= set(page)
            assert {"davsp_under_way 0.0", "davsp_upstream_seconds_count 16.0"} <= set(page)
        process.terminate()
        assert process.wait(60) == 0 and gone([child.pid for child in serving])
        log = process.stderr.read()
        assert "2 workers listen at http://127.0.0.1" in log and "Traceback" not in log


@contextmanager
def command(folder: Path, upstream: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`davsp serve --workers 2`, and its address as soon as it can be reached."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = f"--prompt {folder} --canvas {CANVAS} --upstream {upstream} --port {port} --workers 2"
    start = [sys.executable, "-c", "from davsp import cli; cli.main()", "serve", "--no-probe", "--plain-names"]
    with subprocess.Popen([*start, *options.split()], stderr=subprocess.PIPE, text=True) as process:
        try:
            while process.poll() is None:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.1)
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def open_connections(worker: psutil.Process) -> int:
    """Connections of clients that it keeps."""
    connections = worker.net_connections("tcp")
    ports = {one.laddr.port for one in connections if one.status == psutil.CONN_LISTEN}
    return sum(one.status == psutil.CONN_ESTABLISHED and one.laddr.port in ports for one in connections)
