"""PAT: attack and defence tokens, trained against each other; the defence tokens then stand before every question."""

from davsp.defenses.pat.defense import PAT
from davsp.defenses.pat.settings import PatSettings
from davsp.defenses.pat.train import train_pat

__all__ = ["PAT", "PatSettings", "train_pat"]
