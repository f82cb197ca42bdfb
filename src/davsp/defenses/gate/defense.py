"""The gate: a query is looked at through a defense, and answered without it.

A border makes a model show what it thinks of a query. Whoever only looks need not answer through it: what looks harmful is refused, and
the rest is answered as if there were no defense, so the border costs no utility. A safety text may be looked through as well, and a
query may be looked at as it is. Three ways to look, the cheapest first:

- `states`: the pass ends at the layer; refused if s(x) is above a threshold. No generation.
- `first`: the pass goes to its end; refused if s(x) and the likelihood of a refusal, weighed together, are above a threshold.
  No generation. On a server the log-odds of a refusal's first token are the score (`davsp.defenses.gate.served`).
- `answer`: the answer under the defense is begun; refused if it is a refusal. Needs no states, so it works before any server.

What passes is answered by `else_`, by default undefended. With ECSO there (`then`), an answer to what the look missed is still judged.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from davsp.defenses.base import Defense, batches, canvas_of, together
from davsp.defenses.gate.scores import Look, look, look_at
from davsp.defenses.gate.served import likely, refusal_odds
from davsp.defenses.gate.through import check_bound
from davsp.defenses.none import NoDefense
from davsp.errors import DavspError
from davsp.judges.keyword import withheld
from davsp.lvlm import LVLM, AnsweringLVLM, Canvas, fingerprint, loaded, template_of
from davsp.lvlm.templates import named
from davsp.prompts.gate import Calibration, Line, Served
from davsp.query import Query, Response
from davsp.vector import HarmfulnessVector

Kind = Literal["states", "first", "answer"]
KINDS: tuple[Kind, ...] = ("states", "first", "answer")

TOKENS = 16
"""Of an answer that is looked at that show whether it is a refusal."""

NO_STATES = "gate:states looks inside the model, which a server does not show; take gate:answer."


class Looked(NamedTuple):
    """Of one query: whether it is refused, and the response that is given then."""

    refused: bool
    response: Response


class Gate(Defense):
    """Looks at each query through one defense, and refuses it or answers it through another.

    Args:
        inner: what is looked through.
        kind: how, as at the head of this file.
        calibration: of `states` and `first` on a model that is loaded: scores, thresholds, and the words of the refusal.
        else_: what answers a query that passes; None: nothing stands before it.
        tokens: of `answer`: how many are looked at.
        name: of its row; None makes one of kind and inner.
        served: as `calibration`, of `first` on a server.

    Raises:
        DavspError: an unknown kind, one that needs a calibration without one, or a calibration through something else.
    """

    def __init__(
        self,
        inner: Defense,
        kind: Kind = "answer",
        calibration: Calibration | None = None,
        else_: Defense | None = None,
        tokens: int = TOKENS,
        name: str | None = None,
        served: Served | None = None,
    ) -> None:
        if kind not in KINDS:
            raise DavspError(f"a gate has no kind {kind!r}: choose states, first or answer")
        if kind != "answer" and calibration is None and (served is None or kind == "states"):
            raise DavspError(
                f"a gate of kind {kind} has no threshold yet; make one with davsp gate, or take gate:answer"
            )
        if kind != "answer" and type(inner).respond is not Defense.respond:
            raise DavspError(f"{inner.name} wraps the call, so only its answers can be looked at: take gate:answer")
        if kind != "answer":
            for file in (calibration, served):
                if file is not None:
                    check_bound(file, inner)
        self.inner, self.kind, self.calibration, self.tokens = inner, kind, calibration, tokens
        self.served = served if kind == "first" else None
        self.else_ = else_ or NoDefense()
        self.conversations = inner.conversations and self.else_.conversations
        self.name = name or f"gate:{kind}+{inner.name}"

    def then(self, else_: Defense, name: str) -> "Gate":
        """The same gate, whose passing queries `else_` answers."""
        other = copy.copy(self)
        other.else_, other.name = else_, name
        other.conversations = self.inner.conversations and else_.conversations
        return other

    @property
    def line(self) -> Line:
        """Score and threshold of its kind."""
        assert self.calibration is not None
        return self.calibration.states if self.kind == "states" else self.calibration.first

    def check(self, lvlm: AnsweringLVLM) -> None:
        self.inner.check(lvlm)
        self.else_.check(lvlm)
        if self.kind == "answer":
            return
        if lvlm.server is not None:
            return self._check_served(lvlm)
        if self.calibration is None:
            raise DavspError(
                "the gate was calibrated on a server, not on a model loaded here; make a threshold with davsp gate"
            )
        model, weights = loaded(lvlm, NO_STATES), self.calibration.weights
        model.check_layer(self.calibration.layer)
        if weights is not None and weights != fingerprint(model):
            raise DavspError(
                f"the gate was calibrated on {self.calibration.model}, whose weights are not those of {model.model_id}; "
                "calibrate it on this model with davsp gate"
            )
        if self.calibration.undefended not in (None, model.undefended):
            raise DavspError(
                f"the gate was calibrated with --undefended {self.calibration.undefended}, and pictures are shown by "
                f"{model.undefended} now; calibrate it again, or show them as then"
            )

    def _check_served(self, lvlm: AnsweringLVLM) -> None:
        if self.kind == "states":
            raise DavspError(NO_STATES)
        if self.served is None:
            raise DavspError(
                "gate:first has no threshold for a server yet; make one with davsp gate --engine openai, or take gate:answer"
            )
        if self.served.model != lvlm.model_id:
            raise DavspError(
                f"the gate was calibrated on a server's {self.served.model}, not on {lvlm.model_id}; calibrate it there with "
                "davsp gate --engine openai"
            )
        if (there := named(self.served.template_kwargs)) != template_of(lvlm):
            raise DavspError(
                f"the gate was calibrated under the template {there}, and the server is asked by {template_of(lvlm)} "
                "(--template-kwargs); calibrate it again, or ask as then"
            )

    def prepare(self, queries: Sequence[Query]) -> list[Query]:
        """As they are looked at."""
        return self.inner.prepare(queries)

    def sketch(self, question: str, size: tuple[int, int] | None) -> tuple[str, tuple[int, int] | None]:
        return self.inner.sketch(question, size)

    def respond(
        self,
        lvlm: AnsweringLVLM,
        queries: Sequence[Query],
        vector: HarmfulnessVector | None = None,
        batch_size: int = 32,
        progress: Callable[[int], object] | None = None,
        max_new_tokens: int | None = None,
    ) -> list[Response]:
        """As every defense; seconds, calls and tokens are those of look and answer together.

        The projection that a response carries is of the input that gave it: of a refusal's, what was looked at.
        """
        self.check(lvlm)
        longest = max_new_tokens or lvlm.longest
        responses: dict[int, Response] = {}
        for batch in batches(queries, batch_size):
            pictured = [
                replace(queries[i], image=queries[i].picture()) for i in batch
            ]  # decoded once for look and answer
            looks = self.looks(lvlm, pictured, batch_size, longest)
            passed = [at for at, one in enumerate(looks) if not one.refused]
            answers = self.else_.respond(lvlm, [pictured[at] for at in passed], vector, batch_size, None, longest)
            through = dict(zip(passed, answers, strict=True))
            for at, i in enumerate(batch):
                looked = looks[at].response
                answer = through.get(at)
                responses[i] = (
                    replace(looked, defense=self.name)
                    if answer is None
                    else together([looked, answer], answer, self.name)
                )
            if progress is not None:
                progress(len(batch))
        return [responses[i] for i in range(len(queries))]

    def scores(self, lvlm: LVLM, queries: Sequence[Query], batch_size: int = 32) -> list[float]:
        """Scores of `states` or `first` in the order of the queries; above the threshold is refused."""
        scores: dict[int, float] = {}
        for batch in batches(queries, batch_size):
            _, some = self._scores(lvlm, self.inner.shown([queries[i] for i in batch]))
            scores |= dict(zip(batch, some, strict=True))
        return [scores[i] for i in range(len(queries))]

    # -- looking ---------------------------------------------------------------------------------------------------

    def looks(
        self, lvlm: AnsweringLVLM, queries: Sequence[Query], batch_size: int, max_new_tokens: int
    ) -> list[Looked]:
        """What each query of one batch looks like; all have a picture, or none has."""
        if self.kind == "answer":
            return self._begun(lvlm, queries, batch_size, max_new_tokens)
        start = time.perf_counter()
        if lvlm.server is not None:
            return self._by_token(lvlm, queries, start)
        model, calibration = loaded(lvlm, NO_STATES), self.calibration
        assert calibration is not None
        prepared = self.inner.shown(queries)
        seen, scores = self._scores(model, prepared)
        seconds = (time.perf_counter() - start) / len(queries)
        looked = []
        for query, projection, score in zip(prepared, seen.projection.tolist(), scores, strict=True):
            cost = model.prompt_size(query.asked, query.size())
            refusal = Response(query.id, self.name, calibration.refusal_text, projection, seconds, 1, *cost)
            looked.append(Looked(score > self.line.threshold, refusal))
        return looked

    def _by_token(self, lvlm: AnsweringLVLM, queries: Sequence[Query], start: float) -> list[Looked]:
        """What a server tells of the first token."""
        served = self.served
        assert served is not None
        answers = likely(lvlm, self.inner.shown(queries), served.top)
        scores = [refusal_odds(lvlm, answer, served.refusal_text) for answer in answers]
        seconds, looked = (time.perf_counter() - start) / len(queries), []
        for query, answer, one in zip(queries, answers, scores, strict=True):
            cost = answer.prompt_tokens, answer.image_tokens
            refusal = Response(query.id, self.name, served.refusal_text, None, seconds, 1, *cost)
            looked.append(Looked(one > served.first.threshold, refusal))
        return looked

    def _scores(self, lvlm: LVLM, prepared: Sequence[Query]) -> tuple[Look, list[float]]:
        """What the pass shows of one batch, and the scores made of it."""
        canvas = canvas_of(lvlm, prepared)
        seen = look(lvlm, canvas, [query.asked for query in prepared], *self._sought())
        return seen, [float(score) for score in self._weighed(seen)]

    def excess(self, lvlm: LVLM, canvas: Canvas, questions: Sequence[str]) -> Float[Tensor, " b"]:
        """Scores of `states` or `first` less the threshold, of finished canvases; carries the gradient."""
        return self._weighed(look_at(lvlm, canvas, questions, *self._sought())) - self.line.threshold

    def _sought(self) -> tuple[int, Tensor, str | None]:
        """Layer, direction, and the refusal if its likelihood counts."""
        calibration = self.calibration
        assert calibration is not None
        said = calibration.refusal_text if self.kind == "first" else None
        return calibration.layer, torch.tensor(calibration.unit()), said

    def _weighed(self, seen: Look) -> Tensor:
        score = self.line.projection * seen.projection
        return score if seen.refusal is None else score + self.line.refusal * seen.refusal

    def _begun(
        self, lvlm: AnsweringLVLM, queries: Sequence[Query], batch_size: int, max_new_tokens: int
    ) -> list[Looked]:
        """The beginnings of the answers under `inner`; a refusal that is cut is asked for whole."""
        few = min(self.tokens, max_new_tokens)
        begun = self.inner.respond(lvlm, queries, None, batch_size, None, few)
        if any(response.cut for response in begun):
            raise DavspError(
                f"{few} tokens under {self.inner.name} are all thought, so nothing shows whether the answer is a refusal; "
                "let the gate look at more of them (Gate(tokens=...))"
            )
        looked = [Looked(withheld(response.text), response) for response in begun]
        cut = [at for at, one in enumerate(looked) if one.refused and one.response.finish == "length"]
        if few < max_new_tokens and cut:
            whole = self.inner.respond(lvlm, [queries[at] for at in cut], None, batch_size, None, max_new_tokens)
            for at, response in zip(cut, whole, strict=True):
                looked[at] = Looked(True, together([begun[at], response], response, self.name))
        return looked

    def describe(self) -> dict[str, Any]:
        served = {} if self.served is None else {"served": self.served.digest()}
        return {
            "kind": "gate",
            "look": self.kind,
            "inner": self.inner.describe(),
            "else": self.else_.describe(),
            "calibration": None if self.calibration is None else self.calibration.digest(),
            "tokens": self.tokens if self.kind == "answer" else None,
            **served,
        }
