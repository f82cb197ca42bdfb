"""One border trained on several models: a step on each in turns."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from davsp.errors import DavspError
from davsp.lvlm import LVLM, fingerprint
from davsp.prompts import Prompt, VisualSafetyPrompt
from davsp.prompts.border import folder_name, hub_name
from davsp.query import Query
from davsp.training.borders import Run
from davsp.training.checkpoint import TrainState
from davsp.training.loop import Loop, complete
from davsp.training.settings import TrainSettings
from davsp.vector import HarmfulnessVector


class Pupil(NamedTuple):
    """A model that a border is trained on, with its own vector and training queries."""

    lvlm: LVLM
    vector: HarmfulnessVector
    malicious: Sequence[Query]
    benign: Sequence[Query]


def train_in_turns(
    prompt: VisualSafetyPrompt,
    pupils: Sequence[Pupil],
    settings: TrainSettings,
    out: str | Path,
    resume: bool = True,
    progress: bool = True,
) -> VisualSafetyPrompt:
    """Train one border on several models; checkpoints and `metrics.jsonl` are in `out`.

    Each model has layer, margins and rows as if it were alone. Another canvas than the border's gets it resized, as for zero-shot
    transfer (Table 3), and the gradient goes back through that. Learning rate and Adam's moments are those of all steps together.

    Args:
        prompt: where to start, on the canvas of the first model; left as it is.
        settings: `steps` are those of all models together.
        resume: go on from the checkpoint in `out`, if there is one; False starts anew.
        progress: show a bar with loss and the mean projections of both classes.

    Returns:
        A new border with float32 delta on the first model's canvas; no model is its own, and `data.models` in its config has all.

    Raises:
        DavspError: fewer than two models; steps that do not come out even; else as `davsp.train`.
        Interrupted: Ctrl-C; the state has been saved.
    """
    if len(pupils) < 2:
        raise DavspError("a border is trained in turns on two models or more; for one there is davsp.train.")
    if settings.steps % len(pupils):
        raise DavspError(
            f"{settings.steps} steps cannot be shared evenly by {len(pupils)} models; give a multiple of that."
        )
    return cast(VisualSafetyPrompt, complete(InTurns(prompt, pupils, settings, Path(out)), resume, progress))


class InTurns(Loop):
    """A run of DAVSP on several models."""

    prompt: VisualSafetyPrompt

    def __init__(self, prompt: VisualSafetyPrompt, pupils: Sequence[Pupil], settings: TrainSettings, out: Path):
        super().__init__(pupils[0].lvlm, prompt, settings)
        self.runs = [
            Run(lvlm, prompt.resized(lvlm.canvas), malicious, benign, vector, settings, out, [])
            for lvlm, vector, malicious, benign in pupils
        ]
        self.layer = self.runs[0].layer
        data = {
            f"{number} {name}": value
            for number, run in enumerate(self.runs, 1)
            for name, value in [("weights", fingerprint(run.lvlm)), *run.checkpoint.identity["data"].items()]
        }
        self.checkpoint = self._checkpoint(out, data)

    def _step(self, state: TrainState) -> tuple[Float[Tensor, "3 s s"], dict[str, float]]:
        """The gradient of the model whose turn it is, back on the first one's canvas."""
        turn, number = divmod(state.step, len(self.runs))
        run, leaf = self.runs[number], state.delta.clone().requires_grad_()
        seen = self.prompt.with_delta(leaf).resized(run.prompt.canvas).delta
        gradient, terms = run.gradient(seen.detach(), run._batch(turn))
        return torch.autograd.grad(seen, leaf, gradient)[0], terms | {"model": float(number)}

    def finish(self, state: TrainState) -> Prompt:
        """The border, which is no single model's: its card names all. Losses are left out, as those of the last step are of one."""
        prompt = super().finish(state)
        prompt.config["data"]["models"] = [
            hub_name(run.lvlm.model_id) or folder_name(run.lvlm.model_id) for run in self.runs
        ]
        prompt.config |= {"model_id": None, "revision": None, "figures": {"train_step": state.step}}
        return prompt

    def longest(self) -> tuple[int, bool]:
        """Of all models; raises DavspError as that of one does."""
        found = [run.longest() for run in self.runs]
        return max(tokens for tokens, _ in found), any(answered for _, answered in found)
