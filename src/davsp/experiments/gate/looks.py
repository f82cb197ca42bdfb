"""What one can look at to tell a malicious query from a benign one, with a border and without: scores, higher is more malicious.

Each look is fitted on the gate's fitting queries, which no border was trained on, and is defended alike for fitting and for scoring.
The last two follow published detectors in their idea, not in their detail (INFERRED from their papers; our models are small):

=============  ==================================================================================================================
projection     s(x), of a vector fitted on the same queries
refusal        r(x), the mean log-likelihood of the refusal at the answer's place
both           the two by logistic regression
knn            distance to the k-th nearest benign fitting query less that to the k-th nearest malicious one, in the standardised states of
               all layers (the idea of RCS's k-nearest contrastive score)
logit-lens     mean over the layers of the cosine between what a layer's state would say (logit lens) and the refusal's tokens (the idea of
               HiddenDetect)
=============  ==================================================================================================================
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from davsp.defenses import Defense
from davsp.defenses.base import batches, canvas_of
from davsp.defenses.gate.scores import combined
from davsp.lvlm import LVLM
from davsp.lvlm.hooks import catching
from davsp.query import Query
from davsp.runtime import parallel

NEAREST = 8
FIT = "fit-malicious", "fit-benign"
Features = dict[str, Float[np.ndarray, "_ k"]]


class Seen(NamedTuple):
    """What one pass shows of queries.

    Attributes:
        states: of the last input token, (n, layers, d).
        refusal: r(x), (n,).
        lens: by layer, the cosine of the logit lens with the refusal's tokens, (n, layers).
    """

    states: Float[np.ndarray, "n l d"]
    refusal: Float[np.ndarray, " n"]
    lens: Float[np.ndarray, "n l"]


@torch.no_grad()
def see(
    lvlm: LVLM,
    defense: Defense,
    queries: Sequence[Query],
    refusal_text: str,
    batch_size: int = 32,
    progress: Callable[[int], object] | None = None,
) -> Seen:
    """One pass over each query as the defense shows it, with the refusal in the answer's place.

    Several processes share the batches; all of them must come here.
    """
    layers = list(range(1, lvlm.num_layers))
    every = batches(queries, batch_size)

    def of_batch(number: int) -> Seen:
        prepared = defense.prepare([queries[i] for i in every[number]])
        canvas = canvas_of(lvlm, prepared)
        questions = [query.question for query in prepared]
        last = lvlm.encode(questions, lvlm.sizes(canvas)).last  # padded on the right, so the same with an answer behind
        with catching(lvlm.layers, layers, last, stop=False) as caught:
            loss = lvlm.step(canvas, questions, layers[0], [refusal_text] * len(questions)).answer_loss
        assert loss is not None
        states = torch.stack([caught[layer].to(lvlm.device) for layer in layers], 1)
        return Seen(states.float().cpu().numpy(), -loss.float().cpu().numpy(), _lens(lvlm, states, refusal_text))

    parts: list[Seen] = []
    for number, seen in parallel.work(len(every), of_batch):
        parts.append(seen)
        if progress is not None:
            progress(len(every[number]))
    parts, back = parallel.shared(parts), np.argsort([i for batch in every for i in batch])
    return Seen(*(np.concatenate([getattr(part, name) for part in parts])[back] for name in Seen._fields))


def _lens(lvlm: LVLM, states: Float[Tensor, "b l d"], refusal_text: str) -> Float[np.ndarray, "b l"]:
    """Cosine between what each layer's state would say and the refusal's tokens, each counted once."""
    head, norm = lvlm.model.get_output_embeddings(), lvlm.model.get_decoder().norm
    logits = head(norm(states.to(head.weight.dtype))).float()
    wanted = torch.zeros(logits.shape[-1], device=logits.device)
    wanted[lvlm.tokenizer(refusal_text, add_special_tokens=False)["input_ids"]] = 1
    return torch.nn.functional.cosine_similarity(logits, wanted, dim=-1).cpu().numpy()


def scores(
    fit_bad: Seen, fit_good: Seen, pairs: Features, others: Mapping[str, Seen]
) -> dict[str, dict[str, np.ndarray]]:  # fmt: skip
    """Look -> name of the set -> a score a query.

    Args:
        fit_bad, fit_good: what the looks are fitted on.
        pairs: s(x) and r(x) of all sets (`features`).
        others: the sets to be scored.
    """
    flat = [part.states.reshape(len(part.states), -1) for part in (fit_bad, fit_good)]
    mean, spread = np.concatenate(flat).mean(0), np.concatenate(flat).std(0) + 1e-6
    bad, good = ((part - mean) / spread for part in flat)

    def nearest(seen: Seen) -> np.ndarray:
        x = (seen.states.reshape(len(seen.states), -1) - mean) / spread
        return _kth(x, good) - _kth(x, bad)

    return {
        "projection": {which: pairs[which][:, 0] for which in others},
        "refusal": {which: pairs[which][:, 1] for which in others},
        "both": weighed(pairs),
        "knn": {which: nearest(seen) for which, seen in others.items()},
        "logit-lens": {which: seen.lens.mean(1) for which, seen in others.items()},
    }


def features(fit_bad: Seen, fit_good: Seen, layer: int, others: Mapping[str, Seen]) -> Features:
    """s(x) and r(x) of the fitting sets, named as in `FIT`, and of the others: name -> (n, 2)."""
    difference = fit_bad.states[:, layer - 1].mean(0) - fit_good.states[:, layer - 1].mean(0)
    direction = difference / np.linalg.norm(difference)
    return {
        which: np.stack([seen.states[:, layer - 1] @ direction, seen.refusal], 1).astype(float)
        for which, seen in (*zip(FIT, (fit_bad, fit_good), strict=True), *others.items())
    }


def weighed(seen: Features) -> dict[str, np.ndarray]:
    """Name of the set -> the features' weighed sum a query; the weights are of the fitting sets."""
    weights = np.array(combined(seen[FIT[0]], seen[FIT[1]]))
    return {which: of @ weights for which, of in seen.items() if which not in FIT}


def _kth(x: Float[np.ndarray, "n d"], to: Float[np.ndarray, "m d"]) -> Float[np.ndarray, " n"]:
    """Distance to the k-th nearest."""
    square = (x**2).sum(1)[:, None] + (to**2).sum(1)[None] - 2 * x @ to.T
    return np.sqrt(np.partition(np.maximum(square, 0), NEAREST - 1, axis=1)[:, NEAREST - 1])
