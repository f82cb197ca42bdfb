"""How the models that ship are made: a few steps of every stage, resumed, exported, and the card."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from davsp.embedded import architecture, build, draw
from davsp.errors import DavspError


@pytest.fixture(params=[pytest.param(1, id="one step"), pytest.param(4, id="four steps", marks=pytest.mark.slow)])
def short(monkeypatch, request):
    """All stages, one or four steps of two pictures each; four in the first, which is stopped in the middle."""
    for road in ("STAGES", "SHORT"):
        steps = {n: 4 if n in ("tower", "see") else request.param for n in getattr(build, road)}
        small = {n: build.Stage(steps[n], 2, s.lr, min(s.texts, 1), s.after) for n, s in getattr(build, road).items()}
        monkeypatch.setattr(build, road, small)
    return request.param == 1


def counted(stage: str, which: str = "davsp-mini") -> list[int]:
    """The numbers of all of a stage's steps."""
    return list(range(1, build.road(which)[stage].steps + 1))


def test_every_stage_runs_resumes_to_the_same_bits_and_exports(short, tmp_path: Path):
    from davsp.lvlm import LVLM
    from davsp.runtime.files import read_tensors

    for name in ("tower", "words") if short else build.STAGES:
        records = list(build.run_stage(name, tmp_path / "whole"))
        assert [r["step"] for r in records] == counted(name) and all(np.isfinite(r["loss"]) for r in records)
    for record in build.run_stage("tower", tmp_path / "parts", save_every=2):
        if record["step"] == 3:
            break  # killed between two checkpoints
    assert [r["step"] for r in build.run_stage("tower", tmp_path / "parts", save_every=2)] == [3, 4]
    whole, parts = (read_tensors(tmp_path / x / "tower" / "state.safetensors") for x in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    if short:  # the last stage and what is exported: below
        return

    build.export(tmp_path / "whole", tmp_path / "model")
    lvlm = LVLM.from_pretrained(tmp_path / "model", dtype="float32")
    assert (lvlm.canvas, lvlm.tokens_per_image, lvlm.num_layers) == (168, 144, 6)
    image = draw.page(random.Random(0)).image()
    torch.testing.assert_close(lvlm.preprocess([image])[0], torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255.0)
    assert len(lvlm.generate(lvlm.preprocess([image]), ["what thing is in the picture ?"], max_new_tokens=3)) == 1


def test_a_stage_says_what_it_needs_and_refuses_another_runs_folder(short, tmp_path: Path):
    with pytest.raises(DavspError, match="stage read is not done"):
        next(build.run_stage("bridge", tmp_path))
    list(build.run_stage("tower", tmp_path))
    with pytest.raises(DavspError, match="other settings"):
        next(build.run_stage("tower", tmp_path, seed=5))


def test_the_last_stage_can_start_from_a_finished_model(short, tmp_path: Path, monkeypatch):
    """For who has the shipped weights but none of the stages: the lineage stays on the card, the weights go on."""
    from davsp.embedded import make
    from davsp.runtime.files import read_json, write_json

    monkeypatch.setattr(build, "START_HEADS", 1)
    bars = {"bars": [], "rows": [], "layers": []}
    monkeypatch.setattr(make, "measure", lambda lvlm, console: bars)
    model = architecture.new_model(seed=3)
    first = tmp_path / "first"
    build._save(
        torch.nn.ModuleDict({"model": model}), torch.optim.SGD(model.parameters()), first / build.LAST, {"step": 1}
    )
    start = tmp_path / "start"
    build.export(first, start, seed=3)
    before = {"stage": "joint", "seed": 0, "steps": 9, "batch": 2, "seconds": 5.0, "hardware": "a test"}
    with pytest.raises(DavspError, match="no finished davsp-mini"):
        make.make(tmp_path / "out", tmp_path / "model", start=start)
    write_json(start / "training.json", {"seed": 0, "stages": {"joint": before}})
    with pytest.raises(DavspError, match="goes with the stages sight, skills, polish"):
        make.make(tmp_path / "out", tmp_path / "model", "joint", start=start)

    make.make(tmp_path / "out", tmp_path / "model", start=start)
    stages = read_json(tmp_path / "model" / "training.json")["stages"]
    assert stages["joint (before)"] == before and stages[build.LAST]["start"] == build.sha256(
        start / "model.safetensors"
    )
    assert "davsp mini train --start" in (tmp_path / "model" / "README.md").read_text()
    near, got = (build.read_tensors(f / "model.safetensors") for f in (start, tmp_path / "model"))
    assert 0 < max((got[k] - near[k]).abs().max() for k in got) < 0.02, "it does not go on from the start's weights"
    with pytest.raises(DavspError, match="other settings"):  # another start is another run
        build.check_done(tmp_path / "out", "skills", 0, tmp_path / "model")


MAKING = {
    "stages": {"tower": {"steps": 1, "batch": 1, "seconds": 60.0, "hardware": "a test"}},
    "text": dict.fromkeys(
        ("parameters", "things", "canvas", "tokens", "words", "faces", "seed", "command", "sha256", "name", "kind",
         "depth", "width", "hints", "transformers"), "X",
    ),
}  # fmt: skip


def test_the_card_has_every_bar_of_what_was_measured():
    """In short, of the figures that ship."""
    from davsp.embedded.card import card
    from davsp.runtime.files import read_json

    measured = read_json(build.FOLDER / "figures.json")
    names = [b["behaviour"] for b in measured["bars"]]
    assert len(set(names)) == len(names) == 30
    page = card(measured, MAKING)
    assert all(name in page for name in names) and "| tower | 1 | 1 | 1 min | a test |" in page


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "size"), [(48, 4)])
def test_the_card_is_made_of_measured_figures_and_says_what_is_missed(
    tokens: int, size: int, tmp_path: Path, monkeypatch
):
    """On a model that has learnt nothing: every bar is there, few are met, and the card carries what was measured."""
    from davsp.embedded import load
    from davsp.embedded.card import card, measure
    from davsp.lvlm import LVLM

    completions, model = LVLM.completions, architecture.new_model()
    monkeypatch.setattr(
        LVLM,
        "completions",
        lambda self, canvas, questions, max_new_tokens=48, steer=None: completions(
            self, canvas, questions, tokens, steer
        ),
    )
    build._save(
        torch.nn.ModuleDict({"model": model}), torch.optim.SGD(model.parameters()), tmp_path / build.LAST, {"step": 1}
    )
    build.export(tmp_path, tmp_path / "model")
    measured = measure(
        load(tmp_path / "model"),
        train=1, **{k: size for k in ("harm", "utility", "mme", "llava_bench", "vector", "sweep")},
    )  # fmt: skip
    assert len(measured["bars"]) == 30 and not all(b["met"] for b in measured["bars"])
    names = [b["behaviour"] for b in measured["bars"]]
    assert len(set(names)) == len(names)
    page = card(measured, MAKING)
    assert all(name in page for name in names) and "| tower | 1 | 1 | 1 min | a test |" in page


