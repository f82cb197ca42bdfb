"""The paper's split on the road: drawn from folders and from runs of the undefended model, and read back part by part.

`davsp.benchmarks.splits` says what is drawn. The file also says how its data sets were read, so that every later command
reads them alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from davsp import benchmarks
from davsp.benchmarks import mm_vet, splits
from davsp.benchmarks.splits import Split
from davsp.errors import DavspError
from davsp.query import Query, Verdict, read_jsonl
from davsp.runtime import files
from davsp.store import VERDICTS, hashes, query_hash, recorded

DRAWN = ("vlguard", "mm_safetybench", "mm_vet")
"""The sets that the vector and the training take from; others are tested on as a whole."""

WHOLE = {"vlguard": "train", "mm_safetybench": "all", "figstep": "all"}
"""What `load` calls the part of a set that the split is drawn from; of the others "test"."""


def read(roots: Mapping[str, Path], skip_broken: bool = False, rebuild: bool = False) -> dict[str, list[Query]]:
    """Each set as the split takes it: VLGuard's training data, all of the others.

    Args:
        roots: set -> its folder.
        skip_broken: see the loaders.
        rebuild: typeset the pictures of `benchmarks.REBUILDABLE`.
    """
    sets = {}
    for name, root in roots.items():
        options: dict[str, Any] = {"rebuild": True} if rebuild and name in benchmarks.REBUILDABLE else {}
        split = WHOLE.get(name, "test")
        sets[name] = benchmarks.BENCHMARKS[name].load(root, split, skip_broken=skip_broken, **options)
    return sets


def draw(
    roots: Mapping[str, Path],
    runs: Sequence[Path],
    *,
    blind: bool = False,
    skip_broken: bool = False,
    rebuild: bool = False,
    **options: Any,
) -> Split:
    """Draw the paper's split from folders and finished runs.

    Args:
        roots: set -> its folder; those of `DRAWN`, and what else is to be tested on.
        runs: folders of `davsp eval` in which the undefended model ("none") answers VLGuard's training data and, unless
            `blind`, all of MM-SafetyBench; the verdicts of their first judges say what it refused.
        blind: draw the intents of MM-SafetyBench without a look at answers.
        skip_broken, rebuild: how the sets are read (`read`); kept in the split.
        options: seed and sizes, see `splits.paper_split`.

    Raises:
        DavspError: a set of `DRAWN` or a run is missing, runs of other data or of two models, or what `paper_split` raises.
    """
    if lacking := [name for name in DRAWN if name not in roots]:
        raise DavspError(f"the split is drawn from {', '.join(DRAWN)}, but {', '.join(lacking)} is not given.")
    sets = read(roots, skip_broken, rebuild)
    judged_queries = [*sets["vlguard"], *([] if blind else sets["mm_safetybench"])]
    verdicts, run_records = undefended(runs, judged_queries)
    split = splits.paper_split(
        *(sets[name] for name in DRAWN),
        vlguard_undefended=verdicts,
        mm_safetybench_undefended=None if blind else verdicts,
        others={name: queries for name, queries in sets.items() if name not in DRAWN},
        **options,
    )
    how = {"undefended": run_records, "skip broken": skip_broken, "rebuild": rebuild}
    return replace(split, settings={**split.settings, **how})


def undefended(runs: Sequence[Path], queries: Sequence[Query]) -> tuple[list[Verdict], list[dict[str, Any]]]:
    """The verdicts on the undefended model's answers in some runs; and of each run its model, judges, and verdicts' hash.

    Raises:
        DavspError: a folder that is no finished run or has no "none", other queries of these ids, runs of two models, or one
            query in two runs.
    """
    query_of = {q.id: q for q in queries}
    verdicts: dict[str, Verdict] = {}
    run_records: list[dict[str, Any]] = []
    for run in runs:
        record, path = recorded(run), run / VERDICTS
        if record is None or not path.exists():
            raise DavspError(f"{run} is no finished run; give a folder that davsp eval wrote to its end.")
        if "none" not in record["defenses"]:
            raise DavspError(f"{run} has no answers without a defense; run davsp eval --defense none.")
        run_hashes = hashes(run)
        for name in run_hashes.keys() & query_of.keys():
            if query_hash(query_of[name]) != run_hashes[name]:
                raise DavspError(f"{run} answers another query {name!r} than the data set has; run davsp eval on it.")
        of_run = [
            v
            for v in read_jsonl(path, Verdict)
            if v.defense == "none" and v.query_id in run_hashes.keys() & query_of.keys()
        ]
        if twice := next((v.query_id for v in of_run if v.query_id in verdicts), None):
            raise DavspError(f"the query {twice!r} is in two of the runs; give one of them.")
        verdicts |= {v.query_id: v for v in of_run}
        judges = sorted({v.judge for v in of_run})
        run_records.append({"model": record.get("model"), "judges": judges, "verdicts": files.sha256(path)})
    if len({str(run["model"]) for run in run_records}) > 1:
        raise DavspError(f"{', '.join(map(str, runs))} are of several models; a split is drawn for one.")
    return list(verdicts.values()), run_records


def part(path: Path, roots: Mapping[str, Path]) -> Split:
    """What a split file says of these sets, which are read as they were when it was drawn.

    Raises:
        DavspError: no such file, or a set that it was not drawn with or that has changed.
    """
    settings = splits.settings_of(path)
    sets = read(roots, settings.get("skip broken", False), settings.get("rebuild", False))
    return splits.load_split(path, sets, partial=True)


def for_test(path: Path, roots: Mapping[str, Path]) -> list[Query]:
    """The test of these sets.

    Raises:
        DavspError: as `part`; or a set has no test in the split, as VLGuard, whose own is another file.
    """
    split = part(path, roots)
    if lacking := [name for name in roots if name not in split.test]:
        raise DavspError(f"{path} leaves nothing of {', '.join(lacking)} to test on; evaluate it by its own split.")
    return [q for name in roots for q in split.test[name]]


def for_making(path: Path, roots: Mapping[str, Path], kind: str) -> tuple[list[Query], list[Query]]:
    """The malicious and the benign queries of a kind, "vector" or "train"; a reference of MM-Vet as one answer.

    Raises:
        DavspError: as `part`; or a set that the kind takes from is not given.
    """
    names = [f"{kind}_malicious", f"{kind}_benign"]
    needed = list(dict.fromkeys(splits.SOURCES[name] for name in names))
    if set(roots) != set(needed):
        raise DavspError(f"the {kind} part of a split is of {' and '.join(needed)}; give --benchmark for just these.")
    split = part(path, roots)
    malicious, benign = (split.parts[name] for name in names)
    return malicious, [replace(q, reference=mm_vet.one_answer(q.reference)) for q in benign]
