"""The paper's tables: which defenses are their rows, where in metrics.json their figures stand, what the paper has there.

`paper.json` holds the paper's own figures as they were presented; in points of a hundred, MME in points. Two oddities
are in the source: Table 6 heads its last column MM-Vet, but its values are those of LLaVA-Bench in Table 1 (both readings
are given here), and MME's total without defense is 1798 there and 1818 in Table 1.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from davsp.errors import DavspError
from davsp.lvlm.undefended import WAYS
from davsp.report.cells import OTHER_WAY
from davsp.runtime.files import read_json

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A figure: its name in paper.json, its heading, and where it stands in metrics.json.

    Attributes:
        places: (benchmark, split, metric) in the published sets, then in the embedded ones; the first that is there is taken.
        points: MME's points; everything else is a rate, shown in points of a hundred.
    """

    name: str
    title: str
    places: tuple[tuple[str, str, str], ...]
    points: bool = False


@dataclass(frozen=True)
class Table:
    """One table: name on the command line, number in the paper, caption, defenses by their names in metrics.json, columns."""

    name: str
    number: int
    caption: str
    rows: Mapping[str, str]
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Cell:
    """One figure, with its 95 % interval and n, beside the paper's; None where there is none."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    paper: float | None
    points: bool = False

    @property
    def difference(self) -> float | None:
        """Ours less the paper's, in the table's units."""
        return None if self.value is None or self.paper is None else self.value - self.paper


def _rsr(name: str, title: str) -> Column:
    return Column(name, title, ((name, "total", "rsr"),))


def _skill(name: str) -> Column:
    return Column(name, name, (("mm_vet", name, "score"), ("utility", name, "accuracy")))


RSR = (_rsr("sd_typo", "SD+TYPO"), _rsr("sd", "SD"), _rsr("typo", "TYPO"), _rsr("figstep", "FigStep"))
POOLED = _rsr("mm_safetybench", "MM-SafetyBench")
MM_VET = Column("mm_vet", "MM-Vet", (("mm_vet", "total", "score"), ("utility", "total", "accuracy")))
MME = (
    Column("mme_perception", "MME-P", (("mme", "perception", "score_official"),), points=True),
    Column("mme_cognition", "MME-C", (("mme", "cognition", "score_official"),), points=True),
    Column("mme", "MME", (("mme", "total", "score_official"), ("mme", "total", "accuracy")), points=True),
)
LLAVA_BENCH = Column(
    "llava_bench", "LLaVA-Bench", (("llava_bench", "total", "relative_score"), ("llava_bench", "total", "accuracy"))
)
UTILITY = (*(_skill(name) for name in ("rec", "ocr", "know", "gen", "spat", "math")), MM_VET, *MME, LLAVA_BENCH)

METHODS = {
    "none": "No Defense", "adashield-s": "AdaShield-S", "adashield-a": "AdaShield-A", "pat": "PAT", "uniguard": "UniGuard",
    "esiii": "ESIII", "davsp": "DAVSP",
}  # fmt: skip
FROM = "davsp-from-"  # before the name of the model that a transferred prompt was trained on

TABLES = {
    table.name: table
    for table in (
        Table("utility", 1, "Utility on benign queries", METHODS, UTILITY),
        Table("resistance", 2, "Resist success rate on malicious queries", METHODS, RSR),
        Table(
            "transfer", 3, "The same border on models it was not trained on",
            {"none": "No Defense", "adashield-s": "Only the text", "davsp": "DAVSP, trained here"}, RSR,
        ),
        Table(
            "ablation", 4, "What the border (VSP) and the projection (DA) add",
            {
                "additive-answer": "neither", "additive-projection": "DA", "border-answer": "VSP", "davsp": "VSP and DA",
            },
            (*RSR, MM_VET, *MME, LLAVA_BENCH),
        ),
        Table(
            "intervention", 5, "The projection moved at run time",
            {"none": "original", "vector-added": "projection up", "vector-removed": "projection down"}, (POOLED, RSR[3]),
        ),
        Table(
            "ecso", 6, "DAVSP together with ECSO",
            {
                "none": "No Defense", "ecso": "Only ECSO", "davsp": "Only DAVSP", "ecso-adaptive+davsp": "Adaptive",
                "ecso+davsp": "Static",
            },
            (RSR[3], MME[2], MM_VET, LLAVA_BENCH),
        ),
    )
}  # fmt: skip


@lru_cache
def paper() -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """The paper's figures: table -> model -> defense -> column."""
    figures: dict[str, Any] = read_json(Path(__file__).with_name("paper.json"))
    return figures


