"""What an attack moves and what the model then sees are the same, through every defense; what it does not see is said."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import ImageChops, ImageFilter, ImageOps

from attacked import DEFENSES, TARGET, border
from davsp import LVLM, HarmfulnessVector
from davsp.attacks.redraw import REDRAWS, counter_frame
from davsp.attacks.run import probe
from davsp.attacks.surface import files, goals, rounded, surfaces, unseen, visual
from davsp.defenses import ECSO, Chain, Intervention, NoDefense, SafetyText
from davsp.defenses.ecso import CUT, PUBLISHED
from davsp.errors import DavspError
from davsp.lvlm.onehot import answer_losses
from davsp.prompts import VisualSafetyPrompt
from davsp.query import Query, Response
from tiny import picture, queries


@pytest.mark.parametrize("name", DEFENSES)
def test_what_is_attacked_is_what_the_model_sees_of_the_file(lvlm: LVLM, name: str) -> None:
    """Bit for bit: the attacked canvas is that of the sent PNG, through the defense's own `prepare`."""
    defense, data = DEFENSES[name], queries("malicious", 3)
    ((places, surface),) = surfaces(lvlm, defense, data, TARGET)
    moved = (
        surface.pictures + 0.1 * torch.rand(surface.pictures.shape, generator=torch.Generator().manual_seed(0))
    ).clamp(0, 1)
    sent = [replace(q, image=image) for q, image in zip(data, files(rounded(moved)), strict=True)]
    prepared = defense.prepare(sent)
    seen = lvlm.preprocess([p for q in prepared if (p := q.picture()) is not None])
    assert places == [0, 1, 2] and torch.equal(surface.canvas(rounded(moved)), seen)
    assert surface.questions == [q.question for q in prepared]
    before = [p for q in defense.prepare(data) if (p := q.picture()) is not None]
    if name == "border":  # resized to the inside, the picture is the one that the defense would have made itself
        assert torch.equal(surface.canvas(surface.pictures), lvlm.preprocess(before))


def test_the_gradient_reaches_every_pixel_through_border_and_rounding(lvlm: LVLM) -> None:
    ((_, surface),) = surfaces(lvlm, border(), queries("malicious", 2), TARGET)
    leaf = surface.pictures.clone().requires_grad_()
    surface.comply(leaf).sum().backward()
    assert leaf.grad is not None and leaf.grad.shape == (2, 3, 40, 40)
    assert float((leaf.grad != 0).float().mean()) > 0.99


def test_ecso_is_asked_for_a_harmless_verdict_too(lvlm: LVLM) -> None:
    data = queries("malicious", 2)
    calls = goals(DEFENSES["ecso"], data, TARGET)
    harm = [PUBLISHED.harm.format(query=q.question, response=TARGET[:CUT]) for q in data]
    assert calls[1] == (harm, ["no", "no"])  # of `inner` only the picture follows into the second call
    ((_, surface),) = surfaces(lvlm, DEFENSES["ecso"], data, TARGET)
    canvas = surface.canvas(surface.pictures)
    both = sum(answer_losses(lvlm, canvas, *call) for call in calls)
    assert torch.allclose(surface.comply(surface.pictures), torch.as_tensor(both))
    assert goals(Chain([SafetyText("please"), DEFENSES["ecso"]]), data, TARGET)[1][1] == ["no", "no"]
    whole = goals(ECSO(SafetyText("be safe"), follow="whole"), data, TARGET)
    assert whole[1][0] == [f"be safe {question}" for question in harm]


def test_pictures_of_several_sizes_are_attacked_apart() -> None:
    from davsp import embedded

    qwen = embedded.load("davsp-mini-qwen", device_map="cpu")
    data = [Query(str(i), "what is this ?", "malicious", "test", image=picture(i, size)) for i, size in enumerate([(56, 84), (84, 56), (56, 84)])]  # fmt: skip
    groups = surfaces(qwen, NoDefense(), data, "sure")
    assert sorted(places for places, _ in groups) == [[0, 2], [1]]
    assert len({tuple(surface.pictures.shape[1:]) for _, surface in groups}) == 2


def test_what_the_attack_does_not_see_is_said(vector: HarmfulnessVector) -> None:
    assert unseen(border()) == [] and unseen(DEFENSES["chain"]) == []
    assert "intervention" in unseen(Intervention(vector, 1.0, inner=border()))[0]
    assert "caption" in unseen(DEFENSES["ecso"])[0] and "again" in unseen(ECSO(instead=border()))[0]
    prompt = visual(Intervention(vector, 1.0, inner=Chain([border(), SafetyText("x")])))
    assert isinstance(prompt, VisualSafetyPrompt) and visual(SafetyText("x")) is None
    with pytest.raises(DavspError, match="two visual prompts"):
        visual(Chain([border(), border()]))


def test_each_query_may_have_a_target_of_its_own(lvlm: LVLM) -> None:
    data, targets = queries("malicious", 3), ["a car", "red", "a cake"]
    for defense in DEFENSES.values():
        ((_, surface),) = surfaces(lvlm, defense, data, targets)
        alone = [surfaces(lvlm, defense, [q], one)[0][1] for q, one in zip(data, targets, strict=True)]
        losses = torch.cat([one.comply(one.pictures) for one in alone])
        assert torch.allclose(surface.comply(surface.pictures), losses, atol=1e-4)
    calls = goals(DEFENSES["ecso"], data, targets)
    assert calls[0][1] == targets and all(f"{t[:CUT]}" in q for t, q in zip(targets, calls[1][0], strict=True))


@pytest.mark.parametrize("name", REDRAWS)
def test_redrawn_pictures(name: str) -> None:
    before, prompt = picture(1, (60, 40)), border().prompt
    copy = before.copy()
    for at_hand in (prompt, None):
        picture_after = REDRAWS[name](before, at_hand)
        assert picture_after.mode == "RGB" and (
            picture_after.size != before.size or ImageChops.difference(picture_after, before).getbbox()
        )
    assert ImageChops.difference(before, copy).getbbox() is None


def test_the_counter_frame_is_the_border_turned_round() -> None:
    prompt = border().prompt
    assert isinstance(prompt, VisualSafetyPrompt)
    canvas, frame = counter_frame(picture(1), prompt), prompt.border()
    top = (0, 0, 56, 8)
    assert ImageOps.invert(canvas.crop(top)).tobytes() == frame.crop(top).tobytes()


class Blurs(NoDefense):
    """A defense that the attack has never heard of."""

    def prepare(self, queries: Any) -> list[Query]:
        return [replace(q, image=q.picture().filter(ImageFilter.BLUR)) for q in queries]


class Wavers(NoDefense):
    """Another question each time."""

    calls = 0

    def prepare(self, queries: Any) -> list[Query]:
        Wavers.calls += 1
        return [replace(q, question=f"{'please ' * (Wavers.calls % 2)}{q.question}") for q in queries]


class Calls(NoDefense):
    def respond(self, *args: Any, **options: Any) -> list[Response]:
        return super().respond(*args, **options)


def test_a_defense_is_held_against_what_the_attack_takes_it_for(lvlm: LVLM) -> None:
    data = queries("malicious", 2)
    for defense in DEFENSES.values():
        assert probe(lvlm, defense, data, TARGET) == (True, True)
    assert probe(lvlm, Blurs(), data, TARGET) == (True, False)
    assert probe(lvlm, Wavers(), data, TARGET)[0] is False
    assert unseen(Calls()) == ["what none does with the call"] and unseen(Blurs()) == []
