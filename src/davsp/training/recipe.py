"""The setting of the authors' code in one word (`--recipe published`).

Source: `train/optimize.py`, `train/utils.py` and `scripts/train.sh` of zhangyitonggg/DAVSP, of 2025-09-15, with the versions of its
`requirements.txt`. What the paper says, what that code has and what is not copied: docs/published.md.
"""

from typing import Any

from davsp.lvlm import LVLM
from davsp.prompts import VisualSafetyPrompt
from davsp.training.settings import TrainSettings
from davsp.vector import HarmfulnessVector

PUBLISHED: dict[str, Any] = {
    "steps": 1200, "batch_size": 2, "mixed": False, "optimizer": "sign", "lr": 1 / 255, "schedule": "constant", "objective": "both",
    "lam": 0.02, "normalise": False, "end_token": False, "malicious_answer_share": 0.05,
}  # fmt: skip
"""Fields of `TrainSettings`, for every model."""

PADDING = 30 / 336
"""Width of the border, as a part of the canvas."""

LAYER, MARGINS = 20, (27.0, -2.0)
"""Of LLaVA-1.5-13B alone, in the units of its hidden states there."""


def is_theirs(lvlm: LVLM) -> bool:
    """Whether a model is LLaVA-1.5-13B by its sizes and its template: the one that the code's layer and margins are of."""
    width = lvlm.model.config.get_text_config().hidden_size
    return lvlm.num_layers == 40 and width == 5120 and lvlm.takes_templates()


def padding(canvas: int) -> int:
    """The border's width in pixels on a canvas of that side: 30 of 336."""
    return max(1, round(PADDING * canvas))


def border(lvlm: LVLM, width: int | None, text: str) -> VisualSafetyPrompt:
    """Where the authors' training starts: the colour that the model's normalisation makes 0; pictures are resized twice.

    Args:
        width: of the border in pixels; None: as published.
    """
    side = lvlm.canvas
    colour = lvlm.mean[0].cpu().float().expand(3, side, side).clone()
    return VisualSafetyPrompt(colour, padding(side) if width is None else width, text, {"resizes": 2})


def layer_and_margins(lvlm: LVLM, vector: HarmfulnessVector, layer: int | None = None) -> tuple[dict[str, Any], str]:
    """Layer, mu_plus and mu_minus of `TrainSettings` where the published ones are meant, and a note where they are not.

    Args:
        layer: that the user wants; None: nothing was said.
    """
    if is_theirs(lvlm) and layer in (None, LAYER):
        return {"layer": LAYER, "mu_plus": MARGINS[0], "mu_minus": MARGINS[1]}, ""
    layer = vector.layer if layer is None else layer
    plus, minus = vector.margins(layer) if layer != vector.layer else (vector.mu_plus, vector.mu_minus)
    note = (
        f"the published margins, {MARGINS[0]:+g} and {MARGINS[1]:+g}, are of layer {LAYER} of LLaVA-1.5-13B; at layer {layer} of "
        f"{lvlm.model_id} the vector's own are taken, {plus:+.3g} and {minus:+.3g}"
    )
    return {"layer": layer}, note


def published(**changes: Any) -> TrainSettings:
    """The published settings, but for what is said otherwise."""
    return TrainSettings(**(PUBLISHED | changes))
