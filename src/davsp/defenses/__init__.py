"""What stands between the user's query and the answer: one file a method."""

from davsp.defenses.base import Defense
from davsp.defenses.none import NoDefense
from davsp.defenses.text import SafetyText
from davsp.defenses.visual import VisualPrompt

__all__ = ["Defense", "NoDefense", "SafetyText", "VisualPrompt"]
