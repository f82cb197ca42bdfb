"""The two plots of an answer, as SVG that takes the page's ink."""

from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from davsp.report.plots import BENIGN, COLOURS, LINE, MALICIOUS, STYLE, svg

UNDEFENDED, DEFENDED = COLOURS["none"], COLOURS["davsp"]
WIDTH = 3.05  # inches; the page stretches it to 296 pixels and more, so the smallest letters have 11


def axis(
    undefended: float,
    defended: float,
    margins: tuple[float, float],
    malicious: Sequence[float],
    benign: Sequence[float],
) -> str:
    """Both projections on one axis.

    Args:
        undefended, defended: projections at the layer in use.
        margins: (mu_plus, mu_minus), drawn as lines.
        malicious, benign: projections of the vector's own queries, drawn as ticks for comparison.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.8), layout="constrained")
        ax = figure.subplots()
        for values, shade, y in ((malicious, MALICIOUS, 0.32), (benign, BENIGN, 0.0)):
            ax.plot(values, [y] * len(values), "|", color=shade, markersize=9, alpha=0.5)
        for at, name, shade in ((margins[0], "μ₊", MALICIOUS), (margins[1], "μ₋", BENIGN)):
            ax.axvline(at, color=shade, linestyle=(0, (4, 2)), linewidth=1.2)
            ax.annotate(name, (at, 1), (2, -1), ("data", "axes fraction"), "offset points", va="top", color=shade)
        ax.plot(undefended, 1.0, "o", color=UNDEFENDED, markersize=8, label=f"undefended {undefended:+.1f}")
        ax.plot(defended, 0.68, "*", color=DEFENDED, markersize=13, label=f"defended {defended:+.1f}")
        ax.plot([undefended, defended], [1.0, 0.68], color=DEFENDED, linewidth=1, zorder=1)
        ax.set_ylim(-0.2, 1.4)
        ax.set_yticks([0.32, 0.0], ["malicious", "benign"])
        ax.tick_params(axis="y", length=0)
        ax.grid(False)
        ax.spines["left"].set_visible(False)
        ax.set_xlabel("projection on the harmfulness vector")
        figure.legend(loc="outside upper left", ncols=2, handlelength=1.2)
        return svg(figure, "axis")


def layers(
    undefended: Sequence[float], defended: Sequence[float], margins: Sequence[tuple[float, float]], layer: int
) -> str:
    """Both projections at every layer, 1 first, between the margins of each if there are any; `layer` is the one in use."""
    x = range(1, len(undefended) + 1)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
        ax = figure.subplots()
        for name, shade, values in zip(("μ₊", "μ₋"), (MALICIOUS, BENIGN), zip(*margins, strict=True), strict=False):
            ax.plot(x, values, color=shade, linestyle=(0, (4, 2)), linewidth=1.2, label=name)
        ax.plot(x, undefended, color=UNDEFENDED, marker="o", markersize=4, label="undefended")
        ax.plot(x, defended, color=DEFENDED, marker="*", markersize=8, label="defended")
        ax.axvline(layer, color=LINE, linewidth=6, zorder=0)
        ax.set_xlabel("layer")
        ax.set_ylabel("projection")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside upper left", ncols=4, handlelength=1.3, columnspacing=0.9)
        return svg(figure, "layers")
