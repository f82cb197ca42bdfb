"""Training data, prepared once, and the rows of a step."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from davsp.errors import DavspError
from davsp.prompts.base import Prompt
from davsp.query import Query, single
from davsp.runtime.files import sha256_bytes
from davsp.training.augment import Change


@dataclass(frozen=True)
class Examples:
    """One class of training data: pictures resized to the canvas as 8-bit levels; names are for sentences about a query alone."""

    interiors: UInt8[Tensor, "n 3 s s"]
    questions: list[str]
    answers: list[str]
    names: list[str]

    def digest(self) -> str:
        """SHA-256 over pictures, questions and answers."""
        return sha256_bytes(self.interiors.numpy().tobytes() + json.dumps([self.questions, self.answers]).encode())


@dataclass(frozen=True)
class Batch:
    """The rows of one step; an answer is None where a row carries none.

    Attributes:
        changes: of each row's canvas on its way to the model; none at all: of no row.
        starts: of each row that an attacker changes first, the key of his start; none at all: of no row.
        goals: of each such row, the answer or its beginning that he makes likely; none at all: he raises the row's own loss.
    """

    interiors: UInt8[Tensor, "b 3 s s"]
    questions: list[str]
    malicious: Bool[Tensor, " b"]
    answers: Sequence[str | None]
    changes: Sequence[Change | None] = ()
    starts: Sequence[str | None] = ()
    goals: Sequence[str | None] = ()

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def answered(self) -> int:
        """How many rows carry an answer."""
        return sum(answer is not None for answer in self.answers)

    def share(self, number: int, count: int) -> "Batch":
        """Every `count`-th row from `number` on: what one of several processes computes."""
        return self._of(list(range(number, len(self), count)))

    def attacked(self) -> tuple[list[int], "Batch"]:
        """The rows that an attacker changes, by number and as a batch."""
        rows = [i for i, start in enumerate(self.starts) if start is not None]
        return rows, self._of(rows)

    def parts(self, size: int) -> Iterator["Batch"]:
        """The batch in pieces of at most `size` rows; rows with an answer apart from those without, which cost less."""
        for with_answer in (True, False):
            rows = [i for i, answer in enumerate(self.answers) if (answer is not None) == with_answer]
            for start in range(0, len(rows), size):
                yield self._of(rows[start : start + size])

    def _of(self, rows: list[int]) -> "Batch":
        questions, answers = [self.questions[i] for i in rows], [self.answers[i] for i in rows]
        changes = [self.changes[i] for i in rows] if self.changes else ()
        starts = [self.starts[i] for i in rows] if self.starts else ()
        goals = [self.goals[i] for i in rows] if self.goals else ()
        return Batch(self.interiors[rows], questions, self.malicious[rows], answers, changes, starts, goals)


def prepare(prompt: Prompt, queries: Sequence[Query], answer: Callable[[Query], str]) -> Examples:
    """Resize every picture once and put the safety text before every question.

    Raises:
        DavspError: a query has no picture; a prompt can't act on it.
    """
    single(queries, "training")
    interiors = []
    for query in queries:
        picture = query.picture()
        if picture is None:
            raise DavspError(f"query {query.id} has no image: a visual prompt is trained on queries with one")
        interiors.append(torch.round(prompt.resize([picture]) * 255).to(torch.uint8))
    questions = [prompt.question(query.question) for query in queries]
    names = [f"query {query.id}" for query in queries]
    return Examples(torch.cat(interiors), questions, [answer(query) for query in queries], names)


def reference(query: Query) -> str:
    """The answer that a benign query is to get.

    Raises:
        DavspError: it has none.
    """
    if not query.reference:
        raise DavspError(f"benign query {query.id} has no reference answer: add one, or choose objective 'projection'")
    return query.reference


def pixels(levels: UInt8[Tensor, "b 3 s s"], device: torch.device) -> Float[Tensor, "b 3 s s"]:
    """8-bit levels as float32 in [0, 1], each k/255."""
    return levels.to(device).float() / 255
