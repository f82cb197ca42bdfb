"""Several defenses one after the other."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from davsp.defenses.base import Defense
from davsp.defenses.none import NoDefense
from davsp.errors import DavspError
from davsp.lvlm import AnsweringLVLM
from davsp.query import Query, Response


class Chain(Defense):
    """Each defense gets the queries as the one before it left them: `Chain([A, B])` asks B.prepare(A.prepare(query)).

    So with two texts before the question that of the last stands first. The last may wrap the call (ECSO, an intervention);
    the others only change the input.

    Args:
        defenses: one or more, in the order in which they change the query.
        name: of its row; None joins their names by "+".

    Raises:
        DavspError: there is none, or one that wraps the call, or shows pictures in a way of its own, is not the last: its own
            steps would be left out.
    """

    def __init__(self, defenses: Sequence[Defense], name: str | None = None) -> None:
        if not defenses:
            raise DavspError("Chain got no defense; for none, use NoDefense")
        for defense in defenses[:-1]:
            if type(defense).respond is not Defense.respond:
                raise DavspError(
                    f"{defense.name} wraps the call, so it must be the last of a chain, or be put around it"
                )
            if isinstance(defense, NoDefense) and defense.way:
                raise DavspError(
                    f"{defense.name} shows pictures in a way of its own, so it must be the last of a chain"
                )
        self.defenses = list(defenses)
        self.name = "+".join(d.name for d in defenses) if name is None else name
        self.conversations = all(defense.conversations for defense in defenses)

    def check(self, lvlm: AnsweringLVLM) -> None:
        for defense in self.defenses:
            defense.check(lvlm)

    def prepare(self, queries: Sequence[Query]) -> list[Query]:
        for defense in self.defenses:
            queries = defense.prepare(queries)
        return list(queries)

    def sketch(self, question: str, size: tuple[int, int] | None) -> tuple[str, tuple[int, int] | None]:
        for defense in self.defenses:
            question, size = defense.sketch(question, size)
        return question, size

    def respond(self, lvlm: AnsweringLVLM, queries: Sequence[Query], *args: Any, **options: Any) -> list[Response]:
        """As every defense: the last one answers what the others have prepared."""
        self.check(lvlm)
        for defense in self.defenses[:-1]:
            queries = defense.shown(queries)
        return [replace(r, defense=self.name) for r in self.defenses[-1].respond(lvlm, queries, *args, **options)]

    def describe(self) -> dict[str, Any]:
        return {"kind": "chain", "defenses": [d.describe() for d in self.defenses]}
