"""The plots of a report, as SVG text that sits in the page: it takes the page's ink, so it reads in light and dark."""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from davsp.report.cells import Rows, defenses, find, label

COLOURS = {
    "none": "#7d8590",
    "safety-text": "#c8860d",
    "random-border": "#2a9d8f",
    "additive": "#b0509f",
    "davsp": "#2f6fde",
    "gate": "#7c4fd0",
    "adashield-s": "#c8860d",
    "adashield-a": "#8c5a2b",
    "pat": "#5b8c3e",
    "uniguard": "#b0509f",
    "esiii": "#a04455",
}
MARKERS = {
    "none": "o", "safety-text": "s", "random-border": "^", "additive": "D", "davsp": "*", "gate": "h",
    "adashield-s": "s", "adashield-a": "P", "pat": "v", "uniguard": "D", "esiii": "X",
}  # fmt: skip
MALICIOUS, BENIGN = "#d4552b", "#3d9ac9"
INK, LINE = "#010203", "#030201"  # stand-ins that the page's own colours replace
_SPARE = ("#4b5fa8", "#00798c", "#c8577e", "#8a8300", "#b5482f", "#3f7d5a", "#6f5b8f", "#8c6d46")

STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with dollars is a name
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
}


def colours(defenses: Iterable[str]) -> dict[str, str]:
    """Defense -> its colour on a page: the known ones have their own everywhere, the others take the spare ones in turn."""
    spare = cycle(_SPARE)
    return {defense: COLOURS.get(defense) or next(spare) for defense in defenses}


def named(defense: str) -> str:
    """Its label for a legend, which leaves out what begins with an underscore."""
    words = label(defense)
    return f"\N{WORD JOINER}{words}" if words.startswith("_") else words


def histograms(
    before: Mapping[str, Sequence[float]],
    after: Mapping[str, Sequence[float]],
    titles: tuple[str, str],
    margins: tuple[float, float],
) -> str:
    """Projections by label before and after, on one axis, with the margins (mu_plus, mu_minus) drawn."""
    everything = [s for projections in (before, after) for values in projections.values() for s in values]
    everything += margins
    bins = np.linspace(min(everything), max(everything), 33)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 4.2), layout="constrained")
        for ax, projections, title in zip(figure.subplots(2, 1, sharex=True), (before, after), titles, strict=True):
            for name, shade in (("benign", BENIGN), ("malicious", MALICIOUS)):
                values = projections.get(name, ())
                ax.hist(
                    values, bins, color=shade, alpha=0.45, label=f"{name} (n = {len(values)})", histtype="stepfilled"
                )
                ax.hist(values, bins, color=shade, histtype="step", linewidth=1.2)
            for name, at, shade in (("μ₊", margins[0], MALICIOUS), ("μ₋", margins[1], BENIGN)):
                ax.axvline(at, color=shade, linestyle=(0, (4, 2)), linewidth=1.2)
                ax.annotate(name, (at, 1), (2, -2), ("data", "axes fraction"), "offset points", va="top", color=shade)
            ax.set_title(title)
            ax.set_ylabel("queries")
            ax.margins(y=0.2)
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=2, handlelength=1.2)
        figure.axes[1].set_xlabel("projection on the harmfulness vector")
        return svg(figure, "histograms")


def sweep(layers: Sequence[Mapping[str, Any]], chosen: int) -> str:
    """Held-out AUROC of every layer, the chosen one marked."""
    x, y = [entry["layer"] for entry in layers], [entry["auroc"] for entry in layers]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        ax = figure.subplots()
        ax.plot(x, y, color=COLOURS["davsp"], marker="o", markersize=4)
        if chosen in x:
            at = y[x.index(chosen)]
            ax.plot(chosen, at, "o", color=COLOURS["davsp"], fillstyle="none", markersize=11, markeredgewidth=1.8)
            ax.annotate(f"layer {chosen}: {at:.3f}", (chosen, at), (0, -18), textcoords="offset points", ha="center")
        ax.axhline(0.5, color=LINE, linestyle=(0, (4, 2)))
        ax.set_xlabel("layer")
        ax.set_ylabel("AUROC, held out")
        ax.set_ylim(min(0.45, *y) if len(y) > 1 else 0.45, 1.03)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        return svg(figure, "sweep")


def curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], panel: str, series: Mapping[str, tuple[str, str]]
) -> str | None:
    """One panel of the training curves: each run in its defense's colour.

    Args:
        runs: defense -> records of metrics.jsonl, each with "step".
        panel: the name of the axis.
        series: field of the records -> its name in the legend, line style; fields that no record has are left out.

    Returns:
        The SVG, or None if no record has any of the fields.
    """
    any_points = False
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        ax, shades = figure.subplots(), colours(runs)
        for name, records in runs.items():
            for field, (text, style) in series.items():
                points = [(r["step"], r[field]) for r in records if r.get(field) is not None]
                if points:
                    x, y = np.array(points, float).T
                    words = ", ".join(filter(None, (named(name), text)))
                    ax.plot(x, _smooth(y), style, color=shades[name], label=words)
                    any_points = True
        if not any_points:
            return None
        ax.set_xlabel("step")
        ax.set_ylabel(panel)
        ax.margins(x=0.01)
        figure.legend(loc="outside upper left", ncols=2 if len(ax.lines) <= 2 else 1, handlelength=1.6)
        return svg(figure, re.sub(r"\W+", "-", panel))


def lines(records: Sequence[Mapping[str, Any]], axis: str) -> str:
    """RSR, utility and over-refusal over the values of one setting, with 95 % intervals; values in their order, evenly apart."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        ax = figure.subplots()
        kinds = {
            "rsr": ("RSR", "davsp"),
            "utility": ("utility", "random-border"),
            "over_refusal": ("over-refusal", "additive"),
        }
        for key, (name, colour_of) in kinds.items():
            shown = [(i, r[key]) for i, r in enumerate(records) if r[key] is not None]
            if not shown:
                continue
            x, y = [i for i, _ in shown], [100 * r["value"] for _, r in shown]
            ax.errorbar(
                x,
                y,
                spread([r for _, r in shown]),
                marker="o",
                markersize=5,
                capsize=2,
                color=COLOURS[colour_of],
                label=name,
            )
        ax.set_xticks(range(len(records)), [str(r["value"]) for r in records])
        ax.set_xlabel(axis)
        ax.set_ylabel("%")
        ax.set_ylim(-3, 103)
        figure.legend(loc="outside upper left", ncols=3, handlelength=1.4)
        return svg(figure, re.sub(r"\W+", "-", axis))


def scatter(
    rows: Rows, attacks: Mapping[str, str], utility: tuple[str, str, str] = ("utility", "total", "accuracy")
) -> str:
    """RSR over utility, a panel for each of `attacks` (benchmark -> title), with both 95 % intervals.

    Args:
        utility: benchmark, split and metric of the other axis.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.9 * len(attacks)), layout="constrained")
        panels = np.atleast_1d(figure.subplots(len(attacks), 1, sharex=True))
        for ax, (benchmark, title) in zip(panels, attacks.items(), strict=True):
            for name, shade in colours(defenses(rows)).items():
                _point(ax, name, shade, find(rows, name, *utility), find(rows, name, benchmark, "total", "rsr"))
            ax.set_title(title)
            ax.set_ylabel("RSR, %")
            ax.set_ylim(top=103)
        panels[-1].set_xlabel("utility, %")
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=2, handlelength=1.2)
        return svg(figure, "scatter")


def _point(
    ax: Axes, defense: str, shade: str, x: Mapping[str, Any] | None, y: Mapping[str, Any] | None
) -> None:  # fmt: skip
    if x is None or y is None or x["value"] is None or y["value"] is None:
        return
    place, marker = (100 * x["value"], 100 * y["value"]), MARKERS.get(defense, "o")
    ax.errorbar(*place, spread([y]), spread([x]), fmt="none", ecolor=shade, elinewidth=1, alpha=0.55)
    ax.plot(*place, marker, color=shade, markersize=11 if marker == "*" else 7, linestyle="none", label=named(defense))


def spread(rates: Rows) -> list[list[float]]:
    """How far the intervals of some rates reach below and above them, in percent."""
    below, above = ([100 * abs(r[end] - r["value"]) for r in rates] for end in ("low", "high"))
    return [below, above]


def _smooth(y: np.ndarray) -> np.ndarray:
    """Mean over a window of a thirtieth of the run, to both sides, shorter at the ends."""
    half = len(y) // 60
    return np.array([y[max(0, i - half) : i + half + 1].mean() for i in range(len(y))])


def standalone(text: str) -> str:
    """A plot as a file of its own: on white, with ink that no page has to lend."""
    text = text.replace("currentColor", "#1d2126").replace("var(--line)", "#dcdcd6").replace(' aria-hidden="true"', "")
    text = text.replace("<svg ", '<svg style="background:#fff" ', 1)
    return text + "\n"


def svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element with ids of its own, the page's ink and the page's font."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg [^>]*?)width="[^"]*" ?', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)height="[^"]*" ?', r'\1aria-hidden="true" ', text, count=1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    return text.replace(INK, "currentColor").replace(LINE, "var(--line)")
