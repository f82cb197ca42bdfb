"""The memory of a step's activations: how much it is, and how to do with less by computing them twice."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from davsp.errors import DavspError
from davsp.lvlm import LVLM

FLOATS = 24  # kept for the way back, a token and decoder block, in hidden sizes
RECOMPUTED = 0.4  # of it with activation checkpointing


def estimate_memory(lvlm: LVLM, rows: int, tokens: int, layer: int, answered: bool, checkpointing: bool = False) -> int:
    """About how many bytes the activations of a forward pass take until the backward pass is through.

    24 x hidden size numbers a token and block, and 0.4 of that with activation checkpointing: both measured on a random
    LLaVA of 40 blocks in float32 with SDPA attention (Llama blocks with frozen weights; 844 tokens, 2 rows: 1655 MB,
    and 672 MB). Tower and weights are not counted; eager attention needs far more.

    Args:
        rows: of the micro-batch.
        tokens: of the longest row, image tokens and answer included.
        layer: of the projection, where a pass without an answer ends.
        answered: the pass has an answer loss and goes through all blocks.
        checkpointing: activations are computed again on the way back.
    """
    depth = lvlm.num_layers if answered else layer
    hidden = lvlm.model.config.get_text_config().hidden_size
    floats = FLOATS * hidden * tokens * rows * depth * (RECOMPUTED if checkpointing else 1)
    return int(floats * lvlm.dtype.itemsize)


def advice(row: int, rows: int, free: int) -> str | None:
    """One sentence if `rows` rows of `row` bytes take more than 60 % of the `free` bytes of a device; else None."""
    if row * rows <= 0.6 * free:
        return None
    lower = "--activation-checkpointing" if rows == 1 else f"--micro-batch {max(1, int(0.6 * free / row))}"
    return f"about {row * rows / 1e9:.1f} GB of activations a step, {free / 1e9:.1f} GB are free; {lower} lowers it"


@contextmanager
def recomputing(model: Any, spared: Any) -> Iterator[None]:
    """Activation checkpointing: every block keeps its input alone and is computed again on the way back.

    Forward and backward pass belong inside. The flags are set on the blocks themselves: the model's own switch
    (`activation_checkpointing_enable`) leaves a hook on the embeddings at every call, and asks for a whole model in
    training mode, where any dropout would act. Here no dropout does.

    Args:
        model: a transformers model.
        spared: a block that is left alone: the one whose output is looked at. In transformers 5.0 a block's hooks ran
            inside of what is computed again, where our hook, gone by then, left too few tensors (CheckpointError); in
            5.23 they run outside.

    Raises:
        DavspError: no block of the model can do it.
    """
    blocks: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m is not spared]
    if not blocks:
        raise DavspError(f"{type(model).__name__} can't compute activations again; leave activation checkpointing off")
    before = [(block, block.training, block.gradient_checkpointing) for block in blocks]
    try:
        for block in blocks:
            block.training = block.gradient_checkpointing = True  # of the block alone, not of what is in it
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for block, training, checkpointing in before:
            block.training, block.gradient_checkpointing = training, checkpointing
