"""What long work keeps on disk, so that it can be killed at any moment, goes on where it was, and never mixes two runs.

A file is kept under an identity: all that the result depends on, as JSON. It is only good for the same identity and refused
for another. Two forms hold it: a state (a JSON object with the field `identity`, replaced as a whole by `write_json`), and a
record (a file that is the identity, beside what was made under it). What grows line by line is appended to.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from davsp.errors import DavspError
from davsp.runtime import parallel
from davsp.runtime.files import read_bytes, read_json, write_json

ANEW = "choose another folder, give those settings again, or start anew with --no-resume (resume=False in Python)"


def check(path: Path, stored: Mapping[str, Any], identity: Mapping[str, Any], mend: str = ANEW) -> None:
    """Compare the identity that a file is kept under with that of the work now, both as JSON: a tuple equals a list.

    Args:
        path: of the file, for the message.
        stored: as it was read.
        mend: what the message advises.

    Raises:
        DavspError: they differ; it names the fields that do.
    """
    now = json.loads(json.dumps(identity))
    names = [name for name in {**stored, **now} if stored.get(name, ...) != now.get(name, ...)]
    if names:
        raise DavspError(f"{path} is of a run with other settings ({', '.join(names)}): {mend}")


def restore(path: Path, identity: Mapping[str, Any], **fields: type) -> dict[str, Any] | None:
    """The state in a file of JSON; None if there is none.

    Args:
        identity: of the work now.
        fields: what a state holds besides its identity, and of which type.

    Raises:
        DavspError: the file is of another identity, or no state.
    """
    if not path.exists():
        return None
    state = read_json(path)
    for name, kind in {"identity": dict, **fields}.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            raise DavspError(f"{path} is not a state to go on from (it holds no {name}); delete it to start anew")
    check(path, state["identity"], identity)
    return dict(state)


def record(path: Path, identity: Mapping[str, Any], expected: bool = False) -> None:
    """Write an identity as a file of its own, or compare it with the one that is there; of several processes the first does.

    Args:
        expected: something was made under a record already, so that one must be there.

    Raises:
        DavspError: the one that is there is another, or an expected one is missing.
    """
    if parallel.rank() > 0:
        return
    if not path.exists() and not expected:
        write_json(path, identity)
        return
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise DavspError(f"{path} is no record of a run; delete {path.parent} to start anew")
    check(path, stored, identity, f"give another folder, or delete {path.parent} to start anew")


def append(path: Path, text: str) -> None:
    """Add lines to a file, which is made if it is missing; they are on the disk when this returns.

    Args:
        text: whole lines, each with its end.

    Raises:
        DavspError: the disk is full.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DavspError(f"cannot write {path}: {error.strerror}; free space and run again to go on") from error


def lines(path: Path) -> list[bytes]:
    """The lines of a file without their ends; a last one without an end, as a kill leaves it, is left out.

    Raises:
        DavspError: the file is missing or can't be read.
    """
    return read_bytes(path).split(b"\n")[:-1]
