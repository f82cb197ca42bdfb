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
from davsp.query import Query

SPEAKERS = ("user:", "assistant:")  # one word each in the embedded vocabulary


@dataclass(frozen=True)
class State:
    """The tokens after a step, as text."""

    step: int
    defence: str
    attack: str

    def having(self, part: str, text: str) -> "State":
        """The same with another defence or attack."""
        return State(self.step, *((text, self.attack) if part == "defence" else (self.defence, text)))


@dataclass(frozen=True)
class Rows:
    """Queries of one class, their pictures as the model sees them undefended."""

    canvases: list[Float[Tensor, "3 _ _"]]
    questions: list[str]
    answers: list[str]


class Search:
    """One search: what is fixed, and the step."""

    def __init__(
        self,
        lvlm: LVLM,
        malicious: Sequence[Query],
        benign: Sequence[Query],
        benign_answers: Sequence[str],
        text: str,
        settings: PatSettings,
    ) -> None:
        self.lvlm, self.text, self.settings = lvlm, text, settings
        count = min(settings.behaviours, len(malicious))
        drawn = Random(f"{settings.seed} behaviours").sample(range(len(malicious)), count)
        self.bad = rows_of(lvlm, [malicious[i] for i in drawn], [settings.refusal] * len(drawn))
        answered = [(q, a) for q, a in zip(benign, benign_answers, strict=True) if not withheld(a)]
        if not answered:
            raise DavspError(f"{lvlm.model_id} answers none of the benign queries undefended; give others")
        self.good = rows_of(lvlm, [q for q, _ in answered], [a for _, a in answered])
        self.allowed = allowed_tokens(lvlm, settings.ascii_only)
        weight = settings.refuse_weight
        self.refuse_weight = max(0.0, 1 - settings.benign_weight) if weight is None else weight

    def start(self) -> State:
        """`start` over and over.

        Raises:
            DavspError: it is not one ordinary token of the model, or the tokens run into their neighbours.
        """
        settings = self.settings
        state = State(0, *(" ".join([settings.start] * n) for n in (settings.length, settings.attack_length)))
        for part, count in (("defence", settings.length), ("attack", settings.attack_length)):
            ids = self._ids(state, part, 0)
            unknown = self.lvlm.tokenizer.unk_token_id in ids
            if unknown or len(ids) != count or len(set(ids)) > 2:  # the first may be another, without a space before it
                raise DavspError(
                    f"start {settings.start!r} is no token of {self.lvlm.model_id}'s vocabulary; name one of its words"
                )
        return state

    def advance(self, state: State) -> tuple[State, dict[str, Any]]:
        """An attack token, then a defence token; what is kept of the step."""
        step = state.step + 1
        attack, hurt = self._change("attack", state, [])
        state = State(step, state.defence, attack)
        draw = Random(f"{self.settings.seed} benign {step}")
        good = [draw.randrange(len(self.good.questions)) for _ in self.bad.questions]
        defence, cost = self._change("defence", state, good)
        figures = {"step": step, **hurt, **cost, "defence": defence, "attack": attack}
        return State(step, defence, attack), figures

    def _change(self, part: str, state: State, good: Sequence[int]) -> tuple[str, dict[str, float]]:
        """The best of the candidates for a part, and its losses."""
        rng = Random(f"{self.settings.seed} {part} {state.step}")
        candidates = self._candidates(part, state, rng)
        if not candidates:
            raise DavspError(
                f"no candidate for the {part} gives its own tokens back after step {state.step}; raise candidates or top_k"
            )
        if self.settings.accept == "better":
            candidates.append(getattr(state, part))
        losses = self._score(part, [state.having(part, text) for text in candidates], good)
        best = int(next(iter(losses.values())).argmin())  # of the first, which is the loss; the first of equals
        return candidates[best], {name: float(values[best]) for name, values in losses.items()}

    @torch.no_grad()
    def _score(self, part: str, tried: list[State], good: Sequence[int]) -> dict[str, Float[Tensor, " c"]]:
        """The losses of each candidate: means over the malicious rows, and over the benign rows `good`."""
        attacking, bad = part == "attack", range(len(self.bad.questions))
        rows = [  # candidate, term, number of its rows, picture, question, answer
            (c, "refusal", len(bad), self.bad.canvases[i], self._question(state, i),
             self.settings.target if attacking else self.bad.answers[i])
            for c, state in enumerate(tried) for i in bad
        ] + [
            (c, "benign", len(good), self.good.canvases[i], place(self.text, state.defence, self.good.questions[i]),
             self.good.answers[i])
            for c, state in enumerate(tried) for i in good
        ]  # fmt: skip
        found = {"refusal": torch.zeros(len(tried)), "benign": torch.zeros(len(tried))}
        for start in range(0, len(rows), self.settings.batch_size):
            places, terms, counts, canvas, questions, answers = zip(
                *rows[start : start + self.settings.batch_size], strict=True
            )
            losses = answer_losses(self.lvlm, list(canvas), questions, answers).tolist()
            for c, term, count, loss in zip(places, terms, counts, losses, strict=True):
                found[term][c] += loss / count
        if attacking:
            return {"attack_loss": found["refusal"]}
        loss = self.refuse_weight * found["refusal"] + self.settings.benign_weight * found["benign"]
        return {"loss": loss, "refusal_loss": found["refusal"], "benign_loss": found["benign"]}

    def _candidates(self, part: str, state: State, rng: Random) -> list[str]:
        """Changes of one token, places in turn, as texts that give their own tokens back in every malicious row."""
        ids = self._ids(state, part, 0)
        steepest = self._gradient(part, state).masked_fill(~self.allowed, torch.inf)
        count = min(self.settings.top_k, int(self.allowed.sum()))
        best = (-steepest).topk(count).indices.tolist()
        found: dict[str, None] = {}
        for k in range(self.settings.candidates):
            at = k * len(ids) // self.settings.candidates
            changed = [*ids[:at], best[at][rng.randrange(count)], *ids[at + 1 :]]
            text = self.lvlm.tokenizer.decode(changed, clean_up_tokenization_spaces=False).strip(" ")
            if changed != ids and text not in found and self._same(part, state, text, changed):
                found[text] = None
        return list(found)

    def _same(self, part: str, state: State, text: str, ids: list[int]) -> bool:
        tried = state.having(part, text)
        return bool(text) and all(self._ids(tried, part, row) == ids for row in range(len(self.bad.questions)))

    def _gradient(self, part: str, state: State) -> Float[Tensor, "n v"]:
        """Of the malicious rows alone."""
        total, count = torch.zeros(()), len(self.bad.questions)
        answers = self.bad.answers if part == "defence" else [self.settings.target] * count
        for start in range(0, count, self.settings.batch_size):
            batch = range(start, min(count, start + self.settings.batch_size))
            spans = [self._span(state, part, i) for i in batch]
            questions = [self._question(state, i) for i in batch]
            canvas = [self.bad.canvases[i] for i in batch]
            total = total + token_gradient(self.lvlm, canvas, questions, [answers[i] for i in batch], spans).cpu()
        return total

    def _question(self, state: State, row: int) -> str:
        return f"{place(self.text, state.defence, self.bad.questions[row])} {state.attack}"

    def _where(self, state: State, part: str, question: str) -> tuple[int, int]:
        """The characters of a part in a malicious row's question."""
        start = len(self.text) + bool(self.text) if part == "defence" else len(question) - len(state.attack)
        return start, start + len(getattr(state, part))

    def _span(self, state: State, part: str, row: int) -> tuple[int, int]:
        """Where a part's tokens are in the prompt of a malicious row."""
        question = self._question(state, row)
        pictures = self.lvlm.image_tokens(*self.bad.canvases[row].shape[-2:])
        return token_span(self.lvlm, question, pictures, *self._where(state, part, question))

    def _ids(self, state: State, part: str, row: int) -> list[int]:
        question = self._question(state, row)
        return token_ids(self.lvlm, question, *self._where(state, part, question))


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
    canvases = []
    for query in queries:
        picture = query.picture()
        if picture is None:
            raise DavspError(f"query {query.id} has no image: PAT is trained here on queries with one")
        canvases.append(lvlm.preprocess([picture])[0])
    return Rows(canvases, [query.question.strip() for query in queries], answers)
