"""No defense: the row all others are compared with."""

from collections.abc import Sequence
from typing import Any

from davsp.defenses.base import Defense
from davsp.query import Query


class NoDefense(Defense):
    """The query as it came."""

    name = "none"

    def prepare(self, queries: Sequence[Query]) -> list[Query]:
        return list(queries)

    def describe(self) -> dict[str, Any]:
        return {"kind": "none"}