SIBLINGS = [pytest.param("davsp-mini-narrow", marks=pytest.mark.slow), "davsp-mini-qwen"]


@pytest.mark.parametrize("which", SIBLINGS)
def test_a_sibling_is_made_by_the_same_script_resumes_and_exports(short, tmp_path: Path, which):
    from davsp.lvlm import LVLM
    from davsp.runtime.files import read_json, read_tensors

    for name in ("see",) if short else build.road(which):
        records = list(build.run_stage(name, tmp_path, 3, which=which))
        assert [r["step"] for r in records] == counted(name, which) and all(np.isfinite(r["loss"]) for r in records)
    for record in build.run_stage("see", tmp_path / "parts", 3, save_every=2, which=which):
        if record["step"] == 3:
            break  # killed between two checkpoints
    list(build.run_stage("see", tmp_path / "parts", 3, save_every=2, which=which))
    whole, parts = (read_tensors(tmp_path / x / "see" / "state.safetensors") for x in ("", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert read_json(tmp_path / "see" / "done.json")["hints"] == build.sha256(build.FOLDER / "model.safetensors")
    with pytest.raises(DavspError, match="other settings"):
        build.check_done(tmp_path, "see", 4, which=which) if short else build.check_done(tmp_path, "skills", 3)
    if short:
        return
    looked, last = (read_tensors(tmp_path / x / "state.safetensors") for x in ("look", build.LAST))
    moved = {k.split(".")[2] for k in last if k.startswith("model.model.") and not torch.equal(last[k], looked[k])}
    assert moved == {"vision_tower", "multi_modal_projector", "language_model"} or moved == {"visual", "language_model"}

    build.export(tmp_path, tmp_path / "model", 3, which)
    lvlm = LVLM.from_pretrained(tmp_path / "model", dtype="float32")
    blueprint = architecture.BLUEPRINTS[which]
    assert (lvlm.canvas, lvlm.tokens_per_image, lvlm.num_layers) == (blueprint.side, 144, blueprint.layers)
    picture = draw.page(random.Random(0))
    shown = (lvlm.preprocess([picture.image()]) - lvlm.mean) / lvlm.std
    assert torch.equal(shown, architecture.normalised(lvlm.model, [picture]))  # trained on what it will see
    assert len(lvlm.generate(lvlm.preprocess([picture.image()]), ["what does the picture show ?"], 3)) == 1


def test_a_model_that_is_not_known_is_refused(tmp_path: Path):
    from davsp.embedded.make import make

    with pytest.raises(DavspError, match="the models are davsp-mini, davsp-mini-narrow, davsp-mini-qwen"):
        make(tmp_path, tmp_path / "m", which="davsp-mega")
    with pytest.raises(DavspError, match="stages are see, speak, look, join, sight, skills"):
        make(tmp_path, tmp_path / "m", "joint", which="davsp-mini-qwen")
    with pytest.raises(DavspError, match="--start goes with davsp-mini alone"):
        make(tmp_path, tmp_path / "m", start=tmp_path, which="davsp-mini-qwen")
