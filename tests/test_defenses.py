"""What each defense makes of a query, on the tiny model."""

import io
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from davsp import LVLM, DavspError, HarmfulnessVector, Query, VisualSafetyPrompt
from davsp.defenses import ECSO, Chain, Defense, NoDefense, SafetyText, VisualPrompt, adashield_s, load_defense
from davsp.defenses.adashield_s import DAVSP, PUBLISHED
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
    data = mixed()
    pixels = [q.image.tobytes() for q in data if isinstance(q.image, Image.Image)]
    prepared = MAKERS[kind]().prepare(data)
    assert [q.id for q in prepared] == [q.id for q in data]
    assert [q.image is None for q in prepared] == [False, True, False]
    start = "" if kind == "none" else TEXT + " "
    assert [q.question for q in prepared] == [start + q.question for q in data]
    assert pixels == [q.image.tobytes() for q in data if isinstance(q.image, Image.Image)]


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


def test_a_text_stands_where_its_source_puts_it() -> None:
    """Byte for byte; the wordings by the hash of the published file and of DAVSP's string with the space that ends it."""
    query = [Query("q", "what is this ", "benign", "t")]

    def question_under(defense: Defense) -> str:
        return defense.prepare(query)[0].question

    assert question_under(SafetyText("be safe")) == "be safe what is this "
    assert question_under(SafetyText("be safe", placement="suffix", separator="\n")) == "what is this \nbe safe"
    assert question_under(SafetyText("be safe", placement="sandwich")) == "what is this  be safe what is this "
    assert question_under(adashield_s()) == "what is this " + PUBLISHED + "what is this "
    assert question_under(adashield_s("prefix")) == DAVSP + " what is this "
    assert question_under(adashield_s(text="be safe")) == "what is this be safewhat is this "
    digest = [sha256(text.encode()).hexdigest() for text in (PUBLISHED, DAVSP + " ")]
    assert digest == [
        "42652154f7926583845e074919d023a7403c8fd8237142e4a1b2f5816c0e963c",
        "49d1448a7298567f727090975c271ea9aaa6162a7db7f60ccf933105f3220004",
    ]
    assert SafetyText("be safe").describe() == {"kind": "text", "text": "be safe"}  # as in run folders of old
    placed = [SafetyText("a", placement=p, separator=s) for p in ("prefix", "suffix", "sandwich") for s in ("", " ")]
    assert len({str(d.describe()) for d in placed}) == 6


def test_a_chain_is_one_after_the_other(lvlm: LVLM, vector: HarmfulnessVector) -> None:
    border = VisualPrompt(VisualSafetyPrompt.create(56, 8, "random", text="please"))
    chain = Chain([SafetyText("be safe"), border])
    (prepared,) = chain.prepare(queries("malicious", 1))
    assert prepared.question == "please be safe " + queries("malicious", 1)[0].question
    assert prepared.picture().tobytes() == border.prepare(queries("malicious", 1))[0].picture().tobytes()  # type: ignore[union-attr]
    responses = chain.respond(lvlm, mixed(), vector, batch_size=2, max_new_tokens=6)
    by_hand = border.respond(lvlm, SafetyText("be safe").prepare(mixed()), vector, batch_size=2, max_new_tokens=6)
    assert [(r.text, r.projection) for r in responses] == [(r.text, r.projection) for r in by_hand]
    assert {r.defense for r in responses} == {chain.name} == {"safety-text+davsp"}
    assert chain.describe()["defenses"] == [SafetyText("be safe").describe(), border.describe()]
    checked = Chain([SafetyText("be safe"), ECSO(border)])
    assert checked.respond(lvlm, mixed()[:1], max_new_tokens=4)[0].calls == 4  # the last one may wrap the call
    for wrong, says in (([], "NoDefense"), ([ECSO(), border], "must be the last")):
        with pytest.raises(DavspError, match=says):
            Chain(wrong)
    with pytest.raises(DavspError, match="canvas"):
        Chain([NoDefense(), VisualPrompt(VisualSafetyPrompt.create(28, 4))]).respond(lvlm, mixed())
    with pytest.raises(
        DavspError, match="none:crop shows pictures in a way of its own, so it must be the last of a chain"
    ):
        Chain([NoDefense("crop"), SafetyText("be safe")])
    assert Chain([SafetyText("be safe"), NoDefense("crop")]).name == "safety-text+none:crop"


@pytest.mark.parametrize("kind", MAKERS)
def test_cost_counts_what_the_model_is_given(kind: str, lvlm: LVLM) -> None:
    """Every token but padding, whatever the batch."""
    prepared = MAKERS[kind]().prepare(mixed())
    responses = MAKERS[kind]().respond(lvlm, mixed(), batch_size=8, max_new_tokens=2)
    for query, response in zip(prepared, responses, strict=True):
        pictured = query.image is not None
        assert response.prompt_tokens == int(lvlm.encode([query.question], pictured).mask.sum())
        assert (response.image_tokens, response.calls) == (lvlm.tokens_per_image * pictured, 1)


def test_a_defense_is_read_by_the_files_in_its_folder(tmp_path: Path) -> None:
    border, noise = VisualSafetyPrompt.create(56, 8, "random", text=TEXT), AdditiveNoise.create(56, start="random")
    border.save_pretrained(tmp_path / "border")
    noise.save_pretrained(tmp_path / "noise")
    assert [load_defense(tmp_path / name).name for name in ("border", "noise")] == ["davsp", "additive"]
    assert load_defense(tmp_path / "border", "mine").describe() == VisualPrompt(border).describe()
    (tmp_path / "empty").mkdir()
    missing = r"holds no defense: none of vsp_config\.json, .*, nor, to stand behind gate:first\+, gate.json or gate_served.json; give"
    with pytest.raises(DavspError, match=missing):
        load_defense(tmp_path / "empty")


def test_misuse_is_said(lvlm: LVLM) -> None:
    with pytest.raises(DavspError, match="NoDefense"):
        SafetyText(" ")
    with pytest.raises(DavspError, match="choose prefix, suffix or sandwich"):
        SafetyText("be safe", placement="infix")
    with pytest.raises(DavspError, match="choose sandwich or prefix"):
        adashield_s("suffix")
    with pytest.raises(DavspError, match="canvas"):
        VisualPrompt(VisualSafetyPrompt.create(28, 4)).respond(
            lvlm, [Query("q", "what", "benign", "t", image=picture(0))]
        )
