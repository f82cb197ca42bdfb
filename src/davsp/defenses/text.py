"""A fixed safety text at the question (the paper's "only TSP"); AdaShield-S is one of a known wording (`adashield`)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from davsp.defenses.base import Defense
from davsp.errors import DavspError
from davsp.query import Query


class SafetyText(Defense):
    """Puts `text` as it is at every question, with or without a picture.

    Args:
        text: not empty.
        name: of its row.
        placement: prefix: text, question, as a visual prompt does. suffix: question, text. sandwich: question, text, question.
        separator: what stands between them: one space; nothing in AdaShield's code; a line break in UniGuard's.

    Raises:
        DavspError: the text is empty, which would be no defense under another name, or an unknown placement.
    """

    def __init__(self, text: str, name: str = "safety-text", placement: str = "prefix", separator: str = " ") -> None:
        if not text.strip():
            raise DavspError("SafetyText needs a text; for none, use NoDefense")
        if placement not in ("prefix", "suffix", "sandwich"):
            raise DavspError(f"placement {placement!r} is not known: choose prefix, suffix or sandwich")
        self.text, self.name, self.placement, self.separator = text, name, placement, separator

    def prepare(self, queries: Sequence[Query]) -> list[Query]:
        return [replace(q, question=self._placed(q.question)) for q in queries]

    def _placed(self, question: str) -> str:
        parts = {
            "prefix": (self.text, question),
            "suffix": (question, self.text),
            "sandwich": (question, self.text, question),
        }
        return self.separator.join(parts[self.placement])

    def describe(self) -> dict[str, Any]:
        facts = {"kind": "text", "text": self.text}
        if (self.placement, self.separator) != ("prefix", " "):  # else as in run folders from before there was a choice
            facts |= {"placement": self.placement, "separator": self.separator}
        return facts
