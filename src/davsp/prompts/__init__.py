"""What is trained: a border around the picture, or noise on it."""

from davsp.prompts.additive import AdditiveNoise
from davsp.prompts.base import Prompt
from davsp.prompts.border import VisualSafetyPrompt

__all__ = ["AdditiveNoise", "Prompt", "VisualSafetyPrompt"]
