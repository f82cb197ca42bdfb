"""Queries x defenses x judge -> responses, verdicts and metrics; judging again what was answered before."""

from davsp.evaluation.evaluate import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
