"""Custom queries, those of the user, on disk: a folder with `queries.jsonl` and the pictures that it names.

A line is a JSON object with `id`, `question`, `label` ("malicious" or "benign") and, if you like, `image` (a path
relative to the file), `benchmark`, `category`, `group`, `reference`, `answers`, and `turns`: what was said before the
question, objects with `role` ("user", "assistant", in turn) and `content`.
"""

import io
import json
import warnings
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from davsp.benchmarks.source import SkippedWarning, fault
from davsp.errors import DavspError
from davsp.query import Query, Turn, turns_fault
from davsp.runtime.files import read_text, write_bytes, write_text

NAME = "queries.jsonl"
FIELDS = {f.name for f in fields(Query)}


def load_queries(path: str | Path, skip_broken: bool = False, allow_outside: bool = False) -> list[Query]:
    """Read a folder (its `queries.jsonl`) or a .jsonl file. Pictures stay on disk until they are used, but must be whole.

    Args:
        path: the folder or file.
        skip_broken: leave out lines that are no query and pictures that are missing or broken, and warn, in place of raising.
        allow_outside: take pictures from outside the file's folder, too. A file from a stranger could name any other.

    Raises:
        DavspError: nothing there, no lines, a line that is no query, an unknown field, an id twice, a picture that is missing,
            outside the folder, truncated, animated, CMYK, of more than 8 bits, of one pixel or of too many.
    """
    path = Path(path)
    file = path / NAME if path.is_dir() else path
    if not file.exists():
        raise DavspError(f"there are no queries at {file}; give a folder with {NAME} or a .jsonl file.")
    lines = read_text(file).split("\n")  # not splitlines: a question may hold U+2028
    queries: dict[str, Query] = {}
    skipped = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            query = _query(file, number, line, allow_outside)
            if query.id in queries:
                raise DavspError(f"{file}, line {number}: the id {query.id!r} is there twice; make the ids unique.")
            queries[query.id] = query
        except DavspError as error:
            if not skip_broken:
                raise
            skipped.append(str(error))
    if skipped:
        rest = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        warnings.warn(f"{file}: skipped {len(skipped)}: {' '.join(skipped[:3])}{rest}", SkippedWarning, stacklevel=2)
    if not queries:
        raise DavspError(f"{file} holds no query; add at least one line.")
    return list(queries.values())


def _query(file: Path, number: int, line: str, allow_outside: bool) -> Query:
    where = f"{file}, line {number}"
    try:
        values: dict[str, Any] = json.loads(line)
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DavspError(f"{where} holds half of a character ({error.reason}); write the text in UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise DavspError(f"{where} is not JSON ({error}); write one object a line.") from error
    if not isinstance(values, dict):
        raise DavspError(f"{where} is not a JSON object; write one query a line.")
    if unknown := set(values) - FIELDS:
        raise DavspError(
            f"{where} has the unknown field {sorted(unknown)[0]!r}; a query has {', '.join(sorted(FIELDS))}."
        )
    if values.get("label") not in ("malicious", "benign"):
        raise DavspError(f'{where}: label must be "malicious" or "benign", not {values.get("label")!r}.')
    for name in FIELDS - {"image", "answers", "turns"}:
        if name in values and not isinstance(values[name], str):
            raise DavspError(f"{where}: {name} must be a text, not {values[name]!r}.")
    if not values.get("id") or not values.get("question"):
        raise DavspError(f"{where} lacks an id or a question; give both.")
    image = values.pop("image", None)
    if "\0" in str(image):
        raise DavspError(f"{where} names the image {str(image)!r}, which no file can be called; mend the path.")
    if image is not None:
        image = file.parent / str(image)
        if not allow_outside and not image.resolve().is_relative_to(file.parent.resolve()):
            raise DavspError(
                f"{where} names the image {str(image)!r}, which is outside {file.parent}; copy it there, or give allow_outside=True."
            )
        if not image.is_file():
            raise DavspError(f"{where} names the image {str(image)!r}, which is not there; mend the path.")
        if why := fault(image):
            raise DavspError(f"{where} names the image {str(image)!r}, which {why}; mend it or take the line out.")
    answers = values.pop("answers", [])
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise DavspError(f"{where}: answers must be a list of texts, not {answers!r}.")
    turns = _turns(where, values.pop("turns", []))
    return Query(**{"benchmark": values["label"]} | values, image=image, answers=tuple(answers), turns=turns)


def _turns(where: str, turns: Any) -> tuple[Turn, ...]:
    keys, whole = {"role", "content"}, isinstance(turns, list)
    if not whole or not all(isinstance(t, dict) and t.keys() == keys and isinstance(t["content"], str) for t in turns):
        raise DavspError(f'{where}: turns must be a list of {{"role": "user", "content": "…"}}, not {turns!r}.')
    read = tuple((str(turn["role"]), turn["content"]) for turn in turns)
    if why := turns_fault(read):
        raise DavspError(f"{where}: {why}; mend them.")
    return read


def save_queries(folder: str | Path, queries: Iterable[Query]) -> None:
    """Write queries as `load_queries` reads them, pictures as PNG beside them."""
    folder, lines = Path(folder), []
    for query in queries:
        values = {f: getattr(query, f) for f in sorted(FIELDS) if getattr(query, f)}
        if query.turns:
            values["turns"] = [{"role": role, "content": text} for role, text in query.turns]
        if (picture := query.picture()) is not None:
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            values["image"] = f"images/{query.id}.png"
            write_bytes(folder / values["image"], buffer.getvalue())
        lines.append(json.dumps(values, ensure_ascii=False) + "\n")
    write_text(folder / NAME, "".join(lines))
