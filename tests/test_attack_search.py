"""The searches by themselves: projected gradients, random squares and words end lower than they began, inside their bounds, and repeat."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attacked import DEFENSES, TARGET
from davsp import LVLM
from davsp.attacks.apgd import ENOUGH, apgd
from davsp.attacks.square import square
from davsp.attacks.suffix import search_suffix, with_words
from davsp.attacks.surface import surfaces
from davsp.defenses import VisualPrompt
from davsp.errors import DavspError
from davsp.prompts import VisualSafetyPrompt
from tiny import queries


def far(goal: Tensor) -> Any:
    """Squared distance of each picture from a goal."""
    return lambda x: ((x - goal) ** 2).flatten(1).sum(1)


def test_apgd_ends_at_the_best_point_of_the_box() -> None:
    clean = torch.full((2, 3, 4, 4), 0.5)
    goal = torch.stack([torch.full((3, 4, 4), 0.9), torch.full((3, 4, 4), 0.47)])  # one outside, one inside the box
    result = apgd(lambda x: 100 * far(goal)(x) + 1, clean, 0.1, 60)
    assert torch.allclose(result.pictures[0], torch.tensor(0.6), atol=1e-6)
    assert torch.allclose(result.pictures[1], torch.tensor(0.47), atol=2e-3)
    assert result.curve.shape == (2, 61)
    assert bool((result.curve.diff(dim=1) <= 0).all()) and result.dead == [False, False]


def test_apgd_leaves_neither_box_nor_colours() -> None:
    clean = torch.tensor([0.0, 0.02, 0.98]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    for seed in (None, 3):
        result = apgd(far(torch.tensor([-1.0, -1.0, 2.0]).view(3, 1, 1)), clean, 0.05, 12, seed)
        assert 0 <= float(result.pictures.min()) and float(result.pictures.max()) <= 1
        assert float((result.pictures - clean).abs().max()) <= 0.05 + 1e-6


def test_apgd_stops_once_all_have_enough_and_says_where_there_is_no_gradient() -> None:
    calls = []

    def losses(x: Tensor) -> Tensor:
        calls.append(len(x))
        return far(torch.zeros(3, 2, 2))(x)

    result = apgd(losses, torch.full((1, 3, 2, 2), 0.1), 1.0, 40)
    assert float(result.curve[0, -1]) <= ENOUGH and result.curve.shape == (1, 41) and len(calls) < 40
    stuck = apgd(lambda x: 0 * x.flatten(1).sum(1) + 1, torch.full((1, 3, 2, 2), 0.1), 0.1, 3)
    assert stuck.dead == [True]
    with pytest.raises(DavspError, match="not finite"):
        apgd(lambda x: x.flatten(1).sum(1) / 0, torch.full((1, 3, 2, 2), 0.1), 0.1, 3)


def test_random_starts_are_repeatable() -> None:
    clean = torch.full((1, 3, 4, 4), 0.5)
    same = [apgd(far(torch.ones(3, 4, 4)), clean, 0.1, 1, seed).curve[0, 0].item() for seed in (1, 1, 2)]
    assert same[0] == same[1] != same[2]


def test_square_finds_less_than_it_began_with_and_repeats() -> None:
    clean, losses = (
        torch.full((2, 3, 16, 16), 0.5),
        far(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))),
    )
    one, two = (square(losses, clean, 0.1, 80, 5) for _ in range(2))
    assert torch.equal(one.pictures, two.pictures) and one.curve.shape == (2, 80)
    assert bool((one.curve[:, -1] < one.curve[:, 0]).all()) and bool((one.curve.diff(dim=1) <= 0).all())
    assert torch.allclose((one.pictures - clean).abs(), torch.tensor(0.1))


@pytest.mark.parametrize("name", ["none", "border", "ecso"])
def test_words_after_the_question_make_the_answer_likelier(lvlm: LVLM, name: str) -> None:
    defense, query = DEFENSES[name], queries("malicious", 1)[0]
    options: Any = {"length": 3, "steps": 6, "candidates": 12, "batch_size": 5, "seed": 0}
    steps: list[int] = []
    words = search_suffix(lvlm, defense, query, TARGET, **options, progress=steps.append)
    assert words.curve == sorted(words.curve, reverse=True) and words.curve[-1] < words.curve[0]
    assert len(words.curve) == 7 and sum(steps) == 6
    ((_, surface),) = surfaces(lvlm, defense, [with_words(query, words.text)], TARGET)
    assert words.curve[-1] == pytest.approx(float(surface.comply(surface.pictures)), abs=1e-5)  # as it will be asked
    assert search_suffix(lvlm, defense, query, TARGET, **options) == words
    with pytest.raises(DavspError, match=r"take fewer \(--words\)"):
        nothing = VisualPrompt(VisualSafetyPrompt.create(56, 8))
        nothing.prompt.question = lambda question: "what"  # type: ignore[method-assign]
        search_suffix(lvlm, nothing, query, TARGET, **options)
