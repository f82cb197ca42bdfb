"""The one interface of all defenses."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from davsp.errors import DavspError
from davsp.lvlm import Answer, AnsweringLVLM, loaded
from davsp.query import COST, Query, Question, Response, turns_of
from davsp.runtime.files import sha256_bytes, to_json
from davsp.runtime.thought import split_thought
from davsp.vector import HarmfulnessVector

M = TypeVar("M", bound=AnsweringLVLM)


class Defense(ABC):
    """Who changes the input writes `prepare` and inherits `respond`; who wraps the call overrides `respond`.

    Attributes:
        name: of its row in tables, and in every response.
        conversations: whether it takes queries with turns before their question.
    """

    name: str
    conversations: bool = True

    def check(self, lvlm: AnsweringLVLM) -> None:  # noqa: B027  # most go with any model
        """Raises DavspError if the defense does not go with the model; asked before anything is answered."""

    def asked(self, lvlm: M) -> M:
        """The model as this defense asks it: itself, but where the defense has a way of its own to show pictures."""
        return lvlm

    @abstractmethod
    def prepare(self, queries: Sequence[Query]) -> list[Query]:
        """The queries as the LVLM is to see them, in the same order; the given ones are left as they are."""

    def shown(self, queries: Sequence[Query]) -> list[Query]:
        """As `prepare`, of conversations too: each message of a user is prepared as a query of its own, the first one with the picture.

        So does `davsp serve`. A safety text stands in every message of the user, and what the model said stays as it is.
        """
        if not any(query.turns for query in queries):
            return self.prepare(queries)
        prepared = iter(self.prepare([message for query in queries for message in _messages(query)]))
        return [_with(query, [next(prepared) for _ in _messages(query)]) for query in queries]

    def outline(self, query: Query, size: tuple[int, int] | None) -> tuple[Question, tuple[int, int] | None]:
        """As `sketch`, of conversations too: what the first call shows of a query, and (width, height) of its picture."""
        first, *rest = _messages(query)
        question, size = self.sketch(first.question, size)
        messages = [replace(one, question=self.sketch(one.question, None)[0]) for one in rest]
        return _with(query, [replace(first, question=question), *messages]).asked, size

    def sketch(self, question: str, size: tuple[int, int] | None) -> tuple[str, tuple[int, int] | None]:
        """The question that the first call shows, and (width, height) of its picture, without looking at the picture.

        So it is known before a run what the model has no room for. Who changes a picture's size, or a question by its picture,
        overrides this.
        """
        (prepared,) = self.prepare([Query("", question, "benign", "")])
        return prepared.question, size

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Everything that decides the answers, as JSON; a resumed evaluation compares it."""

    def sha256(self) -> str:
        """Of `describe()`: the same for two defenses that show a model the same, so that caches can tell them apart."""
        return sha256_bytes(to_json(self.describe()).encode())

    def respond(
        self,
        lvlm: AnsweringLVLM,
        queries: Sequence[Query],
        vector: HarmfulnessVector | None = None,
        batch_size: int = 32,
        progress: Callable[[int], object] | None = None,
        max_new_tokens: int | None = None,
    ) -> list[Response]:
        """Answer the queries in their order, greedily. What the model thinks is kept apart from what it answers.

        Args:
            lvlm: the frozen model.
            queries: any mixture of queries with and without a picture; the two kinds are batched apart.
            vector: if given, each response carries the projection of the defended input at `vector.layer`.
            batch_size: queries a forward.
            progress: called with the number of queries answered since the last call.
            max_new_tokens: the longest answer; None: the model's own `longest`.

        Raises:
            DavspError: a picture can't be read, or the defense does not go with the model.
        """
        self.check(lvlm)
        lvlm, prepared = self.asked(lvlm), self.shown(queries)
        responses: dict[int, Response] = {}
        for batch in batches(prepared, batch_size):
            start = time.perf_counter()
            answers, projections = _answer(lvlm, [prepared[i] for i in batch], vector, max_new_tokens)
            seconds = (time.perf_counter() - start) / len(batch)
            for i, answer, projection in zip(batch, answers, projections, strict=True):
                split = split_thought(answer.opened + answer.text, lvlm.reasoning_tags)
                responses[i] = Response(
                    queries[i].id, self.name, split.answer, projection, seconds, 1, answer.prompt_tokens, answer.image_tokens,
                    "\n".join(filter(None, (answer.thought, split.thought))), answer.cut or split.cut,
                    answer.finish,
                )  # fmt: skip
            if progress is not None:
                progress(len(batch))
        return [responses[i] for i in range(len(queries))]


def _messages(query: Query) -> list[Query]:
    """What the user says, each message as a query of its own; the picture is in the first one."""
    texts = [text for role, text in turns_of(query.asked) if role == "user"]
    return [replace(query, question=text, turns=(), image=None if at else query.image) for at, text in enumerate(texts)]


def _with(query: Query, messages: Sequence[Query]) -> Query:
    """The query with its user's messages, as they were prepared, in place of those that it has."""
    texts = iter([message.question for message in messages])
    *turns, (_, question) = ((role, next(texts) if role == "user" else text) for role, text in turns_of(query.asked))
    return replace(messages[0], question=question, turns=tuple(turns))


def together(calls: Sequence[Response], final: Response, name: str) -> Response:
    """The response that stands, with what all calls took."""
    costs = {cost: [getattr(r, cost) for r in calls] for cost in COST}
    took: dict[str, Any] = {cost: None if None in values else sum(values) for cost, values in costs.items()}
    return replace(final, defense=name, seconds=sum(r.seconds for r in calls), **took)


def batches(queries: Sequence[Query], size: int) -> list[list[int]]:
    """Indices in batches that hold only queries with a picture or only such without."""
    kinds = ([i for i, q in enumerate(queries) if (q.image is None) == bare] for bare in (False, True))
    return [kind[at : at + size] for kind in kinds for at in range(0, len(kind), size)]


def canvas_of(lvlm: AnsweringLVLM, prepared: Sequence[Query]) -> Any:
    """The pictures of one of the `batches` of prepared queries, as the model takes them; None of queries in words only."""
    pictures = [picture for query in prepared if (picture := query.picture()) is not None]
    return lvlm.preprocess(pictures) if pictures else None


def _answer(
    lvlm: AnsweringLVLM, prepared: Sequence[Query], vector: HarmfulnessVector | None, max_new_tokens: int | None
) -> tuple[list[Answer], list[float | None]]:
    """Answers and projections of one batch."""
    canvas, questions = canvas_of(lvlm, prepared), [query.asked for query in prepared]
    answers = lvlm.ask(canvas, questions, max_new_tokens)
    if vector is None:
        return answers, [None] * len(answers)
    if any(answer.states is None for answer in answers):
        states = loaded(lvlm).states(canvas, questions, [vector.layer])[:, 0]  # (b, d)
    else:
        states = torch.stack([_written(answer, vector.layer) for answer in answers])
    return answers, [float(s) for s in vector.project(states)]


def _written(answer: Answer, layer: int) -> Float[Tensor, " d"]:
    """The state that a server has written with an answer."""
    there = answer.states or {}
    if layer not in there:
        raise DavspError(
            f"the vector is of layer {layer}, and the server writes {', '.join(map(str, there))}; start it with that layer"
        )
    return there[layer]
