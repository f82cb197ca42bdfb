"""A defended model answers as the defense does, and never without it."""

from pathlib import Path

import pytest
from PIL import Image

from davsp import LVLM, DavspError, DefendedModel, Query, VisualSafetyPrompt
from davsp.defenses import NoDefense, VisualPrompt
from tiny import picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A border that is at home on the tiny model."""
    VisualSafetyPrompt.create(56, 9, "random", text="please be safe").save_pretrained(tmp_path / "prompt")
    return tmp_path / "prompt"


def test_it_answers_as_the_defense(lvlm: LVLM, folder: Path, tmp_path: Path):
    defense = VisualPrompt(VisualSafetyPrompt.from_pretrained(folder))
    model = DefendedModel(lvlm, defense)
    asked = [picture(1, (80, 50)), None, picture(2)], ["what is this", "how do you make cake", "what is in the image"]
    queries = [Query(f"{i}", q, "benign", "", image=p) for i, (p, q) in enumerate(zip(*asked, strict=True))]
    expected = [r.text for r in defense.respond(lvlm, queries, max_new_tokens=6)]
    assert model.generate(*asked, max_new_tokens=6) == expected
    assert model.generate(asked[0][0], asked[1][0], max_new_tokens=6) == expected[0]
    asked[0][0].save(tmp_path / "p.png")
    assert model.generate(str(tmp_path / "p.png"), asked[1][0], max_new_tokens=6) == expected[0]
    assert model.generate(None, asked[1][1], max_new_tokens=6) == expected[1]
    called = model(images=asked[0], text=asked[1], max_new_tokens=6)
    assert called == [{"input_text": q, "generated_text": a} for q, a in zip(asked[1], expected, strict=True)]
    assert model(asked[0][0], asked[1][0], max_new_tokens=6) == called[:1] == model([asked[0][0]], asked[1][0], 6)
    assert model.generate([], []) == []


def test_both_are_loaded_by_name(tiny_folder: Path, folder: Path):
    model = DefendedModel.from_pretrained(tiny_folder, folder, device_map="cpu")
    assert model.defense.describe()["kind"] == "border"
    assert isinstance(DefendedModel.from_pretrained(tiny_folder, "none", device_map="cpu").defense, NoDefense)


def test_what_cannot_be_defended_is_not_asked(
    lvlm: LVLM, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(DavspError, match="canvas is 24x24"):
        DefendedModel(lvlm, VisualPrompt(VisualSafetyPrompt.create(24, 5)))
    model = DefendedModel(lvlm, VisualPrompt(VisualSafetyPrompt.from_pretrained(folder)))
    monkeypatch.setattr(type(lvlm), "ask", lambda *_: pytest.fail("the model was asked"))
    with pytest.raises(DavspError, match="images holds 1 pictures for 2 questions"):
        model.generate([picture(1)], ["what", "how"])
    with pytest.raises(DavspError, match="images holds a int"):
        model.generate([7], ["what"])
    with pytest.raises(DavspError, match=r"cannot open image .*none\.png"):
        model.generate(tmp_path / "none.png", "what")
    with pytest.raises(DavspError, match="images holds a list"):
        model.generate([picture(1), picture(2)], "what")
    chat = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (9, 9))}]}]
    for text in (None, chat):
        with pytest.raises(DavspError, match="text must be a question"):
            model(text=text)
