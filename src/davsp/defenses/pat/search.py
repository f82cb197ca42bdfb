"""A step of PAT's search: a greedy coordinate gradient on the attack tokens, then on the defence tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from davsp.defenses.pat.defense import place
from davsp.defenses.pat.settings import PatSettings
from davsp.errors import DavspError
from davsp.judges.keyword import withheld
from davsp.lvlm import LVLM
from davsp.lvlm.onehot import answer_losses, token_gradient, token_ids, token_span
from davsp.query import Query, single
from davsp.runtime import parallel

SPEAKERS = ("user:", "assistant:")  # one word each in the embedded vocabulary


@dataclass(frozen=True)
class TokenPair:
    """Both parts after a step, as text."""

    step: int
    defence: str
    attack: str

    def having(self, part: str, text: str) -> "TokenPair":
        """The same with another defence or attack."""
        return TokenPair(self.step, *((text, self.attack) if part == "defence" else (self.defence, text)))


@dataclass(frozen=True)
class Rows:
    """Queries of one class, their pictures as the model sees them undefended."""

    canvases: list[Float[Tensor, "3 _ _"]]
    questions: list[str]
    answers: list[str]


class Search:
    """One search: what is fixed, and the step. `keep` gives it the benign side, which the model has to answer first.

    Raises:
        DavspError: a malicious query without a picture, or one that the model has no room for.
    """

    def __init__(self, lvlm: LVLM, malicious: Sequence[Query], text: str, settings: PatSettings) -> None:
        self.lvlm, self.text, self.settings = lvlm, text, settings
        count = min(settings.behaviours, len(malicious))
        chosen = Random(f"{settings.seed} behaviours").sample(range(len(malicious)), count)
        self.bad = rows_of(lvlm, [malicious[i] for i in chosen], [settings.refusal] * count)
        self.good = rows_of(lvlm, [], [])
        self.allowed = allowed_tokens(lvlm, settings.ascii_only)
        weight = settings.refuse_weight
        self.refuse_weight = max(0.0, 1 - settings.benign_weight) if weight is None else weight

    def keep(self, benign: Sequence[Query], answers: Sequence[str]) -> None:
        """Benign queries, and the model's own answers to them, which are to stay.

        Raises:
            DavspError: it answers none of them.
        """
        answered = [(q, a) for q, a in zip(benign, answers, strict=True) if not withheld(a)]
        if not answered:
            raise DavspError(f"{self.lvlm.model_id} answers none of the benign queries undefended; give others")
        self.good = rows_of(self.lvlm, [q for q, _ in answered], [a for _, a in answered])

    def start(self) -> TokenPair:
        """`start` over and over.

        Raises:
            DavspError: it is not one ordinary token of the model, or the tokens run into their neighbours.
        """
        settings = self.settings
        tokens = TokenPair(0, *(" ".join([settings.start] * n) for n in (settings.length, settings.attack_length)))
        for part, count in (("defence", settings.length), ("attack", settings.attack_length)):
            ids = self._ids(tokens, part, 0)
            unknown = self.lvlm.tokenizer.unk_token_id in ids
            if unknown or len(ids) != count or len(set(ids)) > 2:  # the first may be another, without a space before it
                raise DavspError(
                    f"start {settings.start!r} is no token of {self.lvlm.model_id}'s vocabulary; name one of its words"
                )
        return tokens

    def advance(self, tokens: TokenPair) -> tuple[TokenPair, dict[str, Any]]:
        """An attack token, then a defence token; what is kept of the step."""
        step = tokens.step + 1
        attack, hurt = self._change("attack", tokens, [])
        tokens = TokenPair(step, tokens.defence, attack)
        draw = Random(f"{self.settings.seed} benign {step}")
        good = [draw.randrange(len(self.good.questions)) for _ in self.bad.questions]
        defence, cost = self._change("defence", tokens, good)
        figures = {"step": step, **hurt, **cost, "defence": defence, "attack": attack}
        return TokenPair(step, defence, attack), figures

    def _change(self, part: str, tokens: TokenPair, good: Sequence[int]) -> tuple[str, dict[str, float]]:
        """The best of the candidates for a part, and its losses."""
        rng = Random(f"{self.settings.seed} {part} {tokens.step}")
        candidates = parallel.shared(self._candidates(part, tokens, rng) if parallel.rank() == 0 else None)
        if not candidates:
            raise DavspError(
                f"no candidate for the {part} gives its own tokens back after step {tokens.step}; raise candidates or top_k"
            )
        if self.settings.accept == "better":
            candidates.append(getattr(tokens, part))
        losses = self._score(part, [tokens.having(part, text) for text in candidates], good)
        best = int(next(iter(losses.values())).argmin())  # of the first, which is the loss; the first of equals
        return candidates[best], {name: float(values[best]) for name, values in losses.items()}

    @torch.no_grad()
    def _score(self, part: str, candidates: list[TokenPair], good: Sequence[int]) -> dict[str, Float[Tensor, " c"]]:
        """The losses of each candidate: means over the malicious rows, and over the benign rows `good`.

        Several processes share the batches.
        """
        attacking, bad = part == "attack", range(len(self.bad.questions))
        rows = [  # candidate, term, number of its rows, picture, question, answer
            (c, "refusal", len(bad), self.bad.canvases[i], self._question(tokens, i),
             self.settings.target if attacking else self.bad.answers[i])
            for c, tokens in enumerate(candidates) for i in bad
        ] + [
            (c, "benign", len(good), self.good.canvases[i], place(self.text, tokens.defence, self.good.questions[i]),
             self.good.answers[i])
            for c, tokens in enumerate(candidates) for i in good
        ]  # fmt: skip
        means = {"refusal": torch.zeros(len(candidates)), "benign": torch.zeros(len(candidates))}
        size = self.settings.batch_size
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]

        def losses_of(number: int) -> list[float]:
            _, _, _, canvas, questions, answers = zip(*parts[number], strict=True)
            return list(answer_losses(self.lvlm, list(canvas), questions, answers).tolist())

        for number, losses in parallel.work(len(parts), losses_of):
            for (c, term, count, *_), loss in zip(parts[number], losses, strict=True):
                means[term][c] += loss / count
        means = parallel.shared(means)
        if attacking:
            return {"attack_loss": means["refusal"]}
        loss = self.refuse_weight * means["refusal"] + self.settings.benign_weight * means["benign"]
        return {"loss": loss, "refusal_loss": means["refusal"], "benign_loss": means["benign"]}

    def _candidates(self, part: str, tokens: TokenPair, rng: Random) -> list[str]:
        """Changes of one token, places in turn, as texts that give their own tokens back in every malicious row."""
        ids = self._ids(tokens, part, 0)
        steepest = self._gradient(part, tokens).masked_fill(~self.allowed, torch.inf)
        count = min(self.settings.top_k, int(self.allowed.sum()))
        best = (-steepest).topk(count).indices.tolist()
        texts: dict[str, None] = {}
        for k in range(self.settings.candidates):
            at = k * len(ids) // self.settings.candidates
            changed = [*ids[:at], best[at][rng.randrange(count)], *ids[at + 1 :]]
            text = self.lvlm.tokenizer.decode(changed, clean_up_tokenization_spaces=False).strip(" ")
            if changed != ids and text not in texts and self._same(part, tokens, text, changed):
                texts[text] = None
        return list(texts)

    def _same(self, part: str, tokens: TokenPair, text: str, ids: list[int]) -> bool:
        changed = tokens.having(part, text)
        return bool(text) and all(self._ids(changed, part, row) == ids for row in range(len(self.bad.questions)))

    def _gradient(self, part: str, tokens: TokenPair) -> Float[Tensor, "n v"]:
        """Of the malicious rows alone."""
        total, count = torch.zeros(()), len(self.bad.questions)
        answers = self.bad.answers if part == "defence" else [self.settings.target] * count
        for start in range(0, count, self.settings.batch_size):
            batch = range(start, min(count, start + self.settings.batch_size))
            spans = [self._span(tokens, part, i) for i in batch]
            questions = [self._question(tokens, i) for i in batch]
            canvas = [self.bad.canvases[i] for i in batch]
            total = total + token_gradient(self.lvlm, canvas, questions, [answers[i] for i in batch], spans).cpu()
        return total

    def _question(self, tokens: TokenPair, row: int) -> str:
        return f"{place(self.text, tokens.defence, self.bad.questions[row])} {tokens.attack}"

    def _where(self, tokens: TokenPair, part: str, question: str) -> tuple[int, int]:
        """The characters of a part in a malicious row's question."""
        start = len(self.text) + bool(self.text) if part == "defence" else len(question) - len(tokens.attack)
        return start, start + len(getattr(tokens, part))

    def _span(self, tokens: TokenPair, part: str, row: int) -> tuple[int, int]:
        """Where a part's tokens are in the prompt of a malicious row."""
        question = self._question(tokens, row)
        height, width = self.bad.canvases[row].shape[-2:]
        return token_span(self.lvlm, question, (height, width), *self._where(tokens, part, question))

    def _ids(self, tokens: TokenPair, part: str, row: int) -> list[int]:
        question = self._question(tokens, row)
        return token_ids(self.lvlm, question, *self._where(tokens, part, question))


def allowed_tokens(lvlm: LVLM, ascii_only: bool = True) -> Bool[Tensor, " v"]:
    """Which tokens a candidate may be made of: ordinary ones with something to see in them, printable ASCII if asked."""
    tokenizer, size = lvlm.tokenizer, lvlm.model.get_input_embeddings().weight.shape[0]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder, lvlm.image_token_id}
    allowed = torch.zeros(size, dtype=torch.bool)
    for token in range(min(size, len(tokenizer))):
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        plain = not ascii_only or (text.isascii() and text.isprintable())
        allowed[token] = token not in special and plain and bool(text.strip()) and text.strip() not in SPEAKERS
    return allowed


def rows_of(lvlm: LVLM, queries: Sequence[Query], answers: list[str]) -> Rows:
    single(queries, "PAT")
    canvases = []
    for query in queries:
        picture = query.picture()
        if picture is None:
            raise DavspError(f"query {query.id} has no image: PAT is trained here on queries with one")
        canvases.append(lvlm.preprocess([picture])[0])
    return Rows(canvases, [query.question.strip() for query in queries], answers)
