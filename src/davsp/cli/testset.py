"""What is asked in `davsp eval` and `davsp judge`: published sets, a user's own queries, or the embedded test."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from davsp.cli.inputs import embedded_protocol, say
from davsp.errors import DavspError

if TYPE_CHECKING:
    from davsp.query import Query


def asked(
    sets: Sequence[str],
    split: str,
    own: Path | None,
    model: str | None,
    limit: int | None,
    seed: int,
    skip_broken: bool,
) -> "tuple[list[Query], list[str]]":
    """The queries, and a sentence on everything that was left out or is short; each is said as well.

    Args:
        sets: `NAME=ROOT` of published sets.
        split: of the published sets.
        own: folder or .jsonl of own queries; with neither, the embedded test, which is davsp-mini's.
        model: as --model was given.
        limit: only so many of each set, drawn; of own queries the first of each benchmark.
        seed: of what is drawn.
        skip_broken: go on past broken pictures and rows.

    Raises:
        DavspError: both sets and own queries, an unknown set, or what a loader raises.
    """
    if sets and own:
        raise DavspError("--benchmark and --queries do not go together: they are scored by different rules; run twice.")
    if sets:
        return _noted(lambda: [q for spec in sets for q in _load(spec, split, limit, seed, skip_broken)])
    if own is None:
        return _first(embedded_protocol(model, seed).test, limit), []
    from davsp.dataset import load_queries

    found, notes = _noted(lambda: load_queries(own, skip_broken))
    return _first(found, limit), notes


def _load(spec: str, split: str, limit: int | None, seed: int, skip_broken: bool) -> "list[Query]":
    from davsp.benchmarks import BENCHMARKS

    name, _, root = spec.partition("=")
    if name not in BENCHMARKS or not root:
        raise DavspError(f"--benchmark {spec!r} is not NAME=FOLDER with a NAME of {', '.join(BENCHMARKS)}.")
    if not Path(root).expanduser().is_dir():
        raise DavspError(
            f"--benchmark {spec!r}: there is no folder {root}; docs/benchmarks.md says where to get {name}."
        )
    found: list[Query] = BENCHMARKS[name].load(Path(root).expanduser(), split, limit, seed, skip_broken=skip_broken)
    return found


def _noted(load: "Callable[[], list[Query]]") -> "tuple[list[Query], list[str]]":
    """What is loaded; its warnings as notes, and its errors with the option's name in place of the argument's."""
    from davsp.benchmarks.source import ShortWarning, SkippedWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = load()
        except DavspError as error:
            raise DavspError(str(error).replace("skip_broken=True", "--skip-broken")) from error
    notes = []
    for warning in caught:
        if issubclass(warning.category, (SkippedWarning, ShortWarning)):
            notes.append(str(warning.message))
            say(f"note: {warning.message}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return found, notes


def _first(queries: "list[Query]", limit: int | None) -> "list[Query]":
    """The first of each benchmark, of a benign one of each category."""
    if limit is None:
        return queries
    seen: dict[tuple[str, str], int] = {}
    kept = []
    for query in queries:
        key = (query.benchmark, query.category if query.label == "benign" else "")
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= limit:
            kept.append(query)
    return kept
