"""The processes of `--num-processes`, as forks of the tests' own: what a fresh one imports for seconds is there already."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from davsp import cli
from davsp.runtime import parallel
from test_cli import run


class Fork(subprocess.Popen):
    """What `davsp.runtime.parallel.launch` needs of `subprocess.Popen`, which does no more than to give it its type."""

    def __init__(self, command: list[str], env: dict[str, str], stdout: int | None, stderr: Any) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, where there are threads
            self.pid = os.fork()
        if self.pid == 0:
            code: object = 99
            try:
                os.environ.clear()
                os.environ.update(env)
                for number, to in ((1, stdout), (2, stderr)):
                    if to is not None:
                        os.dup2(os.open(os.devnull, os.O_WRONLY) if isinstance(to, int) else to.fileno(), number)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
                sys.argv = ["davsp", *command[command.index("davsp.cli") + 1 :]]
                cli.main()
            except SystemExit as stop:
                code = stop.code or 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code if isinstance(code, int) else 1)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


def forked(*command: str | Path) -> int:
    """The exit code of `davsp COMMAND`, whose processes are forks."""
    parallel._wait([])  # its signature is checked against the real Popen from its first call on
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "subprocess", SimpleNamespace(Popen=Fork, DEVNULL=-3))
        return run(*command)
