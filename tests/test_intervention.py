"""Steering while the model answers: the projection that was asked for, at the tokens that were meant, and nothing left behind."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from davsp import LVLM, DavspError, HarmfulnessVector, VisualSafetyPrompt
from davsp.defenses import ECSO, Chain, Gate, Intervention, NoDefense, SafetyText, VisualPrompt
from davsp.embedded.data import Protocol
from davsp.judges import refused
from davsp.lvlm import Steer
from davsp.lvlm.hooks import steering
from model_server import model_server
from tiny import queries

LAYER, TARGET = 2, 7.5


@pytest.mark.parametrize("answer", [True, False])
def test_steering_to_a_target_gives_that_projection(answer: bool, lvlm: LVLM, vector: HarmfulnessVector) -> None:
    """In every row, however far it was; across the vector and at other tokens nothing changes."""
    questions, unit = [q.question for q in queries("malicious", 2)], vector.direction(LAYER)
    canvas = lvlm.preprocess([q.picture() for q in queries("malicious", 2)])  # type: ignore[misc]
    tokens = lvlm.encode(questions, True, padding_side="left")
    assert int(tokens.mask.sum(1).min()) < tokens.mask.shape[1]  # a padded row
    seen: dict[bool, list[torch.Tensor]] = {False: [], True: []}

    def run(steered: bool) -> None:
        handle = lvlm.layers[LAYER - 1].register_forward_hook(lambda m, i, output: seen[steered].append(output.clone()))
        options: Any = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        lvlm.model.generate(**lvlm.inputs(tokens, canvas, masked=True), **options)
        handle.remove()

    run(False)
    with steering(
        lvlm.layers, LAYER, unit, TARGET, answer
    ):  # its hook comes first, so the one that watches sees its output
        run(True)
    target = torch.full((2,), TARGET)
    torch.testing.assert_close(seen[True][0][:, -1] @ unit, target, rtol=0, atol=1e-3)
    change = seen[True][0] - seen[False][0]
    assert torch.count_nonzero(change[:, :-1]) == 0
    across = change[:, -1] - (change[:, -1] @ unit)[:, None] * unit
    assert float(across.abs().max()) < 1e-3 < float(change[:, -1].abs().max())
    shifts = change[:, -1] @ unit
    assert abs(float(shifts[0] - shifts[1])) > 1e-3  # a shift of its own for each row
    assert len(seen[True]) == 4
    for step in seen[True][1:]:
        at = bool(((step[:, -1] @ unit - target).abs() < 1e-3).all())
        assert at == answer


def test_the_answers_are_the_steered_model_s(lvlm: LVLM, vector: HarmfulnessVector) -> None:
    data = queries("malicious", 3)
    canvas, words = lvlm.preprocess([q.picture() for q in data]), [q.question for q in data]  # type: ignore[misc]
    by = 40 * 2 * vector.half_gap() * vector.direction()
    for defense, steer in (
        (Intervention(vector, times=40), (vector.layer, by)),
        (Intervention(vector, to=TARGET), Steer(vector.layer, vector.direction(), TARGET)),
        (Intervention(vector, to=TARGET, answer=False), Steer(vector.layer, vector.direction(), TARGET, False)),
    ):
        responses = defense.respond(lvlm, data, max_new_tokens=6)
        assert [r.text for r in responses] == lvlm.generate(canvas, words, 6, steer=steer)
        assert {(r.defense, r.calls) for r in responses} == {("intervention", 1)}
    before = [r.text for r in NoDefense().respond(lvlm, data, max_new_tokens=6)]
    assert [r.text for r in Intervention(vector, times=0).respond(lvlm, data, max_new_tokens=6)] == before
    assert [r.text for r in Intervention(vector, times=40).respond(lvlm, data, max_new_tokens=6)] != before
    assert lvlm.generate(canvas, words, 6) == before and lvlm.steer is None  # nothing is left behind


def test_it_goes_around_any_defense(lvlm: LVLM, vector: HarmfulnessVector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of the inner one is steered, and sees what the inner one makes of the query."""
    query, border = queries("malicious", 1), VisualPrompt(VisualSafetyPrompt.create(56, 8, "random", text="please"))
    seen: list[tuple[Steer | None, Any]] = []

    def completions(self: LVLM, canvas: Any, questions: list[str], max_new_tokens: int = 48) -> list[tuple[str, str]]:
        seen.append((self.steer, canvas))
        return [("yes", "stop")] * len(questions)

    monkeypatch.setattr(LVLM, "completions", completions)
    around = Intervention(vector, to=1.0, inner=ECSO(border), name="i")
    (response,) = around.respond(lvlm, query)
    assert response.calls == 4 and [steer and steer.to for steer, _ in seen] == [1.0] * 4
    canvas = lvlm.preprocess([border.prompt.image(query[0].picture())])  # type: ignore[arg-type]
    assert torch.equal(seen[0][1], canvas)
    seen.clear()
    inside = Chain([SafetyText("be safe"), Intervention(vector, times=1.0, inner=border)])
    assert inside.name == "safety-text+intervention" and inside.respond(lvlm, query)[0].defense == inside.name
    assert len(seen) == 1 and seen[0][0] is not None
    assert (
        len({str(d.describe()) for d in (around, inside, Intervention(vector, to=1.0), Intervention(vector, 1.0))}) == 4
    )


