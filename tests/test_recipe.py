"""`--recipe published`: each element against the authors' rule, written out a second time."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy, interpolate

from davsp import LVLM, HarmfulnessVector, VisualSafetyPrompt, cli, embedded
from davsp.benchmarks.custom import save_queries
from davsp.cli import reproduce
from davsp.cli.options import ModelOptions
from davsp.defenses import VisualPrompt
from davsp.defenses.adashield_s import DAVSP
from davsp.defenses.ecso import PUBLISHED
from davsp.embedded.data import Protocol
from davsp.experiments.paper import run as paper
from davsp.lvlm.templates import TEMPLATES
from davsp.prompts.border import pad_to_square
from davsp.training import TrainSettings, recipe
from davsp.training.borders import Run
from families import save_family
from tiny import picture, queries

SMALL = {"steps": 40, "batch_size": 4}


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> LVLM:
    return LVLM.from_pretrained(save_family("llava", tmp_path_factory.mktemp("llava") / "llava"), device_map="cpu")


def test_the_numbers_are_those_of_their_script():
    settings = recipe.published()
    assert (settings.steps, settings.batch_size, settings.lam, settings.lr) == (1200, 2, 0.02, 1 / 255)
    assert (settings.optimizer, settings.schedule, settings.objective) == ("sign", "constant", "both")
    assert not (settings.normalise or settings.end_token or settings.mixed) and settings.malicious_answer_share == 0.05
    assert (recipe.padding(336), recipe.padding(168)) == (30, 15)
    assert (recipe.LAYER, recipe.MARGINS) == (20, (27.0, -2.0))


def test_the_loss_of_an_answer_ends_with_its_words(llava):
    """Their labels hold the answer's tokens alone, the rest is padded; the loss is their mean."""
    canvas = llava.preprocess([picture(0, (60, 60)), picture(1, (60, 60))])
    questions, answers = ["what is this", "is this a car"], ["a red car", "yes"]
    got = llava.step(canvas, questions, 2, answers, end_token=False).answer_loss
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        prompt = llava.encode([question], True).ids[0]
        target = torch.tensor(llava.tokenizer(answer, add_special_tokens=False)["input_ids"])
        ids = torch.cat([prompt, target, torch.zeros(16, dtype=torch.long)])  # padded, as theirs, without a mask
        labels = torch.full_like(ids, -100)
        labels[len(prompt) : len(prompt) + len(target)] = target
        with torch.no_grad():
            logits = llava.model(input_ids=ids[None], **llava.pixel_inputs(canvas[row : row + 1])).logits[0]
        assert got[row].item() == pytest.approx(cross_entropy(logits[:-1], labels[1:]).item(), rel=1e-4)
    assert not torch.allclose(got, llava.step(canvas, questions, 2, answers).answer_loss)


@pytest.mark.parametrize("size", [(336, 336), (500, 200), (120, 333), (900, 900)])
def test_a_picture_is_resized_twice(size):
    """Padded with white, bicubic to 336 in 8 bit; then bilinear on the tensor, without antialiasing."""
    shown = picture(3, size)
    border = VisualSafetyPrompt(torch.zeros(3, 336, 336), 30, config={"resizes": 2})
    first = np.asarray(pad_to_square(shown).resize((336, 336), Image.Resampling.BICUBIC), np.float64)
    theirs = interpolate(torch.tensor(first).permute(2, 0, 1)[None], (276, 276), mode="bilinear", antialias=False)[0]
    inside = border.resize([shown])[0, :, 30:-30, 30:-30] * 255
    assert (inside - theirs).abs().max() <= 0.5 + 1e-3  # ours is rounded to 8 bit
    painted = np.asarray(border.painter()(shown))[30:-30, 30:-30]
    assert np.array_equal(painted, inside.round().byte().permute(1, 2, 0).numpy())
    once = VisualSafetyPrompt(torch.zeros(3, 336, 336), 30).resize([shown])[0, :, 30:-30, 30:-30] * 255
    assert (once - theirs).abs().max() > 2


def test_how_often_is_kept_wherever_the_prompt_goes(tmp_path):
    border = VisualSafetyPrompt(torch.zeros(3, 56, 56), 5, config={"resizes": 2})
    border.save_pretrained(tmp_path / "twice")
    loaded = VisualSafetyPrompt.from_pretrained(tmp_path / "twice")
    assert loaded.resizes == loaded.with_delta(loaded.delta).resizes == loaded.resized(112).resizes == 2
    assert json.loads((tmp_path / "twice" / "vsp_config.json").read_text())["resizes"] == 2
    assert Image.open(tmp_path / "twice" / "vsp.png").text["resizes"] == "2"
    assert "resized twice" in (tmp_path / "twice" / "README.md").read_text()
    once = VisualSafetyPrompt(torch.zeros(3, 56, 56), 5)
    once.save_pretrained(tmp_path / "once")
    assert all("resize" not in (tmp_path / "once" / name).read_text() for name in ("vsp_config.json", "README.md"))
    assert VisualPrompt(once).describe() != VisualPrompt(border).describe()


