"""What tests of attacks share: a run that takes seconds, defenses of every kind, and queries."""

from typing import Any

from davsp.defenses import ECSO, Chain, Defense, NoDefense, SafetyText, VisualPrompt
from davsp.prompts import AdditiveNoise, VisualSafetyPrompt
from davsp.query import Query
from tiny import queries

TARGET = "a car"
QUICK: dict[str, Any] = {
    "steps": 6, "tries": 5, "batch_size": 3, "target": TARGET, "words": 3, "word_steps": 4, "word_candidates": 6,
    "universal_steps": 4,
}  # fmt: skip


def border(text: str = "please be safe") -> VisualPrompt:
    return VisualPrompt(VisualSafetyPrompt.create(56, 8, "random", 0, text))


DEFENSES: dict[str, Defense] = {
    "none": NoDefense(),
    "border": border(),
    "noise": VisualPrompt(AdditiveNoise.create(56, 32 / 255, "random", 0, "please be safe"), "noise"),
    "chain": Chain([border(""), SafetyText("please")]),
    "ecso": ECSO(border()),
}


def others(count: int) -> list[Query]:
    """Queries with other pictures."""
    return queries("malicious", count, seed=1)
