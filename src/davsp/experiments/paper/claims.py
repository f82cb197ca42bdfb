"""Does it hold here? The paper's claims, each against our figures, with the cells that decide."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from davsp.experiments.paper.tables import FROM, METHODS, base

Row = Mapping[str, Any]
PICTURES = "pictures"  # RSR over all malicious pictures of the four forms
HOLDS, FAILS, UNTESTED = "holds", "does not hold", "not testable here"


@dataclass(frozen=True)
class Claim:
    """What the paper says, where, and whether our figures agree.

    Attributes:
        verdict: "holds", "does not hold", or "not testable here". It compares the figures as they are; `evidence` has the
            intervals, and says where a difference is within them.
    """

    text: str
    source: str
    verdict: str
    evidence: str


class Figures:
    """The rows of one model by defense, benchmark and metric."""

    def __init__(self, rows: Sequence[Row]):
        self.at = {(r["defense"], base(r["benchmark"]), r["metric"]): r for r in rows if r["split"] == "total"}
        self.defenses = list(dict.fromkeys(r["defense"] for r in rows))

    def row(self, defense: str, benchmark: str, metric: str) -> Row | None:
        row = self.at.get((defense, benchmark, metric))
        return row if row is not None and row["value"] is not None else None

    def rsr(self, defense: str) -> Row | None:
        return self.row(defense, PICTURES, "rsr")

    def utility(self, defense: str) -> Row | None:
        """MM-Vet's score, or the share of right answers on its embedded counterpart."""
        return self.row(defense, "mm_vet", "score") or self.row(defense, "utility", "accuracy")


def claims(rows: Sequence[Row]) -> list[Claim]:
    """All claims for one model, from its rows of metrics.json with those of `PICTURES`."""
    f = Figures(rows)
    verdicts = [
        _best(f), _front(f),
        _above(f, "davsp", "border-answer", "rsr", "deep alignment drives safety: RSR is lower without it", "Table 4"),
        _above(f, "additive-projection", "additive-answer", "rsr",
               "deep alignment drives safety, with additive noise as well", "Table 4"),
        _above(f, "davsp", "additive-projection", "utility", "the border keeps utility, additive noise does not", "Table 4"),
        _above(f, "vector-added", "none", "rsr", "the projection moved up at run time raises RSR", "Table 5"),
        _above(f, "none", "vector-removed", "rsr", "the projection moved down at run time lowers RSR", "Table 5"),
        _above(f, "ecso+davsp", "davsp", "rsr", "ECSO and DAVSP together resist more than DAVSP alone", "Table 6", True),
        _above(f, "ecso+davsp", "ecso", "rsr", "ECSO and DAVSP together resist more than ECSO alone", "Table 6", True),
        _within(f, "ecso-adaptive+davsp", 1.0), _over_refusal(f),
    ]  # fmt: skip
    for name in f.defenses:
        if name.startswith(FROM):
            text = f"a border trained on {name.removeprefix(FROM)} helps here, beyond the text alone"
            verdicts.append(_above(f, name, "adashield-s", "rsr", text, "Table 3", True))
    if not any(name.startswith(FROM) for name in f.defenses):
        verdicts.append(
            Claim("a border trained on another model helps here", "Table 3", UNTESTED, "no such border was given")
        )
    return verdicts


def _best(f: Figures) -> Claim:
    text, source = "DAVSP resists more than every other method", "Table 2"
    ours = f.rsr("davsp")
    others = {name: row for name in METHODS if name != "davsp" and (row := f.rsr(name))}
    if ours is None or len(others) < 2:
        return Claim(text, source, UNTESTED, "DAVSP or the methods beside it were not evaluated")
    name = max(others, key=lambda x: others[x]["value"])
    verdict = HOLDS if ours["value"] > others[name]["value"] else FAILS
    return Claim(text, source, verdict, f"{_pair(ours, others[name], METHODS[name])}; {len(others)} methods beside it")


def _front(f: Figures) -> Claim:
    """On the Pareto front of RSR against utility: nobody is at least as good in both and better in one."""
    text, source = "no method is better in both RSR and utility", "Tables 1 and 2"
    points = {n: (r["value"], u["value"]) for n in METHODS if (r := f.rsr(n)) and (u := f.utility(n))}
    if "davsp" not in points or len(points) < 3:
        return Claim(text, source, UNTESTED, "DAVSP or the methods beside it were not evaluated")
    ours = points["davsp"]
    above = [METHODS[n] for n, p in points.items() if p != ours and p[0] >= ours[0] and p[1] >= ours[1]]
    evidence = f"RSR {100 * ours[0]:.1f}, utility {100 * ours[1]:.1f}" + (f"; {', '.join(above)}" if above else "")
    return Claim(text, source, FAILS if above else HOLDS, evidence)


def _above(f: Figures, high: str, low: str, measure: str, text: str, source: str, equal: bool = False) -> Claim:
    """`high` has more of `measure` ("rsr" or "utility") than `low`; `equal`: or as much."""
    get = f.rsr if measure == "rsr" else f.utility
    a, b = get(high), get(low)
    if a is None or b is None:
        missing = high if a is None else low
        return Claim(text, source, UNTESTED, f"{missing} was not evaluated")
    holds = a["value"] >= b["value"] if equal else a["value"] > b["value"]
    what = "RSR" if measure == "rsr" else "utility"
    return Claim(text, source, HOLDS if holds else FAILS, f"{what}: {high} {_pair(a, b, low)}")


def _within(f: Figures, defense: str, points: float) -> Claim:
    text, source = f"adaptive integration keeps utility within {points:g} point of No Defense", "Table 6"
    a, b = f.utility(defense), f.utility("none")
    if a is None or b is None:
        return Claim(text, source, UNTESTED, f"{defense} was not evaluated")
    lost = 100 * (b["value"] - a["value"])
    return Claim(text, source, HOLDS if lost <= points else FAILS, f"utility: {defense} {_pair(a, b, 'none')}")


def _over_refusal(f: Figures) -> Claim:
    text, source = "DAVSP does not refuse benign queries (at most 3 points more than No Defense)", "said in words"
    a, b = f.row("davsp", "benign", "over_refusal"), f.row("none", "benign", "over_refusal")
    if a is None or b is None:
        return Claim(text, source, UNTESTED, "davsp was not evaluated")
    verdict = HOLDS if 100 * (a["value"] - b["value"]) <= 3 else FAILS
    return Claim(text, source, verdict, f"refused: davsp {_pair(a, b, 'none')}")


def _pair(a: Row, b: Row, name: str) -> str:
    """Two figures with their intervals; says if each lies in the other's."""
    inside = b["low"] <= a["value"] <= b["high"] and a["low"] <= b["value"] <= a["high"]
    return f"{_show(a)}, {name} {_show(b)}" + (" (within the noise)" if inside and a["value"] != b["value"] else "")


def _show(row: Row) -> str:
    return f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
