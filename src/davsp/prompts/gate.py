"""A border's gate: the scores and thresholds of `davsp.defenses.gate`, in a file beside the prompt.

Like the canaries it is no part of the prompt: it has a hash of its own, over all that it says, and names the pixels and texts that it
was measured with.
"""

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, field_validator

from davsp.errors import DavspError
from davsp.prompts.canaries import texts
from davsp.runtime.config import read_config
from davsp.runtime.files import check_regular, sha256_bytes, to_json

if TYPE_CHECKING:
    from davsp.prompts.border import VisualSafetyPrompt

FILE = "gate.json"
MEND = "delete it; davsp gate makes a new one"

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class Line(BaseModel):
    """A score and the threshold above which a query is refused.

    score = projection * s(x) + refusal * r(x), with s the projection of the last input token's state and r the mean log-likelihood
    of the refusal at the answer's place (`davsp.defenses.gate.scores`).

    Attributes:
        projection, refusal: weights.
        threshold: a query is refused whose score is above it.
        benign, malicious: calibration queries.
        refused_benign, refused_malicious: how many of these are above it.
        auroc: of their scores.
    """

    model_config = _STRICT

    projection: float
    refusal: float
    threshold: float
    benign: int = Field(ge=1)
    malicious: int = Field(ge=1)
    refused_benign: int = Field(ge=0)
    refused_malicious: int = Field(ge=0)
    auroc: float = Field(ge=0, le=1)


class Calibration(BaseModel):
    """The file.

    Attributes:
        pixels, texts: of the prompt that was looked through: `pixels_sha256()`; text, separator, suffix.
        model, revision, weights: that was asked; `weights` is `davsp.lvlm.fingerprint`.
        layer: of the projection.
        direction: the unit vector there, base64 of float32, little endian.
        refusal_text: whose likelihood is measured, and what is said in place of an answer.
        rate: false refusals that the threshold is made for.
        confidence: how sure that is; None: on average over calibration sets.
        states, first: the two kinds of gate that have a score.
        sha256: of all the rest.
    """

    model_config = _STRICT

    version: Literal[1] = 1
    pixels: str
    texts: tuple[str, str, str]
    model: str
    revision: str | None = None
    weights: str | None = None
    layer: int = Field(ge=1)
    direction: str
    refusal_text: str = Field(min_length=1)
    rate: float = Field(gt=0, lt=1)
    confidence: float | None = Field(None, gt=0, lt=1)
    states: Line
    first: Line
    sha256: str = ""

    def digest(self) -> str:
        """What `sha256` must be."""
        return sha256_bytes(to_json(self.model_dump(exclude={"sha256"})).encode())

    def contents(self) -> bytes:
        """The file's bytes, with its hash."""
        return to_json(self.model_copy(update={"sha256": self.digest()}).model_dump()).encode()

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

    def described(self) -> str:
        """In a line: what it is made for, and what it caught of the held-out queries."""
        sure = f", with {self.confidence:.0%} confidence" if self.confidence else " on average"
        caught = " and ".join(
            f"{name} {line.refused_malicious} of {line.malicious}"
            for name, line in (("states", self.states), ("first", self.first))
        )
        return (
            f"gate.json: thresholds for at most {self.rate:.2%} of benign queries refused{sure}; of malicious ones they "
            f"refuse by {caught}, measured on {self.model}"
        )

    def unit(self) -> Float[np.ndarray, " d"]:
        """The direction, float32."""
        return np.frombuffer(base64.b64decode(self.direction), dtype="<f4").copy()

    def belong(self, prompt: "VisualSafetyPrompt") -> bool:
        """Whether it was measured with this very prompt."""
        return (self.pixels, self.texts) == (prompt.pixels_sha256(), texts(prompt))


def packed(direction: Sequence[float]) -> str:
    """A direction as the file holds it."""
    return base64.b64encode(np.asarray(direction, dtype="<f4").tobytes()).decode()


def read_calibration(path: Path, prompt: "VisualSafetyPrompt") -> Calibration:
    """The calibration in a prompt's folder.

    Raises:
        DavspError: the file is broken, was changed, or is of another border or text.
    """
    check_regular(path)
    content = read_config(path, Calibration)
    if content.sha256 != content.digest():
        raise DavspError(f"{path} was changed since it was written: its field 'sha256' is another one; {MEND}")
    if not content.belong(prompt):
        what = "border" if content.pixels != prompt.pixels_sha256() else "text"
        raise DavspError(f"{path} was measured with another {what} than this prompt's; {MEND}")
    return content
