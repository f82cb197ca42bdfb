"""The gate `first` on a server: it tells the log-probabilities of tokens, and neither states nor what it would have said of a given text.

score = log p - log (1 - p), with p the probability that the answer, as it is looked at, begins as the refusal does. p is the sum over those
of the likeliest tokens at the answer's first place that the refusal begins with; blanks do not count. If none of them is listed, p is
the most that it can be: no more than the last one listed, and no more than all that are not listed together. So a query is refused
rather than passed where a server tells too little.

Only the first token is asked for, so the look is a prefill. A model that begins harmless answers with the same token ("I see …") is told
apart less well; the calibration shows it.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from davsp.defenses.base import Defense, batches, canvas_of
from davsp.defenses.gate.calibration import check_sets
from davsp.defenses.gate.threshold import CONFIDENCE, RATE, counts
from davsp.defenses.gate.through import seen_through
from davsp.errors import DavspError
from davsp.lvlm import Answer, AnsweringLVLM, Token
from davsp.prompts.gate import Served, Threshold
from davsp.query import Query
from davsp.runtime.thought import split_thought

TOKENS = 1
TOP = 20
"""Of the likeliest tokens; OpenAI and vLLM tell no more."""

LEAST = 1e-9  # of a probability: below it is rounding
UNTOLD = (
    "told no log-probabilities (logprobs with top_logprobs), without which gate:first sees nothing; take gate:answer"
)


def log_odds(token: Token, refusal: str) -> float:
    """The score at the answer's first place."""
    listed = [*token.top, *([] if token.text in dict(token.top) else [(token.text, token.logprob)])]
    chances = [(_begins(text, refusal), math.exp(logprob)) for text, logprob in listed]
    left = max(0.0, 1 - math.fsum(chance for _, chance in chances))
    yes = math.fsum(chance for begins, chance in chances if begins)
    no = math.fsum(chance for begins, chance in chances if not begins)
    unseen = 0.0 if yes else min(left, min(chance for _, chance in chances))
    return math.log(max(yes + unseen, LEAST)) - math.log(max(no + left - unseen, LEAST))


def _begins(text: str, refusal: str) -> bool:
    """Whether a refusal can begin with a token; servers show blanks as their vocabulary does, or not at all."""
    bare, whole = ("".join(t.replace("▁", " ").replace("Ġ", " ").split()) for t in (text, refusal))
    return bare != "" and (whole.startswith(bare) or bare.startswith(whole))


def refusal_odds(lvlm: AnsweringLVLM, answer: Answer, refusal: str) -> float:
    """The score of an answer that `likely` gave.

    Raises:
        DavspError: it is no answer yet, or its tokens are not told.
    """
    split = split_thought(answer.opened + answer.text, lvlm.reasoning_tags)
    if answer.thought or split.thought or split.cut:
        raise DavspError(
            f"{lvlm.model_id} thinks before it answers, so its first token shows nothing; take gate:answer."
        )
    if not answer.tokens:
        raise DavspError(f"the server of {lvlm.model_id} {UNTOLD}.")
    return log_odds(answer.tokens[0], refusal)


def likely(lvlm: AnsweringLVLM, prepared: Sequence[Query], top: int) -> list[Answer]:
    """The first tokens of the answers to one batch of defended queries."""
    return lvlm.likely(canvas_of(lvlm, prepared), [query.asked for query in prepared], TOKENS, top)


def calibrate_served(
    lvlm: AnsweringLVLM,
    inner: Defense,
    held: tuple[Sequence[Query], Sequence[Query]],
    refusal_text: str,
    rate: float = RATE,
    confidence: float | None = CONFIDENCE,
    top: int = TOP,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> Served:
    """The threshold of `first`, by the very log-probabilities that a server tells.

    Args:
        inner: as in `calibrate`.
        held: malicious and benign queries, drawn like those that are served, and in no other use.
        refusal_text: what the model says where it refuses.
        rate, confidence: of false refusals (`davsp.defenses.gate.threshold`).
        top: likeliest tokens that are asked for.
        progress: called with the number of queries looked at since the last call.

    Raises:
        DavspError: as `check_sets` or `refusal_odds`.
    """
    check_sets(None, held, rate, confidence)
    inner.check(lvlm)
    pixels, texts = seen_through(inner)

    def scored(queries: Sequence[Query]) -> Float[np.ndarray, " n"]:
        scores = np.zeros(len(queries))
        for batch in batches(queries, batch_size):
            answers = likely(lvlm, inner.prepare([queries[i] for i in batch]), top)
            scores[batch] = [refusal_odds(lvlm, answer, refusal_text) for answer in answers]
            if progress is not None:
                progress(len(batch))
        return scores

    first = Threshold(**counts(scored(held[0]), scored(held[1]), rate, confidence))
    return Served(
        pixels=pixels, texts=texts, model=lvlm.model_id, refusal_text=refusal_text, top=top,
        template_kwargs=dict(getattr(lvlm, "template_kwargs", {})), rate=rate, confidence=confidence, first=first,
    )  # fmt: skip
