#!/usr/bin/env bash
# httpcore2 2.16.2: a pool with 64 idle connections to one server is asked for one more request.
# Expected: it takes an idle connection; the others are left alone, or looked at by the clock.
# Seen: at every request, and again when its reply ends, the system is asked about each idle connection (is it readable?). So what a
# request costs grows with the connections that are kept; keepalive_expiry=None changes nothing. A proxy of many clients splits its pool.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check httpx2==2.16.2 httpcore2==2.16.2 anyio==4.16.0
"$folder/venv/bin/python" - <<'P'
import asyncio
import httpcore2
import httpx2
from httpcore2._backends import anyio as backend

asked = 0
original = backend.AnyIOStream.get_extra_info

def counted(self, info):
    global asked
    asked += info == "is_readable"
    return original(self, info)

backend.AnyIOStream.get_extra_info = counted

async def server(reader, writer):
    try:
        while await reader.readuntil(b"\r\n\r\n"):
            await asyncio.sleep(0.05)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    except (asyncio.IncompleteReadError, asyncio.CancelledError):
        writer.close()

async def main():
    global asked
    listening = await asyncio.start_server(server, "127.0.0.1", 0)
    url = "http://127.0.0.1:%d/" % listening.sockets[0].getsockname()[1]
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=None)
    async with httpx2.AsyncClient(limits=limits, trust_env=False) as client:
        await asyncio.gather(*(client.get(url) for _ in range(64)))
        asked = 0
        await client.get(url)
    print("idle connections asked for one request:", asked)
    assert asked >= 64, "the behaviour has changed"

asyncio.run(main())
P
