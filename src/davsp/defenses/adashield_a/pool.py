"""AdaShield-A's pool: a table of refined prompts, and a key for each.

Two files: `pool.json`, the table and how it was made, to be read and edited by anyone; `pool.safetensors`, the keys, a row
each. Columns are those of the published CSV under plainer names; all scenarios are in one table.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor

import davsp
from davsp.errors import DavspError
from davsp.runtime.config import read_config
from davsp.runtime.files import read_tensors, sha256_bytes, to_json, write_all
from davsp.runtime.table import TextTable

CONFIG, KEYS = "pool.json", "pool.safetensors"


class PoolRow(BaseModel):
    """One training query's outcome.

    Attributes:
        query, question, scenario: of the training query; its id, text and category.
        defense_prompt, improvement: the best prompt and what the defender said of it ("" for the starting prompt).
        response: what the model answered under it.
        init_score, final_score: 1 refused, 10 not, 5 refused but not held up by validation. Rows with 1 are used.
        iteration: the round that wrote the prompt; 0 is the starting prompt.
        validated: share of the scenario's validation queries that are refused under it; None: not tried.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    query: str
    question: str
    scenario: str
    defense_prompt: str
    improvement: str
    response: str
    init_score: int
    final_score: int
    iteration: int
    validated: float | None = None


class PoolConfig(BaseModel):
    """What `pool.json` holds; a file with other fields is refused.

    Attributes:
        beta: a query whose best similarity is not above it gets no prompt; None: every query gets one.
        placement, separator: of the prompt at the question, as `davsp.defenses.SafetyText` has them.
        encoder, defender: what made the keys and the prompts.
        keys: SHA-256 of the keys' numbers, so that the two files are of one pool.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model_id: str | None = None
    revision: str | None = None
    beta: float | None = 0.7
    placement: Literal["prefix", "suffix", "sandwich"] = "sandwich"
    separator: str = ""
    encoder: dict[str, Any]
    defender: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    data: dict[str, Any] = {}
    davsp_version: str = davsp.__version__
    keys: str
    rows: list[PoolRow]


@dataclass(frozen=True)
class Pool:
    """The table with its keys: a unit row each, float32."""

    config: PoolConfig
    keys: Float[Tensor, "n d"]

    @property
    def used(self) -> list[int]:
        """The rows that queries are matched with: those of final score 1."""
        return [i for i, row in enumerate(self.config.rows) if row.final_score == 1]

    def nearest(self, keys: Float[Tensor, "m d"]) -> list[tuple[int, float]]:
        """For each key the used row of the largest cosine, the first of equals (published: one by chance), and that cosine."""
        used = self.used
        similarities = keys @ self.keys[used].T
        return [(used[int(row.argmax())], float(row.max())) for row in similarities]

    def save(self, folder: str | Path) -> None:
        """Write both files, the table last."""
        from safetensors.torch import save

        table = to_json(self.config.model_dump()).encode()
        write_all(folder, {KEYS: save({"keys": self.keys.contiguous()}), CONFIG: table})

    @classmethod
    def load(cls, folder: str | Path) -> "Pool":
        """Read both files.

        Raises:
            DavspError: one is missing, a field is unknown or wrong, or they are of two pools.
        """
        config = read_config(Path(folder) / CONFIG, PoolConfig)
        keys = read_tensors(Path(folder) / KEYS).get("keys", torch.empty(0))
        if keys.dim() != 2 or len(keys) != len(config.rows) or keys_hash(keys) != config.keys:
            raise DavspError(f"{Path(folder) / KEYS} does not hold the keys of {CONFIG} beside it; make the pool anew")
        return cls(config, keys)

    def table(self) -> TextTable:
        """For a terminal: a line a row, those that are not used in grey."""
        headings = ("scenario", "query", "first", "last", "round", "validated", "prompt")
        table = TextTable(*headings, keys=2, right=False, title="AdaShield-A pool")
        for row in self.config.rows:
            share = "" if row.validated is None else f"{row.validated:.2f}"
            figures = f"{row.init_score}", f"{row.final_score}", f"{row.iteration}", share
            table.add_row(
                row.scenario, row.query, *figures, row.defense_prompt, style="" if row.final_score == 1 else "dim"
            )
        return table

    def summary(self) -> str:
        """How many rows are used, of which scenarios, and whose prompts they are."""
        rows = [self.config.rows[i] for i in self.used]
        scenarios = ", ".join(f"{name or 'none'} {count}" for name, count in Counter(r.scenario for r in rows).items())
        written = sum(r.iteration > 0 for r in rows)
        by = {"chat": "by a defender model", "grammar": "by a grammar of phrases, not by a model"}
        author = by.get(self.config.defender.get("kind", ""), "by hand")
        return (
            f"{len(rows)} of {len(self.config.rows)} rows are used ({scenarios or 'none'}); {written} of them hold a "
            f"prompt written {author}, the others the starting prompt"
        )


def keys_hash(keys: Float[Tensor, "n d"]) -> str:
    """SHA-256 of the numbers."""
    return sha256_bytes(keys.contiguous().numpy().tobytes())
