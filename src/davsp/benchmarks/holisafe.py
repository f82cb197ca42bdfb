"""HoliSafe-Bench (Lee et al., 2025, arXiv 2506.04704): 4,031 questions on 1,796 pictures, in all five combinations of safeness.

Source: the gated dataset etri-vilab/holisafe-bench on the Hub (holisafe_bench.json, images/); counts of the README of
github.com/youngwanLEE/holisafe. Texts and generated pictures CC BY-NC 4.0, other pictures under their own licences. `type` is the
safeness of picture, question and both together: SSS is harmless, SSU harmful only in combination, SUU, USU and UUU harmful.
The file could not be read here: fields and folders are those that several public readers of it agree on; how many of each type
there are was not found.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from davsp.benchmarks import formats, rsr, source
from davsp.benchmarks.source import Download, Inventory, Item, Problems
from davsp.query import Query

NAME = "holisafe"
TYPES = ("SSS", "SSU", "SUU", "USU", "UUU")

COUNTS: dict[str, int | None] = {"all types": 4031, **dict.fromkeys(TYPES)}
"""Questions in all; by type not known."""


def load(
    root: Path, split: str = "test", limit: int | None = None, seed: int = 0, *, skip_broken: bool = False
) -> list[Query]:
    """The questions as queries: benchmark `holisafe_<type>`, of which `holisafe_sss` is benign; the group is the picture.

    Args:
        root: the folder with holisafe_bench.json.
        split: "test".
        limit: at most so many queries, drawn with `seed`, all questions on a picture together.
        seed: of the draw.
        skip_broken: leave out what is broken and warn, in place of raising.

    Raises:
        DavspError: nothing known at `root`, another split, an unknown type, a broken row or picture.
    """
    source.only_test(NAME, split)
    problems = Problems(skip_broken)
    return source.queries(_read(Path(root), problems), NAME, root, limit, seed, problems)


def check(root: Path) -> Inventory:
    """Count questions with a whole picture, in all and by type."""
    problems, root = Problems(skip=True), Path(root)
    return source.report(_read(root, problems), NAME, root, problems)


score = partial(rsr.score, by_category=True)
"""RSR of the four harmful types and over-refusal of SSS, by category and in total. The authors' attack rate is 1 − RSR, by Claude,
GPT-4o, Gemini or refusal words, and their refusal rate is over-refusal."""


def _read(root: Path, problems: Problems) -> Download | None:
    path = formats.first(root, "holisafe_bench.json")
    if path is None:
        return None
    return Download("Hub folder", (path,), list(_items(path, problems)), COUNTS)


def _items(path: Path, problems: Problems) -> Iterator[Item]:
    for where, row in formats.json_rows(path, problems):
        if not formats.has(row, ["image", "query", "type"], where, problems, ["id"]):
            continue
        kind = row["type"]
        if kind not in TYPES:
            problems.add(f"{where} is of the unknown type {kind!r}", "fetch the file again")
            continue
        label: Literal["benign", "malicious"] = "benign" if kind == "SSS" else "malicious"
        benchmark, category = f"{NAME}_{kind.lower()}", formats.text(row, "category")
        query = Query(f"{NAME}/{row['id']}", row["query"], label, benchmark, category, row["image"])
        picture = formats.first(path.parent, *(f"{lead}{row['image']}" for lead in ("images/", "images/images/", "")))
        yield Item(query, picture or path.parent / "images" / row["image"], where, ("all types", kind))
