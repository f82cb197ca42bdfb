"""UniGuard: noise that makes harmful sentences unlikely, and a text of UniGuard's, fixed or searched."""

from davsp.defenses.uniguard.search import SearchSettings, search_text
from davsp.defenses.uniguard.train import EPS, FIXED, OPTIMISED, SETTINGS, train_uniguard, with_text_part

__all__ = ["EPS", "FIXED", "OPTIMISED", "SETTINGS", "SearchSettings", "search_text", "train_uniguard", "with_text_part"]
