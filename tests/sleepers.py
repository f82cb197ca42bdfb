"""Two workers that only sleep, under `davsp.serve.workers`: run as a program by test_serve_workers.py.

    python tests/sleepers.py [deaf]

Each prints its process id. A deaf one does not end on SIGTERM; it prints that it was told.
"""

import os
import signal
import socket
import sys
import time

from davsp.errors import DavspError
from davsp.serve import workers


def sleep(listening: socket.socket) -> None:
    if sys.argv[1:] == ["deaf"]:
        signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"told\n"))
    os.write(1, f"{os.getpid()}\n".encode())
    time.sleep(60)


if __name__ == "__main__":
    try:
        workers.run(sleep, 2, "127.0.0.1", 0)
    except DavspError as error:
        sys.exit(str(error))
