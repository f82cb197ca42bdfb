"""Looking at and adding to hidden states, by forward hooks that are gone afterwards.

Layers are numbered as in `hidden_states`: layer l is the output of `blocks[l - 1]`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Steer(NamedTuple):
    """How generation is steered at one layer; see `steering`."""

    layer: int
    vector: Tensor  # (D,)
    to: float | None = None
    answer: bool = True


class _StatesKnown(Exception):
    """Leaves a forward pass once the state that was asked for is known."""


@contextmanager
def catching(blocks: Any, layers: Sequence[int], last: Int[Tensor, " b"], stop: bool) -> Iterator[dict[int, Tensor]]:
    """Collect the states (b, d) of the tokens `last` at `layers`, at least float32.

    With `stop`, the forward pass is left at the deepest of them.
    """
    caught: dict[int, Tensor] = {}

    def hook(layer: int) -> Any:
        def keep(module: Any, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            rows = torch.arange(len(hidden), device=hidden.device)
            caught[layer] = wide(hidden[rows, last.to(hidden.device)])
            if stop and layer == max(layers):
                raise _StatesKnown

        return keep

    handles = [blocks[layer - 1].register_forward_hook(hook(layer)) for layer in set(layers)]
    try:
        yield caught
    except _StatesKnown:
        pass
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def steering(
    blocks: Any, layer: int, vector: Float[Tensor, " d"], to: float | None = None, answer: bool = True
) -> Iterator[None]:
    """Add `vector` to the newest token of every row at `layer`: the prompt's last one, then each answer token.

    For left-padded generation, where the newest token stands last.

    Args:
        blocks: the decoder's.
        layer: 1 .. len(blocks).
        vector: in the units of the hidden state; with `to` a unit vector.
        to: move each row along the vector by what brings its projection h . v to this value, in place of adding the vector.
        answer: also at each answer token; else at the prompt's last token alone.
    """
    steered = False

    def add(module: Any, inputs: Any, output: Any) -> Any:
        nonlocal steered
        if steered and not answer:
            return output
        steered = True
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        if to is None:
            hidden[:, -1] += vector.to(hidden)
        else:
            newest = wide(hidden[:, -1])
            along = vector.to(newest)
            hidden[:, -1] = (newest + (to - newest @ along)[:, None] * along).to(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = blocks[layer - 1].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def wide(x: Tensor) -> Tensor:
    """Half precision to float32; wider types stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