def test_a_border_begins_where_normalised_pixels_are_zero(llava):
    border = recipe.border(llava, None, "be safe")
    normalised = llava.pixel_inputs(border.delta[None])["pixel_values"][0]
    assert normalised[:, border.mask[0] > 0].abs().max() < 1e-6 and border.text == "be safe"
    assert border.padding == round(30 / 336 * 56) and recipe.border(llava, 9, "").padding == 9


def batches(llava: LVLM, vector: HarmfulnessVector, tmp_path: Path, **changes):
    settings = recipe.published(**(SMALL | changes))
    bad, good = queries("malicious", 8), queries("benign", 6)
    loop = Run(llava, recipe.border(llava, None, ""), bad, good, vector, settings, tmp_path / "run", [])
    return loop, [loop._batch(step) for step in range(settings.steps)]


@pytest.fixture(scope="module")
def fitted(llava) -> HarmfulnessVector:
    return HarmfulnessVector.fit(llava, queries("malicious", 6), queries("benign", 6), progress=False)


def test_a_batch_is_of_one_class(llava, fitted, tmp_path):
    _, steps = batches(llava, fitted, tmp_path, malicious_answer_share=0.5)
    harmful = [batch for batch in steps if batch.malicious.all()]
    benign = [batch for batch in steps if not batch.malicious.any()]
    assert len(harmful) + len(benign) == 40 and 10 < len(harmful) < 30
    assert all(batch.answered == 4 for batch in benign)
    assert {batch.answered for batch in harmful} == {0, 4}  # the refusal on all rows or on none
    for two in (harmful[0:2], harmful[2:4]):  # epoch after epoch, without a gap where a batch was of the other class
        assert len({q for batch in two for q in batch.questions}) == len({q.question for q in queries("malicious", 8)})


def test_what_is_minimised_is_the_raw_hinge_and_a_fiftieth_of_the_answer_loss(llava, fitted, tmp_path):
    loop, steps = batches(llava, fitted, tmp_path)
    batch = next(batch for batch in steps if not batch.malicious.any())
    _, terms = loop.gradient(loop.prompt.delta, batch)
    canvas = loop.prompt.apply(batch.interiors.float() / 255)
    out = llava.step(canvas, batch.questions, loop.layer, list(batch.answers), end_token=False)
    s = out.state.float() @ fitted.direction(loop.layer)
    hinge = (s - loop.mu_minus).clamp(min=0).mean().item()
    assert terms["hinge"] == pytest.approx(hinge, rel=1e-4, abs=1e-5)
    assert terms["loss"] == pytest.approx(hinge + 0.02 * out.answer_loss.mean().item(), rel=1e-4)
    moved = loop.advance(loop.checkpoint.start(loop.prompt.delta.clone()))[0].delta - loop.prompt.delta
    assert set((moved[:, loop.prompt.mask[0] > 0] * 255).round().int().unique().tolist()) <= {-1, 0, 1}


def test_margins_and_layer_are_those_of_one_model_and_layer(llava, fitted, monkeypatch):
    fields, note = recipe.layer_and_margins(llava, fitted)
    assert fields == {"layer": fitted.layer}
    assert "+27 and -2, are of layer 20 of LLaVA-1.5-13B" in note and f"{fitted.mu_plus:+.3g}" in note
    monkeypatch.setattr(recipe, "is_theirs", lambda lvlm: True)
    assert recipe.layer_and_margins(llava, fitted) == ({"layer": 20, "mu_plus": 27.0, "mu_minus": -2.0}, "")
    fields, note = recipe.layer_and_margins(llava, fitted, 2)
    assert fields == {"layer": 2} and note


@pytest.mark.parametrize(("layers", "width", "theirs"), [(40, 5120, True), (32, 4096, False), (40, 4096, False)])
def test_llava_13b_is_known_by_its_sizes_and_template(llava, monkeypatch, layers, width, theirs):
    monkeypatch.setattr(llava, "num_layers", layers)
    monkeypatch.setattr(llava.model.config.get_text_config(), "hidden_size", width)
    assert recipe.is_theirs(llava) == theirs
    monkeypatch.setattr(llava.tokenizer, "chat_template", TEMPLATES["llava_v1"].replace("USER", "U"))
    monkeypatch.setattr(llava, "takes_templates", lambda: False)
    assert not recipe.is_theirs(llava)


