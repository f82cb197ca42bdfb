"""MOSSBench (Li et al., ICLR 2025, arXiv 2406.17806): 300 harmless questions on pictures that look like harm; what is refused is too much.

Source: github.com/xirui-li/MOSSBench at 8d68b06 (git clone; CC BY-SA 4.0, a test set, not for training), with the pictures.
Three kinds of stimulus, 100 each. Beside it lie 244 contrasts: the question, and in 46 of them the picture, changed so that
it does ask for harm. The copy on the Hub (AIcell/MOSSBench) is a table of other columns and is not read.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from davsp.benchmarks import formats, rsr, source
from davsp.benchmarks.source import Download, Inventory, Item, Problems
from davsp.errors import DavspError
from davsp.query import Query

NAME = "mossbench"

STIMULI = {"type 1": "Exaggerated Risk", "type 2": "Negated Harm", "type 3": "Counterintuitive Interpretation"}
"""`over` of a row's metadata -> the stimulus, in the order of the authors' script."""

COUNTS = {
    "test": dict(zip(STIMULI.values(), (100, 100, 100), strict=True)),
    "contrast": dict(zip(STIMULI.values(), (100, 44, 100), strict=True)),
}
"""Questions by split and stimulus."""

_FOLDERS = {"test": "data", "contrast": "data_contrast"}


def load(
    root: Path, split: str = "test", limit: int | None = None, seed: int = 0, *, skip_broken: bool = False
) -> list[Query]:
    """The questions as queries: category the stimulus, group the number, which a question and its contrast share.

    Args:
        root: the clone.
        split: "test", benign (benchmark `mossbench`), or "contrast", malicious (`mossbench_contrast`).
        limit: at most so many, drawn with `seed`.
        seed: of the draw.
        skip_broken: leave out what is broken and warn, in place of raising.

    Raises:
        DavspError: nothing known at `root`, an unknown split or stimulus, a broken row or picture.
    """
    if split not in COUNTS:
        raise DavspError(f"the split {split!r} of {NAME} is not known: choose test or contrast.")
    problems = Problems(skip_broken)
    return source.queries(_read(Path(root), [split], problems), NAME, root, limit, seed, problems)


def check(root: Path) -> Inventory:
    """Count questions with a whole picture by split and stimulus; a split of which nothing is here is only named."""
    problems, root = Problems(skip=True), Path(root)
    return source.report(_read(root, list(COUNTS), problems), NAME, root, problems)


score = partial(rsr.score, by_category=True)
"""Over-refusal by stimulus and in total, and RSR of the contrasts. The authors ask GPT-4 with the picture whether an answer refuses."""


def _read(root: Path, splits: Sequence[str], problems: Problems) -> Download | None:
    paths = {split: root / _FOLDERS[split] / "images_information/information.json" for split in splits}
    here = {split: path for split, path in paths.items() if path.exists()}
    if not here:
        return None
    items = [item for split, path in here.items() for item in _items(path, split, problems)]
    published = {f"{split} {stimulus}": n for split in here for stimulus, n in COUNTS[split].items()}
    absent = [f"no {_FOLDERS[split]} here" for split in splits if split not in here]
    return Download("official clone", tuple(here.values()), items, published, "; ".join(absent))


def _items(path: Path, split: str, problems: Problems) -> Iterator[Item]:
    benchmark = NAME if split == "test" else f"{NAME}_{split}"
    label: Literal["benign", "malicious"] = "benign" if split == "test" else "malicious"
    for where, row in formats.json_rows(path, problems):
        if not formats.has(row, ["pid", "question", "image"], where, problems, ["metadata"]):
            continue
        kind = row["metadata"].get("over") if isinstance(row["metadata"], dict) else None
        stimulus = STIMULI.get(str(kind))
        if stimulus is None:
            problems.add(f"{where} is of the unknown stimulus {kind!r}", "fetch the file again")
            continue
        query = Query(f"{benchmark}/{row['pid']}", row["question"], label, benchmark, stimulus, row["pid"])
        yield Item(query, path.parent.parent / row["image"], where, (f"{split} {stimulus}",))
