"""AdaShield-A: a pool of prompts that a defender model wrote; each query gets the prompt of the row most like it."""

from davsp.defenses.adashield_a.defense import AdaShieldA
from davsp.defenses.adashield_a.refine import RefineSettings, make_pool

__all__ = ["AdaShieldA", "RefineSettings", "make_pool"]
