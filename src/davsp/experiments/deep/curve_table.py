"""What the looks of `curve.py` give: rows, paired differences at the same step, and the best RSR where so much utility may be lost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from davsp import metrics
from davsp.experiments.cells import points, rate
from davsp.experiments.deep.borders import Outcomes, kept
from davsp.experiments.deep.depth import COLOURS
from davsp.experiments.seeds import MANIFEST, notes, under_way
from davsp.metrics import Outcome
from davsp.report import plots
from davsp.runtime.files import write_json, write_text

QUARTER, EVERY_ROW = "both, λ 6", "both, λ 6, every row"
CURVES: dict[str, dict[str, Any]] = {
    "answer": {"objective": "answer"}, "both, λ 2.5": {"objective": "both", "lam": 2.5}, "projection": {"objective": "projection"},
    QUARTER: {"objective": "both", "lam": 6.0}, "both, λ 1": {"objective": "both", "lam": 1.0},
    "both, λ 0.3": {"objective": "both", "lam": 0.3},
    EVERY_ROW: {"objective": "both", "lam": 6.0, "malicious_answer_share": 1.0},
}  # fmt: skip
"""Every malicious row carries the refusal in "answer" and in the last, a quarter of them in the others."""
ANY = "both, any λ"
LOSSES = (1, 3, 5, 10)
"""Points of utility that may be lost."""
DRAWS = 1000
NOTHING = -9.0
"""In place of an RSR where no point loses so little."""
PLACES = {("total", "rsr"): "malicious", ("total", "accuracy"): "utility", ("total", "over_refusal"): "benign"}
PLACED = [(place, metric) for (_, metric), place in PLACES.items()]


def pool(out: Path, model: str) -> list[dict[str, Any]]:
    """Rows, table and plot of all seeds in the part's folder."""
    facts, outcomes = kept(out)
    table: list[dict[str, Any]] = []
    for name, rows in outcomes.items():
        table += metrics.rows(model, name, rows, None if name == "none" else outcomes["none"])
    table += [*at_equal_steps(model, outcomes), *choices(model, outcomes)]
    seeds = [one["seed"] for one in facts]
    write_json(out / "metrics.json", metrics.metrics_file(table))
    several = {"seeds": seeds, "under_way": under_way(facts), "stages": [one["stages"] for one in facts]}
    write_json(out / MANIFEST, {**facts[0], **several})
    write_text(out / "curve.md", markdown(table, model, seeds) + "".join(f"{x}\n" for x in notes(out, facts)))
    write_text(out / "curve.svg", figure(table))
    return table


def at_equal_steps(model: str, outcomes: Outcomes) -> list[dict[str, Any]]:
    """Paired differences at the same step: of each curve from answers alone, and of refusals on every row from those on a quarter."""
    table: list[dict[str, Any]] = []
    for name, rows in outcomes.items():
        curve_of, _, step = name.partition(" step ")
        for other in ("answer", *((QUARTER,) if curve_of == EVERY_ROW else ())):
            if curve_of != other and (before := outcomes.get(f"{other} step {step}")):
                against = metrics.rows(model, f"{name} against {other}", rows, before)
                table += [row for row in against if row["metric"].endswith("_difference")]
    return table


def choices(model: str, outcomes: Mapping[str, Sequence[Outcome]], seed: int = 0) -> list[dict[str, Any]]:
    """Best RSR of each curve where so many points of utility may be lost, and the differences from answers alone, with 95 % of `DRAWS`."""
    curves = {c: [n for n in outcomes if n.startswith(f"{c} step ")] for c in CURVES}
    curves = {c: names for c, names in curves.items() if names} | {ANY: [n for n in outcomes if n.startswith("both")]}
    rng = np.random.default_rng(seed)
    names = list(outcomes)
    drawn = {place: _drawn(outcomes, names, place, rng) for place in ("malicious", "utility")}  # (draws, defenses) each
    n = sum(o.benchmark == "malicious" for o in outcomes["none"])
    lost = drawn["utility"][:, [names.index("none")]] - drawn["utility"]
    table, best = [], dict[tuple[str, int], Float[np.ndarray, " draws"]]()
    for name, members in curves.items():
        at = [names.index(one) for one in members]
        for points_lost in LOSSES:
            allowed = lost[:, at] <= points_lost / 100 + 1e-9
            best[name, points_lost] = drawn["malicious"][:, at].max(1, initial=NOTHING, where=allowed)
    for (name, points_lost), values in best.items():
        metric = f"rsr_at_{points_lost}"
        table.append(_row(model, f"best of {name}", metric, values, n))
        if name != "answer" and ("answer", points_lost) in best:
            table.append(
                _row(
                    model,
                    f"best of {name} against answer",
                    f"{metric}_difference",
                    _minus(values, best["answer", points_lost]),
                    n,
                )
            )
    return table


def _minus(a: Float[np.ndarray, " draws"], b: Float[np.ndarray, " draws"]) -> Float[np.ndarray, " draws"]:
    return np.where((a == NOTHING) | (b == NOTHING), NOTHING, a - b)


