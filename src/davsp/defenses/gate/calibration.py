"""Calibrating a gate: the weights of its scores on some queries, its thresholds on others."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float

from davsp.defenses.base import Defense, batches, canvas_of
from davsp.defenses.gate.scores import combined, look
from davsp.defenses.gate.threshold import CONFIDENCE, RATE, check_enough, counts
from davsp.defenses.gate.through import seen_through
from davsp.errors import DavspError
from davsp.lvlm import LVLM, fingerprint, model_name
from davsp.prompts.beside import UNTOUCHED
from davsp.prompts.gate import Calibration, Line, packed
from davsp.query import Query
from davsp.runtime import parallel
from davsp.vector import HarmfulnessVector, check_classes

Scores = Float[np.ndarray, "_ 2"]


def calibrate(
    lvlm: LVLM,
    inner: Defense,
    vector: HarmfulnessVector,
    fit: tuple[Sequence[Query], Sequence[Query]] | None,
    held: tuple[Sequence[Query], Sequence[Query]],
    refusal_text: str,
    rate: float = RATE,
    confidence: float | None = CONFIDENCE,
    batch_size: int = 32,
    progress: Callable[[int], object] | None = None,
) -> Calibration:
    """Thresholds of the gates `states` and `first`; the same in each of several processes.

    Args:
        inner: what is looked through: a border, a safety text before the question, or nothing.
        vector: of the projection, at its layer.
        fit: malicious and benign queries that the weights of `first` are fitted on. A border must not have been trained on
            them: it moves what it was trained on further than anything else. None: `first` is the likelihood of the refusal alone.
        held: malicious and benign queries that set the thresholds; drawn like those that are served, and in no other use.
        refusal_text: whose likelihood is a score, and what the gate says.
        rate, confidence: of false refusals (`davsp.defenses.gate.threshold`).
        progress: called with the number of queries looked at since the last call.

    Raises:
        DavspError: as `check_sets`, or vector or `inner` and model do not go together.
    """
    vector.check(lvlm)
    inner.check(lvlm)
    pixels, texts = seen_through(inner)
    check_sets(fit, held, rate, confidence)
    *weighed, bad, good = [
        scored(lvlm, inner, part, vector, refusal_text, batch_size, progress) for part in (*(fit or ()), *held)
    ]
    projection, refusal = combined(*weighed) if weighed else (0.0, 1.0)
    lines = {
        name: _line(w, bad, good, rate, confidence)
        for name, w in (("states", (1.0, 0.0)), ("first", (projection, refusal)))
    }
    return Calibration(
        pixels=pixels, texts=texts, undefended=lvlm.undefended if pixels == UNTOUCHED else None,
        model=model_name(lvlm), revision=lvlm.revision, weights=fingerprint(lvlm),
        layer=vector.layer, direction=packed(vector.direction().tolist()), refusal_text=refusal_text,
        rate=rate, confidence=confidence, **lines,
    )  # fmt: skip


def check_sets(
    fit: tuple[Sequence[Query], Sequence[Query]] | None, held: tuple[Sequence[Query], Sequence[Query]], rate: float,
    confidence: float | None,
) -> None:  # fmt: skip
    """What can be said of the sets before anything is computed; as of `calibrate`.

    Raises:
        DavspError: a class is empty, or holds queries of the other; a query is in both sets; too few benign ones are held.
    """
    for classes in filter(None, (fit, held)):
        check_classes(*classes)
    if both := {q.id for part in fit or () for q in part} & {q.id for part in held for q in part}:
        raise DavspError(
            f"query {min(both)!r} is in the fitting set and held out; a threshold needs queries of its own"
        )
    check_enough(len(held[1]), rate, confidence)


def scored(
    lvlm: LVLM,
    defense: Defense,
    queries: Sequence[Query],
    vector: HarmfulnessVector,
    refusal_text: str,
    batch_size: int = 32,
    progress: Callable[[int], object] | None = None,
) -> Scores:
    """s(x) and r(x) of each query as the defense shows it, (n, 2). Several processes share the batches; all of them must come here."""
    every, scores = batches(queries, batch_size), np.zeros((len(queries), 2))

    def of_batch(number: int) -> Scores:
        prepared = defense.prepare([queries[i] for i in every[number]])
        canvas = canvas_of(lvlm, prepared)
        questions = [query.question for query in prepared]
        seen = look(lvlm, canvas, questions, vector.layer, vector.direction(), refusal_text)
        assert seen.refusal is not None
        return torch.stack([seen.projection, seen.refusal], 1).double().numpy()

    for number, some in parallel.work(len(every), of_batch):
        scores[every[number]] = some
        if progress is not None:
            progress(len(some))
    return parallel.shared(scores)


def _line(weights: tuple[float, float], bad: Scores, good: Scores, rate: float, confidence: float | None) -> Line:
    held = counts(bad @ np.array(weights), good @ np.array(weights), rate, confidence)
    return Line(projection=weights[0], refusal=weights[1], **held)
