"""Rows of one table that share answers: each is asked for once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from davsp.defenses import Defense
from davsp.evaluation import Evaluation, evaluate
from davsp.lvlm import AnsweringLVLM
from davsp.query import Query, Response


class Once(Defense):
    """A defense that answers each query once a process: rows that share answers do not ask for them again. Greedy answers are the same."""

    def __init__(self, inner: Defense) -> None:
        self.inner, self.name, self.known = inner, inner.name, dict[tuple[str, int | None], Response]()

    def check(self, lvlm: AnsweringLVLM) -> None:
        self.inner.check(lvlm)

    def prepare(self, queries: Sequence[Query]) -> list[Query]:
        return self.inner.prepare(queries)

    def sketch(self, question: str, size: tuple[int, int] | None) -> tuple[str, tuple[int, int] | None]:
        return self.inner.sketch(question, size)

    def respond(
        self, lvlm: AnsweringLVLM, queries: Sequence[Query], vector: Any = None, batch_size: int = 32,
        progress: Any = None, max_new_tokens: int | None = None,
    ) -> list[Response]:  # fmt: skip
        """As every defense; a query is known by its id and the length of its answer, whatever the vector."""
        new = [q for q in queries if (q.id, max_new_tokens) not in self.known]
        for q, response in zip(
            new, self.inner.respond(lvlm, new, vector, batch_size, progress, max_new_tokens), strict=True
        ):
            self.known[q.id, max_new_tokens] = response
        return [self.known[q.id, max_new_tokens] for q in queries]

    def describe(self) -> dict[str, Any]:
        return self.inner.describe()


LAST = ",ecso"
"""Ends the names of gates before ECSO."""


def answered(
    lvlm: AnsweringLVLM, defenses: Mapping[str, Defense], queries: Sequence[Query], out: Path, **how: Any
) -> Evaluation:
    """As `evaluate`; gates before ECSO come last, and know what other rows have answered, also in a run that `out` has kept."""
    first = {name: defense for name, defense in defenses.items() if not name.endswith(LAST)}
    evaluation = evaluate(lvlm, first, queries, out, **how)
    if len(first) == len(defenses):
        return evaluation
    for name, answers in evaluation.responses.items():
        if isinstance(once := first[name], Once):
            once.known |= {(r.query_id, lvlm.longest): r for r in answers}
    return evaluate(lvlm, defenses, queries, out, **how)
