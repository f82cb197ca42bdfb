"""Files of rows: csv, TSV, parquet, JSON and JSON lines, each row with where it stands; what is wrong goes to `Problems`."""

import base64
import binascii
import csv
import io
import json
import os.path
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from davsp.benchmarks.source import Problems, Record
from davsp.errors import DavspError, words_of
from davsp.runtime.files import read_text

HIDDEN = re.compile(r"(^|/)(\.|__MACOSX)")
LONGEST_FIELD = 1 << 30  # of a TSV: a picture in base64 is a field


def first(root: Path, *names: str) -> Path | None:
    """The first of these paths under `root` that is there."""
    return next((root / name for name in names if os.path.exists(root / name)), None)


def beside(folder: Path, stem: str, suffixes: Sequence[str] = (".jpg", ".png", ".jpeg")) -> Path:
    """The picture `stem` with whichever suffix is there; with the first one if there is none."""
    paths = [folder / f"{stem}{suffix}" for suffix in suffixes]
    return next((path for path in paths if os.path.exists(path)), paths[0])


def files_in(folder: Path, pattern: str) -> list[Path]:
    """The paths that match, in order, without the hidden ones: macOS leaves `._name` and `.DS_Store` beside all it copies."""
    return sorted(path for path in folder.glob(pattern) if not HIDDEN.search(path.relative_to(folder).as_posix()))


def csv_rows(
    path: Path, needed: Sequence[str], problems: Problems, delimiter: str = ","
) -> Iterator[tuple[str, Record]]:
    """Where it stands and the fields of each row of a csv or TSV with a head.

    Raises:
        DavspError: unreadable, not UTF-8, or a needed column is not there.
    """
    text = read_text(path)
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        _need(path, rows.fieldnames or [], needed)
        for number, row in enumerate(rows, 2):
            if None in row or None in row.values():
                problems.add(f"{path}, row {number} has not as many fields as the head", "fetch the file again")
            else:
                yield f"{path}, row {number}", row
    except csv.Error as error:
        raise DavspError(f"{path} is no table: {error}; fetch it again.") from error
    finally:
        csv.field_size_limit(before)


def parquet_rows(paths: Sequence[Path], needed: Sequence[str]) -> Iterator[tuple[str, Record]]:
    """Where it stands and the fields of each row of parquet files.

    Raises:
        DavspError: pyarrow is not installed, a file is no parquet, or a needed column is not there.
    """
    pyarrow = _pyarrow(paths[0])
    for path in paths:
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                _need(path, file.schema_arrow.names, needed)
                for batch in file.iter_batches(batch_size=64):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{path}, row {number}", row
        except (OSError, pyarrow.ArrowException) as error:
            raise _unreadable(path, error) from error


def parquet_has(path: Path, columns: Sequence[str]) -> bool:
    """Whether a parquet file has all these columns: two data sets may name their files alike."""
    pyarrow = _pyarrow(path)
    try:
        return set(columns) <= set(pyarrow.parquet.read_schema(path).names)
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from error


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        if find_spec("pyarrow") is None:
            raise DavspError(
                f"{path} is a parquet file; its reader comes with pip install 'davsp[parquet]'."
            ) from error
        raise DavspError(
            f"{path} is a parquet file, and its reader cannot be imported ({words_of(error)}); install pyarrow anew."
        ) from error
    return pyarrow


def _unreadable(path: Path, error: Exception) -> DavspError:
    if isinstance(error, OSError) and error.strerror:  # the system's, not Arrow's
        return DavspError(f"cannot read {path}: {error.strerror}")
    return DavspError(f"{path} is no readable parquet file: {words_of(error)}; fetch it again.")


