"""The tokens of an answer as text, with those that were nearly said in their place."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from davsp.lvlm.answering import Token
from davsp.lvlm.hooks import wide


def spoken(
    tokenizer: Any, ids: Sequence[int], logits: Sequence[Float[Tensor, " v"]], ends: Collection[int], top: int
) -> tuple[Token, ...]:
    """The tokens up to the end, which is none of them; their texts in a row are the answer's.

    Args:
        ids: of the answer, padding behind it.
        logits: at the place of each.
        ends: ids that end an answer.
        top: how many of the likeliest are told at each place.
    """
    tokens = list[Token]()
    for place, (one, row) in enumerate(zip(ids, logits, strict=True)):
        if one in ends:
            break
        logprobs = torch.log_softmax(wide(row), -1)
        best = torch.topk(logprobs, min(top, len(logprobs)))
        others = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        told = tuple((_added(tokenizer, ids[:place], other), value) for other, value in others)
        tokens.append(Token(_added(tokenizer, ids[:place], one, shown=True), float(logprobs[one]), told))
    return tuple(tokens)


def _added(tokenizer: Any, before: Sequence[int], one: int, shown: bool = False) -> str:
    """What a token adds to a text; a special one its name, or nothing where the answer does not show it either."""
    start = len(tokenizer.decode(list(before), skip_special_tokens=shown))
    return str(tokenizer.decode([*before, one], skip_special_tokens=shown)[start:])
