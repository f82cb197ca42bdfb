"""The two lists of what is installed: the same versions, and a hash of each file."""

import re
from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PIN = re.compile(r"^([\w.-]+)==([^\s;]+)\s*(?:;\s*([^\\\n]*))?", re.MULTILINE)


def pins(name: str) -> dict[str, tuple[str, str]]:
    """Package -> version and, if it is not for everyone, for whom."""
    found = PIN.findall((ROOT / name).read_text())
    return {canonicalize_name(package): (version, where.strip().replace('"', "'")) for package, version, where in found}


def test_hashes_are_of_the_versions_in_the_lock() -> None:
    lock = pins("requirements.lock")
    assert len(lock) > 100 and lock.pop("torch")
    assert pins("requirements-hashes.txt") == lock, "run `make hashes`"


def test_every_pin_has_hashes_and_nothing_tells_where_it_was_fetched() -> None:
    lines = (ROOT / "requirements-hashes.txt").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    for entry in re.split(r"\n(?=\S)", text):
        first, *hashes = entry.replace("\\\n", "\n").splitlines()
        assert PIN.match(first) and hashes, first
        assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64} ?", line) for line in hashes), first
