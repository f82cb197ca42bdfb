"""A visual safety prompt, border or additive noise, in front of every query."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from davsp.defenses.base import Defense
from davsp.lvlm import AnsweringLVLM
from davsp.prompts import Prompt
from davsp.query import Query


class VisualPrompt(Defense):
    """Replaces each picture by the finished 8-bit canvas and puts the prompt's texts around the question.

    The canvas is made of bytes, as a PNG would hold it, so that what is measured is what can be deployed. A
    query without a picture gets the text alone.
    """

    def __init__(self, prompt: Prompt, name: str = "davsp") -> None:
        self.prompt, self.name = prompt.quantised(), name
        self.paint = self.prompt.painter()

    def check(self, lvlm: AnsweringLVLM) -> None:
        """Raises DavspError if the prompt is for another canvas: the LVLM would crop or stretch it in silence."""
        self.prompt.check(lvlm)

    def prepare(self, queries: Sequence[Query]) -> list[Query]:
        return [self._prepared(q) for q in queries]

    def _prepared(self, query: Query) -> Query:
        picture = query.picture()
        canvas = None if picture is None else self.paint(picture)
        return replace(query, image=canvas, question=self.prompt.question(query.question))

    def sketch(self, question: str, size: tuple[int, int] | None) -> tuple[str, tuple[int, int] | None]:
        return self.prompt.question(question), size and (self.prompt.canvas, self.prompt.canvas)

    def describe(self) -> dict[str, Any]:
        padding = getattr(self.prompt, "padding", None)
        facts = {
            "kind": self.prompt.kind,
            "text": self.prompt.text,
            "padding": padding,
            "delta": self.prompt.pixels_sha256(),
        }
        if getattr(self.prompt, "resizes", 1) != 1:
            facts["resizes"] = 2
        texts = {"separator": self.prompt.separator, "suffix": self.prompt.suffix}
        return facts if texts == {"separator": " ", "suffix": ""} else facts | texts  # else as in folders from before
