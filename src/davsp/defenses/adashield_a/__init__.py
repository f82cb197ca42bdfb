"""AdaShield-A: a pool of prompts that a defender model wrote; each query gets the prompt of the row most like it."""

from davsp.defenses.adashield_a.defender import ChatDefender, Defender
from davsp.defenses.adashield_a.defense import AdaShieldA
from davsp.defenses.adashield_a.features import ClipEncoder, Encoder, LVLMEncoder
from davsp.defenses.adashield_a.pool import Pool
from davsp.defenses.adashield_a.refine import RefineSettings, make_pool

__all__ = [
    "AdaShieldA",
    "ChatDefender",
    "ClipEncoder",
    "Defender",
    "Encoder",
    "LVLMEncoder",
    "Pool",
    "RefineSettings",
    "make_pool",
]
