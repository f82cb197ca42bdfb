"""The records of `davsp corruptions` as a table for a README, and RSR over shifts as a plot."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from davsp.report import plots
from davsp.report.cells import markdown_table

SETS = {"sd": "SD", "typo": "TYPO", "sd_typo": "SD+TYPO", "figstep": "FigStep-like"}
TITLES = {"none": "*no defense*", "text": "*the text alone, white border*", "png": "**untouched (PNG)**"}


def markdown(run: Mapping[str, Any]) -> str:
    """A row a change: RSR over all malicious pictures and by set, what it lost, what the border still adds to its text.

    Args:
        run: the content of corruptions.json.
    """
    records = run["records"]
    sets = [name for name in records[0]["rsr"] if name != "pictures"]
    heads = ["change", "patches", "RSR, all", *(SETS.get(name, name) for name in sets), "against untouched",
             "against the text alone", "over-refusal", "utility", "projection"]  # fmt: skip
    title = (
        f"**What is left of a border's effect**: {run['model']}, canvas {run['canvas']}, border {run['padding']}, patches of "
        f"{run['patch']} pixels. Percent and points, 95 % intervals."
    )
    lines = []
    for r in records:
        cells = [TITLES.get(r["change"], r["change"]), f"{r['patches']:.2f}" if "patches" in r else "–"]
        cells += [_rate(r["rsr"]["pictures"])] + [f"{100 * r['rsr'][name]['value']:.0f}" for name in sets]
        cells += [_difference(r, other) for other in ("png", "text")]
        cells += [_rate(r["over_refusal"].get("benign")), _rate(r["accuracy"].get("utility"))]
        cells.append(f"{r['projection_malicious']:.2f}" if "projection_malicious" in r else "–")
        lines.append(cells)
    notes = [
        f"RSR: {records[0]['rsr']['pictures']['n']} malicious pictures; intervals drawn by intent. Differences are of RSR over all of "
        "them, paired; * : p < 0.05, not corrected for the number of rows.",
        "patches: cosine of the border's patches before and after, as the tower's first layer gives them. projection: mean of the malicious queries on the "
        "harmfulness vector.",
    ]
    return "\n".join([title, "", *markdown_table(heads, lines), "", *(f"- {note}" for note in notes)]) + "\n"


def _rate(figure: Mapping[str, Any] | None) -> str:
    if figure is None or figure["value"] is None:
        return "–"
    return "{value:.0f} <sub>{low:.0f}–{high:.0f}</sub>".format(
        **{k: 100 * figure[k] for k in ("value", "low", "high")}
    )


def _difference(record: Mapping[str, Any], other: str) -> str:
    figure = record.get(f"against_{other}", {}).get("pictures rsr")
    if figure is None:
        return "–"
    value, low, high = (f"{100 * figure[k]:+.0f}".replace("-", "−") for k in ("value", "low", "high"))
    return f"{value} <sub>{low} to {high}</sub>{'*' if figure['p'] < 0.05 else ''}"


def plot(runs: Sequence[Mapping[str, Any]]) -> str:
    """RSR over all malicious pictures by the pixels of a horizontal shift, a panel a model, as an SVG file's text."""
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(4.6, 0.7 + 1.7 * len(runs)), layout="constrained")
        panels = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
        for ax, run in zip(panels, runs, strict=True):
            of = {r["change"]: r["rsr"]["pictures"] for r in run["records"]}
            _level(ax, of["text"], "the text alone", plots.COLOURS["safety-text"])
            points = [(0.0, of["png"]), *((_pixels(name), f) for name, f in of.items() if _pixels(name))]
            points = sorted(points, key=lambda point: point[0])
            x, y = [at for at, _ in points], [100 * f["value"] for _, f in points]
            spread, look = plots.spread([f for _, f in points]), {"color": plots.COLOURS["davsp"], "marker": "o"}
            ax.errorbar(x, y, spread, markersize=4, capsize=2, label="the border and its text", **look)
            ax.axvline(run["patch"], color=plots.INK, linewidth=0.8, linestyle=(0, (4, 2)), label="a patch")
            ax.set_title(run["model"])
            ax.set_ylabel("RSR, %")
            ax.set_ylim(40, 103)
        panels[-1].set_xlabel("shift to the right, pixels")
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=3, handlelength=1.4)
        return plots.standalone(plots.svg(figure, "shifts"))


def _level(ax: Any, figure: Mapping[str, float], name: str, colour: str) -> None:
    ax.axhline(100 * figure["value"], color=colour, linewidth=1.2, label=name)
    ax.axhspan(100 * figure["low"], 100 * figure["high"], color=colour, alpha=0.12, linewidth=0)


def _pixels(name: str) -> float:
    """Of a horizontal shift; 0 for every other change."""
    kind, _, pixels = name.partition("-")
    if kind != "shift":
        return 0.0
    return 0.5 if pixels == "half" else float(pixels) if pixels.isdigit() else 0.0
