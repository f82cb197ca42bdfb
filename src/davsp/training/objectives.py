"""What is minimised."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def projection_hinge(
    s: Float[Tensor, " b"], malicious: Bool[Tensor, " b"], mu_plus: float, mu_minus: float
) -> Float[Tensor, ""]:
    """L_proj: malicious queries are pushed above mu_plus, benign ones below mu_minus; mean over the batch.

    L_proj = 1/B sum [malicious] max(0, mu_plus - s) + [benign] max(0, s - mu_minus)   (the paper's projection loss)

    Args:
        s: projections on the harmfulness vector, in the units of the hidden state.
        malicious: which rows are malicious; the others are benign.
    """
    return torch.where(malicious, mu_plus - s, s - mu_minus).clamp(min=0).mean()


def answer_cross_entropy(losses: Float[Tensor, " b"], answered: Bool[Tensor, " b"]) -> Float[Tensor, ""]:
    """L_output: mean over the rows that carry an answer of the mean cross-entropy of its tokens; 0 if none does."""
    return torch.where(answered, losses, 0).sum() / answered.sum().clamp(min=1)
