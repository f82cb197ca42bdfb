"""The queries of `davsp eval`, `judge` and `attack`: published sets, a user's own queries, or the embedded test.

And those of the commands that make a vector or a prompt.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from davsp.cli.inputs import embedded_protocol, say, shipped_protocol
from davsp.errors import DavspError

if TYPE_CHECKING:
    from davsp.cli.options import DataOptions, MaliciousOptions, TestSetOptions
    from davsp.defenses import Defense
    from davsp.embedded.data import Protocol
    from davsp.lvlm import AnsweringLVLM
    from davsp.query import Query

T = TypeVar("T")

OPTIONS = {
    "skip_broken=True": "--skip-broken",
    "allow_outside=True": "--allow-outside",
    "give rebuild=True": "give --rebuild",
    "or rebuild=False": "or leave out --rebuild",
    "(max_new_tokens)": "(--max-new-tokens)",
}
"""Arguments, as the errors of Python name them, and how the command line says the same."""


def load_test_set(
    test: "TestSetOptions", model: str | None, limit: int | None, seed: int
) -> "tuple[list[Query], list[str]]":
    """The queries, and a sentence on everything that was left out or is short; each is said as well.

    Args:
        test: of the published sets `split` is a name, or a file of `davsp data split`, whose test part is taken.
        model: as --model was given; the embedded test is for those that ship.
        limit: only so many of each set, drawn; of custom queries the first of each benchmark.
        seed: of what is drawn.

    Raises:
        DavspError: both sets and custom queries, an unknown set, options that do not go together, or what a loader raises.
    """
    sets = test.benchmark or []
    if sets and test.queries:
        raise DavspError("--benchmark and --queries do not go together: they are scored by different rules; run twice.")
    roots = folders(sets)
    if test.types and "mm_safetybench" not in roots:
        raise DavspError("--type goes with --benchmark mm_safetybench=FOLDER.")
    if test.rebuild and not {"figstep", "mm_safetybench"} & set(roots):
        raise DavspError("--rebuild goes with --benchmark figstep=FOLDER or mm_safetybench=FOLDER.")
    if roots and is_split_file(test.split):
        if limit or test.skip_broken or test.rebuild or test.types:
            raise DavspError(
                "--limit, --skip-broken, --rebuild and --type do not go with a split file: it says all that."
            )
        from davsp.benchmarks.protocol import for_test

        return noted(lambda: for_test(Path(test.split), roots))
    if roots:
        return noted(lambda: _load(roots, test, limit, seed))
    if test.queries is None:
        return _first(embedded_protocol(model, seed).test, limit), []
    from davsp.benchmarks.custom import load_queries

    path = test.queries
    queries, notes = noted(lambda: load_queries(path, test.skip_broken, test.allow_outside))
    return _first(queries, limit), notes


def is_split_file(split: str) -> bool:
    """Whether --split names a file of `davsp data split`, not a part that the set's authors named."""
    return split.endswith(".json")


def folders(sets: Sequence[str]) -> dict[str, Path]:
    """The folder of each set in `NAME=ROOT`.

    Raises:
        DavspError: an unknown set, one that is given twice, or no such folder.
    """
    from davsp.benchmarks import BENCHMARKS

    roots: dict[str, Path] = {}
    for spec in sets:
        name, _, root = spec.partition("=")
        if name not in BENCHMARKS or not root:
            raise DavspError(f"--benchmark {spec!r} is not NAME=FOLDER with a NAME of {', '.join(BENCHMARKS)}.")
        if name in roots:
            raise DavspError(f"--benchmark names {name} twice; run once for each folder.")
        roots[name] = Path(root).expanduser()
        if not roots[name].is_dir():
            raise DavspError(
                f"--benchmark {spec!r}: there is no folder {root}; docs/benchmarks.md says where to get {name}."
            )
    return roots


