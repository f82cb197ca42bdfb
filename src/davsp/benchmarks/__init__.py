"""The six benchmarks of the paper, one module each: `load` what was downloaded, `check` it, and score as its authors do.

And sets of over-refusal and of safe twins, in which the harm lies in picture and text together.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from davsp.benchmarks import (
    figstep,
    formats,
    holisafe,
    llava_bench,
    mm_safetybench,
    mm_safetybench_pp,
    mm_vet,
    mme,
    mossbench,
    mssbench,
    siuo,
    vlguard,
)
from davsp.benchmarks.scoring import Scores
from davsp.benchmarks.source import EMBEDDED, Inventory
from davsp.errors import DavspError
from davsp.query import Query, Response

BENCHMARKS: dict[str, ModuleType] = {
    module.NAME: module
    for module in (
        mm_safetybench, figstep, vlguard, mm_vet, mme, llava_bench,  # of the paper
        mossbench, siuo, mssbench, holisafe, mm_safetybench_pp,
    )
}  # fmt: skip

REBUILDABLE = (figstep.NAME, mm_safetybench.NAME)
"""The sets of which pictures can be typeset: `load(..., rebuild=True)`."""

__all__ = [
    "BENCHMARKS", "REBUILDABLE", "Scores", "by_set", "check", "data_set", "figstep", "holisafe", "llava_bench", "mm_safetybench",
    "mm_safetybench_pp", "mm_vet", "mme", "mossbench", "mssbench", "score", "siuo", "vlguard",
]  # fmt: skip


def check(root: Path) -> list[Inventory]:
    """An inventory of every data set in `root`, which holds one, or folders that hold one each.

    What cannot be read at all is an inventory with that as its only fault.

    Raises:
        DavspError: `root` is no folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise DavspError(f"{root} is no folder; give the one that holds the data sets.")
    folders = [path for path in formats.files_in(root, "*") if path.is_dir()]
    inventories = []
    for name in BENCHMARKS:
        here = _check(name, root)
        below = [] if here.layout else [_check(name, folder) for folder in folders]
        inventories += [inventory for inventory in [here, *below] if inventory.layout]
    return inventories


def data_set(benchmark: str) -> str:
    """The name in `BENCHMARKS` of the set that a query's benchmark belongs to: "sd_typo" -> "mm_safetybench".

    Raises:
        DavspError: it belongs to none.
    """
    name = benchmark.removesuffix(EMBEDDED)
    if name in mm_safetybench.FIELDS or name.startswith(mm_safetybench.REBUILT):
        return mm_safetybench.NAME
    owners = [known for known in BENCHMARKS if name == known or name.startswith(f"{known}_")]
    if not owners:
        raise DavspError(f"the benchmark {benchmark!r} is of none of the sets {', '.join(BENCHMARKS)}.")
    return max(owners, key=len)


def by_set(queries: Iterable[Query]) -> dict[str, list[Query]]:
    """The queries of each set, by its name in `BENCHMARKS`.

    Raises:
        DavspError: one is of no set, or a set is there as published and as its embedded counterpart.
    """
    parts: dict[str, list[Query]] = {}
    for q in queries:
        parts.setdefault(data_set(q.benchmark), []).append(q)
    for name, part in parts.items():
        if len({q.benchmark.endswith(EMBEDDED) for q in part}) > 1:
            raise DavspError(f"{name} is there as published and as its embedded counterpart; take one at a time.")
    return parts


def score(
    queries: Sequence[Query],
    responses: Sequence[Response],
    judges: Mapping[str, Any],
    *,
    model: str = "",
    baseline: Mapping[str, Scores] | None = None,
    mode: str = "sound",
    seed: int = 0,
) -> dict[str, Scores]:
    """Score a run over several sets, each by its own scorer.

    Args:
        queries: of any of the sets.
        responses: an answer of one defense to each.
        judges: set -> its judge or grader, or the verdicts or grades that it gave before; MME needs none, as it is scored by words.
        model: name for the rows.
        baseline: what this function gave for the defense that differences start from.
        mode: of all these scorers; MME has none, as both of its parsers are always given.
        seed: of the bootstrap.

    Raises:
        DavspError: a set without a judge, or whatever its scorer raises.
    """
    parts = by_set(queries)
    if lacking := [name for name in parts if name not in judges and name != mme.NAME]:
        raise DavspError(f"there is no judge for {', '.join(lacking)}; docs/judges.md names those there are.")
    scores = {}
    for name, part in parts.items():
        options = {} if name == mme.NAME else {"judge": judges[name], "mode": mode}
        then = (baseline or {}).get(name)
        scores[name] = BENCHMARKS[name].score(part, responses, **options, model=model, baseline=then, seed=seed)
    return scores


def _check(name: str, folder: Path) -> Inventory:
    try:
        return BENCHMARKS[name].check(folder)
    except DavspError as error:
        return Inventory(name, folder, "unreadable", broken=(str(error),))
