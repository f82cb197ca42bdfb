"""`davsp` as a user runs it, within the test's own process."""

import sys
from pathlib import Path

import pytest

from davsp import cli


def run(*arguments: str | Path) -> int:
    """The exit code of `davsp ARGUMENTS`, run in this process through its entry point."""
    old, sys.argv = sys.argv, ["davsp", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)
    finally:
        sys.argv = old