def _row(model: str, defense: str, metric: str, values: Float[np.ndarray, " draws"], n: int) -> dict[str, Any]:
    """The first value is of the queries as they are, the others are draws; None where more than 2.5 % of them have no point to choose."""
    head = {"model": model, "defense": defense, "benchmark": "malicious", "split": "total", "metric": metric}
    chosen = values[values != NOTHING]
    if values[0] == NOTHING or len(chosen) < 0.975 * len(values):
        return head | {"value": None, "low": None, "high": None, "n": n}
    low, high = np.quantile(chosen[1:], (0.025, 0.975))
    return head | {"value": float(values[0]), "low": float(low), "high": float(high), "n": n}


def _drawn(
    outcomes: Mapping[str, Sequence[Outcome]], names: Sequence[str], place: str, rng: np.random.Generator
) -> Float[np.ndarray, "draws n"]:
    """Rate of each defense: of the queries as they are, then of draws of whole intents."""
    per = [{o.query_id: o for o in outcomes[name] if o.benchmark == place} for name in names]
    ids = [i for i in per[0] if all(i in one and one[i].value is not None for one in per)]
    values = np.array([[float(one[i].value or 0) for i in ids] for one in per])  # (defenses, queries)
    groups = sorted({per[0][i].group for i in ids})
    where = np.array([groups.index(per[0][i].group) for i in ids])
    sums = np.stack([np.bincount(where, row, len(groups)) for row in values])  # (defenses, groups)
    counts = np.bincount(where, minlength=len(groups))
    times = np.stack(
        [np.ones(len(groups)), *(rng.multinomial(len(groups), [1 / len(groups)] * len(groups)) for _ in range(DRAWS))]
    )
    drawn: Float[np.ndarray, "draws n"] = (times @ sums.T) / (times @ counts)[:, None]
    return drawn


def markdown(rows: Sequence[Mapping[str, Any]], model: str, seeds: Sequence[int]) -> str:
    """All points, and the best RSR at equal utility."""
    at = {(r["defense"], r["benchmark"], r["metric"]): r for r in rows if r["split"] == "total"}
    lines = [
        f"**Resistance over utility, {model}**, seeds {', '.join(map(str, seeds))}. RSR on {at['none', 'malicious', 'rsr']['n']} malicious "
        "pictures; percent, 95 % intervals by intent.", "", "| | step | RSR | utility | over-refusal |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name in dict.fromkeys(r["defense"] for r in rows if r["metric"] == "rsr"):
        curve_of, _, step = name.partition(" step ")
        lines.append("| " + " | ".join([curve_of, step or "–", *(rate(at[name, *p]) for p in PLACED)]) + " |")
    lines += [
        "",
        "| best RSR where at most so much utility is lost | " + " | ".join(f"{x} points" for x in LOSSES) + " |",
    ]
    lines.append("|---" * (len(LOSSES) + 1) + "|")
    for name in dict.fromkeys(r["defense"] for r in rows if r["metric"].startswith("rsr_at_")):
        change = name.endswith(" against answer")
        cells = [at[name, "malicious", f"rsr_at_{x}" + "_difference" * change] for x in LOSSES]
        title = f"{name.removesuffix(' against answer')}, less answers alone" if change else name
        lines.append("| " + " | ".join([title, *((points if change else rate)(one) for one in cells)]) + " |")
    lines += ["", "| at the same step, paired | RSR | utility | over-refusal |", "|---|---|---|---|"]
    for name in dict.fromkeys(
        r["defense"] for r in rows if r["metric"] == "rsr_difference" and " against " in r["defense"]
    ):
        curve_of, _, other = name.partition(" against ")
        title = f"{curve_of}, less {'answers alone' if other == 'answer' else other}"
        gains = (points(at.get((name, place, f"{metric}_difference"))) for place, metric in PLACED)
        lines.append("| " + " | ".join([title, *gains]) + " |")
    return (
        "\n".join(
            [*lines, "", "- –: no point, in the figure or in more than 2.5 % of the draws. The judge is `keyword`."]
        )
        + "\n"
    )


def figure(rows: Sequence[Mapping[str, Any]]) -> str:
    """The curves: a line from look to look, the last one filled."""
    at = {
        (r["defense"], r["metric"]): 100 * r["value"]
        for r in rows
        if r["metric"] in ("rsr", "accuracy") and r["split"] == "total"
    }
    styles: dict[str, Any] = {
        QUARTER: ":", "both, λ 1": "--", "both, λ 0.3": "-.", EVERY_ROW: (0, (5, 1))
    }  # fmt: skip
    with matplotlib.rc_context(plots.STYLE):
        drawn = Figure(figsize=(5.4, 3.8), layout="constrained")
        ax = drawn.subplots()
        ax.plot(at["none", "accuracy"], at["none", "rsr"], "o", color=COLOURS["none"], label="no defense")
        for name in CURVES:
            steps = [one for one, metric in at if metric == "rsr" and one.startswith(f"{name} step ")]
            if steps:
                x, y = ([at[one, metric] for one in steps] for metric in ("accuracy", "rsr"))
                colour = COLOURS[name.partition(",")[0]]
                style = styles.get(name, "-")
                marker = "s" if name.endswith("every row") else "o"
                ax.plot(x, y, linestyle=style, marker=marker, markersize=3.5, color=colour, label=name)
                ax.plot(x[-1], y[-1], marker, markersize=7, color=colour)
        ax.set_xlabel("utility, %")
        ax.set_ylabel("RSR, %")
        drawn.legend(loc="outside lower center", ncols=3, handlelength=2.8)
        return plots.standalone(plots.svg(drawn, "curve"))
