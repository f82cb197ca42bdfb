"""The scores and thresholds of a gate (`davsp.defenses.gate`), in files beside the border that it looks through, or alone in a folder.

`gate.json` is of a model that is loaded, `gate_served.json` of one behind a server, which shows less. Like the canaries they are no part
of the prompt (`davsp.prompts.beside`). Of a gate that looks through a safety text, or through nothing, they say all there is.
"""

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, Field, field_validator, model_serializer

from davsp.prompts.beside import STRICT, Beside

FILE, SERVED = "gate.json", "gate_served.json"


class Threshold(BaseModel):
    """The threshold of a score, and what it made of the calibration queries.

    Attributes:
        threshold: a query is refused whose score is above it.
        benign, malicious: calibration queries.
        refused_benign, refused_malicious: how many of these are above it.
        auroc: of their scores.
    """

    model_config = STRICT

    threshold: float
    benign: int = Field(ge=1)
    malicious: int = Field(ge=1)
    refused_benign: int = Field(ge=0)
    refused_malicious: int = Field(ge=0)
    auroc: float = Field(ge=0, le=1)


class Line(Threshold):
    """The same of a score on a loaded model.

    score = projection * s(x) + refusal * r(x), with s the projection of the last input token's state and r the mean log-likelihood
    of the refusal at the answer's place (`davsp.defenses.gate.scores`).

    Attributes:
        projection, refusal: weights.
    """

    projection: float
    refusal: float


class Calibration(Beside):
    """The file.

    Attributes:
        layer: of the projection.
        direction: the unit vector there, base64 of float32, little endian.
        refusal_text: whose likelihood is measured, and what is said in place of an answer.
        undefended: how pictures came to the model's shape, of a look without a border; left out of the file with one, which makes its
            own pictures.
        rate: false refusals that the threshold is made for.
        confidence: how sure that is; None: on average over calibration sets.
        states, first: the two kinds of gate that have a score.
        the others: as in `Beside`.
    """

    mend: ClassVar[str] = "delete it; davsp gate makes a new one"
    version: Literal[1] = 1
    layer: int = Field(ge=1)
    direction: str
    refusal_text: str = Field(min_length=1)
    undefended: str | None = None
    rate: float = Field(gt=0, lt=1)
    confidence: float | None = Field(None, gt=0, lt=1)
    states: Line
    first: Line

    @field_validator("direction")
    @classmethod
    def _is_unit(cls, value: str) -> str:
        try:
            vector = np.frombuffer(base64.b64decode(value, validate=True), dtype="<f4")
        except (binascii.Error, ValueError) as error:
            raise ValueError("no float32 numbers in base64") from error
        if not abs(float(np.linalg.norm(vector.astype(float))) - 1) < 1e-3:
            raise ValueError("no unit vector")
        return value

    @model_serializer(mode="wrap")
    def _without_usual(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if name != "undefended" or value}

    def lines(self) -> dict[str, Threshold]:
        """Kind of gate -> its threshold."""
        return {"states": self.states, "first": self.first}

    def described(self) -> str:
        """In a line: what it is made for, and what it caught of the held-out queries."""
        caught = " and ".join(
            f"{name} {line.refused_malicious} of {line.malicious}" for name, line in self.lines().items()
        )
        return (
            f"{FILE}: thresholds for at most {promise(self.rate, self.confidence)}; of malicious ones they "
            f"refuse by {caught}, measured on {self.model}"
        )

    def unit(self) -> Float[np.ndarray, " d"]:
        """The direction, float32."""
        return np.frombuffer(base64.b64decode(self.direction), dtype="<f4").copy()


class Served(Beside):
    """The other file: the gate `first` by the log-probabilities that a server tells (`davsp.defenses.gate.served`).

    Nobody sees which weights a server runs, so `weights` is None and `model` is what it calls the model.

    Attributes:
        refusal_text: whose beginning is looked for, and what is said in place of an answer.
        top: how many of the likeliest tokens are asked for.
        template_kwargs: what the server's chat template was told; left out of the file where it was nothing.
        rate, confidence: as in `Calibration`.
        first: the threshold.
        the others: as in `Beside`.
    """

    mend: ClassVar[str] = "delete it; davsp gate --engine openai makes a new one"
    version: Literal[1] = 1
    refusal_text: str = Field(min_length=1)
    top: int = Field(ge=1)
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    rate: float = Field(gt=0, lt=1)
    confidence: float | None = Field(None, gt=0, lt=1)
    first: Threshold

    @model_serializer(mode="wrap")
    def _without_usual(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if name != "template_kwargs" or value}

    def lines(self) -> dict[str, Threshold]:
        """As those of `Calibration`."""
        return {"first": self.first}

    def described(self) -> str:
        """As that of `Calibration`."""
        return (
            f"{SERVED}: a threshold for at most {promise(self.rate, self.confidence)}; of malicious ones it refuses by first "
            f"{self.first.refused_malicious} of {self.first.malicious}, measured on a server's {self.model}"
        )


def promise(rate: float, confidence: float | None) -> str:
    """What a threshold is made for, in words."""
    sure = f", with {confidence:.0%} confidence" if confidence else " on average"
    return f"{rate:.2%} of benign queries refused{sure}"


def packed(direction: Sequence[float]) -> str:
    """A direction as the file holds it."""
    return base64.b64encode(np.asarray(direction, dtype="<f4").tobytes()).decode()
