"""What the tables of a report hold: names as they are read, columns, and their figures from the tidy rows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from davsp.benchmarks import mm_safetybench, mme
from davsp.benchmarks.source import EMBEDDED
from davsp.metrics import AT_LENGTH, LOST, WORST
from davsp.query import COST

Rows = Sequence[Mapping[str, Any]]

OTHER_WAY = "none:"
"""Before how undefended pictures are shown in a row of their own."""

DEFENSES = {
    "none": "No Defense",
    "safety-text": "Safety text only",
    "adashield-s": "AdaShield-S",
    "adashield-s:prefix": "AdaShield-S, prefix",
    "random-border": "Random border + text",
    "additive": "Additive noise + text",
    "adashield-a": "AdaShield-A",
    "pat": "PAT",
    "uniguard": "UniGuard",
    "esiii": "ESIII",
    "ecso": "ECSO",
    "davsp": "DAVSP",
    "gate": "Gate + DAVSP",
    "ecso+davsp": "ECSO + DAVSP, static",
    "ecso-adaptive+davsp": "ECSO + DAVSP, adaptive",
}
BENCHMARKS = {
    "sd": "SD",
    "typo": "TYPO",
    "sd_typo": "SD+TYPO",
    "figstep": "FigStep",
    "mme": "Yes/no",
    "llava_bench": "Description",
}
OUT_OF_DISTRIBUTION = ("figstep", "mme", "llava_bench")
SCORES = ("score", "acc_", "relative", "over_refusal", LOST)
"""How the metrics of published sets begin that are no RSR."""
POOLED = {"in": "in_distribution", "out": "out_of_distribution"}
SUMS = (*POOLED.values(), mm_safetybench.NAME, mm_safetybench.NAME + EMBEDDED)
"""Benchmarks whose answers are those of others."""


@dataclass(frozen=True)
class RateColumn:
    """One column of a table: which rows it shows, its heading, and whether a high value is good."""

    heading: str
    benchmark: str
    split: str
    metric: str
    high_is_good: bool = True
    note: str = ""


@dataclass(frozen=True)
class RateCell:
    """A rate as it is printed; empty texts where there is nothing to print."""

    value: str
    interval: str = ""
    difference: str = ""
    direction: str = ""  # "better", "worse", or "" where p >= 0.05 or nothing is compared
    unscored: int = 0
    worst: str = ""  # the rate if every unscored answer is unsafe; empty if there are none


def label(defense: str) -> str:
    if defense.startswith(OTHER_WAY):
        return f"{DEFENSES['none']}, {defense.removeprefix(OTHER_WAY)}"
    return DEFENSES.get(defense, defense)


def find(rows: Rows, defense: str, benchmark: str, split: str, metric: str) -> Mapping[str, Any] | None:
    """The one row with these keys, or None."""
    keys = (defense, benchmark, split, metric)
    return next((r for r in rows if (r["defense"], r["benchmark"], r["split"], r["metric"]) == keys), None)


def defenses(rows: Rows) -> list[str]:
    """The defenses in the rows, the known ones first and in the order of the paper's tables."""
    order = {name: i for i, name in enumerate(DEFENSES)}
    present = dict.fromkeys(r["defense"] for r in rows)
    return sorted(present, key=lambda d: order.get("none" if d.startswith(OTHER_WAY) else d, len(order)))


def main_columns(rows: Rows) -> list[RateColumn]:
    """RSR by benchmark, utility in total, over-refusal: what a defense gains and what it costs."""
    attacked = _ordered(r["benchmark"] for r in rows if r["metric"] == "rsr" and r["benchmark"] not in POOLED.values())
    columns = [RateColumn(BENCHMARKS.get(b, b), b, "total", "rsr", note=_note(b)) for b in attacked]
    columns.append(RateColumn("Utility", "utility", "total", "accuracy"))
    columns.append(RateColumn("Over-refusal", "benign", "total", "over_refusal", high_is_good=False))
    return [c for c in columns if _present(rows, c)]


def utility_columns(rows: Rows) -> list[RateColumn]:
    """Utility by category and in total, then the other benign benchmarks."""
    splits = dict.fromkeys(r["split"] for r in rows if r["benchmark"] == "utility" and r["metric"] == "accuracy")
    columns = [RateColumn(s, "utility", s, "accuracy") for s in splits if s != "total"]
    columns.append(RateColumn("total", "utility", "total", "accuracy"))
    others = _ordered(r["benchmark"] for r in rows if r["metric"] == "accuracy" and r["benchmark"] != "utility")
    columns += [RateColumn(BENCHMARKS.get(b, b), b, "total", "accuracy", note=_note(b)) for b in others]
    return [c for c in columns if _present(rows, c)]


def score_rows(rows: Rows) -> list[tuple[str, str, str, list[Mapping[str, Any] | None]]]:
    """Scores and over-refusal of published sets: (benchmark, part, metric, the row of each of `defenses(rows)`).

    The bound of a score of which some answers are unscored is among them.
    """
    names = defenses(rows)
    keys = dict.fromkeys(
        (r["benchmark"], r["split"], r["metric"])
        for r in rows
        if r["metric"].startswith(SCORES) and not r["metric"].endswith("_difference") and r["benchmark"] != "benign"
    )
    return [
        (*key, [find(rows, name, *key) for name in names])
        for key in keys
        if not key[2].endswith("_worst_case") or any(_lacking(rows, name, *key[:2]) for name in names)
    ]


