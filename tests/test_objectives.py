"""Losses against values worked out by hand."""

import pytest
import torch

from davsp.training.objectives import answer_cross_entropy, projection_hinge


def test_hinge_by_hand():
    """mu+ = 2, mu- = -1. Malicious 3 and 0.5: 0 and 1.5. Benign -2 and 1: 0 and 2. Mean 3.5 / 4."""
    s, malicious = torch.tensor([3.0, 0.5, -2.0, 1.0]), torch.tensor([True, True, False, False])
    assert projection_hinge(s, malicious, 2.0, -1.0).item() == 0.875


def test_hinge_gradient_by_hand():
    """-1/B on malicious below mu+, +1/B on benign above mu-, nothing beyond the margins."""
    s = torch.tensor([3.0, 0.5, -2.0, 1.0], requires_grad=True)
    projection_hinge(s, torch.tensor([True, True, False, False]), 2.0, -1.0).backward()
    assert s.grad.tolist() == [0, -0.25, 0, 0.25]


def test_answer_loss_is_the_mean_over_the_rows_that_answer():
    losses = torch.tensor([1.0, 9.0, 3.0], requires_grad=True)
    value = answer_cross_entropy(losses, torch.tensor([True, False, True]))
    value.backward()
    assert value.item() == pytest.approx(2.0) and losses.grad.tolist() == [0.5, 0, 0.5]
    assert answer_cross_entropy(torch.tensor([5.0]), torch.tensor([False])).item() == 0
