"""What each defense makes of a query, on the tiny model."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from davsp import LVLM, DavspError, HarmfulnessVector, Query, VisualSafetyPrompt
from davsp.defenses import Defense, NoDefense, SafetyText, VisualPrompt
from davsp.prompts import AdditiveNoise
from tiny import picture, queries

TEXT = "please be safe"
MAKERS: dict[str, Callable[[], Defense]] = {
    "none": NoDefense,
    "text": lambda: SafetyText(TEXT),
    "border": lambda: VisualPrompt(VisualSafetyPrompt.create(56, 8, "random", text=TEXT)),
    "additive": lambda: VisualPrompt(AdditiveNoise.create(56, start="random", text=TEXT), "additive"),
}


def mixed() -> list[Query]:
    """With a picture, without, with."""
    words = Query("w", "what is this", "benign", "test", reference="red")
    first, second = queries("malicious", 2)
    return [first, words, second]


@pytest.mark.parametrize("kind", MAKERS)
def test_prepare_keeps_order_and_the_given_queries(kind: str) -> None:
    given = mixed()
    pixels = [q.image.tobytes() for q in given if isinstance(q.image, Image.Image)]
    made = MAKERS[kind]().prepare(given)
    assert [q.id for q in made] == [q.id for q in given]
    assert [q.image is None for q in made] == [False, True, False]
    start = "" if kind == "none" else TEXT + " "
    assert [q.question for q in made] == [start + q.question for q in given]
    assert pixels == [q.image.tobytes() for q in given if isinstance(q.image, Image.Image)]


@pytest.mark.parametrize("kind", MAKERS)
def test_respond_keeps_order_whatever_the_batch(kind: str, lvlm: LVLM, vector: HarmfulnessVector) -> None:
    defense, advanced = MAKERS[kind](), []
    one = defense.respond(lvlm, mixed(), vector, batch_size=1, max_new_tokens=6)
    many = defense.respond(lvlm, mixed(), vector, batch_size=8, progress=advanced.append, max_new_tokens=6)
    assert [r.query_id for r in many] == [q.id for q in mixed()] and sum(advanced) == 3
    assert {r.defense for r in many} == {defense.name}
    assert [r.text for r in one] == [r.text for r in many]
    assert [r.projection for r in one] == pytest.approx([r.projection for r in many], abs=1e-4)


def test_projection_is_of_the_defended_input(lvlm: LVLM, vector: HarmfulnessVector) -> None:
    query, border = queries("malicious", 1)[0], VisualSafetyPrompt.create(56, 8, "random", text=TEXT)
    response = VisualPrompt(border).respond(lvlm, [query], vector, max_new_tokens=1)[0]
    canvas = lvlm.preprocess([border.image(query.picture())])  # type: ignore[arg-type]
    state = lvlm.states(canvas, [f"{TEXT} {query.question}"], [vector.layer])[0, 0]
    assert response.projection == pytest.approx(float(state @ vector.direction()), abs=1e-4)
    assert NoDefense().respond(lvlm, [query], None, max_new_tokens=1)[0].projection is None


def test_the_model_sees_what_a_png_holds(lvlm: LVLM) -> None:
    border = VisualSafetyPrompt(torch.rand(3, 56, 56), 8)  # not 8-bit
    canvas = VisualPrompt(border).prepare([queries("benign", 1)[0]])[0].picture()
    assert canvas is not None and canvas.size == (56, 56)
    file = io.BytesIO()
    canvas.save(file, "PNG")
    again = Image.open(file)
    assert torch.equal(lvlm.preprocess([canvas]), lvlm.preprocess([again]))
    levels = (lvlm.preprocess([canvas])[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(levels, np.asarray(canvas))


def test_description_follows_what_decides() -> None:
    described = [str(make().describe()) for make in MAKERS.values()]
    assert len(set(described)) == len(MAKERS)
    other = VisualPrompt(VisualSafetyPrompt.create(56, 8, "random", seed=1, text=TEXT))
    assert other.describe() != MAKERS["border"]().describe() == MAKERS["border"]().describe()
    assert SafetyText("other").describe() != SafetyText(TEXT).describe()


@pytest.mark.parametrize("text", ["please be safe", " please\n", "please be safe "])
def test_text_alone_and_text_with_a_border_ask_the_same(text: str) -> None:
    query = queries("malicious", 1)
    border = VisualPrompt(VisualSafetyPrompt.create(56, 8, text=text))
    assert SafetyText(text).prepare(query)[0].question == border.prepare(query)[0].question


def test_misuse_is_said(lvlm: LVLM) -> None:
    with pytest.raises(DavspError, match="NoDefense"):
        SafetyText(" ")
    with pytest.raises(DavspError, match="canvas"):
        VisualPrompt(VisualSafetyPrompt.create(28, 4)).respond(
            lvlm, [Query("q", "what", "benign", "t", image=picture(0))]
        )