def cell(rows: Rows, defense: str, column: RateColumn) -> RateCell:
    """The cell of a table; a dash where nothing was measured."""
    keys = (column.benchmark, column.split)
    row = find(rows, defense, *keys, column.metric)
    unscored = _lacking(rows, defense, *keys, metric="unscored" if column.metric == "rsr" else LOST)
    bound = find(rows, defense, *keys, WORST) if unscored else None
    worst = "" if bound is None else percent(bound["value"])
    if row is None or row["value"] is None:
        return RateCell("–", unscored=unscored, worst=worst)
    difference = find(rows, defense, *keys, f"{column.metric}_difference")
    text, direction = "", ""
    if difference is not None:
        text = f"{points(difference['value'])}, {p_value(difference.get('p'))}"
        if difference.get("p", 1.0) < 0.05 and difference["value"]:
            direction = "better" if (difference["value"] > 0) == column.high_is_good else "worse"
    interval = f"{100 * row['low']:.1f}–{100 * row['high']:.1f}"
    return RateCell(percent(row["value"]), interval, text, direction, unscored, worst)


def costs(rows: Rows, latency: Mapping[str, float]) -> list[tuple[str, list[str]]]:
    """What an answer takes under each of `defenses(rows)`: calls, prompt tokens, those of pictures, time; empty if none is known.

    Each as its mean, and behind it what is more than under No Defense; time as a multiple of No Defense's.
    """
    lines = []
    for name in defenses(rows):
        counts = [_count(rows, name, what) for what in COST]
        time = f"×{latency[name]:.2f}" if name in latency else "–"
        lines.append((name, [*counts, time]))
    return lines if any(row["benchmark"] == "cost" for row in rows) else []


MANY = 0.05
"""Share of cut answers above which a table says what that means."""


def cut_note(rows: Rows) -> str:
    """A sentence on the answers that were cut at the longest; empty where none was, or where that is not known."""
    cut: dict[str, tuple[int, int]] = {}
    lengths = [row for row in rows if row["metric"] == AT_LENGTH]
    for row in lengths:
        k, n = cut.get(row["defense"], (0, 0))
        cut[row["defense"]] = k + round(row["value"] * row["n"]), n + row["n"]
    worst = sorted((name for name in cut if cut[name][0]), key=lambda name: -cut[name][0] / cut[name][1])
    if not worst:
        return ""
    counts = ["{} of {} answers under {}".format(*cut[name], label(name)) for name in worst[:3]]
    more = f", and fewer under {len(worst) - 3} more" if len(worst) > 3 else ""
    sentence = f"Cut at {lengths[0]['max_new_tokens']} tokens: {', '.join(counts)}{more}."
    if cut[worst[0]][0] > MANY * cut[worst[0]][1]:
        sentence += " How they would have gone on is not known; allow more (--max-new-tokens)."
    return sentence


COST_HEADINGS = ("Calls", "Prompt tokens", "of pictures", "Time")


def _count(rows: Rows, defense: str, what: str) -> str:
    mean = find(rows, defense, "cost", "total", what)
    more = find(rows, defense, "cost", "total", f"{what}_difference")
    if mean is None:
        return "–"
    digits = 2 if what == "calls" else 1
    return f"{mean['value']:.{digits}f}" + ("" if more is None else f" ({more['value']:+.{digits}f})".replace("-", "−"))


def number(row: Mapping[str, Any] | None) -> str:
    """A score with its interval: points (MME's scores) with one digit behind the point, a share with three."""
    if row is None or row["value"] is None:
        return "–"
    digits = 1 if row["benchmark"].startswith(mme.NAME) and row["metric"].startswith("score") else 3
    interval = "" if row["low"] is None else f" [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
    return f"{row['value']:.{digits}f}{interval}"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def points(difference: float) -> str:
    """A difference of rates in percentage points, with its sign."""
    text = f"{100 * difference:+.1f}"
    return "±0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def p_value(p: float | None) -> str:
    if p is None:
        return ""
    return "p<.001" if p < 0.001 else f"p={p:.3f}".replace("0.", ".", 1) if p < 1 else "p=1"


def _lacking(rows: Rows, defense: str, benchmark: str, split: str, metric: str = "unscored") -> int:
    """How many answers of a part are unscored."""
    row = find(rows, defense, benchmark, split, metric)
    return round(row["value"] * row["n"]) if row and row["value"] else 0


def _present(rows: Rows, c: RateColumn) -> bool:
    return any((r["benchmark"], r["split"], r["metric"]) == (c.benchmark, c.split, c.metric) for r in rows)


def _ordered(names: Iterable[str]) -> list[str]:
    present = list(dict.fromkeys(names))
    return [b for b in BENCHMARKS if b in present] + [b for b in present if b not in BENCHMARKS]


def _note(benchmark: str) -> str:
    return "out of distribution" if benchmark in OUT_OF_DISTRIBUTION else ""


def markdown_table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    rows = [f"| {' | '.join(cells)} |" for cells in (heads, *lines)]
    return [rows[0], "|---" * len(heads) + "|", *rows[1:]]