def both_classes(
    data: "DataOptions", kind: Literal["vector", "train"], model: str | None, seed: int
) -> "tuple[list[Query], list[Query], Protocol | None]":
    """Malicious and benign queries to make a vector or a prompt of: of a split file, the user's own, or of the embedded protocol,
    which comes with them then.

    Raises:
        DavspError: options that do not go together, a model that does not ship without queries, or what a reader raises.
    """
    from davsp.vector import check_classes

    if queries := split_queries(data, kind):
        return *queries, None
    protocol = shipped_protocol(model, data.malicious, data.benign, seed)
    bad, good = (getattr(protocol, f"{kind}_{label}", None) for label in ("malicious", "benign"))
    bad = queries_at(data.malicious, bad, "--malicious", data.allow_outside)
    good = queries_at(data.benign, good, "--benign", data.allow_outside)
    check_classes(bad, good)
    return bad, good, protocol


def split_queries(data: "MaliciousOptions", kind: str) -> "tuple[list[Query], list[Query]] | None":
    """Malicious and benign queries of a split file, in place of the user's own; None without one."""
    custom = data.malicious or getattr(data, "benign", None)
    if (data.split or data.benchmark) and custom:
        raise DavspError("--split takes the place of --malicious and --benign; give one or the other.")
    return from_split(data.split, data.benchmark or [], kind)


def queries_at(
    path: Path | None, otherwise: "list[Query] | None", option: str, allow_outside: bool = False
) -> "list[Query]":
    """The queries that an option names; left out: `otherwise`, and without that DavspError."""
    from davsp.benchmarks.custom import load_queries

    if path is not None:
        return noted(lambda: load_queries(path, allow_outside=allow_outside))[0]
    if otherwise is None:
        raise DavspError(f"{option} is missing; give a folder or .jsonl of queries.")
    return otherwise


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


def _load(roots: "Mapping[str, Path]", test: "TestSetOptions", limit: int | None, seed: int) -> "list[Query]":
    from davsp.benchmarks import BENCHMARKS, REBUILDABLE

    queries: list[Query] = []
    for name, root in roots.items():
        options: dict[str, Any] = {"types": test.types} if test.types and name == "mm_safetybench" else {}
        if test.rebuild and name in REBUILDABLE:
            options["rebuild"] = True
        queries += BENCHMARKS[name].load(root, test.split, limit, seed, skip_broken=test.skip_broken, **options)
    return queries


def noted(load: "Callable[[], T]") -> "tuple[T, list[str]]":
    """What is loaded; its warnings as notes, and its errors with the option's name in place of the argument's."""
    from davsp.benchmarks.source import ShortWarning, SkippedWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with by_options():
            loaded = load()
    notes = []
    for warning in caught:
        if issubclass(warning.category, (SkippedWarning, ShortWarning)):
            notes.append(str(warning.message))
            say(f"note: {warning.message}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return loaded, notes


@contextmanager
def by_options() -> Iterator[None]:
    """What is refused inside is said with the option's name in place of the argument's."""
    try:
        yield
    except DavspError as error:
        message = str(error)
        for argument, option in OPTIONS.items():
            message = message.replace(argument, option)
        raise type(error)(message) from error


def _first(queries: "list[Query]", limit: int | None) -> "list[Query]":
    """The first of each benchmark, of a benign one of each category."""
    if limit is None:
        return queries
    counts: dict[tuple[str, str], int] = {}
    first = []
    for query in queries:
        key = (query.benchmark, query.category if query.label == "benign" else "")
        counts[key] = counts.get(key, 0) + 1
        if counts[key] <= limit:
            first.append(query)
    return first


def with_room(
    lvlm: "AnsweringLVLM",
    defenses: "dict[str, Defense]",
    queries: "list[Query]",
    longest: int | None,
    skip_broken: bool,
) -> "tuple[list[Query], list[str]]":
    """The queries that the model has room for under every defense, and what to say of the others; said here, too."""
    from davsp.evaluation.fitting import fitting

    (kept, note), _ = noted(lambda: fitting(lvlm, defenses, queries, longest, skip_broken))
    if note:
        say(f"note: {note}")
    return kept, [note] if note else []
