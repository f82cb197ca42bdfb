"""What stands between the user's query and the answer: a file a method, and a folder for one that is trained."""

from davsp.defenses.adashield_a.defense import AdaShieldA
from davsp.defenses.adashield_s import adashield_s
from davsp.defenses.base import Defense
from davsp.defenses.chain import Chain
from davsp.defenses.ecso import ECSO
from davsp.defenses.gate import Gate
from davsp.defenses.intervention import Intervention
from davsp.defenses.load import load_defense
from davsp.defenses.none import NoDefense
from davsp.defenses.pat.defense import PAT
from davsp.defenses.text import SafetyText
from davsp.defenses.visual import VisualPrompt

__all__ = [
    "ECSO",
    "PAT",
    "AdaShieldA",
    "Chain",
    "Defense",
    "Gate",
    "Intervention",
    "NoDefense",
    "SafetyText",
    "VisualPrompt",
    "adashield_s",
    "load_defense",
]
