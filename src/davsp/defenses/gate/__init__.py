"""The gate: looking at a query through a defense, and answering it without."""

from davsp.defenses.gate.calibration import calibrate, check_sets
from davsp.defenses.gate.defense import KINDS, Gate
from davsp.defenses.gate.served import calibrate_served
from davsp.defenses.gate.threshold import needed, threshold
from davsp.defenses.gate.through import Alone, read_alone

__all__ = ["KINDS", "Alone", "Gate", "calibrate", "calibrate_served", "check_sets", "needed", "read_alone", "threshold"]
