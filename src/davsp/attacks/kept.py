"""What a run of attacks leaves on the disk, so that it can be killed at any moment and goes on to the same end."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from davsp.attacks.apgd import Found
from davsp.attacks.surface import files, png, rounded
from davsp.errors import DavspError
from davsp.query import Query, open_picture
from davsp.runtime.files import read_bytes, read_json, sha256_bytes, write_bytes, write_json

FOUND = "found.jsonl"
POINTS = 21  # of a loss curve that are kept


def same(path: Path, wanted: dict[str, Any], made: bool = False) -> None:
    """Write the record of what a folder is made with, or compare it with the one that is there.

    Args:
        made: something that should have a record is there.

    Raises:
        DavspError: the folder is of another run, or has no record.
    """
    wanted = json.loads(json.dumps(wanted))
    if not path.exists() and not made:
        write_json(path, wanted)
        return
    there = read_json(path)
    if there != wanted:
        names = [n for n in wanted if not isinstance(there, dict) or there.get(n) != wanted[n]] or ["another field"]
        raise DavspError(
            f"{path.parent} was made with another {names[0]}; give another folder, or delete this one to attack anew"
        )


def keep(
    folder: Path, queries: Sequence[Query], numbers: Sequence[int], best: Found, found: dict[str, dict[str, Any]]
) -> None:
    """Write the pictures of a batch, then its records; both are on the disk when this returns. Records that are there stay."""
    new = []
    for query, number, picture, losses, dead in zip(
        queries, numbers, files(rounded(best.pictures)), best.curve.tolist(), best.dead, strict=True
    ):
        name = f"{number:05d}.png"
        write_bytes(folder / "pictures" / name, png(picture))
        if query.id in found:  # of a batch that a kill cut in two; it is made again to the same bits
            continue
        found[query.id] = {
            "query_id": query.id, "file": name, "sha256": sha256_bytes(picture.tobytes()), "dead": dead, **curve(losses),
        }  # fmt: skip
        new.append(found[query.id])
    append(folder / FOUND, new)


def curve(losses: Sequence[float]) -> dict[str, list[Any]]:
    """Some points of a loss curve, the first and the last among them."""
    places = sorted({round(i * (len(losses) - 1) / (POINTS - 1)) for i in range(POINTS)})
    return {"steps": places, "curve": [round(losses[i], 5) for i in places]}


def append(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Add lines; they are on the disk when this returns.

    Raises:
        DavspError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DavspError(f"{path} cannot be written ({error.strerror}); free some space and run again") from error


def records(path: Path, field: str) -> dict[str, dict[str, Any]]:
    """Query id -> record; a last line without an end, as a kill leaves it, is cut off the file.

    Raises:
        DavspError: a line is damaged: no JSON, or without `query_id`, `field`, `steps` or `curve`.
    """
    if not path.exists():
        return {}
    data = read_bytes(path)
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        write_bytes(path, whole)
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
        return {row["query_id"]: row for row in rows if row[field] and row["steps"] and row["curve"]}
    except (ValueError, TypeError, KeyError) as error:
        raise DavspError(f"{path} is damaged ({error}); delete {path.parent} to attack anew") from error


def checked(folder: Path, record: dict[str, Any]) -> Path:
    """The file of a picture that an attack made.

    Raises:
        DavspError: it is missing, or another one.
    """
    path = folder / "pictures" / str(record["file"])
    try:
        found = sha256_bytes(open_picture(path).tobytes())
    except DavspError:
        found = ""
    if found != record["sha256"]:
        raise DavspError(f"{path} is not the picture that was found; delete {folder} to attack anew")
    return path
