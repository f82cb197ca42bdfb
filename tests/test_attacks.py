"""Attacks: the search by itself, the road it takes, and what a run leaves behind."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ImageChops, ImageFilter, ImageOps
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor

from davsp import LVLM, HarmfulnessVector
from davsp.attacks import AttackSettings, attack
from davsp.attacks.apgd import ENOUGH, apgd
from davsp.attacks.checks import checks
from davsp.attacks.page import markdown, words_sentence
from davsp.attacks.redraw import REDRAWS, counter_frame
from davsp.attacks.run import probe, slug
from davsp.attacks.settings import CLEAN
from davsp.attacks.square import square
from davsp.attacks.suffix import search_suffix, with_words
from davsp.attacks.surface import files, goals, rounded, surfaces, unseen, visual
from davsp.attacks.table import ALL, rows
from davsp.defenses import ECSO, Chain, Defense, Intervention, NoDefense, SafetyText, VisualPrompt
from davsp.defenses.ecso import CUT, PUBLISHED
from davsp.errors import DavspError
from davsp.lvlm.onehot import answer_losses
from davsp.prompts import AdditiveNoise, VisualSafetyPrompt
from davsp.query import Query, Response
from tiny import picture, queries

TARGET = "a car"
QUICK: dict[str, Any] = {
    "steps": 6, "tries": 5, "batch_size": 3, "target": TARGET, "words": 3, "word_steps": 4, "word_candidates": 6,
    "universal_steps": 4,
}  # fmt: skip


def border(text: str = "please be safe") -> VisualPrompt:
    return VisualPrompt(VisualSafetyPrompt.create(56, 8, "random", 0, text))


DEFENSES: dict[str, Defense] = {
    "none": NoDefense(),
    "border": border(),
    "noise": VisualPrompt(AdditiveNoise.create(56, 32 / 255, "random", 0, "please be safe"), "noise"),
    "chain": Chain([border(""), SafetyText("please")]),
    "ecso": ECSO(border()),
}


def told(count: int) -> list[Query]:
    """Queries that say in words what they ask for."""
    return [replace(q, context="steal a car") for q in queries("malicious", count)]


def others(count: int) -> list[Query]:
    """Queries with other pictures."""
    return queries("malicious", count, seed=1)


# -- the search ------------------------------------------------------------------------------------------------------------


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


# -- the road --------------------------------------------------------------------------------------------------------------


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
    with pytest.raises(DavspError, match="take fewer"):
        nothing = VisualPrompt(VisualSafetyPrompt.create(56, 8))
        nothing.prompt.question = lambda question: "what"  # type: ignore[method-assign]
        search_suffix(lvlm, nothing, query, TARGET, **options)


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


# -- a run -----------------------------------------------------------------------------------------------------------------


def test_a_run_keeps_the_bounds_and_beats_noise(lvlm: LVLM, vector: HarmfulnessVector, tmp_path: Path) -> None:
    data = [*told(4), *queries("benign", 2)]
    defenses = {"none": NoDefense(), "davsp": border()}
    settings = AttackSettings(eps=(8, 255), **QUICK | {"target": "a car :"})
    results = attack(lvlm, defenses, data, tmp_path, settings, vector, training=others(5), max_new_tokens=4)
    by = {(a.defense, a.attack, a.eps): a for a in results}
    clean = torch.cat([s.pictures for _, s in surfaces(lvlm, border(), data[:4], TARGET)])
    for kind in ("noise", "comply", "deed", "hide", "both", "universal", "square"):
        sent = by["davsp", kind, 8].queries
        levels = [torch.tensor(list(q.picture().tobytes())) for q in sent if q.picture() is not None]  # type: ignore[union-attr]
        base = [torch.tensor(list(image.tobytes())) for image in files(clean)]
        apart = torch.stack([(a.int() - b.int()).abs().max() for a, b in zip(levels, base, strict=True)])
        assert 0 < int(apart.max()) <= 8, kind
        assert {q.picture().size for q in sent if q.picture() is not None} == {(40, 40)}  # type: ignore[union-attr]
    assert ("none", "transfer", 8) not in by
    for eps in (8, 255):
        sent, source = by["davsp", "transfer", eps].queries, by["none", "comply", eps].queries
        assert [q.image for q in sent] == [q.image for q in source]  # the very files
    ends = {kind: sum(r["curve"][-1] for r in by["davsp", kind, 255].records) for kind in ("noise", "comply")}
    assert ends["comply"] < ends["noise"]
    assert all(
        r["curve"] == sorted(r["curve"], reverse=True) for a in results for r in a.records if a.attack != "universal"
    )
    assert {q.label for q in by["davsp", CLEAN, None].queries} == {"malicious", "benign"}
    assert {q.label for q in by["davsp", "comply", 8].queries} == {"malicious"}

    table = rows("tiny", results, data)
    words = by["davsp", "suffix", None].queries
    assert all(w.question.startswith(f"{q.question} ") for w, q in zip(words, data[:4], strict=True))
    assert [w.image for w in words] == [q.image for q in data[:4]]
    assert [q.question for q in by["davsp", "joint", 8].queries] == [w.question for w in words]
    rates = {(r["attack"], r["eps"]): r["value"] for r in table if r["defense"] == "davsp" and r["benchmark"] == ALL and r["metric"] == "rsr"}  # fmt: skip
    assert rates["worst", 255] <= rates["worst", 8] <= rates["worst", 0] <= rates[CLEAN, None]
    assert rates["worst", 8] <= min(
        rates[kind, 8] for kind in ("noise", "transfer", "comply", "deed", "hide", "both", "universal", "square")
    )
    paired = [r for r in table if r["metric"] == "rsr_difference" and r["defense"] == "davsp"]
    assert {r["attack"] for r in paired} == {a.attack for a in results} - {"transfer"} | {"worst", "any"}
    marks = checks(results, defenses, {name: (True, True) for name in defenses})
    by_chance = [by[name, "random-words", None].queries for name in defenses]
    assert by_chance[0] == by_chance[1] and all(
        w.question.startswith(f"{q.question} ") for w, q in zip(by_chance[0], data, strict=True)
    )
    assert {r["attack"] for r in table if r["metric"] == "accuracy"} == {CLEAN, "random-words"}
    (accuracy,) = [
        r["value"] for r in table
        if (r["defense"], r["attack"], r["metric"], r["benchmark"]) == ("none", "random-words", "accuracy", ALL)
    ]  # fmt: skip
    assert f"No Defense {100 * accuracy:.1f} [" in words_sentence(table, results)
    assert (
        words_sentence(table, results) in markdown(table, results, marks, "tiny") and words_sentence([], results) == ""
    )
    assert len(marks) == 16 and {m.state for m in marks} <= {"good", "doubt"}


def test_a_run_that_was_cut_off_ends_the_same(lvlm: LVLM, tmp_path: Path) -> None:
    settings = AttackSettings(attacks=("comply",), eps=(16,), restarts=2, **QUICK)
    data, defenses = queries("malicious", 5), {"davsp": border()}
    whole, again = tmp_path / "whole", tmp_path / "again"
    for out in (whole, again):
        attack(lvlm, defenses, data, out, settings, max_new_tokens=4)
    records = again / "davsp" / "comply-16" / "found.jsonl"
    lines = records.read_text().splitlines(keepends=True)
    records.write_text("".join(lines[:3]) + lines[3][:20])  # the second batch was under way
    (records.parent / "pictures" / "00003.png").unlink()
    (records.parent / "pictures" / ".00004.png.x.tmp").write_text("half")
    results = attack(lvlm, defenses, data, again, settings, max_new_tokens=4)
    assert records.read_text() == (whole / "davsp" / "comply-16" / "found.jsonl").read_text()
    assert sorted(p.name for p in (records.parent / "pictures").iterdir()) == [f"0000{i}.png" for i in range(5)]
    assert results[-1].attack == "comply" and len(results[-1].queries) == 5
    more = settings.model_copy(update={"eps": (4, 16), "attacks": ("comply", "redraw")})
    assert len(attack(lvlm, defenses, data, again, more, max_new_tokens=4)) == 3 + len(REDRAWS)  # a run may grow

    records.write_text("".join(lines[:1]))  # a batch that was cut in two
    attack(lvlm, defenses, data, again, settings, max_new_tokens=4)
    assert records.read_text() == "".join(lines)

    for change in ({"steps": 7}, {"target": "red"}):
        with pytest.raises(
            DavspError, match=rf"comply-16/attack\.json is of a run with other settings \({next(iter(change))}\)"
        ):
            attack(lvlm, defenses, data, again, settings.model_copy(update=change), max_new_tokens=4)
    with pytest.raises(DavspError, match=r"again/attack\.json is of a run with other settings \(queries\)"):
        attack(lvlm, defenses, data[:4], again, settings, max_new_tokens=4)
    with pytest.raises(DavspError, match=r"davsp/defense\.json is of a run with other settings \(defense\)"):
        attack(lvlm, {"davsp": border("red")}, data, again, settings, max_new_tokens=4)
    records.write_text("".join(lines[:4]) + lines[4].replace("sha256", "sha"))
    with pytest.raises(DavspError, match=r"found\.jsonl is damaged"):
        attack(lvlm, defenses, data, again, settings, max_new_tokens=4)
    records.write_text("".join(lines))
    spoilt = {
        "is not the picture that was found": lambda path: picture(1, (40, 40)).save(path), "is missing": Path.unlink,
    }  # fmt: skip
    for why, spoil in spoilt.items():
        spoil(records.parent / "pictures" / "00000.png")
        with pytest.raises(DavspError, match=rf"00000\.png {why}; delete .*comply-16"):
            attack(lvlm, defenses, data, again, settings, max_new_tokens=4)


def test_settings_that_decide_nothing_may_change(lvlm: LVLM, vector: HarmfulnessVector, tmp_path: Path) -> None:
    data, defenses = queries("malicious", 2), {"davsp": border()}
    first = AttackSettings(attacks=("comply",), eps=(16,), **QUICK)
    attack(lvlm, defenses, data, tmp_path, first, max_new_tokens=4)
    more = first.model_copy(update={"attacks": ("comply", "hide"), "tries": 9, "words": 4})
    attack(lvlm, defenses, data, tmp_path, more, vector, max_new_tokens=4)  # the vector comes later
    wider = replace(vector, malicious=vector.malicious * 2)
    with pytest.raises(DavspError, match=r"hide-16/attack\.json is of .* \(vector\)"):
        attack(lvlm, defenses, data, tmp_path, more, wider, max_new_tokens=4)
    (tmp_path / "davsp" / "hide-16" / "attack.json").unlink()
    with pytest.raises(DavspError, match=r"attack\.json"):
        attack(lvlm, defenses, data, tmp_path, more, vector, max_new_tokens=4)


def test_more_starts_are_never_worse(lvlm: LVLM, tmp_path: Path) -> None:
    data, ends = queries("malicious", 3), []
    for restarts in (1, 3):
        settings = AttackSettings(attacks=("comply",), eps=(4,), restarts=restarts, **QUICK)
        results = attack(lvlm, {"davsp": border()}, data, tmp_path / str(restarts), settings, max_new_tokens=4)
        ends.append([r["curve"][-1] for r in results[-1].records])
    assert all(after <= before for before, after in zip(*ends, strict=True)) and ends[0] != ends[1]


@pytest.mark.parametrize(
    ("defenses", "attacks", "says"),
    [
        ({"davsp": border()}, ("transfer",), "'transfer' needs the defense 'none'"),
        ({"none": NoDefense()}, ("joint",), "'joint' goes on from the words of 'suffix'"),
        ({"none": NoDefense()}, ("hide",), "'hide' needs the defender's vector"),
        ({"none": NoDefense()}, ("deed",), "query malicious-0 has no context"),
        ({"none": NoDefense()}, ("universal",), "'universal' needs pictures to be trained on"),
        ({"a b": NoDefense(), "a_b": NoDefense()}, ("comply",), "differ in punctuation"),
        ({"davsp": VisualPrompt(VisualSafetyPrompt.create(112, 8))}, ("comply",), "canvas"),
    ],
)
def test_what_can_not_be_run(lvlm: LVLM, tmp_path: Path, defenses: Any, attacks: Any, says: str) -> None:
    with pytest.raises(DavspError, match=says):
        attack(lvlm, defenses, queries("malicious", 1), tmp_path / "out", AttackSettings(attacks=attacks, **QUICK))
    assert not (tmp_path / "out").exists()


def test_a_deed_in_words_that_the_model_does_not_know_is_refused(lvlm: LVLM, tmp_path: Path) -> None:
    data = [replace(q, context="xylophone") for q in queries("malicious", 1)]
    with pytest.raises(DavspError, match="malicious-0: the answer that 'deed' wants 'a car: xylophone' holds words"):
        attack(lvlm, {"none": NoDefense()}, data, tmp_path, AttackSettings(attacks=("deed",), **QUICK))


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


def test_a_folder_stays_in_its_own(lvlm: LVLM, tmp_path: Path) -> None:
    assert slug("..") == "_" and slug("a/../b c") == "a_.._b_c" and "/" not in slug("../x")
    settings = AttackSettings(attacks=("noise",), eps=(4,), **QUICK)
    attack(lvlm, {"..": NoDefense()}, queries("malicious", 1), tmp_path / "out", settings, max_new_tokens=2)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_half_precision_without_range_is_refused(lvlm: LVLM, tmp_path: Path) -> None:
    from copy import copy

    half = copy(lvlm)
    half.dtype = torch.float16
    with pytest.raises(DavspError, match="float16 loses small gradients"):
        attack(
            half, {"none": NoDefense()}, queries("malicious", 1), tmp_path, AttackSettings(attacks=("noise",), **QUICK)
        )


def test_queries_that_are_left_out_are_counted(lvlm: LVLM, tmp_path: Path) -> None:
    output = io.StringIO()
    data = [*queries("malicious", 1), Query("w", "what is this", "malicious", "test")]
    settings = AttackSettings(attacks=("noise",), eps=(4,), **QUICK)
    attack(lvlm, {"none": NoDefense()}, data, tmp_path, settings, max_new_tokens=2, console=Console(file=output))
    assert "1 malicious queries have no picture and are left out" in output.getvalue()


def test_without_a_picture_there_is_nothing_to_attack(lvlm: LVLM, tmp_path: Path) -> None:
    words = [Query("w", "what is this", "malicious", "test"), *queries("benign", 1)]
    with pytest.raises(DavspError, match="no malicious query with a picture"):
        attack(lvlm, {"none": NoDefense()}, words, tmp_path, AttackSettings(attacks=("comply",)))


@pytest.mark.parametrize(
    "wrong", [{"attacks": ("pgd",)}, {"eps": (0,)}, {"eps": (256,)}, {"eps": ()}, {"steps": 0}, {"depth": 1}]
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AttackSettings(**wrong)
