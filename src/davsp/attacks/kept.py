"""What a run of attacks leaves on the disk, so that it can be killed at any moment and goes on to the same end."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from davsp.attacks.apgd import Found
from davsp.attacks.surface import files, png, rounded
from davsp.errors import DavspError
from davsp.files import read_bytes, read_json, sha256_bytes, write_bytes, write_json
from davsp.query import Query, open_picture

FOUND = "found.jsonl"
POINTS = 21  # of a loss curve that are kept


def same(path: Path, wanted: dict[str, Any]) -> None:
    """Write the record, or compare it with the one that is there.

    Raises:
        DavspError: the folder is of another run.
    """
    wanted = json.loads(json.dumps(wanted))
    if not path.exists():
        write_json(path, wanted)
        return
    there = read_json(path)
    if there != wanted:
        names = [n for n in wanted if not isinstance(there, dict) or there.get(n) != wanted[n]] or ["another field"]
        raise DavspError(
            f"{path} is of an attack with another {names[0]}; give another folder, or delete {path.parent}"
        )


def keep(
    folder: Path, queries: Sequence[Query], numbers: Sequence[int], best: Found, found: dict[str, dict[str, Any]]
) -> None:
    """Write the pictures of a batch, then its records; both are on the disk when this returns."""
    records = []
    for query, number, picture, losses, dead in zip(
        queries, numbers, files(rounded(best.pictures)), best.curve.tolist(), best.dead, strict=True
    ):
        name = f"{number:05d}.png"
        write_bytes(folder / "pictures" / name, png(picture))
        found[query.id] = {
            "query_id": query.id, "file": name, "sha256": sha256_bytes(picture.tobytes()), "dead": dead, **curve(losses),
        }  # fmt: skip
        records.append(found[query.id])
    append(folder / FOUND, records)


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


def records(path: Path) -> dict[str, dict[str, Any]]:
    """Query id -> record; a last line without an end, as a kill leaves it, is cut off the file."""
    if not path.exists():
        return {}
    data = read_bytes(path)
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        write_bytes(path, whole)
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
        return {row["query_id"]: row for row in rows}
    except (ValueError, TypeError, KeyError) as error:
        raise DavspError(f"{path} is damaged ({error}); delete {path.parent} to attack anew") from error


def opened(path: Path, sha256: str) -> Image.Image:
    """A picture that an attack made.

    Raises:
        DavspError: it is missing, or another one.
    """
    picture = open_picture(path)
    if sha256_bytes(picture.tobytes()) != sha256:
        raise DavspError(f"{path} is not the picture that was found; delete {path.parent.parent} to attack anew")
    return picture
