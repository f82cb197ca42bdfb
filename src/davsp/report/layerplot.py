"""The layer sweep as a picture: AUROC and d' of every layer."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from davsp.report.plots import COLOURS


def layer_plot(rows: Sequence[Mapping[str, Any]], chosen: int, data: str) -> bytes:
    """A PNG of two panels over the layer, AUROC and d', with the chosen layer marked.

    Args:
        rows: a row a layer, as `HarmfulnessVector.by_layer` gives them.
        chosen: the layer in use.
        data: the queries that the figures are of, for the title.
    """
    figure = Figure(figsize=(8, 3), layout="constrained")
    layers = [row["layer"] for row in rows]
    for axis, key, name in zip(figure.subplots(1, 2), ("auroc", "gap"), ("AUROC", "d'"), strict=True):
        axis.plot(layers, [row[key] for row in rows], color=COLOURS["davsp"], marker="o", markersize=4)
        axis.axvline(chosen, color=COLOURS["none"], linestyle=(0, (4, 2)), label=f"layer {chosen}, in use")
        axis.axhline(0.5 if key == "auroc" else 0.0, color="lightgrey", zorder=0)  # no better than chance
        axis.set(xlabel="layer", ylabel=name)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.suptitle(f"harmfulness vector, {data}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
