"""ESIII-style: noise that makes the picture say safety sentences."""

from davsp.defenses.esiii.train import EPS, QUESTION, SENTENCES, SETTINGS, train_esiii

__all__ = ["EPS", "QUESTION", "SENTENCES", "SETTINGS", "train_esiii"]
