"""The harmfulness vector: the direction in which malicious and benign queries differ inside the model.

direction.py    the vector: fit, sweep, margins, projection, files
states.py       the states that it is fitted on
separation.py   how well projections tell the classes apart
published.py    the authors' file
"""

from davsp.vector.direction import HarmfulnessVector
from davsp.vector.separation import auroc
from davsp.vector.states import Readable, check_classes, collect_states

__all__ = ["HarmfulnessVector", "Readable", "auroc", "check_classes", "collect_states"]
