"""What the cells of one model's tables share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from davsp.defenses.ecso import Templates
from davsp.experiments.stages import Stages
from davsp.lvlm import LVLM
from davsp.prompts import Prompt, VisualSafetyPrompt
from davsp.training import TrainSettings, recipe
from davsp.vector import HarmfulnessVector

if TYPE_CHECKING:
    from davsp.defenses.adashield_a import Defender
    from davsp.embedded.data import Protocol


@dataclass
class Kit:
    """What all cells of one model share.

    Attributes:
        text: AdaShield-S's, before every question of all methods but No Defense, as in the paper's comparison.
        settings: of every prompt that is trained; only the objective differs between them.
        templates: ECSO's prompts, in words the model knows.
        shipped: the model is one of those that ship: small budgets, words that it knows, whatever data it is given.
        corpus: UniGuard's harmful sentences, for other models.
        defender: who writes AdaShield-A's prompts, for other models.
        borrowed: name of another model -> the border trained on it.
        published: borders begin, and pictures inside them are resized, as in the authors' code.
        trained: prompts that are there already.
    """

    lvlm: LVLM
    data: "Protocol"
    vector: HarmfulnessVector
    text: str
    settings: TrainSettings
    stages: Stages
    padding: int
    eps: float
    templates: Templates
    shipped: bool = True
    corpus: Sequence[str] = ()
    defender: "Defender | None" = None
    borrowed: Mapping[str, Path] = field(default_factory=dict)
    published: bool = False
    trained: dict[str, Prompt] = field(default_factory=dict)

    def border(self) -> VisualSafetyPrompt:
        """Where the training of a border begins."""
        if self.published:
            return recipe.border(self.lvlm, self.padding, self.text)
        return VisualSafetyPrompt.create(self.lvlm.canvas, self.padding, text=self.text)