def json_file(path: Path, problems: Problems) -> Any:
    """Parse a JSON file; a key that occurs twice in one object is a problem, where `json` would keep the last one.

    Raises:
        DavspError: missing or not JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> Record:
        body: Record = {}
        for key, value in pairs:
            if key in body:
                problems.add(f"{path}: the id {key!r} occurs twice", "delete one of the two")
            body.setdefault(key, value)
        return body

    try:
        return json.loads(read_text(path), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DavspError(f"{path} is not JSON: {error}; fetch it again.") from error


def json_rows(path: Path, problems: Problems) -> Iterator[tuple[str, Any]]:
    """Where it stands and each row of a JSON file that is a list of rows, or an object of rows by id.

    Raises:
        DavspError: missing, not JSON, or neither.
    """
    body = json_file(path, problems)
    if isinstance(body, dict):
        yield from ((f"{path}, item {name!r}", row) for name, row in body.items())
    elif isinstance(body, list):
        yield from ((f"{path}, item {number}", row) for number, row in enumerate(body, 1))
    else:
        raise DavspError(f"{path} is neither a list nor an object of rows; fetch it again.")


def json_lines(
    path: Path, needed: Sequence[str], problems: Problems, other: Sequence[str] = ()
) -> Iterator[tuple[str, Record]]:
    """Where it stands and the object of each line of a JSON-lines file, with the fields of `has`."""
    for number, line in enumerate(read_text(path).split("\n"), 1):  # not splitlines: a text may hold U+2028
        where = f"{path}, line {number}"
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            problems.add(f"{where} is not JSON", "fetch the file again")
            continue
        if row is not None and has(row, needed, where, problems, other):
            yield where, row


def has(row: Any, needed: Sequence[str], where: str, problems: Problems, other: Sequence[str] = ()) -> bool:
    """Whether a row is an object with text in the needed fields, and anything in the other ones; if not, a problem."""
    if not isinstance(row, dict):
        problems.add(f"{where} is no object", "fetch the file again")
        return False
    lacks = [name for name in (*needed, *other) if row.get(name) is None]
    odd = [name for name in needed if name not in lacks and not _is_text(row[name])]
    if lacks:
        problems.add(f"{where} lacks {', '.join(lacks)}", "fetch the file again")
    elif odd:
        problems.add(f"{where} has no text in {', '.join(odd)}", "fetch the file again")
    return not lacks and not odd


def _is_text(value: Any) -> bool:
    """Whether it is text that can be written again: JSON may hold half of a surrogate pair."""
    return isinstance(value, str) and value.encode(errors="replace").decode() == value


def text(row: Record, name: str) -> str:
    """The text or number in a field that need not be there, as text; "" for whatever else is."""
    value = row.get(name)
    return str(value) if isinstance(value, int | float) or _is_text(value) else ""


def lists(parts: Any, key: str) -> bool:
    """Whether `parts` is an object that holds a list of texts there."""
    texts = parts.get(key) if isinstance(parts, dict) else None
    return isinstance(texts, list) and all(map(_is_text, texts))


def _need(path: Path, columns: Sequence[str], needed: Sequence[str]) -> None:
    lacks = [name for name in needed if name not in columns]
    if lacks:
        there = ", ".join(columns) or "none"
        raise DavspError(f"{path} lacks the column {', '.join(lacks)} (it has: {there}); give the file as published.")


def shards(folder: Path, split: str, problems: Problems) -> list[Path]:
    """The files `<split>-00000-of-00004[-hash].parquet` of a folder, in order.

    Two files for one shard (a folder that was fetched in two revisions) are a DavspError; a missing one is a problem.
    """
    shard_of: dict[int, Path] = {}
    total = 0
    for path in files_in(folder, f"{split}-*.parquet"):
        parts = re.fullmatch(rf"{split}-(\d+)-of-(\d+)(-\w+)?\.parquet", path.name)
        if parts is None:
            continue
        number, total = int(parts[1]), max(total, int(parts[2]))
        if number in shard_of:
            raise DavspError(
                f"{shard_of[number]} and {path} are the same shard of two revisions; delete the older one."
            )
        shard_of[number] = path
    missing = [number for number in range(total) if number not in shard_of]
    for number in missing:
        problems.add(f"{folder} lacks shard {number} of 0 to {total - 1} of {split}", "fetch it")
    return [shard_of[number] for number in sorted(shard_of)]


def image_bytes(value: Any, where: str, problems: Problems) -> bytes | None:
    """The bytes of a picture from a parquet or TSV cell: raw, struct{bytes, path}, base64; None, with a problem, if none."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, str):
        try:
            value = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            value = None
    if isinstance(value, bytes) and value:
        return value
    problems.add(f"{where} has no readable picture", "fetch the file again")
    return None


def tsv_rows(path: Path, needed: Sequence[str], problems: Problems) -> Iterator[tuple[str, Record]]:
    """Rows of a VLMEvalKit TSV with `image` as bytes; a short `image` is the index of the row that holds the picture."""
    rows = list(csv_rows(path, ["index", "image", *needed], problems, "\t"))
    held = {row["index"]: row["image"] for _, row in rows if len(row["image"]) > 64}
    for where, row in rows:
        image = row["image"] if len(row["image"]) > 64 else held.get(row["image"], row["image"])
        data = image_bytes(image, where, problems)
        if data is not None:
            yield where, row | {"image": data}
