"""MM-SafetyBench++ (Zhang et al., CVPR 2026, arXiv 2603.15800): each harmful question with a harmless twin, changed as little as can be.

Source: EchoSafe-MLLM/MM-SafetyBench-plus-plus on the Hub, CC BY 4.0; its repository and its files could not be read here. Seen: the
Hub's count of 2,844 rows, which are six scenarios of MM-SafetyBench (711 questions, and the rates on the authors' page
github.com/EchoSafe-MLLM/EchoSafe-MLLM.github.io at bbf5fe2 are multiples of their parts), harmful and harmless, in two kinds of
picture; and one public reader of it, from which the folders processed_questions and processed_questions_safe, the columns image,
category, mode (Gen, GenOCR) and label, and the pairing are: a question and its twin have the same place among the rows of their
scenario. INFERRED: the column `question` (without it the file is refused), and that the parquet files lie at the top or in data/.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from davsp.benchmarks import formats, rsr, source
from davsp.benchmarks.source import Download, Inventory, Item, Problems
from davsp.errors import DavspError
from davsp.query import Query

NAME = "mm_safetybench_pp"

COUNTS = {
    "Illegal_Activity": 97, "HateSpeech": 163, "Malware_Generation": 44, "Physical_Harm": 144, "Fraud": 154, "Sex": 109,
}  # fmt: skip
"""Pairs of each scenario in each mode; 711."""

MODES = ("gen", "genocr")
COLUMNS = ("image", "question", "category", "mode", "label")

_LABELS: dict[str, Literal["benign", "malicious"]] = {"safe": "benign", "unsafe": "malicious"}
_SCENARIOS = {name.casefold(): name for name in COUNTS}


def load(
    root: Path, split: str = "test", limit: int | None = None, seed: int = 0, *, skip_broken: bool = False
) -> list[Query]:
    """The questions as queries: benchmark `mm_safetybench_pp_<mode>_safe`, benign, or `..._unsafe`, malicious.

    Category is the scenario. A question and its twin, in both modes, are one group.

    Args:
        root: the folder of the download, with processed_questions_safe.
        split: "test", both modes; "gen" or "genocr", one of them.
        limit: at most so many queries, drawn with `seed`, whole pairs of them.
        seed: of the draw.
        skip_broken: leave out what is broken and warn, in place of raising.

    Raises:
        DavspError: nothing known at `root`, an unknown split, scenario, mode or label, a broken row or picture; also with
            `skip_broken`, where rows are missing, so that no place says which twin belongs to which question.
    """
    if split not in ("test", *MODES):
        raise DavspError(f"the split {split!r} of {NAME} is not known: choose test, gen or genocr.")
    problems, modes = Problems(skip_broken), MODES if split == "test" else (split,)
    return source.queries(_read(Path(root), modes, problems), NAME, root, limit, seed, problems)


def check(root: Path) -> Inventory:
    """Count questions with a whole picture by mode, label and scenario."""
    problems, root = Problems(skip=True), Path(root)
    return source.report(_read(root, MODES, problems), NAME, root, problems)


score = partial(rsr.score, by_category=True)
"""RSR of the harmful questions and over-refusal of their twins, by scenario and in total. The authors ask GPT-5-mini; their contextual
correctness is the harmonic mean of the rates of refused harmful and of answered harmless ones. Their quality score is not here."""


def _read(root: Path, modes: Sequence[str], problems: Problems) -> Download | None:
    if not (root / "processed_questions_safe").is_dir():
        return None
    paths = formats.files_in(root / "data", "*.parquet") or formats.files_in(root, "*.parquet")
    if not paths:
        raise DavspError(f"{root} holds no parquet file with the pictures of {NAME}; fetch the whole set from the Hub.")
    published = {f"{mode} {label} {name}": n for mode in modes for label in _LABELS for name, n in COUNTS.items()}
    return Download("Hub folder", tuple(paths), list(_items(paths, modes, problems)), published)


def _items(paths: Sequence[Path], modes: Sequence[str], problems: Problems) -> Iterator[Item]:
    places: Counter[tuple[str, str, str]] = Counter()
    for where, row in formats.parquet_rows(paths, COLUMNS):
        if not formats.has(row, COLUMNS[2:], where, problems):
            continue
        name = _SCENARIOS.get(row["category"].casefold())
        mode, label = row["mode"].casefold(), row["label"].casefold()
        if name is None or mode not in MODES or label not in _LABELS:
            told = ", ".join(repr(row[column]) for column in ("category", "mode", "label"))
            problems.add(f"{where} is of an unknown scenario, mode or label ({told})", "fetch the file again")
            continue
        place = places[name, mode, label]
        places[name, mode, label] += 1  # a broken row has its place, too
        if mode not in modes or not formats.has(row, ["question"], where, problems, ["image"]):
            continue
        if (picture := formats.image_bytes(row["image"], where, problems)) is None:
            continue
        group, benchmark = f"{NAME}/{name}/{place}", f"{NAME}_{mode}_{label}"
        query = Query(f"{group}/{mode}/{label}", row["question"], _LABELS[label], benchmark, name, group)
        yield Item(query, picture, where, (f"{mode} {label} {name}",))
    for name in COUNTS:
        rows = {f"{mode} {label}": n for (of, mode, label), n in places.items() if of == name}
        if len(set(rows.values())) > 1:
            told = ", ".join(f"{n} {kind}" for kind, n in rows.items())
            raise DavspError(
                f"the rows of {name} in {paths[0].parent} are {told}: of unequal numbers, no place says which twin "
                "belongs to which question; fetch the set again."
            )
