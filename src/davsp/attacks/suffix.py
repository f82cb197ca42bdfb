"""Words after the question by a greedy coordinate gradient (Zou et al. 2023, arXiv 2307.15043), the picture and the defense in place.

One query at a time. A step takes the gradient with respect to the tokens of the words, draws changes of one token from the best ones, and
keeps the best of them if it is better. A change counts only if its text is read as the very same tokens where it stands.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from davsp.attacks.apgd import ENOUGH
from davsp.attacks.surface import Surface, goals, surfaces
from davsp.defenses import Defense
from davsp.defenses.pat.search import allowed_tokens
from davsp.errors import DavspError
from davsp.lvlm import LVLM
from davsp.lvlm.onehot import answer_losses, token_gradient, token_ids, token_span
from davsp.query import Query

TOP = 64  # tokens a place that changes are drawn from


class Words(NamedTuple):
    """The words, and the loss at the start and after each step."""

    text: str
    curve: list[float]


def search_suffix(
    lvlm: LVLM,
    defense: Defense,
    query: Query,
    target: str,
    *,
    length: int,
    steps: int,
    candidates: int,
    batch_size: int,
    seed: int,
    progress: Callable[[int], object] = lambda n: None,
) -> Words:
    """Words after the question of one query that make the wanted answer likely under a defense.

    Args:
        target: as in `surfaces`.
        length: tokens of the words.
        steps, candidates: changes of one token, and how many are tried for each.
        batch_size: questions a forward.
        progress: told of every step.

    Raises:
        DavspError: no words of that length are read as their own tokens; else as `surfaces`.
    """
    search = _Search(lvlm, defense, query, target, batch_size)
    rng = Random(f"{seed} suffix {query.id}")
    ids = search.start(length, rng)
    text = search.text(ids)
    curve = [search.losses([text])[0]]
    for step in range(steps):
        if curve[-1] <= ENOUGH:
            progress(steps - step)
            return Words(text, curve + [curve[-1]] * (steps - step))
        changes = search.changes(ids, candidates, rng)
        losses = search.losses([search.text(one) for one in changes]) if changes else []
        if losses and min(losses) < curve[-1]:
            ids = changes[losses.index(min(losses))]
            text = search.text(ids)
        curve.append(min([curve[-1], *losses]))
        progress(1)
    return Words(text, curve)


def with_words(query: Query, words: str) -> Query:
    """The query with words after its question."""
    return replace(query, question=f"{query.question.strip()} {words}")


def random_words(lvlm: LVLM, queries: Sequence[Query], length: int, seed: int) -> list[Query]:
    """The queries with so many tokens of chance after each question: what words do without a search, the control of `suffix`."""
    usable = allowed_tokens(lvlm).nonzero()[:, 0].tolist()
    drawn = [Random(f"{seed} random words {query.id}").choices(usable, k=length) for query in queries]
    words = [str(lvlm.tokenizer.decode(ids, clean_up_tokenization_spaces=False)).strip() for ids in drawn]
    return [with_words(query, some) for query, some in zip(queries, words, strict=True)]


class _Search:
    def __init__(self, lvlm: LVLM, defense: Defense, query: Query, target: str, batch_size: int) -> None:
        ((_, surface),) = surfaces(lvlm, defense, [query], target)
        self.lvlm, self.defense, self.query, self.target = surface.lvlm, defense, query, target
        self.batch_size = batch_size
        self.canvas = _canvas(surface)
        height, width = self.canvas.shape[-2:]
        self.size = height, width
        self.allowed = allowed_tokens(lvlm)

    def text(self, ids: Sequence[int]) -> str:
        return str(self.lvlm.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)).strip()

    def question(self, text: str) -> tuple[str, int]:
        """What the model is asked, and where the words begin in it; the last place, should a defense repeat the question."""
        question = self.defense.prepare([with_words(self.query, text)])[0].question
        return question, question.rfind(text)

    def holds(self, ids: Sequence[int]) -> bool:
        """Whether the words are read as these tokens where they stand."""
        text = self.text(ids)
        question, start = self.question(text)
        return bool(text) and start >= 0 and token_ids(self.lvlm, question, start, start + len(text)) == list(ids)

    def start(self, length: int, rng: Random) -> list[int]:
        usable, ids = self.allowed.nonzero()[:, 0].tolist(), list[int]()
        while len(ids) < length:
            longer = ([*ids, token] for token in rng.sample(usable, min(len(usable), 200)))
            first = next((candidate for candidate in longer if self.holds(candidate)), None)
            if first is None:
                raise DavspError(
                    f"no words of {length} tokens go with the question of {self.query.id}; take fewer (--words)"
                )
            ids = first
        return ids

    def changes(self, ids: list[int], count: int, rng: Random) -> list[list[int]]:
        """Up to so many changes of one token."""
        text = self.text(ids)
        question, start = self.question(text)
        span = token_span(self.lvlm, question, self.size, start, start + len(text))
        steepest = token_gradient(self.lvlm, self.canvas, [question], [self.target], [span]).cpu()
        top = min(TOP, int(self.allowed.sum()))
        best = (-steepest.masked_fill(~self.allowed, torch.inf)).topk(top).indices.tolist()
        changes: list[list[int]] = []
        for k in range(count):
            at = k * len(ids) // count
            changed = [*ids[:at], best[at][rng.randrange(top)], *ids[at + 1 :]]
            if changed != ids and changed not in changes and self.holds(changed):
                changes.append(changed)
        return changes

    @torch.no_grad()
    def losses(self, texts: Sequence[str]) -> list[float]:
        """Of the wanted beginnings, over all calls of the defense."""
        losses: list[float] = []
        for at in range(0, len(texts), self.batch_size):
            batch = [with_words(self.query, text) for text in texts[at : at + self.batch_size]]
            canvas = self.canvas.expand(len(batch), -1, -1, -1)
            calls = goals(self.defense, batch, self.target)
            total = torch.stack([answer_losses(self.lvlm, canvas, *call) for call in calls]).sum(0)
            losses += total.tolist()
        return losses


@torch.no_grad()
def _canvas(surface: Surface) -> Float[Tensor, "1 3 h w"]:
    return surface.canvas(surface.pictures)