def paper_model(name: str, model: str, family: str) -> str:
    """Which of the paper's models a table is set beside: the same one if it is there, else the first, of the family if one is.

    Args:
        name: of the table.
        model: hub id or name of ours.
        family: "llava", "qwen2_vl", ...
    """
    known = list(paper()[name])
    same = [x for x in known if x.lower() == model.split("/")[-1].lower().removesuffix("-hf")]
    kin = [x for x in known if x.lower().startswith(family.split("_")[0])]
    return (same or kin or known)[0]


def cells(table: Table, rows: Sequence[Row], model: str) -> dict[str, list[Cell]]:
    """The table's cells by defense, in the order of its columns; defenses that were not evaluated are left out.

    Args:
        table: one of `TABLES`; further defenses named `FROM...` are added to "transfer".
        rows: of metrics.json.
        model: of the paper's, whose figures stand beside.

    Raises:
        DavspError: none of its defenses was evaluated.
    """
    known = {row["defense"] for row in rows}
    names = [name for name in table.rows if name in known]
    if "none" in names:  # behind it, the same with pictures in another way
        names[1:1] = sorted(name for name in known if name.startswith(OTHER_WAY))
    if table.name == "transfer":
        names += sorted(name for name in known if name.startswith(FROM))
    if not names:
        raise DavspError(f"table {table.name} has no row here: none of {', '.join(table.rows)} was evaluated.")
    at = {(r["defense"], base(r["benchmark"]), r["split"], r["metric"]): r for r in rows}
    theirs = paper()[table.name][model]
    return {
        name: [_cell(column, at, name, theirs.get(_theirs(table, name), {})) for column in table.columns]
        for name in names
    }


def _theirs(table: Table, defense: str) -> str:
    """The paper's row beside ours: its Table 3 has transferred borders alone, none that was trained on the model itself."""
    if table.name == "transfer" and defense == "davsp":
        return ""
    return "davsp" if defense.startswith(FROM) else defense


def base(benchmark: str) -> str:
    """The published set that a benchmark stands for: itself, or what was rebuilt or drawn in its place."""
    return re.sub(r"_(embedded|rebuilt.*)$", "", benchmark)


def _cell(column: Column, at: Mapping[Any, Row], defense: str, theirs: Mapping[str, float]) -> Cell:
    place = next((p for p in column.places if (defense, *p) in at), None)
    if place is None:
        return Cell(None, None, None, 0, theirs.get(column.name), column.points)
    row = at[defense, *place]
    points = column.points and place[2].startswith("score")
    if row["value"] is None:
        value = low = high = None
    else:
        value, low, high = (row[k] * (1 if points else 100) for k in ("value", "low", "high"))
    # the embedded counterparts' shares of right answers are not the published scores
    their = theirs.get(column.name) if place == column.places[0] else None
    return Cell(value, low, high, row["n"], their, points)


def title(table: Table, defense: str) -> str:
    """A row's heading."""
    if defense.startswith(OTHER_WAY):
        return f"No Defense, {WAYS[defense.removeprefix(OTHER_WAY)]}"
    if defense.startswith(FROM):
        return f"DAVSP, from {defense.removeprefix(FROM)}"
    return table.rows[defense]
