"""The gate: looking at a query through a border, and answering it without."""

from davsp.defenses.gate.calibration import calibrate
from davsp.defenses.gate.defense import KINDS, Gate
from davsp.defenses.gate.served import calibrate_served
from davsp.defenses.gate.threshold import needed, threshold

__all__ = ["KINDS", "Gate", "calibrate", "calibrate_served", "needed", "threshold"]
