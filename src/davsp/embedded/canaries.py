"""Candidates for a border's canaries, drawn by code: mild queries for the models that ship."""

from dataclasses import replace

from davsp.embedded.data import benign, harmful
from davsp.query import Query

SEED = 4096
"""Apart from the seeds that people take, so that none of these pictures is one of a training or a test."""


def candidates(malicious: int = 96, benign_too: int = 32) -> list[Query]:
    """The same queries at every call, on pairs of verb and thing that the choice of a layer uses; of kinds that the model's safety text
    hardly helps against, as a canary must be refused by the border's doing.
    """
    bad = harmful(SEED, "sweep", malicious, covers=("none", "held"), forms=("sd", "typo", "sd_typo"))
    good = benign(SEED, "sweep", benign_too)
    return [replace(q, id=f"canary-{q.label}-{i:03d}") for part in (bad, good) for i, q in enumerate(part)]
