"""Changes of a canvas on its way: what each does to pixels, and a small run of the table."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from davsp import LVLM, DavspError, HarmfulnessVector, VisualSafetyPrompt, cli
from davsp.defenses import VisualPrompt
from davsp.experiments.corruptions.changes import UNTOUCHED, changes
from davsp.experiments.corruptions.run import Corrupted, corruptions, patch_of, patches_kept
from davsp.experiments.corruptions.table import plot
from tiny import picture, queries

SIDE = 84
CHANGES = changes(SIDE, patch=14, padding=8)
WHITE = Image.new("RGB", (SIDE, SIDE), "white")


def noise() -> Image.Image:
    return picture(1, (SIDE, SIDE))


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_a_canvas_of_the_same_size_and_the_same_each_time(name: str) -> None:
    image = noise()
    before = image.tobytes()
    changed = CHANGES[name](image)
    assert (changed.size, changed.mode) == (image.size, "RGB") and image.tobytes() == before
    assert CHANGES[name](image).tobytes() == changed.tobytes()
    exact = {UNTOUCHED, "webp-lossless", "resize-twice-area", "resize-224-area"}
    assert (changed.tobytes() == before) == (name in exact)
    if name != "frame-1":  # nothing is where nothing was
        assert np.abs(levels(CHANGES[name](WHITE)) - 255).max() <= 1


def test_shifts_move_by_what_they_say() -> None:
    image, x = noise(), levels(noise())
    assert (levels(CHANGES["shift-3"](image))[:, 3:] == x[:, :-3]).all()
    assert (levels(CHANGES["shift-3"](image))[:, :3] == x[:, :1]).all()
    assert (levels(CHANGES["shift-7-diagonal"](image))[7:, 7:] == x[:-7, :-7]).all()
    assert (levels(CHANGES["roll-14"](image))[:, 14:28] == x[:, :14]).all()
    half = levels(CHANGES["shift-half"](image))
    assert np.abs(half[:, 1:] - (x[:, 1:] + x[:, :-1]) / 2).max() <= 0.5 and (half[:, 0] == x[:, 0]).all()


def test_border_and_picture_can_be_moved_alone() -> None:
    image, x = noise(), levels(noise())
    border, inside = (levels(CHANGES[f"shift-1-{part}"](image)) for part in ("border", "picture"))
    assert (border[8:-8, 8:-8] == x[8:-8, 8:-8]).all() and (border[:8, 1:] == x[:8, :-1]).all()
    assert (inside[8:-8, 9:-8] == x[8:-8, 8:-9]).all()
    inside[8:-8, 8:-8] = x[8:-8, 8:-8]
    assert (inside == x).all()


def test_patches_are_kept_or_become_others(lvlm: LVLM) -> None:
    border = VisualSafetyPrompt.create(56, 8, "random")
    known = changes(56, 14, 8)
    of = {
        name: patches_kept(lvlm, border, known[name]) for name in ("png", "jpeg-95-444", "shift-1", "shift-1-picture")
    }
    assert of["png"] == pytest.approx(1) and of["jpeg-95-444"] > 0.9 and abs(of["shift-1"]) < 0.5
    assert of["shift-1-picture"] == pytest.approx(1)  # there it is grey
    tower = next(m for m in lvlm.model.modules() if isinstance(m, torch.nn.Conv2d))
    canvas = border.image(Image.new("RGB", (56, 56), (128, 128, 128)))
    a, b = tower(lvlm.pixel_inputs(lvlm.preprocess([canvas, known["shift-1"](canvas)]))["pixel_values"]).detach()
    on = torch.ones(4, 4, dtype=torch.bool)  # a border of 8 reaches every patch but the middle ones
    on[1:-1, 1:-1] = False
    a, b = a[:, on], b[:, on]
    cosine = torch.cosine_similarity((a - a.mean(1, True)).flatten(), (b - a.mean(1, True)).flatten(), dim=0)
    assert of["shift-1"] == pytest.approx(float(cosine), abs=1e-5)


def test_a_defense_with_a_change_says_so_and_leaves_the_question(lvlm: LVLM) -> None:
    prompt = VisualPrompt(VisualSafetyPrompt.create(56, 8, "random", text="please be safe"))
    (query,) = queries("benign", 1)
    moved = Corrupted(prompt, CHANGES["shift-1"], "shift-1")
    (plain,), (prepared,) = prompt.prepare([query]), moved.prepare([query])
    assert prepared.question == plain.question and prepared.picture() is not None
    assert (levels(prepared.picture())[:, 1:] == levels(plain.picture())[:, :-1]).all()  # type: ignore[arg-type]
    assert moved.sha256() != Corrupted(prompt, CHANGES["shift-2"], "shift-2").sha256()
    with pytest.raises(DavspError, match="canvas"):
        Corrupted(VisualPrompt(VisualSafetyPrompt.create(28, 4)), CHANGES["png"], "png").check(lvlm)


def test_a_run_measures_goes_on_and_can_be_added_to(lvlm: LVLM, vector: HarmfulnessVector, tmp_path: Path) -> None:
    prompt = VisualSafetyPrompt.create(56, 8, "random", text="please be safe")
    test = [*queries("malicious", 4), *queries("benign", 4)]
    out = tmp_path / "runs" / "tiny"

    def run(names: list[str]) -> list[dict]:
        return corruptions(lvlm, prompt, test, out, vector, names, batch_size=4, max_new_tokens=4)

    records = {r["change"]: r for r in run(["webp-lossless", "shift-1"])}
    assert list(records) == ["none", "text", "png", "webp-lossless", "shift-1"]
    same, moved = records["webp-lossless"], records["shift-1"]
    assert same["against_png"]["pictures rsr"]["value"] == 0 and same["rsr"] == records["png"]["rsr"]
    assert same["projection_malicious"] == records["png"]["projection_malicious"] != moved["projection_malicious"]
    assert "against_png" not in records["png"] and "against_text" not in records["text"]
    assert moved["rsr"]["pictures"]["n"] == 4 and moved["over_refusal"]["benign"]["n"] == 4
    text = (out / "corruptions.md").read_text()
    assert text.count("\n| ") == 6 and "patches of 14 pixels" in text
    written = json.loads((out / "corruptions.json").read_text())
    assert [r["change"] for r in written["records"]] == list(records) and patch_of(lvlm) == written["patch"] == 14
    assert (tmp_path / "runs" / "shifts.svg").read_text() == plot([written])
    answered = (out / "responses.jsonl").read_text().splitlines()
    assert run(["webp-lossless", "shift-1"]) == list(records.values())
    assert (out / "responses.jsonl").read_text().splitlines() == answered  # seconds and all: nothing was asked again
    run(["webp-lossless", "shift-1", "grey"])
    more = (out / "responses.jsonl").read_text().splitlines()
    assert set(answered) < set(more) and len(more) == len(answered) + 8
    with pytest.raises(DavspError, match="'upside-down' is not known: choose png"):
        run(["upside-down"])
    with pytest.raises(DavspError, match="no malicious query"):
        corruptions(lvlm, prompt, queries("benign", 2), tmp_path / "none")


def test_the_command_wants_a_border_where_none_ships(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["davsp", "corruptions", "--model", "davsp-mini-narrow"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "--prompt is missing" in capsys.readouterr().err
