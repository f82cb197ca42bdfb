"""What a run of attacks leaves on the disk, so that it can be killed at any moment and goes on to the same end."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from davsp.attacks.apgd import SearchResult
from davsp.attacks.surface import files, png, rounded
from davsp.errors import DavspError, words_of
from davsp.query import Query, open_picture
from davsp.runtime import journal
from davsp.runtime.files import sha256_bytes, write_bytes

RECORDS = "found.jsonl"
POINTS = 21  # of a loss curve that are kept


def save_batch(
    folder: Path,
    queries: Sequence[Query],
    numbers: Sequence[int],
    result: SearchResult,
    records: dict[str, dict[str, Any]],
) -> None:
    """Write the pictures of a batch, then its records; both are on the disk when this returns. Records that are there stay."""
    new = []
    for query, number, picture, losses, dead in zip(
        queries, numbers, files(rounded(result.pictures)), result.curve.tolist(), result.dead, strict=True
    ):
        name = f"{number:05d}.png"
        write_bytes(folder / "pictures" / name, png(picture))
        if query.id in records:  # of a batch that a kill cut in two; it is made again to the same bits
            continue
        records[query.id] = {
            "query_id": query.id, "file": name, "sha256": sha256_bytes(picture.tobytes()), "dead": dead,
            **curve_points(losses),
        }  # fmt: skip
        new.append(records[query.id])
    append(folder, new)


def curve_points(losses: Sequence[float]) -> dict[str, list[Any]]:
    """Some points of a loss curve, the first and the last among them."""
    places = sorted({round(i * (len(losses) - 1) / (POINTS - 1)) for i in range(POINTS)})
    return {"steps": places, "curve": [round(losses[i], 5) for i in places]}


def append(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    """Add records to those of an attack; they are on the disk when this returns."""
    journal.append(folder / RECORDS, "".join(json.dumps(record) + "\n" for record in records))


def read_records(folder: Path, field: str) -> dict[str, dict[str, Any]]:
    """Query id -> record; a last line without an end, as a kill leaves it, is cut off the file.

    Raises:
        DavspError: a line is damaged: no JSON, or without `query_id`, `field`, `steps` or `curve`.
    """
    path = folder / RECORDS
    if not path.exists():
        return {}
    lines = journal.lines(path)
    whole = b"".join(line + b"\n" for line in lines)
    if len(whole) < path.stat().st_size:
        write_bytes(path, whole)
    try:
        records = [json.loads(line) for line in lines]
        return {one["query_id"]: one for one in records if one[field] and one["steps"] and one["curve"]}
    except (ValueError, TypeError, KeyError) as error:
        raise DavspError(f"{path} is damaged ({words_of(error)}); delete {folder} to attack anew") from error


def picture_file(folder: Path, record: dict[str, Any]) -> Path:
    """The file of a picture that an attack made.

    Raises:
        DavspError: it is missing, or another one.
    """
    path, mend = folder / "pictures" / str(record["file"]), f"delete {folder} to attack anew"
    if not path.exists():
        raise DavspError(f"{path} is missing; {mend}")
    if sha256_bytes(open_picture(path).tobytes()) != record["sha256"]:
        raise DavspError(f"{path} is not the picture that was found; {mend}")
    return path
