"""The loads on the proxy and on the judge in small: what is sent, and what is measured of it."""

import asyncio
import json
import subprocess
import sys
import threading
from contextlib import suppress
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import hostile
import judge
import psutil
import pytest

from proxy import until

spec = spec_from_file_location("perf_proxy", Path(hostile.__file__).with_name("proxy.py"))
assert spec and spec.loader
proxy = module_from_spec(spec)
spec.loader.exec_module(proxy)


@pytest.fixture
def stub():
    """The stub's port; it runs in this process."""
    port, running = proxy.free_port(), []

    async def run() -> None:
        running.extend([asyncio.get_running_loop(), asyncio.current_task()])
        with suppress(asyncio.CancelledError):
            await proxy.stub(port)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    proxy.wait(port)
    yield port
    loop, task = running
    loop.call_soon_threadsafe(task.cancel)
    thread.join()


def clients_of(port: int) -> int:
    """How many are connected to this process there."""
    connections = psutil.Process().net_connections("tcp")
    return sum(one.status == psutil.CONN_ESTABLISHED and one.laddr.port == port for one in connections)


def test_a_load_and_what_others_notice(stub, tmp_path, monkeypatch):
    """The stub stands for the proxy, too."""
    monkeypatch.setattr(hostile, "REST", 0.1)
    start = hostile.started

    def started(role, *arguments):
        """The load is there before others ask, whichever process a busy machine lets go first."""
        process = start(role, *arguments)
        if role == "send":
            until(lambda: clients_of(stub))
        return process

    monkeypatch.setattr(hostile, "started", started)
    path, body = tmp_path / "load", json.loads(hostile.values().split(b"\r\n\r\n")[1])
    assert len(body["tools"][0]["function"]["parameters"]["enum"]) == 90_000
    path.write_bytes(hostile.TEXT)
    served = proxy.Served(stub, stub, psutil.Process(), psutil.Process())
    row = hostile.measure(served, str(path), clients=3, count=30, longest=20)
    assert row["probe"]["asked"] == 30 and row["probe"]["statuses"] == row["stub"]["statuses"] == {"200": 30}
    assert 0 < row["probe"]["median_ms"] <= row["probe"]["p99_ms"] <= row["probe"]["worst_ms"]
    assert row["replies"]["200"]["count"] >= 6 and row["replies"].keys() == {"200"} and not row["killed"]
    assert hostile.missed(row, {"worst_ms": 0, "peak_mb": 1e6, "statuses": ["200", "429"]}) == ["worst_ms"]
    assert hostile.missed(row, {"statuses": ["431"]}) == ["statuses"] and hostile.missed(row, {}) == []


def test_the_stub_tells_the_pixels_that_it_saw(stub):
    import hashlib

    from PIL import Image

    seen = hostile.pixels(stub, proxy.jpeg())
    red = Image.new("RGB", (2, 3), "red")
    with hostile.connect(stub) as connection:
        connection.sendall(hostile.pictures(hostile.png(red), 1, b"X-Pixels: 1\r\n"))
        status, body = hostile.reply(connection)
    assert status == "200" and hashlib.sha256(red.tobytes()).hexdigest() in body.decode()
    assert (
        len(set(seen.values())) == 4 and seen["jpeg"] == seen["transparent"]
    )  # the stub drops alpha; canvases have none


def test_a_proxy_that_takes_too_much_memory_is_killed(monkeypatch):
    monkeypatch.setattr(hostile, "MOST", 1)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        with hostile.watched(psutil.Process(process.pid)) as memory:
            assert process.wait(20) < 0
        assert memory["killed"]


def test_peak_and_what_is_kept():
    with hostile.watched(psutil.Process()) as memory:
        block = bytearray(200_000_000)
        until(lambda: memory["kept_mb"] > 180)
        del block
        until(lambda: memory["kept_mb"] < 20)
    assert memory["peak_mb"] == pytest.approx(200, abs=20)


def test_the_interval_of_a_ratio():
    before = [2.0, 4, 8, 2, 4, 8, 2, 4, 8]
    new = [old * factor for old, factor in zip(before, (0.1, 0.5, 0.6, 0.7, 0.65, 0.6, 0.55, 0.8, 0.9), strict=True)]
    row = hostile.ratio({"before": before, "new": new})
    assert (row["ratio"], row["low"], row["high"]) == pytest.approx((0.6, 0.5, 0.8))


def test_two_builds_ask_the_same_judge(tmp_path):
    """This one twice: each answer is judged right and answered once, and both meet the same refusals."""
    out, root, name = tmp_path / "judge.json", Path(judge.__file__).parents[1], "10 % refused by chance"
    judge.main(
        root, out, rounds=1, count=30, only=[name], only_parts=False, beside="", serves=None, asks=None, without=None
    )
    written = json.loads(out.read_text())
    before, now = written["rounds"]
    assert before["requests"] == now["requests"] > 30 and {before["build"], now["build"]} == {"before", "now"}
    for row in written["rounds"]:
        assert (row["answered"], row["answered_twice"], row["right"]) == (30, 0, 30)
        assert row["most_under_way"] <= judge.MOST
    assert written["target"] == {"scenario": judge.JUDGED, "ratio": 3.0, "met": False}
    assert written["scenarios"][name]["now"]["wrong_or_unscored"] == 0
