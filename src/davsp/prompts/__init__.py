"""What is trained: a border around the picture, or noise on it."""

from davsp.prompts.additive import AdditiveNoise
from davsp.prompts.base import Prompt
from davsp.prompts.border import VisualSafetyPrompt
from davsp.prompts.load import load_prompt, saved_files
from davsp.prompts.published import ExactBorder

__all__ = ["AdditiveNoise", "ExactBorder", "Prompt", "VisualSafetyPrompt", "load_prompt", "saved_files"]
