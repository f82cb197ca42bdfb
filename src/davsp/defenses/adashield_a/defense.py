"""AdaShield-A: a safety prompt fetched from a pool for each query (Wang et al., ECCV 2024, arXiv 2403.09513).

`davsp.defenses.adashield_a` makes the pool; here a query gets the prompt of the row whose key is most like its own.

As published (`infer_figstep.py`, `infer_qr.py`): the key of picture and question, the cosine to the keys of all scenarios, the largest
one's prompt, between two copies of the question (`placement="sandwich"`; prefix is DAVSP's). Beta = 0.7, below which nothing is
put, is in its script for benign queries only; attack queries always get a prompt there, so it knows which are which. Here **one beta
holds for all queries**. `beta=None` puts a prompt at every query. Its 7.1 for two other models, which no cosine exceeds, is not
copied. The published order of equal rows is chance, here it is the first.

The pool of the embedded LVLMs is written by a grammar, not by a defender model: they can't write prompts. Keys and so beta are on
another scale there. In a chain put it first: behind a visual prompt the key would be of the picture in its frame.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from davsp.defenses.adashield_a.features import Encoder, encoder_of
from davsp.defenses.adashield_a.pool import Pool
from davsp.defenses.base import Defense
from davsp.defenses.text import SafetyText
from davsp.errors import DavspError
from davsp.lvlm import AnsweringLVLM
from davsp.lvlm.templates import CHECKPOINT
from davsp.query import Query
from davsp.runtime.files import sha256_bytes, to_json


class AdaShieldA(Defense):
    """Puts the prompt of the most similar row at the question, if it is similar enough.

    Args:
        pool: with at least one row that is used.
        name: of its row.
        encoder: of keys; None: the pool's own, loaded by `check`, as every answer begins with it.

    Raises:
        DavspError: no row of the pool is used, so that nothing would be defended.
    """

    def __init__(self, pool: Pool, name: str = "adashield-a", encoder: Encoder | None = None) -> None:
        if not pool.used:
            raise DavspError("the pool holds no row with final_score 1, so it would defend nothing; make another")
        self.pool, self.name, self.encoder = pool, name, encoder

    @property
    def template(self) -> str | None:
        """The conversation template that the pool was made under; None: not known."""
        return str(self.pool.config.data.get("template", CHECKPOINT)) if self.pool.config.data else None

    @classmethod
    def load(cls, folder: str | Path, name: str | None = None) -> "AdaShieldA":
        """The pool in a folder.

        Raises:
            DavspError: see `Pool.load`.
        """
        return cls(Pool.load(folder), name or "adashield-a")

    def check(self, lvlm: AnsweringLVLM) -> None:
        """Loads the pool's encoder; raises DavspError if its keys are features of another LVLM."""
        if self.encoder is None:
            self.encoder = encoder_of(self.pool.config.encoder, lvlm)

    def prepare(self, queries: Sequence[Query]) -> list[Query]:
        if self.encoder is None:
            raise DavspError(f"{self.name} has no encoder yet; call check with the model first")
        if not queries:
            return []
        config, prepared = self.pool.config, []
        for query, (row, similarity) in zip(queries, self.pool.nearest(self.encoder.encode(queries)), strict=True):
            if config.beta is not None and similarity <= config.beta:
                prepared.append(query)
                continue
            text = SafetyText(config.rows[row].defense_prompt, self.name, config.placement, config.separator)
            prepared += text.prepare([query])
        return prepared

    def sketch(self, question: str, size: tuple[int, int] | None) -> tuple[str, tuple[int, int] | None]:
        """Under the longest prompt of the pool: which one it will be the picture decides."""
        config = self.pool.config
        longest = max((row.defense_prompt for row in config.rows), key=len)
        return SafetyText(longest, self.name, config.placement, config.separator).sketch(question, size)

    def describe(self) -> dict[str, Any]:
        """The pool's content by its hash, and what a reader wants to know at once."""
        config = self.pool.config
        return {
            "kind": "adashield-a",
            "pool": sha256_bytes(to_json(config.model_dump()).encode()),
            "rows": len(self.pool.used),
            "beta": config.beta,
            "placement": config.placement,
            "encoder": config.encoder["kind"],
            "defender": config.defender.get("kind"),
        }
