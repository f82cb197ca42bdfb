"""Attacks that know a gate: both roads of a picture, the look's score in the loss, and what counts as broken."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from davsp import LVLM, DavspError, HarmfulnessVector, VisualSafetyPrompt
from davsp.attacks import AttackSettings, attack
from davsp.attacks.run import probe
from davsp.attacks.surface import files, plain_road, rounded, surfaces, unseen, visual
from davsp.defenses import ECSO, Defense, Gate, NoDefense, SafetyText, VisualPrompt
from davsp.defenses.gate import KINDS
from davsp.lvlm.onehot import answer_losses
from davsp.prompts.gate import Calibration
from davsp.query import Query
from tiny import queries

TARGET = "a car"


@pytest.fixture(scope="module")
def border(lvlm: LVLM, vector: HarmfulnessVector) -> VisualSafetyPrompt:
    from davsp.defenses.gate import calibrate

    prompt = VisualSafetyPrompt.create(56, 8, "random", text="please be safe").quantised()
    held = [replace(q, id=f"held-{q.id}") for q in queries("benign", 12)]
    fit = queries("malicious", 6), queries("benign", 6)
    rest = [replace(q, id=f"held-{q.id}") for q in queries("malicious", 4)]
    prompt.gate = calibrate(
        lvlm, VisualPrompt(prompt), vector, fit, (rest, held), "i cannot", rate=0.2, confidence=None
    )
    return prompt


def gated(border: VisualSafetyPrompt, kind: Any, at: float | None = None) -> Gate:
    """A gate; `at`: with another threshold."""
    calibration: Calibration | None = border.gate
    assert calibration is not None
    if at is not None and kind != "answer":
        line = getattr(calibration, kind).model_copy(update={"threshold": at})
        calibration = calibration.model_copy(update={kind: line})
    return Gate(VisualPrompt(border), kind, calibration)


def moved(pictures: torch.Tensor) -> torch.Tensor:
    noise = torch.rand(pictures.shape, generator=torch.Generator().manual_seed(0))
    return rounded((pictures + 0.1 * noise).clamp(0, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_both_roads_are_those_of_the_sent_file(lvlm: LVLM, border: VisualSafetyPrompt, kind: str) -> None:
    """Bit for bit: through the border for the look, and resized as any picture for the answer."""
    gate, data = gated(border, kind), queries("malicious", 3)
    ((places, surface),) = surfaces(lvlm, gate, data, TARGET)
    some = moved(surface.pictures)
    sent = [replace(q, image=image) for q, image in zip(data, files(some), strict=True)]
    for road, defense in ((surface.canvas, gate.inner), (surface.plain, NoDefense())):
        assert road is not None
        prepared = defense.prepare(sent)
        assert torch.equal(road(some), lvlm.preprocess([p for q in prepared if (p := q.picture()) is not None]))
    assert places == [0, 1, 2] and some.shape[-1] == 40
    assert surface.questions == [f"please be safe {q.question}" for q in data]
    assert surface.after == [([q.question for q in data], [TARGET] * 3)]
    assert probe(lvlm, gate, data, TARGET) == (True, True) and unseen(gate) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_look_and_the_answer_together(lvlm: LVLM, border: VisualSafetyPrompt, kind: str) -> None:
    data = queries("malicious", 3)
    ((_, surface),) = surfaces(lvlm, gated(border, kind), data, TARGET)
    some, plain = moved(surface.pictures), surface.plain
    assert plain is not None
    answers = [TARGET] * 3
    losses, undefended = surface.comply(some), answer_losses(lvlm, plain(some), [q.question for q in data], answers)
    if kind == "answer":
        under = answer_losses(lvlm, surface.canvas(some), surface.questions, answers)
        assert torch.allclose(losses, undefended + under, atol=1e-5)
        return
    sent = [replace(q, image=image) for q, image in zip(data, files(some), strict=True)]
    scores = gated(border, kind).scores(lvlm, sent)
    start = gated(border, kind).scores(
        lvlm, [replace(q, image=i) for q, i in zip(data, files(surface.pictures), strict=True)]
    )
    for at in (min(scores) - 1, sorted(scores)[1] + 1e-3, max(scores) + 100):
        ((_, surface),) = surfaces(lvlm, gated(border, kind, at), data, TARGET)
        expected = [
            max((s - at) / max(abs(first - at), 1e-6) + 0.02, 0) for s, first in zip(scores, start, strict=True)
        ]
        assert surface.comply(some).tolist() == pytest.approx(
            (undefended + torch.tensor(expected)).tolist(), rel=1e-3, abs=1e-3
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_reaches_every_pixel_by_the_look_alone(lvlm: LVLM, border: VisualSafetyPrompt, kind: str) -> None:
    ((_, surface),) = surfaces(lvlm, gated(border, kind, -1e3), queries("malicious", 2), TARGET)
    leaf = surface.pictures.clone().requires_grad_()
    replace(surface, plain=None).comply(leaf).sum().backward()
    assert leaf.grad is not None and float((leaf.grad != 0).float().mean()) > 0.99


@pytest.mark.parametrize("kind", ["states", "first"])
def test_a_query_is_broken_if_it_passes_and_is_complied_with(
    lvlm: LVLM, border: VisualSafetyPrompt, tmp_path: Path, kind: str
) -> None:
    """The search gets past a threshold that stops the clean pictures; one that nothing passes withstands it."""
    data = queries("malicious", 3)
    start = gated(border, kind).scores(lvlm, data)
    settings = AttackSettings(attacks=("noise", "comply"), eps=(64,), steps=12, batch_size=3, target=TARGET)
    spread = max(start) - min(start)

    def attacked(at: float, out: Path) -> tuple[Gate, dict[str, Any]]:
        gate = gated(border, kind, at)
        results = attack(lvlm, {"gate": gate}, data, out, settings, max_new_tokens=4)
        return gate, {result.attack: result for result in results}

    gate, found = attacked(min(start) - 0.1 * spread, tmp_path / "a")
    assert set(found["clean"].labels.values()) == {"safe"}
    passed = [score <= gate.line.threshold for score in gate.scores(lvlm, found["comply"].queries)]
    assert sum(passed) > sum(s <= gate.line.threshold for s in gate.scores(lvlm, found["noise"].queries))
    assert [found["comply"].labels[q.id] == "unsafe" for q in data] == passed
    _, found = attacked(-1e6, tmp_path / "b")
    assert set(found["comply"].labels.values()) == {"safe"}


def test_what_the_attack_does_not_know_of_gates(
    lvlm: LVLM, border: VisualSafetyPrompt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, gate = queries("malicious", 1), gated(border, "first")

    def refused(defense: Defense, kinds: tuple[str, ...], why: str) -> None:
        with pytest.raises(DavspError, match=why):
            attack(lvlm, {"gate": defense}, data, tmp_path, AttackSettings(attacks=kinds, target=TARGET))

    refused(gate, ("suffix",), "'suffix' does not know gates")
    results = attack(
        lvlm, {"gate": gate}, data, tmp_path / "words", AttackSettings(attacks=("random-words",), target=TARGET)
    )
    assert [a.attack for a in results] == ["clean", "random-words"]  # nothing is searched, so there is nothing to know
    refused(ECSO(gate), ("comply",), "stands outermost")
    refused(Gate(VisualPrompt(border), else_=VisualPrompt(border)), ("comply",), "another border")
    assert visual(Gate(SafetyText("please be safe"))) is None
    whole = type(lvlm).preprocess
    monkeypatch.setattr(type(lvlm), "preprocess", lambda self, pictures: (whole(self, pictures) + 1 / 255).clamp(max=1))
    with pytest.raises(DavspError, match="in a way whose gradient"):
        plain_road(lvlm, torch.zeros(1, 3, 40, 40))


def test_a_gate_over_a_text_has_one_road(lvlm: LVLM) -> None:
    data: list[Query] = queries("malicious", 2)
    ((_, surface),) = surfaces(lvlm, Gate(SafetyText("please be safe")), data, TARGET)
    assert surface.plain is not None and torch.equal(surface.plain(surface.pictures), surface.canvas(surface.pictures))
    assert len(surface.goals) == len(surface.after) == 1
