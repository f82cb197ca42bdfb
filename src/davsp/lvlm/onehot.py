"""Losses of answers, and their gradient with respect to the tokens of a part of the question.

The gradient goes through a hook on the decoder's embedding: its output becomes a leaf, and everything behind it (where the
picture's features are put in, positions, masks) stays the family's own code.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from davsp.errors import DavspError
from davsp.lvlm.asking import Size
from davsp.lvlm.base import LVLM, Canvas
from davsp.lvlm.hooks import wide


def answer_losses(
    lvlm: LVLM, canvas: Canvas | None, questions: Sequence[str], answers: Sequence[str]
) -> Float[Tensor, " b"]:
    """Mean cross-entropy of each answer's tokens, without the end token: an answer may be only the beginning of one.

    Args:
        canvas: finished canvases in [0, 1], or None for questions in words only.
        questions, answers: one a row; no answer is empty.

    Raises:
        DavspError: an answer without a token, or a canvas of another size.
    """
    tokens = lvlm.encode(questions, lvlm.sizes(canvas), answers)
    answer_tokens = tokens.answer_mask.clone()
    answer_tokens[torch.arange(len(questions)), _ends(tokens.answer_mask)] = False
    counts = answer_tokens.sum(1)
    if not counts.all():
        raise DavspError(f"the answer {answers[int(counts.argmin())]!r} holds no token of {lvlm.model_id}; give words")
    before = torch.zeros_like(answer_tokens)  # the logits at t - 1 foretell token t
    before[:, :-1] = answer_tokens[:, 1:]
    logits = lvlm.model(**lvlm.inputs(tokens, canvas), use_cache=False, logits_to_keep=before).logits
    losses = cross_entropy(wide(logits), tokens.ids[answer_tokens], reduction="none")
    return torch.stack([part.mean() for part in losses.split(counts.tolist())])


def token_gradient(
    lvlm: LVLM,
    canvas: Canvas | None,
    questions: Sequence[str],
    answers: Sequence[str],
    spans: Sequence[tuple[int, int]],
) -> Float[Tensor, "n v"]:
    """Gradient of the sum of `answer_losses` with respect to the one-hot rows of a part of every question.

    To first order, putting token v at place i of the part changes the sum by g[i, v] - g[i, the token that is there].

    Args:
        spans: first and last but one token of the part in each row, as `token_span` says; all of one length n.

    Raises:
        DavspError: as `answer_losses`; or the decoder embeds its tokens in another way than by one call.
    """
    embedding = lvlm.model.get_input_embeddings()
    with torch.enable_grad(), _leaf(embedding) as leaves:
        loss = answer_losses(lvlm, canvas, questions, answers).sum()
        if len(leaves) != 1:
            raise DavspError(
                f"{lvlm.model_id} embeds its tokens {len(leaves)} times a pass; PAT knows models that do once"
            )
        (gradient,) = torch.autograd.grad(loss, leaves[0])  # (b, t, d)
    parts = torch.stack([gradient[row, start:end] for row, (start, end) in enumerate(spans)])  # (b, n, d)
    scale = float(getattr(embedding, "embed_scale", 1.0))  # Gemma's embedding multiplies what it looks up
    return wide(parts).sum(0) @ wide(embedding.weight.detach()).T * scale


def token_span(lvlm: LVLM, question: str, size: Size | None, start: int, end: int) -> tuple[int, int]:
    """Where the characters [start, end) of a question are among the tokens of its prompt, as `LVLM.encode` makes it.

    Args:
        size: height and width of the canvas before it; None: there is none.

    Raises:
        DavspError: the chat template changes the question, or no token stands for the characters.
    """
    ids, inside = _part(lvlm, question, size is not None, start, end)
    more = len(lvlm.picture_ids(*size)) - 1 if size else 0  # one placeholder becomes many tokens
    shift = ids[: inside[0]].count(lvlm.image_token_id) * more
    return inside[0] + shift, inside[-1] + 1 + shift


def token_ids(lvlm: LVLM, question: str, start: int, end: int) -> list[int]:
    """The tokens of the characters [start, end) of a question with a picture, in its prompt.

    Raises:
        DavspError: as `token_span`.
    """
    ids, inside = _part(lvlm, question, True, start, end)
    return ids[inside[0] : inside[-1] + 1]


def _part(lvlm: LVLM, question: str, has_image: bool, start: int, end: int) -> tuple[list[int], list[int]]:
    """The prompt's tokens, with one placeholder for a picture, and which of them stand for the characters."""
    text = lvlm.prompt(question, has_image)
    at = text.rfind(question)
    if at < 0:
        raise DavspError(
            f"the chat template of {lvlm.model_id} changes the question {question[:60]!r}; take outer spaces off"
        )
    bos = lvlm.tokenizer.bos_token
    encoding = lvlm.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)), return_offsets_mapping=True)
    inside = [i for i, (a, b) in enumerate(encoding["offset_mapping"]) if a < at + end and b > at + start and a < b]
    if not inside:
        raise DavspError(f"no token of {lvlm.model_id} stands for {question[start:end]!r}; give other words")
    return encoding["input_ids"], inside


def _ends(mask: Tensor) -> Int[Tensor, " b"]:
    """The last true place of each row."""
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(1)


@contextmanager
def _leaf(embedding: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Make what the embedding gives out a leaf that takes a gradient; collects one a call."""
    leaves: list[Tensor] = []

    def cut(module: object, inputs: object, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # some families write into it

    handle = embedding.register_forward_hook(cut)
    try:
        yield leaves
    finally:
        handle.remove()
