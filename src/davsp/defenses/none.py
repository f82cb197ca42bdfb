"""No defense: the row all others are compared with."""

from collections.abc import Sequence
from typing import Any

from davsp.defenses.base import Defense, M
from davsp.errors import DavspError
from davsp.lvlm import LVLM, AnsweringLVLM
from davsp.query import Query


class NoDefense(Defense):
    """The query as it came.

    Attributes:
        way: how its picture comes to the model's shape (`davsp.lvlm.undefended.WAYS`); None: as the model's other undefended pictures.
    """

    def __init__(self, way: str | None = None) -> None:
        self.way = way
        self.name = f"none:{way}" if way else "none"

    def prepare(self, queries: Sequence[Query]) -> list[Query]:
        return list(queries)

    def describe(self) -> dict[str, Any]:
        return {"kind": "none", **({"undefended_picture": self.way} if self.way else {})}

    def asked(self, lvlm: M) -> M:
        """The model, showing pictures in this row's way.

        Raises:
            DavspError: it has no such way, or is on a server, which has its own.
        """
        if self.way is None:
            return lvlm
        if not isinstance(lvlm, LVLM):
            raise DavspError(
                f"{self.name} goes with a model loaded here: a server shapes undefended pictures in its own way"
            )
        other: Any = lvlm.showing(self.way)
        return other

    def check(self, lvlm: AnsweringLVLM) -> None:
        self.asked(lvlm)


def baselines(lvlm: AnsweringLVLM) -> dict[str, Defense]:
    """No Defense, and of a model that looks at tiles the same with each picture on one, which is what a border of one is compared with."""
    others = (
        [way for way in lvlm.ways if way != lvlm.undefended] if isinstance(lvlm, LVLM) and "tile" in lvlm.ways else []
    )
    return {one.name: one for one in (NoDefense(), *map(NoDefense, others))}
