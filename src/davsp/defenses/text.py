"""A fixed safety text before the question (the paper's "only TSP"; with AdaShield's text it is AdaShield-S)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from davsp.defenses.base import Defense
from davsp.errors import DavspError
from davsp.query import Query


class SafetyText(Defense):
    """Puts `text` as it is and one space before every question, with or without a picture, as a visual prompt does.

    Raises:
        DavspError: the text is empty; that would be no defense under another name.
    """

    def __init__(self, text: str, name: str = "safety-text") -> None:
        if not text.strip():
            raise DavspError("SafetyText needs a text; for none, use NoDefense")
        self.text, self.name = text, name

    def prepare(self, queries: Sequence[Query]) -> list[Query]:
        return [replace(q, question=f"{self.text} {q.question}") for q in queries]

    def describe(self) -> dict[str, Any]:
        return {"kind": "text", "text": self.text}