def main(*arguments: str | Path) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr("sys.argv", ["davsp", *map(str, arguments)])
        cli.main()
    return int(stop.value.code or 0)


def test_one_word_on_the_command_line(llava, tmp_path, capsys, monkeypatch):
    """`vector` and `train` of a LLaVA: text, template, border, settings; what is said besides wins."""
    for label in ("malicious", "benign"):
        save_queries(tmp_path / label, queries(label, 4))
    model = ["--model", llava.model_id, "--device", "cpu", "--recipe", "published"]
    data = ["--malicious", tmp_path / "malicious", "--benign", tmp_path / "benign"]
    assert main("vector", *model, *data, "--out", tmp_path / "vector") == 0
    vector = HarmfulnessVector.load(tmp_path / "vector")
    assert (vector.text, vector.template) == (DAVSP, "llava_v1")
    runs = []
    monkeypatch.setattr("davsp.training.train", lambda *arguments, **_: runs.append(arguments) or arguments[1])
    line = ["train", *model, *data, "--vector", tmp_path / "vector", "--out", tmp_path / "out"]
    assert main(*line) == 0 and "the published margins, +27 and -2, are of layer 20" in capsys.readouterr().err
    assert (
        main(*line, "--lam", "0.5", "--padding", "7", "--mu-plus", "3", "--text", "be safe", "--template", "checkpoint")
        == 0
    )
    (asked, start, *_, settings, _), (other, border, *_, changed, _) = runs
    assert settings == recipe.published(layer=vector.layer) and asked.template == "llava_v1"
    assert (start.resizes, start.padding, start.text) == (2, recipe.padding(56), DAVSP)
    assert (changed.lam, changed.mu_plus, changed.steps) == (0.5, 3, 1200) and other.template == "checkpoint"
    assert (border.resizes, border.padding, border.text) == (2, 7, "be safe")
    assert main(*line[:-4], "--recipe", "paper") == 2
    assert "--recipe 'paper' is not known: choose published or own" in capsys.readouterr().err


@pytest.mark.parametrize("word", [None, "published", "own"])
def test_the_tables_of_other_models_are_made_by_it(llava, word, tmp_path, monkeypatch, capsys):
    kits = []
    monkeypatch.setattr("davsp.experiments.paper.run.make_kit", lambda *_, **options: kits.append(options))
    data = Protocol([], [], [], [], [], [], [])
    for model in (ModelOptions(name=llava.model_id, device="cpu"), ModelOptions(device="cpu")):
        reproduce._kit(model, data, tmp_path, reproduce.MethodOptions(recipe=word), 0, None, None)
    other, shipped = kits
    assert other["published"] == (word != "own") and shipped["published"] == (word == "published")
    assert other["settings"] == (
        recipe.published() if word != "own" else TrainSettings(steps=1200, batch_size=2, normalise=False)
    )
    theirs = recipe.published(refusal=embedded.REFUSAL)
    assert shipped["settings"] == (theirs if word == "published" else embedded.SETTINGS)


def test_a_kit_by_it(llava, tmp_path, monkeypatch):
    from rich.console import Console

    data = Protocol(queries("malicious", 4), queries("benign", 4), [], [], [], [], [])
    options = {"text": "", "settings": recipe.published(), "templates": PUBLISHED, "console": Console(quiet=True)}
    kit = paper.make_kit(llava, data, tmp_path, published=True, **options)
    assert kit.border().resizes == 2 and kit.border().padding == kit.padding == recipe.padding(56)
    assert kit.settings.layer == kit.vector.layer and kit.settings.mu_plus is None
    monkeypatch.setattr(recipe, "is_theirs", lambda lvlm: True)
    monkeypatch.setattr(recipe, "LAYER", 2)
    kit = paper.make_kit(llava, data, tmp_path, published=True, **options)
    assert (kit.vector.layer, kit.settings.layer, kit.settings.mu_plus, kit.settings.mu_minus) == (2, 2, 27.0, -2.0)


def test_settings_of_before_look_as_they_did():
    """So a run of then goes on: what was no choice is not written."""
    fields = TrainSettings().model_dump()
    assert "mixed" not in fields and "end_token" not in fields
    assert recipe.published().model_dump().items() >= {"mixed": False, "end_token": False}.items()
    assert TrainSettings(**recipe.published().model_dump()) == recipe.published() and math.isclose(
        fields["lr"], 1 / 255
    )
