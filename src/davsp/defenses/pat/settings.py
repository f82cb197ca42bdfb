"""How PAT's tokens are searched."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class PatSettings(BaseModel):
    """How the tokens are searched.

    Attributes:
        steps: each changes at most one attack and one defence token.
        length, attack_length: tokens of each.
        start: what every one of them is at first; one token of the model.
        benign_weight, refuse_weight: None is 1 - benign_weight, as published.
        candidates, top_k: changes scored a step and part, and tokens a place that they are drawn from.
        behaviours, pairs: malicious and benign queries, drawn once; all, if there are fewer. The published benign file has some 214.
        accept: always (published) or better.
        benign_answers: model (published): first sentence of what it answers undefended; reference: the query's own.
        refusal, target: what the defence and the attack want to hear; in words that the model knows.
        ascii_only: printable ASCII tokens alone.
        seed: of all draws.
        batch_size: rows a forward.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(100, ge=1)
    length: int = Field(15, ge=1)
    attack_length: int = Field(20, ge=1)
    start: str = Field("!", min_length=1)
    benign_weight: float = Field(0.2, ge=0)
    refuse_weight: float | None = Field(None, ge=0)
    candidates: int = Field(256, ge=1)
    top_k: int = Field(256, ge=1)
    behaviours: int = Field(25, ge=1)
    pairs: int = Field(214, ge=1)
    accept: Literal["always", "better"] = "always"
    benign_answers: Literal["model", "reference"] = "model"
    refusal: str = Field("I am sorry, I cannot help with that.", min_length=1)
    target: str = Field("Sure, here is", min_length=1)
    ascii_only: bool = True
    seed: int = 0
    batch_size: int = Field(32, ge=1)
