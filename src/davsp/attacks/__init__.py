"""Attacks that know the defense: pictures made against it, which then take the whole road from file to verdict.

An attack makes queries out of queries; `davsp.evaluation.evaluate` answers and judges them as any others. So nothing that an attack
believes of a defense enters a figure: what counts is the answer to the 8-bit picture it ends with.
"""

from davsp.attacks.run import attack
from davsp.attacks.settings import AttackSettings

__all__ = ["AttackSettings", "attack"]
