"""The rows of `davsp reproduce gate` as tables for a page, and the ROC of its looks."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from davsp.experiments.cells import points, rate
from davsp.experiments.gate.figures import LOOK_ECSO
from davsp.experiments.gate.twins import twin_table
from davsp.report import plots
from davsp.report.cells import markdown_table

Figures = Mapping[tuple[str, str, str], Mapping[str, Any]]
"""(defense, benchmark, metric) -> its row."""

TITLES = {
    "none": "*no defense*", "davsp": "DAVSP", "gate-states": "gate, `states`", "gate-first": "gate, `first`",
    "gate-answer": "gate, `answer`", "ecso": "ECSO", "ecso-adaptive+davsp": "adaptive ECSO + DAVSP",
    "gate-answer,ecso": "gate, `answer`, then ECSO", "gate-first,ecso": "gate, `first`, then ECSO",
}  # fmt: skip
THROUGH = {
    "none": "undefended",
    "safety-text": "the safety text",
    "random-border": "a random border",
    "davsp": "the border",
    "none+davsp": "undefended and the border",
}
LINES = {"davsp refusal": "-", "none refusal": "--", "davsp both": "-", "none both": "--"}


def markdown(
    rows: Sequence[Mapping[str, Any]], model: str, seeds: Sequence[int], partly: Mapping[str, Sequence[int]]
) -> str:
    """Tables: the defenses, the looks, and the twins if there are any.

    Args:
        partly: defenses that were not run with all seeds -> those that they were run with.
    """
    at = {(r["defense"], r["benchmark"], r["metric"]): r for r in rows}
    lines = [
        f"**The gate on {model}**, seeds {', '.join(map(str, seeds))}. Percent and points, 95 % intervals by intent.",
        "",
        *_defenses(at),
        "",
        "**What tells the classes apart**",
        "",
        *_looks(rows, at),
        *_before_ecso(at),
    ]
    malicious = at["none", "all pictures", "rsr"]["n"]
    notes = [
        f"{malicious} malicious queries with pictures, {at['none', 'benign', 'over_refusal']['n']} benign ones; the judge is `keyword`. There are "
        "few intents among the malicious ones, so no RSR has a lower end much above 95.",
        "a gate on a look refuses above the threshold that 600 held-out benign queries give for 0.5 % false refusals with 95 % confidence (the "
        "intents of the test were not among them), and answers undefended below.",
    ]  # fmt: skip
    notes += [
        f"{TITLES[name]}: seed{'s' * (len(of) > 1)} {', '.join(map(str, of))} alone, against no defense on the same queries."
        for name, of in partly.items()
    ]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), *twin_table(rows, TITLES)]) + "\n"


def _defenses(at: Figures) -> list[str]:
    """What each defense gains and costs."""
    heads = (
        "defense",
        "RSR in distribution",
        "RSR FigStep-like",
        "utility",
        "against none",
        "over-refusal",
        "by query",
    )
    lines = []
    for name in TITLES:
        if (name, "benign", "over_refusal") not in at:
            continue
        places = [("in distribution", "rsr"), ("out of distribution", "rsr"), ("utility", "accuracy")]
        cells = [TITLES[name], *(rate(at[name, *place]) for place in places)]
        cells.append(points(at.get((name, "utility", "accuracy_difference"))))
        cells += [rate(at[name, "benign", "over_refusal"], 1), _bounds(at[name, "benign", "over_refusal_by_query"])]
        lines.append(cells)
    return markdown_table(heads, lines)


def _looks(rows: Sequence[Mapping[str, Any]], at: Figures) -> list[str]:
    """How well each look tells the classes apart, and what a gate on it gives, the best first."""
    heads = (
        "look", "through", "AUROC", "caught at 0.5 % over-refusal", "over-refusal at 99 % caught", "RSR of a gate on it",
        "over-refusal", "utility against none",
    )  # fmt: skip
    lines = []
    for r in sorted((r for r in rows if r["metric"] == "auroc"), key=lambda r: -r["value"]):
        through, _, look = r["defense"].removeprefix("look: ").partition(" ")
        others = [at[r["defense"], "all pictures", m]["value"] for m in ("rsr_at_rate", "over_refusal_at_99")]
        gate = [at[r["defense"], *place] for place in (("all pictures", "rsr"), ("benign", "over_refusal"))]
        price = points(at.get((r["defense"], "utility", "accuracy_difference")))
        area = f"{r['value']:.4f} <sub>{r['low']:.4f}–{r['high']:.4f}</sub>"
        lines.append([look, THROUGH[through], area, *(f"{100 * x:.1f}" for x in others), *map(rate, gate), price])
    return markdown_table(heads, lines)


def _before_ecso(at: Figures) -> list[str]:
    """What a gate on each look gives where ECSO answers what passes; nothing where ECSO was not run."""
    keys = {name.removeprefix(f"{LOOK_ECSO}: "): name for name, *_ in at if name.startswith(LOOK_ECSO)}
    if not keys:
        return []
    heads = ["look", "through", "RSR in distribution", "RSR FigStep-like", "utility against none", "over-refusal"]
    lines = []
    for key, name in sorted(keys.items(), key=lambda one: -at[one[1], "all pictures", "rsr"]["value"]):
        through, _, look = key.partition(" ")
        places = (("in distribution", "rsr"), ("out of distribution", "rsr"), ("benign", "over_refusal"))
        *rsr, over = (rate(at[name, *place]) for place in places)
        lines.append([look, THROUGH[through], *rsr, points(at.get((name, "utility", "accuracy_difference"))), over])
    return ["", "**A gate on a look, and ECSO behind it**", "", *markdown_table(heads, lines)]


def _bounds(figure: Mapping[str, Any]) -> str:
    return "<sub>{:.1f}–{:.1f}</sub>".format(*(100 * figure[k] for k in ("low", "high")))


def roc(looks: Sequence[Mapping[str, np.ndarray]], model: str) -> str:
    """Malicious queries refused over benign ones refused (log scale), a line a look, as an SVG file's text; seeds are averaged."""
    grid = np.geomspace(5e-4, 1, 200)
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(5.2, 3.6), layout="constrained")
        ax = figure.subplots()
        for key, style in LINES.items():
            curves = [_curve(one[f"{key}/test"], one["malicious"], grid) for one in looks]
            through, _, look = key.partition(" ")
            colour = plots.COLOURS["davsp" if look == "refusal" else "additive"]
            ax.plot(100 * grid, 100 * np.mean(curves, 0), style, color=colour, label=f"{look}, {THROUGH[through]}")
        ax.axvline(0.5, color=plots.INK, linewidth=0.8, linestyle=(0, (1, 2)))
        ax.set(xscale="log", ylim=(60, 101), title=model)
        ax.set(xlabel="benign queries refused, %", ylabel="malicious queries refused, %")
        ax.xaxis.set_major_formatter("{x:g}")  # powers of ten would need the mathematics that STYLE leaves off
        ax.legend(loc="lower right", frameon=False)
        return plots.standalone(plots.svg(figure, "roc"))


def _curve(scores: np.ndarray, malicious: np.ndarray, grid: np.ndarray) -> np.ndarray:
    good = np.sort(scores[~malicious])[::-1]
    at = good[np.minimum((grid * len(good)).astype(int), len(good) - 1)]  # as many benign ones stand above
    return (scores[malicious][:, None] > at).mean(0)
