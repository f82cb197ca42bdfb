"""`davsp eval` killed with SIGKILL at moments drawn by seed, and the same command again: tests/killed.py, a program of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from faults import Seen


def run(seed: int, count: int) -> Seen:
    """So many runs, each killed once or twice."""
    seen, here = Seen(tried=count), Path(__file__).parents[1]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(here), *sys.path]),
        "COLUMNS": "100",
    }
    with TemporaryDirectory() as folder:
        command = [sys.executable, str(here / "killed.py"), folder, str(count), str(seed)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        seen.broken.append(done.stderr[-2000:])
    else:
        report = json.loads(done.stdout.splitlines()[-1])
        seen.outcomes["kills"] = report["kills"]
        seen.outcomes["runs that ended with the files of one that was not killed"] = count
    return seen
