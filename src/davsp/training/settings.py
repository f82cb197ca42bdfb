"""How a prompt is trained, and what the settings leave to the vector."""

from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_serializer

from davsp.errors import DavspError
from davsp.lvlm import LVLM
from davsp.vector import HarmfulnessVector

Augmentation = Literal["shift", "resize", "jpeg", "crop", "gamma"]
"""What a canvas may go through on its way to the model (`davsp.training.augment`)."""

DEED = "deed"
"""Of `adversarial_target`: no beginning, but each query's own deed."""
USUAL = (("benign_share", 0.5), ("mixed", True), ("end_token", True), ("augment", ()), ("adversarial", 0))
"""What was no choice once."""


class TrainSettings(BaseModel):
    """How a prompt is trained.

    Attributes:
        steps, batch_size: both classes are in every batch.
        benign_share: share of a batch's rows that are benign. Against an attacker the usual half is too little: docs/attack.md.
        mixed: False: a batch is of one class, drawn by a coin, as in the authors' code (benign_share is the coin's); a malicious one
            then carries the refusal on all its rows or on none.
        optimizer: "sign" (published: delta -= lr * sign of the gradient) or "adam".
        lr: step in pixel units, where white is 1; 1/255 is one 8-bit level.
        schedule: "constant", or "cosine" down to zero.
        objective: "projection" (hinge alone), "answer" (cross-entropy alone: every benign row its reference, every
            malicious row the refusal), or "both" (hinge + lam * cross-entropy, as published).
        lam: weight of the cross-entropy in "both".
        malicious_answer_share: share of malicious rows that carry the refusal in "both"; published 0.05.
        end_token: whether the answer's loss counts the end token, too; the authors' code has none.
        normalise: divide the hinge by half the distance between the class means, so that `lam` means the same for
            every model and layer; False is the raw sum of the slides.
        layer, mu_plus, mu_minus: None: the vector's.
        refusal: the answer that malicious queries are to get.
        augment: changes of the canvas that the border is to survive; three of four rows of a step get one of them, drawn by the seed.
        adversarial: levels (of 255) by which an attacker changes the malicious pictures of every step; 0: nobody does.
        adversarial_steps: his gradients a picture.
        adversarial_target: the beginning of an answer that he makes likely; "deed": the whole answer that does what the row asks for;
            "": he raises the row's own losses, its distance below mu_plus and the cross-entropy of the refusal, by their weights.
        seed: of data order and choice of rows that carry an answer.
        micro_batch: rows in memory at a time; their gradients are summed to that of the whole batch. None: all.
        activation_checkpointing: keep only the input of each block and compute the block again on the way back. These
            two cost memory or time, not quality; the gradient is the same but for rounding.
        checkpoint_every, probe_every: in steps.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(150, ge=1)
    batch_size: int = Field(16, ge=2, multiple_of=2)
    mixed: bool = True
    benign_share: float = Field(0.5, gt=0, lt=1)
    optimizer: Literal["sign", "adam"] = "sign"
    lr: float = Field(1 / 255, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    objective: Literal["projection", "answer", "both"] = "both"
    lam: float = Field(0.2, ge=0)
    malicious_answer_share: float = Field(0.05, ge=0, le=1)
    end_token: bool = True
    normalise: bool = True
    layer: int | None = None
    mu_plus: float | None = None
    mu_minus: float | None = None
    refusal: str = Field(min_length=1, default="I am sorry, I cannot help with that.")
    augment: tuple[Augmentation, ...] = ()
    adversarial: int = Field(0, ge=0, le=255)
    adversarial_steps: int = Field(3, ge=1)
    adversarial_target: str = ""
    seed: int = 0
    micro_batch: int | None = Field(None, ge=1)
    activation_checkpointing: bool = False
    checkpoint_every: int = Field(25, ge=1)
    probe_every: int = Field(25, ge=1)

    @field_validator("refusal", "adversarial_target")
    @classmethod
    def _has_words(cls, value: str) -> str:
        if value and not value.strip():
            raise ValueError("it is blank")
        return value

    @field_validator("benign_share")
    @classmethod
    def _leaves_both_classes(cls, value: float, others: Any) -> float:
        size = others.data.get("batch_size", 2)  # left out where it is wrong itself
        if others.data.get("mixed", True) and not 0 < round(size * value) < size:
            raise ValueError(f"it leaves one class no row in a batch of {size}")
        return value

    @field_validator("augment")
    @classmethod
    def _are_different(cls, value: tuple[Augmentation, ...]) -> tuple[Augmentation, ...]:
        if len(set(value)) < len(value):
            raise ValueError("name each kind once")
        return value

    @property
    def benign_rows(self) -> int:
        """Of a mixed batch."""
        return round(self.batch_size * self.benign_share)

    @model_serializer(mode="wrap")
    def _without_usual(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Without `USUAL`: a run from before goes on."""
        return {
            name: value
            for name, value in dump(self).items()
            if (name, value) not in USUAL and (self.adversarial or not name.startswith("adversarial"))
        }

    @property
    def weights(self) -> tuple[float, float]:
        """Of hinge and cross-entropy."""
        return {"projection": (1.0, 0.0), "answer": (0.0, 1.0), "both": (1.0, self.lam)}[self.objective]


class SentenceSettings(BaseModel):
    """How noise is trained on sentences (`davsp.training.sentences`); the defaults are UniGuard's as published.

    Attributes:
        likely: whether the sentences are to become likely (ESIII) or unlikely (UniGuard).
        steps, batch_size: a row is a picture, a question and a sentence.
        the others: as in `TrainSettings`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    likely: bool
    steps: int = Field(5000, ge=1)
    batch_size: int = Field(1, ge=1)
    optimizer: Literal["sign", "adam"] = "sign"
    lr: float = Field(1 / 255, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    seed: int = 0
    micro_batch: int | None = Field(None, ge=1)
    activation_checkpointing: bool = False
    checkpoint_every: int = Field(25, ge=1)


def resolve(settings: TrainSettings, lvlm: LVLM, vector: HarmfulnessVector) -> tuple[TrainSettings, int, float, float]:
    """Fill in what was left to the vector, and check that vector, layer and model go together.

    Returns:
        The whole settings, and of them layer, mu_plus and mu_minus.

    Raises:
        DavspError: they do not go together, or mu_plus is not above mu_minus.
    """
    layer = vector.layer if settings.layer is None else settings.layer
    lvlm.check_layer(layer)
    vector.check(lvlm)
    plus, minus = (vector.mu_plus, vector.mu_minus) if layer == vector.layer else vector.margins(layer)
    plus = plus if settings.mu_plus is None else settings.mu_plus
    minus = minus if settings.mu_minus is None else settings.mu_minus
    if plus <= minus:
        raise DavspError(
            f"mu_plus ({plus:.4g}) must be above mu_minus ({minus:.4g}): give other margins or another layer"
        )
    return settings.model_copy(update={"layer": layer, "mu_plus": plus, "mu_minus": minus}), layer, plus, minus
