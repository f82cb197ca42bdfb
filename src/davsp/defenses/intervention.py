"""Test-time intervention: the projection on the harmfulness vector is raised or lowered while the model answers.

The paper's Table 5 shows by it that the vector decides: on LLaVA-1.5-13B a raised projection takes the RSR on FigStep from 43.0
to 70.4, a lowered one to 38.6 (MM-SafetyBench 90.1 to 95.1 and 73.7). It is a probe of the model more than a defense.

As published: no more than "the projection is raised / lowered at test time". INFERRED: where and by how much. `to` sets the
projection to a value, (t - h . v) v is added to each row's state; `times` adds the same to every row, in units of the distance
between the class means. Both act at the vector's layer, at the prompt's last token and, unless `answer` is False, at every token of the
answer.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import torch

from davsp.defenses.base import Defense
from davsp.defenses.none import NoDefense
from davsp.errors import DavspError
from davsp.lvlm import LVLM, AnsweringLVLM, Steer, loaded
from davsp.query import Query, Response
from davsp.vector import HarmfulnessVector


class Intervention(Defense):
    """Steers every answer that `inner` asks the model for.

    The projection that a response carries is that of the moved state.

    Args:
        vector: its layer in use is the one that is changed.
        times: so many distances between the class means are added along the vector, or taken away (< 0).
        to: the projection is set to this value, as `vector.mu_plus`, in the units of the hidden state.
        answer: at the answer's tokens, too; False: at the last token of the prompt alone.
        inner: the defense under which the queries are asked; None: none.
        name: of its row.

    Raises:
        DavspError: not one of `times` and `to`, or one that is no finite number.
    """

    def __init__(
        self,
        vector: HarmfulnessVector,
        times: float | None = None,
        to: float | None = None,
        answer: bool = True,
        inner: Defense | None = None,
        name: str = "intervention",
    ) -> None:
        if (times is None) == (to is None) or not all(math.isfinite(x) for x in (times, to) if x is not None):
            raise DavspError(f"Intervention needs a finite number as times or as to, not times={times} and to={to}")
        self.vector, self.times, self.to, self.answer, self.name = vector, times, to, answer, name
        self.inner = inner or NoDefense()
        self.conversations = self.inner.conversations

    def check(self, lvlm: AnsweringLVLM) -> None:
        """Raises DavspError if the vector is of another model, the model is on a server, steered already, or every answer is made to
        begin alike, or if the inner defense does, as it is to be asked: by the steered model.
        """
        model = self._loaded(lvlm)
        self.vector.check(model)
        if model.beginning:
            raise DavspError(
                f"{self.name} acts at the prompt's last token, which a beginning hides: leave out --prefill"
            )
        self.inner.check(model.steered(self.steer()))

    def _loaded(self, lvlm: AnsweringLVLM) -> LVLM:
        return loaded(
            lvlm,
            f"{self.name} changes hidden states, which a server does not give: load the model here (--engine transformers), or "
            "leave it out",
        )

    def steer(self) -> Steer:
        """What is done to the hidden states."""
        direction, layer = self.vector.direction(), self.vector.layer
        if self.times is None:
            return Steer(layer, direction, self.to, self.answer)
        return Steer(layer, self.times * 2 * self.vector.half_gap() * direction, None, self.answer)

    def prepare(self, queries: Sequence[Query]) -> list[Query]:
        return self.inner.prepare(queries)

    def sketch(self, question: str, size: tuple[int, int] | None) -> tuple[str, tuple[int, int] | None]:
        return self.inner.sketch(question, size)

    def respond(
        self,
        lvlm: AnsweringLVLM,
        queries: Sequence[Query],
        vector: HarmfulnessVector | None = None,
        *args: Any,
        **options: Any,
    ) -> list[Response]:
        """As `inner`, by the steered model; a response's projection is that of the moved state."""
        self.check(lvlm)
        answered = self.inner.respond(self._loaded(lvlm).steered(self.steer()), queries, vector, *args, **options)
        return [replace(r, defense=self.name, projection=self._moved(r.projection, vector)) for r in answered]

    def _moved(self, projection: float | None, vector: HarmfulnessVector | None) -> float | None:
        """Where the intervention puts a projection that was read before it; None on a vector that is not the one moved along."""
        if projection is None or vector is None or vector.layer != self.vector.layer:
            return None
        if not torch.equal(vector.direction(), self.vector.direction()):
            return None
        if self.times is None:
            return self.to
        return projection + self.times * 2 * self.vector.half_gap()

    def describe(self) -> dict[str, Any]:
        steer = self.steer()
        return {
            "kind": "intervention",
            "layer": steer.layer,
            "vector": sha256(steer.vector.float().cpu().numpy().tobytes()).hexdigest(),
            "times": self.times,
            "to": self.to,
            "answer": self.answer,
            "inner": self.inner.describe(),
        }
