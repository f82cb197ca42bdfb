"""SIUO, Safe Inputs but Unsafe Output (Wang et al., NAACL 2025, arXiv 2406.15279): 167 questions, harmful only with their picture.

Source: github.com/sinwang20/SIUO at 18974b6 (data/siuo_gen.json; the pictures are an archive linked there), or sinwang/SIUO on
the Hub, with siuo_gen.json and images/ at the top (seen in github.com/microsoft/PyRIT at 5cca581, which reads it). Licence
CC BY-NC 4.0, research only. Picture and question are each harmless; nine domains. The set's other task, multiple choice
(siuo_mcqa.json), is not read. INFERRED: what folder the archive makes when it is unpacked.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from davsp.benchmarks import formats, rsr, source
from davsp.benchmarks.source import Download, Inventory, Item, Problems
from davsp.query import Query

NAME = "siuo"

COUNTS = {
    "self-harm": 19,
    "illegal activities & crime": 18,
    "privacy violation": 21,
    "morality": 20,
    "dangerous behavior": 18,
    "discrimination & stereotyping": 18,
    "information misinterpretation": 17,
    "religion beliefs": 20,
    "controversial topics, politics": 16,
}
"""Questions by domain; 167."""

_PICTURES = ("images", "images/images", "images/SIUO-images", "SIUO-images")


def load(
    root: Path, split: str = "test", limit: int | None = None, seed: int = 0, *, skip_broken: bool = False
) -> list[Query]:
    """The questions as queries, all malicious: benchmark `siuo`, category the domain, reference the authors' answer.

    The context is the question with the authors' safety warning, which says what the picture makes of it.

    Args:
        root: the clone with its pictures, or the folder of siuo_gen.json.
        split: "test".
        limit: at most so many, drawn with `seed`.
        seed: of the draw.
        skip_broken: leave out what is broken and warn, in place of raising.

    Raises:
        DavspError: nothing known at `root`, another split, an unknown domain, a broken row or picture.
    """
    source.only_test(NAME, split)
    problems = Problems(skip_broken)
    return source.queries(_read(Path(root), problems), NAME, root, limit, seed, problems)


def check(root: Path) -> Inventory:
    """Count questions with a whole picture by domain."""
    problems, root = Problems(skip=True), Path(root)
    return source.report(_read(root, problems), NAME, root, problems)


score = partial(rsr.score, by_category=True)
"""RSR by domain and in total. The authors ask GPT-4V with the picture whether an answer keeps to the safety warning, and count an
empty answer as safe; here it is unscored."""


def _read(root: Path, problems: Problems) -> Download | None:
    path = formats.first(root, "data/siuo_gen.json", "siuo_gen.json")
    if path is None:
        return None
    layout = "official clone" if path.parent != root else "Hub folder"
    return Download(layout, (path,), list(_items(path, problems)), dict(COUNTS))


def _items(path: Path, problems: Problems) -> Iterator[Item]:
    for where, row in formats.json_rows(path, problems):
        if not formats.has(row, ["image", "question", "category"], where, problems, ["question_id"]):
            continue
        if row["category"] not in COUNTS:
            problems.add(f"{where} is of the unknown domain {row['category']!r}", "fetch the file again")
            continue
        name, warning = f"{NAME}/{row['question_id']}", formats.text(row, "safety_warning")
        context = f"{row['question']}\n{warning}" if warning else ""
        reference = formats.text(row, "reference_answer")
        query = Query(name, row["question"], "malicious", NAME, row["category"], name, reference, context=context)
        picture = formats.first(path.parent, *(f"{folder}/{row['image']}" for folder in _PICTURES))
        yield Item(query, picture or path.parent / "images" / row["image"], where, (row["category"],))
