"""Plots with one small panel a method, so that all methods of a table can be looked at side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from davsp.report.cells import label
from davsp.report.plots import BENIGN, LINE, MALICIOUS, STYLE, svg

RIGHT, WRONG = BENIGN, MALICIOUS
ACROSS = 3  # panels a line


def projections(
    scores: Mapping[str, Mapping[str, Sequence[float]]], titles: Mapping[str, str], margins: tuple[float, float]
) -> str:
    """Where each method puts malicious and benign queries on the harmfulness vector, all on one axis.

    Args:
        scores: defense -> label ("malicious", "benign") -> projections.
        titles: defense -> heading of its panel; left out, its usual name.
        margins: μ₊ and μ₋, drawn in every panel.
    """
    everything = [s for panel in scores.values() for values in panel.values() for s in values] + list(margins)
    bins = np.linspace(min(everything), max(everything), 41).tolist()
    with matplotlib.rc_context(STYLE):
        figure, panels = _panels(len(scores), 1.5, sharex=True)
        for ax, (name, panel) in zip(panels, scores.items(), strict=True):
            for kind, shade in (("benign", BENIGN), ("malicious", MALICIOUS)):
                values = panel.get(kind, ())
                share = np.full(len(values), 100 / max(1, len(values)))  # classes of different size, the same area
                ax.hist(values, bins, weights=share, color=shade, alpha=0.5, histtype="stepfilled", label=kind)
            for at, shade in zip(margins, (MALICIOUS, BENIGN), strict=True):
                ax.axvline(at, color=shade, linestyle=(0, (4, 2)), linewidth=1)
            ax.set_title(titles.get(name, label(name)))
            ax.set_yticks([])
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=2, handlelength=1.2)
        figure.supxlabel("projection on the harmfulness vector; dashed: μ₋ and μ₊", fontsize=8.5)
        return svg(figure, "projections")


def confusions(counts_of: Mapping[str, Mapping[str, tuple[int, int, int]]], titles: Mapping[str, str]) -> str:
    """What was withheld and what was answered, of malicious and of benign queries, a 2 × 2 square a method.

    Args:
        counts_of: defense -> label -> counts of (withheld, answered, unscored). The last are no part of the shares; they
            are given below the square where there are any.
        titles: as for `projections`.
    """
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure, panels = _panels(len(counts_of), 1.75)
        for ax, (name, counts) in zip(panels, counts_of.items(), strict=True):
            for row, kind in enumerate(("malicious", "benign")):
                withheld, answered, _ = counts.get(kind, (0, 0, 0))
                for column, n in enumerate((withheld, answered)):
                    share = n / max(1, withheld + answered)
                    shade = RIGHT if row == column else WRONG  # malicious withheld, benign answered
                    ax.add_patch(Rectangle((column, 1 - row), 1, 1, facecolor=shade, alpha=0.08 + 0.72 * share))
                    ax.text(column + 0.5, 1.5 - row, f"{100 * share:.0f} %\n{n}", ha="center", va="center", fontsize=8)
            ax.set(xlim=(0, 2), ylim=(0, 2), title=titles.get(name, label(name)))
            ax.set_xticks([0.5, 1.5], ["withheld", "answered"])
            ax.set_yticks([1.5, 0.5], ["malicious", "benign"])
            ax.tick_params(length=0)
            if lost := sum(c[2] for c in counts.values()):
                ax.set_xlabel(f"{lost} unscored", fontsize=8)
            for spine in ax.spines.values():
                spine.set(visible=True, color=LINE)
        return svg(figure, "confusions")


def _panels(count: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, `ACROSS` a line, each `height` inches high."""
    lines = -(-count // ACROSS)
    figure = Figure(figsize=(7.2, 0.6 + height * lines), layout="constrained")
    axes = np.atleast_1d(figure.subplots(lines, ACROSS, **options)).ravel().tolist()
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]
