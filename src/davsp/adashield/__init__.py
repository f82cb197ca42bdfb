"""Making AdaShield-A's pool of prompts (`davsp.defenses.adashield_a` puts them in place)."""

from davsp.adashield.refine import RefineSettings, make_pool

__all__ = ["RefineSettings", "make_pool"]
