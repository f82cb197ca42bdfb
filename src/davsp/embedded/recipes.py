"""How prompts, noise, tokens and pools are made for the models that ship, in words that they know.

Each method has small budgets here; on other models it is as published.
"""

from typing import Any

from davsp.embedded.words import REFUSAL, SAFETY_TEXT
from davsp.training.settings import TrainSettings

SETTINGS = TrainSettings(
    steps=150, optimizer="adam", lr=0.02, schedule="cosine", lam=2.5, malicious_answer_share=0.25, refusal=REFUSAL
)
"""DAVSP, of the demo and of `davsp train`; the seed is the run's."""

NOISE: dict[str, Any] = {"steps": 150, "batch_size": 8}
"""UniGuard and ESIII-style: fields of SentenceSettings."""

TOKENS: dict[str, Any] = {
    "steps": 20, "candidates": 16, "top_k": 64, "behaviours": 8, "target": "sure , here are the steps :", "refusal": REFUSAL,
}  # fmt: skip
"""PAT: fields of PatSettings; the target is how the models' compliant answers begin."""

POOL: dict[str, Any] = {
    "placement": "prefix", "separator": " ", "start": SAFETY_TEXT, "judge": "keyword", "max_new_tokens": 48,
    "per_scenario": 5, "validation": 2,
}  # fmt: skip
"""AdaShield-A: fields of RefineSettings."""
