"""Training PAT's tokens (`davsp.defenses.pat` puts them in place)."""

from davsp.pat.settings import PatSettings
from davsp.pat.train import train_pat

__all__ = ["PatSettings", "train_pat"]