def test_misuse_is_said(lvlm: LVLM, vector: HarmfulnessVector, monkeypatch: pytest.MonkeyPatch) -> None:
    from davsp.lvlm.remote import RemoteLVLM

    for amount in ({}, {"times": 1.0, "to": 2.0}, {"to": float("nan")}, {"times": float("inf")}):
        with pytest.raises(DavspError, match="finite number as times or as to"):
            Intervention(vector, **amount)
    other = Intervention(replace(vector, vectors=vector.vectors[:, :5]), to=1.0)
    with pytest.raises(DavspError, match="of another model"):
        other.respond(lvlm, queries("benign", 1))
    with pytest.raises(DavspError, match="into another"):
        Intervention(vector, to=1.0, inner=Intervention(vector, to=2.0)).respond(lvlm, queries("benign", 1))
    with pytest.raises(DavspError, match="out of range"):
        lvlm.steered(Steer(4, torch.zeros(32)))
    with pytest.raises(DavspError, match="wraps the call"):
        Chain([Intervention(vector, to=1.0), NoDefense()])
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with model_server(lvlm) as server:
        remote = RemoteLVLM("org/m", server.url)
        with pytest.raises(DavspError, match="which a server does not give: load the model here"):
            Intervention(vector, to=1.0).respond(remote, queries("benign", 1))
        with pytest.raises(DavspError, match="no hidden states"):
            remote.steered(Steer(1, torch.zeros(32)))
        assert not server.bodies


def test_what_it_does_not_go_with_is_told_before_anything_is_answered(lvlm: LVLM, vector: HarmfulnessVector) -> None:
    """By `check`: an evaluation asks it of every row before the first one is answered."""
    once, begun = Intervention(vector, to=1.0, name="once"), lvlm.begun("a car")
    for defense in (once, ECSO(instead=once), Chain([SafetyText("be safe"), once])):
        defense.check(lvlm)
        with pytest.raises(DavspError, match="leave out --prefill"):
            defense.check(begun)
    for inner in (once, ECSO(once), Chain([SafetyText("be safe"), once]), Gate(once), Gate(NoDefense(), else_=once)):
        with pytest.raises(DavspError, match="steered already: put no intervention into another"):
            Intervention(vector, to=2.0, inner=inner).check(lvlm)


def test_it_moves_davsp_mini_both_ways(mini: LVLM, protocol: Protocol) -> None:
    """The paper's Table 5 in small: more is refused with the projection raised, less with it lowered."""
    vector = HarmfulnessVector.fit(
        mini, protocol.vector_malicious[:12], protocol.vector_benign[:12], progress=False
    ).use_layer(3)
    bad = [q for q in protocol.test if q.benchmark in ("sd", "sd_typo")][::12]
    refusals = {
        name: sum(refused(r.text) for r in defense.respond(mini, bad))
        for name, defense in {
            "none": NoDefense(),
            "up": Intervention(vector, times=0.75),
            "plus": Intervention(vector, to=vector.mu_plus),
            "down": Intervention(vector, times=-0.75),
        }.items()
    }
    assert refusals["down"] < refusals["none"] < min(refusals["up"], refusals["plus"]), refusals


def test_the_projection_of_a_response_is_that_of_the_moved_state(lvlm: LVLM, vector: HarmfulnessVector) -> None:
    data = queries("malicious", 3)
    before = [r.projection for r in NoDefense().respond(lvlm, data, vector)]
    moved = [r.projection for r in Intervention(vector, times=0.5).respond(lvlm, data, vector)]
    assert moved == pytest.approx([s + vector.half_gap() for s in before])  # half of the distance between the means
    assert [r.projection for r in Intervention(vector, to=3.0).respond(lvlm, data, vector)] == [3.0] * 3
    other = replace(vector, layer=1) if vector.layer != 1 else replace(vector, layer=2)
    assert [r.projection for r in Intervention(vector, to=3.0).respond(lvlm, data, other)] == [None] * 3
