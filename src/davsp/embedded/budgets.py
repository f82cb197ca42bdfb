"""How much the methods beside DAVSP may cost on the models that ship; elsewhere they are as published."""

from typing import Any

NOISE: dict[str, Any] = {"steps": 150, "batch_size": 8}  # UniGuard, ESIII-style: fields of SentenceSettings
TOKENS: dict[str, Any] = {  # PAT: fields of PatSettings; the target is how the models' compliant answers begin
    "steps": 20, "candidates": 16, "top_k": 64, "behaviours": 8, "target": "sure , here are the steps :",
}  # fmt: skip
