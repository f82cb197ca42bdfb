"""What is asked in `davsp eval` and `davsp judge`: published sets, a user's own queries, or the embedded test.

And what `--benchmark` and a split file name in the commands that make a vector or a prompt.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from davsp.cli.inputs import embedded_protocol, say
from davsp.errors import DavspError

if TYPE_CHECKING:
    from davsp.query import Query

T = TypeVar("T")


def asked(
    sets: Sequence[str],
    split: str,
    own: Path | None,
    model: str | None,
    limit: int | None,
    seed: int,
    skip_broken: bool,
    rebuild: bool = False,
    types: Sequence[str] = (),
) -> "tuple[list[Query], list[str]]":
    """The queries, and a sentence on everything that was left out or is short; each is said as well.

    Args:
        sets: `NAME=ROOT` of published sets.
        split: of the published sets: a name, or a file of `davsp data split`, whose test part is taken.
        own: folder or .jsonl of own queries; with neither, the embedded test, which is davsp-mini's.
        model: as --model was given.
        limit: only so many of each set, drawn; of own queries the first of each benchmark.
        seed: of what is drawn.
        skip_broken: go on past broken pictures and rows.
        rebuild: typeset the pictures that can be.
        types: picture types of MM-SafetyBench; none: the three with pictures.

    Raises:
        DavspError: both sets and own queries, an unknown set, options that do not go together, or what a loader raises.
    """
    if sets and own:
        raise DavspError("--benchmark and --queries do not go together: they are scored by different rules; run twice.")
    roots = folders(sets)
    if types and "mm_safetybench" not in roots:
        raise DavspError("--type goes with --benchmark mm_safetybench=FOLDER.")
    if rebuild and not {"figstep", "mm_safetybench"} & set(roots):
        raise DavspError("--rebuild goes with --benchmark figstep=FOLDER or mm_safetybench=FOLDER.")
    if roots and is_split_file(split):
        if limit or skip_broken or rebuild or types:
            raise DavspError(
                "--limit, --skip-broken, --rebuild and --type do not go with a split file: it says all that."
            )
        from davsp.benchmarks.protocol import for_test

        return noted(lambda: for_test(Path(split), roots))
    if roots:
        return noted(lambda: _load(roots, split, limit, seed, skip_broken, rebuild, types))
    if own is None:
        return _first(embedded_protocol(model, seed).test, limit), []
    from davsp.benchmarks.custom import load_queries

    found, notes = noted(lambda: load_queries(own, skip_broken))
    return _first(found, limit), notes


def is_split_file(split: str) -> bool:
    """Whether --split names a file of `davsp data split`, not a part that the set's authors named."""
    return split.endswith(".json")


def folders(sets: Sequence[str]) -> dict[str, Path]:
    """The folder of each set in `NAME=ROOT`.

    Raises:
        DavspError: an unknown set, one that is given twice, or no such folder.
    """
    from davsp.benchmarks import BENCHMARKS

    found: dict[str, Path] = {}
    for spec in sets:
        name, _, root = spec.partition("=")
        if name not in BENCHMARKS or not root:
            raise DavspError(f"--benchmark {spec!r} is not NAME=FOLDER with a NAME of {', '.join(BENCHMARKS)}.")
        if name in found:
            raise DavspError(f"--benchmark names {name} twice; run once for each folder.")
        found[name] = Path(root).expanduser()
        if not found[name].is_dir():
            raise DavspError(
                f"--benchmark {spec!r}: there is no folder {root}; docs/benchmarks.md says where to get {name}."
            )
    return found


def from_split(split: str | None, sets: Sequence[str], kind: str) -> "tuple[list[Query], list[Query]] | None":
    """The malicious and benign queries of a kind ("vector", "train") in a split file; None without one.

    Raises:
        DavspError: only one of the two options, or what the file's reader raises.
    """
    if split is None and not sets:
        return None
    if split is None or not sets or not is_split_file(split):
        raise DavspError("--split FILE.json (of davsp data split) and --benchmark NAME=FOLDER go together.")
    from davsp.benchmarks.protocol import for_making

    roots = folders(sets)
    return noted(lambda: for_making(Path(split), roots, kind))[0]


def _load(
    roots: "Mapping[str, Path]", split: str, limit: int | None, seed: int, skip_broken: bool, rebuild: bool,
    types: Sequence[str],
) -> "list[Query]":  # fmt: skip
    from davsp.benchmarks import BENCHMARKS, REBUILDABLE

    found: list[Query] = []
    for name, root in roots.items():
        options: dict[str, Any] = {"types": types} if types and name == "mm_safetybench" else {}
        if rebuild and name in REBUILDABLE:
            options["rebuild"] = True
        found += BENCHMARKS[name].load(root, split, limit, seed, skip_broken=skip_broken, **options)
    return found


def noted(load: "Callable[[], T]") -> "tuple[T, list[str]]":
    """What is loaded; its warnings as notes, and its errors with the option's name in place of the argument's."""
    from davsp.benchmarks.source import ShortWarning, SkippedWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = load()
        except DavspError as error:
            said = str(error).replace("skip_broken=True", "--skip-broken").replace("rebuild=True", "--rebuild")
            raise DavspError(said) from error
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
