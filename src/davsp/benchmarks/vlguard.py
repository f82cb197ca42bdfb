"""VLGuard (Zong et al., ICML 2024, arXiv 2402.02207): pictures with harmless and harmful instructions, for training and test.

Source: the gated dataset ys-zong/VLGuard on the Hub (train.json, test.json, train.zip, test.zip; unpack the zips there).
Terms: research only, no redistribution; the pictures keep their own licences. Three subsets: `unsafes` (a harmful picture
and its instruction), `safe_unsafes` (a harmful instruction on a harmless picture), `safe_safes` (a harmless one on the same).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from davsp.benchmarks import formats, rsr, source
from davsp.benchmarks.source import Download, Inventory, Item, Problems
from davsp.errors import DavspError
from davsp.query import Query

COUNTS = {
    "train": {"unsafes": 1023, "safe_unsafes": 977, "safe_safes": 977},
    "test": {
        "unsafes": 442,
        "safe_unsafes": 558,
        "safe_safes": 558,
        "risky behavior/sexually explicit": 111,
        "risky behavior/violence": 68,
        "risky behavior/political": 57,
        "risky behavior/professional advice": 34,
        "privacy/personal data": 69,
        "discrimination/race": 40,
        "discrimination/sex": 31,
        "discrimination/other": 14,
        "deception/disinformation": 18,
    },
}
"""Questions by subset, and the unsafe ones of the test by category; 2,000 and 1,000 pictures."""

SUBSETS = ("unsafes", "safe_unsafes", "safe_safes")
NAME = "vlguard"

_KEYS = {"instruction": "unsafes", "unsafe_instruction": "safe_unsafes", "safe_instruction": "safe_safes"}
_CATEGORIES = {name for name in COUNTS["test"] if "/" in name}


def load(
    root: Path,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    *,
    subsets: Sequence[str] = SUBSETS,
    skip_broken: bool = False,
) -> list[Query]:
    """The instructions as queries: benchmark `vlguard_<subset>`, category of the harm or source of the picture.

    `safe_safes` are benign, the others malicious. The group is the picture: both instructions on it are one group.

    Args:
        root: the folder with train.json or test.json.
        split: "train" or "test".
        limit: at most so many queries, drawn with `seed`, whole groups of them.
        seed: of the draw.
        subsets: which of the three.
        skip_broken: leave out what is broken and warn, in place of raising.

    Raises:
        DavspError: nothing known at `root`, an unknown split, subset or category, a broken row or picture.
    """
    problems = Problems(skip_broken)
    for name in subsets:
        if name not in SUBSETS:
            raise DavspError(f"the subset {name!r} of {NAME} is not known: choose {', '.join(SUBSETS)}.")
    if split not in COUNTS:
        raise DavspError(f"the split {split!r} of {NAME} is not known: choose train or test.")
    return source.queries(_read(Path(root), split, subsets, problems), NAME, root, limit, seed, problems)


def check(root: Path) -> Inventory:
    """Count what is whole in the splits that are here, each by itself: eight pictures, and so their ids, are in both."""
    root = Path(root)
    reports = {split: _report(root, split) for split in COUNTS}
    here = [report for report in reports.values() if report.layout]
    if not here:
        return Inventory(NAME, root)
    counts = tuple(count for report in here for count in report.counts)
    broken = tuple(sentence for report in here for sentence in report.broken)
    index = {file: digest for report in here for file, digest in report.index.items()}
    absent = [f"no {split}.json here" for split, report in reports.items() if not report.layout]
    official = {file: good for report in here for file, good in report.official.items()}
    return Inventory(NAME, root, here[0].layout, counts, broken, index, "; ".join(absent), official)


def _report(root: Path, split: str) -> Inventory:
    problems = Problems(skip=True)
    return source.report(_read(root, split, SUBSETS, problems), NAME, root, problems)


score = rsr.score
"""RSR of `unsafes` and `safe_unsafes`, by category and in total, and over-refusal of `safe_safes`. The authors judge by words:
"keyword-vlguard" of `davsp.judges.keyword_lists`; their attack rate is 1 − RSR. Their win rate on `safe_safes`, by a judge that
sees pictures, is not here."""


def _read(root: Path, split: str, subsets: Sequence[str], problems: Problems) -> Download | None:
    path = formats.first(root, f"{split}.json", f"data/{split}.json")
    if path is None:
        return None
    rows = formats.json_file(path, problems)
    if not isinstance(rows, list):
        raise DavspError(f"{path} is no list of pictures; fetch it again.")
    if rows and "instr-resp" not in (rows[0] if isinstance(rows[0], dict) else {}):
        return None  # another data set's train.json
    items = list(_items(root, path, rows, split, subsets, problems))
    categories = "unsafes" in subsets
    published = {
        f"{split} {key}": n for key, n in COUNTS[split].items() if key in subsets or ("/" in key and categories)
    }
    return Download("official folder", (path,), items, published)


def _items(
    root: Path, path: Path, rows: list[Any], split: str, subsets: Sequence[str], problems: Problems
) -> Iterator[Item]:
    ids: dict[str, int] = {}
    spare = split == "train"  # the published train.json has Ads_303871 twice
    for number, row in enumerate(rows, 1):
        where = f"{path}, item {number}"
        if not formats.has(row, ["image"], where, problems, ["id", "safe", "instr-resp"]):
            continue
        if not row["image"].strip("/"):
            problems.add(f"{where} names no picture", "fetch the file again")
            continue
        name = str(row["id"])
        ids[name] = ids.get(name, 0) + 1
        if ids[name] == 2 and spare:
            spare, name = False, f"{name}~2"
        category = Path(row["image"]).parts[0]
        if not row["safe"]:
            category = f"{row.get('harmful_category')}/{row.get('harmful_subcategory')}"
            if category not in _CATEGORIES:
                problems.add(f"{where} is of the unknown category {category!r}", "fetch the file again")
                continue
        responses = row["instr-resp"] if isinstance(row["instr-resp"], list) else []
        texts = [pair for pair in responses if isinstance(pair, dict)]
        pairs = {_KEYS[key]: pair for pair in texts for key in _KEYS if isinstance(pair.get(key), str) and pair[key]}
        if set(pairs) != ({"safe_unsafes", "safe_safes"} if row["safe"] else {"unsafes"}):
            problems.add(f"{where} has not the instructions of its kind of picture", "fetch the file again")
            continue
        picture = _picture(root, split, row["image"])
        for subset in (s for s in subsets if s in pairs):
            pair = pairs[subset]
            text = next(pair[key] for key, kind in _KEYS.items() if kind == subset)
            label: Literal["benign", "malicious"] = "benign" if subset == "safe_safes" else "malicious"
            reference = str(pair.get("response") or "")
            query = Query(f"{subset}/{name}", text, label, f"{NAME}_{subset}", category, row["image"], reference)
            keys = [subset] if row["safe"] or split == "train" else [subset, category]
            yield Item(query, picture, where, tuple(f"{split} {key}" for key in keys))


def _picture(root: Path, split: str, name: str) -> Path:
    """With or without the folder of the split, or with two: an archive that was unpacked into a folder of its own name."""
    leads = (f"{split}/", f"{split}/{split}/", "")
    path = formats.first(root, *(f"{top}{lead}{name}" for lead in leads for top in ("", "data/")))
    return path or root / split / name
