"""`kill -9` at any moment of `davsp eval`, and the same command again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("rounds", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_with_the_same_files(tmp_path: Path, rounds: int) -> None:
    """At most one batch is answered again for each kill, nothing is lost, nothing is left behind (tests/killed.py)."""
    here = Path(__file__).parent
    seed = "1" if rounds == 1 else "0"  # of 1 the first kill is at a write, not after a time that may be too late
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(here), "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, str(here / "killed.py"), str(tmp_path), str(rounds), seed],
        env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["asked"] == 22 and report["writes"] > 30, report
    assert report["kills"] >= 0.9 * rounds, report  # the rest were due after the run's end
