#!/usr/bin/env bash
# uvloop 0.23.0: a server whose one client sends without a pause, as an upload does.
# Expected: as in asyncio's own loop, a connection is read once, then whatever else is ready has its turn.
# Seen: one connection is read up to 32 times (256 KiB each) before anything else runs, so four quick uploads hold a loop for 30 MiB a turn.
# A server that throws a refused upload away has to pause the connection itself.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check uvloop==0.23.0
"$folder/venv/bin/python" - <<'P'
import asyncio
import socket
import threading
import time
import uvloop

class Sink(asyncio.Protocol):
    in_a_row = most = 0

    def data_received(self, data):
        if Sink.in_a_row == 0:
            asyncio.get_running_loop().call_soon(self.turn)
        Sink.in_a_row += 1
        Sink.most = max(Sink.most, Sink.in_a_row)
        time.sleep(0.001)  # so that there is always more to read

    def turn(self):
        Sink.in_a_row = 0

def send(port):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(bytes(2**26))

async def main():
    server = await asyncio.get_running_loop().create_server(Sink, "127.0.0.1", 0)
    client = threading.Thread(target=send, args=server.sockets[0].getsockname()[1:])
    client.start()
    while client.is_alive():
        await asyncio.sleep(0.05)
    server.close()

most = {}
for name, run in (("asyncio", asyncio.run), ("uvloop", uvloop.run)):
    Sink.most = Sink.in_a_row = 0
    run(main())
    most[name] = Sink.most
print("reads of one connection before another callback runs:", most)
assert most["asyncio"] == 1 and most["uvloop"] > 8, "the behaviour has changed"
P
