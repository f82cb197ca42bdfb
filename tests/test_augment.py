"""Changes of the canvas inside training: the same pixels as the changes that are measured, with a gradient."""

import numpy as np
import pytest
import torch
from PIL import Image

from davsp.cli.inputs import settings_of
from davsp.errors import DavspError
from davsp.experiments.corruptions import changes as measured
from davsp.prompts.base import from_picture, to_bytes
from davsp.training import TrainSettings, augment

PAIRS = {
    "shift right": (augment.shifted(3, 0), measured.shifted(3)),
    "shift both": (augment.shifted(2, 5), measured.shifted(2, 5)),
    "half": (augment.shifted(0.5, 0), measured.half_shifted(diagonal=False)),
    "resize": (augment.resized(31, Image.Resampling.BILINEAR), measured.there_and_back(31, "bilinear")),
    "larger": (augment.resized(60, Image.Resampling.BICUBIC), measured.there_and_back(60, "bicubic")),
    "crop": (augment.cropped(2), measured.cropped(2)),
    "jpeg": (augment.compressed(75), measured.recoded("JPEG", quality=75)),
    "gamma": (augment.gamma(0.9), measured.gamma(0.9)),
}


@pytest.fixture
def picture() -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    return Image.fromarray(levels)


@pytest.mark.parametrize("name", PAIRS)
def test_a_change_gives_the_pixels_of_the_one_that_is_measured(name, picture):
    ours, theirs = PAIRS[name]
    gap = to_bytes(ours(from_picture(picture))).astype(int) - np.asarray(theirs(picture)).astype(int)
    assert np.abs(gap).max() <= (1 if name == "half" else 0)  # a half is rounded to even there and here, in other units


def test_left_and_up_are_possible(picture):
    levels = np.asarray(augment.shifted(-2, -1)(from_picture(picture)) * 255).round()
    there = np.pad(np.asarray(picture), ((0, 1), (0, 2), (0, 0)), mode="edge")[1:, 2:]
    assert np.array_equal(levels, there.transpose(2, 0, 1))
    with pytest.raises(ValueError, match="half"):
        augment.shifted(0.25, 0)


@pytest.mark.parametrize("name", PAIRS)
def test_every_change_has_a_gradient_of_its_own_size(name, picture):
    row = from_picture(picture).clamp(0.2, 0.8).requires_grad_()  # nothing is clipped
    (gradient,) = torch.autograd.grad(PAIRS[name][0](row).sum(), row)
    assert gradient.isfinite().all()
    assert 0.5 < gradient.mean() < 1.5  # brighter all over is brighter after it


def test_rows_are_drawn_by_their_key_and_every_kind_comes(monkeypatch):
    kinds = ("shift", "resize", "jpeg", "crop", "gamma")
    row = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0))
    drawn, again = ([augment.draw(kinds, f"0 augment {i} 0") for i in range(200)] for _ in range(2))
    assert 0.65 < sum(change is not None for change in drawn) / 200 < 0.85
    after, same = (augment.changed(row.expand(20, -1, -1, -1), changes[:20]) for changes in (drawn, again))
    assert torch.equal(after, same) and len({one.numpy().tobytes() for one in after}) > 10
    named = {kind: (lambda row: row) for kind in kinds}
    monkeypatch.setattr(augment, "DRAWN", {kind: lambda chance, kind=kind: named[kind] for kind in kinds})
    found = [augment.draw(kinds, str(i)) for i in range(400)]
    assert all(40 < found.count(named[kind]) < 80 for kind in kinds)  # 60 each


def test_rows_without_a_change_stay_to_the_bit(picture):
    rows = torch.stack([from_picture(picture)] * 2)
    after = augment.changed(rows, [None, augment.shifted(1, 0)])
    assert torch.equal(after[0], rows[0]) and not torch.equal(after[1], rows[1])


def test_settings_name_what_is_not_known():
    with pytest.raises(ValueError, match="rotate"):
        TrainSettings(augment=("shift", "rotate"))
    with pytest.raises(ValueError, match="it is blank"):
        TrainSettings(refusal=" ")
    with pytest.raises(ValueError, match="name each kind once"):
        TrainSettings(augment=("shift", "jpeg", "shift"))
    assert "augment" not in TrainSettings().model_dump()  # runs from before go on
    assert TrainSettings(augment=("jpeg",)).model_dump()["augment"] == ("jpeg",)


def test_a_kind_named_twice_is_said_by_its_option():
    with pytest.raises(DavspError, match=r"is not possible: name each kind once\.$"):
        settings_of(TrainSettings, {"augment": ["shift", "shift"]})
