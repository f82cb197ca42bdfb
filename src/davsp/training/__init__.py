"""The one training loop, and what goes into it: batches, objectives, settings, checkpoints."""

from davsp.training.borders import train
from davsp.training.settings import SentenceSettings, TrainSettings

__all__ = ["SentenceSettings", "TrainSettings", "train"]
