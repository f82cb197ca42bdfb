"""Pictures without a visual prompt: padded, cut, stretched or kept whole, against plain numpy and Pillow; and where it is said."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from command import run as davsp
from davsp import LVLM, DavspError, HarmfulnessVector, embedded, evaluate
from davsp.attacks.surface import surfaces
from davsp.benchmarks.custom import save_queries
from davsp.defenses import NoDefense, SafetyText
from davsp.defenses.none import baselines
from davsp.experiments.paper.tables import TABLES, cells, title
from davsp.experiments.stages import Stages, fitted_vector
from davsp.lvlm.remote import RemoteLVLM
from davsp.lvlm.undefended import facts, in_records, note
from davsp.query import Query
from davsp.vector import collect_states
from families import save_family
from tiny import picture, queries

CLIP_MEAN = (122, 116, 104)  # of 255, cut and not rounded, as LLaVA's code has it
GREY = (127, 127, 127)
SIZES = [(100, 70), (41, 200), (57, 56), (56, 57), (300, 11), (56, 56)]
ONE_WAY = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "mistral3", "deepseek_vl", "deepseek_vl_hybrid")
TALL_AND_WIDE = [(30, 90), (90, 30), (90, 31), (31, 90)]


def load(folder: Path, undefended: str | None = None) -> LVLM:
    return LVLM.from_pretrained(folder, device_map="cpu", undefended=undefended)


@pytest.fixture(scope="module")
def crop(tiny_folder: Path) -> LVLM:
    """The tiny model as its checkpoint's processor shows it pictures."""
    return load(tiny_folder, "crop")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family, and LLaVA with the other processors and the other tower that it comes with."""
    at = tmp_path_factory.mktemp("families")
    made = {name: save_family(name, at / name) for name in ("llava", "gemma3", "internvl", *ONE_WAY)}
    for name, pads in (("llava-pads", True), ("llava-cuts", False)):
        made[name] = shutil.copytree(made["llava"], at / name)
        size = {"height": 56, "width": 56}
        LlavaImageProcessorPil(size={"shortest_edge": 56}, crop_size=size, do_pad=pads).save_pretrained(made[name])
    made["llava-whole"] = shutil.copytree(made["llava"], at / "llava-whole")
    CLIPImageProcessorPil(size={"shortest_edge": 56}, do_center_crop=False).save_pretrained(made["llava-whole"])
    made["llava-siglip"] = shutil.copytree(made["llava"], at / "llava-siglip")
    config = LlavaConfig.from_pretrained(made["llava"])
    config.vision_config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2, image_size=56, patch_size=14
    )
    config.vision_feature_select_strategy = "full"
    LlavaForConditionalGeneration(config).save_pretrained(made["llava-siglip"])
    SiglipImageProcessorPil(size={"height": 56, "width": 56}).save_pretrained(made["llava-siglip"])
    return made


def levels(lvlm: LVLM, image: Image.Image) -> np.ndarray:
    (canvas,) = lvlm.preprocess([image])
    return (canvas * 255).round().byte().permute(1, 2, 0).numpy()


def padded(image: Image.Image, colour: tuple[int, int, int], side: int = 56) -> np.ndarray:
    """The reference: a square array of one colour, the picture's rows and columns in its middle, one resize."""
    pixels = np.array(image)
    height, width = pixels.shape[:2]
    whole = np.empty((max(height, width),) * 2 + (3,), np.uint8)
    whole[:] = colour
    top, left = (len(whole) - height) // 2, (len(whole) - width) // 2
    whole[top : top + height, left : left + width] = pixels
    return np.array(Image.fromarray(whole).resize((side, side), Image.Resampling.BICUBIC))


def cut(image: Image.Image, side: int = 56) -> np.ndarray:
    width, height = (side * length // min(image.size) for length in image.size)
    whole = np.array(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - side) // 2, (width - side) // 2
    return whole[top : top + side, left : left + side]


def stretched(image: Image.Image, side: int = 56) -> np.ndarray:
    return np.array(image.resize((side, side), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", SIZES)
def test_llava_pads_as_its_authors_do_or_cuts_as_its_processor_does(lvlm: LVLM, crop: LVLM, size: Any) -> None:
    image = picture(3, size)
    assert (lvlm.undefended, crop.undefended, lvlm.ways) == ("pad", "crop", ("pad", "crop"))
    assert np.array_equal(levels(lvlm, image), padded(image, CLIP_MEAN))
    assert np.array_equal(levels(crop, image), cut(image))
    if size == (56, 56):
        assert np.array_equal(levels(lvlm, image), np.array(image)) and np.array_equal(levels(crop, image), image)


@pytest.mark.parametrize(
    ("name", "ways", "theirs", "colour"),
    [
        ("llava", ("pad", "crop"), cut, CLIP_MEAN),
        ("llava-cuts", ("pad", "crop"), cut, CLIP_MEAN),
        ("llava-pads", ("pad",), lambda image: padded(image, CLIP_MEAN), CLIP_MEAN),
        ("llava-whole", ("pad",), lambda image: padded(image, CLIP_MEAN), CLIP_MEAN),
        ("llava-siglip", ("pad", "stretch"), stretched, GREY),
    ],
)
def test_llavas_processors(folders: dict[str, Path], name: str, ways: Any, theirs: Any, colour: Any) -> None:
    for way in (None, *ways):
        model = load(folders[name], way)
        assert (model.ways, model.undefended) == (ways, way or "pad")
        for size in TALL_AND_WIDE:
            image = picture(4, size)
            expected = padded(image, colour) if model.undefended == "pad" else theirs(image)
            assert np.array_equal(levels(model, image), expected), (way, size)
            assert model.seen(*size) == (56, 56)
        assert len(model.generate(model.preprocess([picture(4, (90, 30))]), ["what is this"], 2)) == 1


def test_the_processor_that_pads_itself_makes_the_same(folders: dict[str, Path]) -> None:
    own, ours = load(folders["llava-pads"]), load(folders["llava"])
    for size in TALL_AND_WIDE:
        image = picture(5, size)
        its = own.image_processor([image], do_rescale=False, do_normalize=False)["pixel_values"][0]
        assert np.array_equal(levels(ours, image), np.asarray(its).transpose(1, 2, 0))


@pytest.mark.parametrize("name", ONE_WAY)
def test_the_other_families_have_one_way_which_is_their_authors(folders: dict[str, Path], name: str) -> None:
    model, way = load(folders[name]), "pad" if "deepseek" in name else "resize"
    assert (model.ways, model.undefended) == ((way,), way)
    assert load(folders[name], way).undefended == way
    with pytest.raises(DavspError, match=rf"undefended 'crop' is not for .*\({name}\), whose undefended .*\({way}\)"):
        load(folders[name], "crop")
    for size in TALL_AND_WIDE:
        image, seen = picture(6, size), model.seen(*size)
        got = levels(model, image)
        assert got.shape[:2] == seen
        if way == "resize":  # whole, in multiples of 28 or 32
            unit = 32 if "qwen3" in name else 28
            assert (seen[0] > seen[1]) == (size[1] > size[0]) and not (seen[0] % unit or seen[1] % unit)
            assert np.array_equal(got, np.array(image.resize(seen[::-1], Image.Resampling.BICUBIC)))
        else:  # resized, then padded
            short = round(min(size) * model.canvas / 90)
            small = image.resize(
                tuple(model.canvas if length == 90 else short for length in size),  # type: ignore[arg-type]
                Image.Resampling.BICUBIC,
            )
            assert np.array_equal(got, padded(small, _mean(model), model.canvas))


@pytest.mark.parametrize(
    ("name", "ways", "kernel"), [("gemma3", ("stretch",), "BILINEAR"), ("internvl", ("tile", "stretch"), "BICUBIC")]
)
def test_what_is_stretched_is_pillows(folders: dict[str, Path], name: str, ways: tuple[str, ...], kernel: str) -> None:
    model = load(folders[name], "stretch")
    assert model.ways == ways and load(folders[name]).undefended == ways[0]
    for size in TALL_AND_WIDE:
        expected = picture(6, size).resize((56, 56), Image.Resampling[kernel])
        assert np.array_equal(levels(model, picture(6, size)), np.array(expected))


def test_tiles_make_a_difference_to_square_pictures_too(folders: dict[str, Path]) -> None:
    """So records hold the way, tables say it, and what can't be searched is refused."""
    asked = [Query("a", "what is this", "malicious", "test", image=picture(0, (112, 112)))]
    tiled, whole = load(folders["internvl"]), load(folders["internvl"], "stretch")
    assert in_records(tiled, asked) == {"undefended_picture": "tile"} and in_records(whole, asked) == {}
    assert in_records(tiled, [replace(asked[0], image=None)]) == {}
    assert "cut into tiles, with the whole beside them (--undefended tile)" in note(facts(tiled, asked))
    assert note(facts(whole, asked)) == ""
    strips = [replace(asked[0], image=picture(0, (112, 60)))]
    with pytest.raises(DavspError, match=r"undefended pictures in tiles, .*--undefended stretch"):
        surfaces(tiled, NoDefense(), strips, "Sure")
    assert (
        len(surfaces(whole, NoDefense(), strips, "Sure"))
        == len(surfaces(tiled, NoDefense("stretch"), strips, "Sure"))
        == 1
    )


def test_a_table_of_a_model_with_tiles_has_both_baselines(
    folders: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    data = [replace(query, image=picture(i, (112, 60 + i))) for i, query in enumerate(queries("malicious", 4))]
    save_queries(tmp_path / "data", data)
    tiled, whole = load(folders["internvl"]), load(folders["internvl"], "stretch")
    assert [*baselines(tiled)] == ["none", "none:stretch"] and [*baselines(whole)] == ["none", "none:tile"]
    assert [*baselines(load(folders["llava"]))] == ["none"]
    common = (
        "eval",
        "--model",
        folders["internvl"],
        "--queries",
        tmp_path / "data",
        "--max-new-tokens",
        4,
        "--max-unscored",
        1,
    )
    assert davsp(*common, "--out", tmp_path / "out") == 0
    capsys.readouterr()
    said: dict[str, list[str]] = {}
    for line in (tmp_path / "out" / "responses.jsonl").read_text().splitlines():
        answer = json.loads(line)
        said.setdefault(answer["defense"], []).append(answer["text"])
    once = {name: [r.text for r in evaluate(lvlm, {"none": NoDefense()}, data, max_new_tokens=4).responses["none"]]
            for name, lvlm in (("none", tiled), ("none:stretch", whole))}  # fmt: skip
    assert {name: sorted(texts) for name, texts in said.items()} == {
        name: sorted(texts) for name, texts in once.items()
    }
    assert (
        said["none"] != said["none:stretch"] and "No Defense, stretch" in (tmp_path / "out" / "report.html").read_text()
    )
    for wrong, why in (
        ("none:crop", "undefended 'crop' is not for"),
        ("none:stretch+safety-text=no", "is a row of its own"),
    ):
        assert davsp(*common, "--out", tmp_path / "no", "--defense", wrong) == 2
        assert why in capsys.readouterr().err and not (tmp_path / "no").exists()
    with pytest.raises(DavspError, match="none:stretch goes with a model loaded here"):
        NoDefense("stretch").check(RemoteLVLM("m", "http://127.0.0.1:1/v1"))


def test_the_papers_tables_have_both_baselines() -> None:
    place = {"benchmark": "figstep", "split": "total", "metric": "rsr", "value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    rows = [{"defense": name, **place} for name in ("davsp", "none:stretch", "none")]
    table = TABLES["resistance"]
    assert [*cells(table, rows, "LLaVA-1.5-13B")] == ["none", "none:stretch", "davsp"]
    assert title(table, "none:stretch") == "No Defense, stretched to a square"


def _mean(model: LVLM) -> tuple[int, int, int]:
    mean = getattr(model, "high_mean", model.mean).flatten().tolist()
    return tuple(int(level * 255 + 1e-4) for level in mean)  # type: ignore[return-value]


@pytest.mark.parametrize("wide", [True, False])
def test_words_at_the_border_of_a_typographic_picture_are_seen_only_where_it_is_padded(
    lvlm: LVLM, crop: LVLM, wide: bool
) -> None:
    typo = Image.new("RGB", (600, 120), "white")
    for x in (4, 540):
        ImageDraw.Draw(typo).text((x, 20), "bomb", fill="black", font_size=80)
    assert not (np.array(typo)[:, 240:360] < 128).any()
    typo = typo if wide else typo.transpose(Image.Transpose.ROTATE_90)
    assert (levels(lvlm, typo) < 90).any() and not (levels(crop, typo) < 255).any()


@pytest.mark.parametrize(
    ("way", "good", "bad", "made"),
    [("pad", (13377, 1), (13378, 1), "13378x13378"), ("crop", (57065, 1), (57066, 1), "56x3195696")],
)
def test_no_thin_picture_becomes_a_larger_one_than_pillow_opens(
    tiny_folder: Path, way: str, good: Any, bad: Any, made: str
) -> None:
    model, said = (
        load(tiny_folder, way),
        f"^a picture of .*\\({way}\\), would take {made} on its way; cut or shrink it$",
    )
    assert model.seen(*good) == model.seen(*good[::-1]) == (56, 56)
    for size in (bad, bad[::-1]):
        with pytest.raises(DavspError, match=said):
            model.check_query("what is this", size, 2)
        with pytest.raises(DavspError, match=said):
            model.preprocess([Image.new("RGB", size)])
        with pytest.raises(DavspError, match="query 'thin' cannot be shown: a picture of"):
            collect_states(model, [Query("thin", "what is this", "benign", "t", image=Image.new("RGB", size))], [1])


def test_a_way_that_the_model_does_not_have_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(
        DavspError, match=r"'stretch' is not for .*\(llava\), whose .*padded to a square \(pad\) or cut"
    ):
        load(tiny_folder, "stretch")


def test_the_shipped_models_see_their_own_data_as_before() -> None:
    data = embedded.protocol(0)
    every = [query for part in vars(data).values() for query in part if query.image is not None]
    assert {query.size() for query in every} == {(168, 168)}
    for name in ("davsp-mini", "davsp-mini-narrow"):
        pad, crop = (embedded.load(name, "cpu", way) for way in (None, "crop"))
        assert pad.undefended == "pad"
        pictures = [query.picture() for query in every[::40]]
        assert torch.equal(pad.preprocess(pictures), crop.preprocess(pictures))  # type: ignore[arg-type]
        assert in_records(pad, every) == {} and note(facts(pad, every)) == ""


def test_the_vector_is_fitted_on_pictures_padded_in_white(lvlm: LVLM, crop: LVLM, tmp_path: Path) -> None:
    some = queries("malicious", 3)
    white = [Image.fromarray(padded(query.picture(), (255, 255, 255))) for query in some]  # type: ignore[arg-type]
    questions = [query.question for query in some]
    expected = lvlm.states(lvlm.preprocess(white), questions, [2])
    assert torch.equal(collect_states(lvlm, some, [2], progress=False), expected)
    cropped = crop.states(crop.preprocess([q.picture() for q in some]), questions, [2])  # type: ignore[misc]
    assert torch.equal(collect_states(crop, some, [2], progress=False), cropped)
    for model in (lvlm, crop):
        fitted = HarmfulnessVector.fit(model, some, queries("benign", 3), progress=False)
        assert fitted.undefended == model.undefended
        fitted.save(tmp_path / "vector")
        assert HarmfulnessVector.load(tmp_path / "vector").undefended == model.undefended
    square = [query for query in queries("malicious", 2)]
    square = [type(q)(**{**vars(q), "image": picture(0)}) for q in square]
    good = [type(q)(**{**vars(q), "image": picture(1)}) for q in queries("benign", 2)]
    fitted = HarmfulnessVector.fit(lvlm, square, good, progress=False)
    fitted.save(tmp_path / "square")
    assert fitted.undefended == "" and "undefended" not in json.loads((tmp_path / "square" / "vector.json").read_text())


def test_what_was_answered_in_one_way_does_not_go_on_in_another(lvlm: LVLM, crop: LVLM, tmp_path: Path) -> None:
    some = [*queries("malicious", 2), *queries("benign", 1)]
    defenses = {"none": NoDefense(), "text": SafetyText("please be safe")}
    evaluate(crop, defenses, some, tmp_path / "old", max_new_tokens=2)
    record = json.loads((tmp_path / "old" / "run.json").read_text())
    assert record.pop("undefended_picture") is None  # so older runs, which do not say, are of the same
    (tmp_path / "old" / "run.json").write_text(json.dumps(record))
    evaluate(crop, defenses, some, tmp_path / "old", max_new_tokens=2)
    with pytest.raises(DavspError, match=r"answers of another run \(another undefended picture \(see --undefended\)\)"):
        evaluate(lvlm, defenses, some, tmp_path / "old", max_new_tokens=2)
    evaluate(lvlm, defenses, some, tmp_path / "new", max_new_tokens=2)
    with pytest.raises(DavspError, match="another undefended picture"):
        evaluate(crop, defenses, some, tmp_path / "new", max_new_tokens=2)


def test_of_square_pictures_a_run_goes_on_in_either_way(lvlm: LVLM, crop: LVLM, tmp_path: Path) -> None:
    some = [type(q)(**{**vars(q), "image": picture(i, (70, 70))}) for i, q in enumerate(queries("malicious", 2))]
    first = evaluate(crop, {"none": NoDefense()}, some, tmp_path / "run", max_new_tokens=2)
    again = evaluate(lvlm, {"none": NoDefense()}, some, tmp_path / "run", max_new_tokens=2)
    assert first.responses == again.responses and in_records(lvlm, some) == {}


def test_a_vector_of_older_pictures_is_made_anew(lvlm: LVLM, crop: LVLM, tmp_path: Path, capsys: Any) -> None:
    from davsp.embedded.data import Protocol

    bad, good = queries("malicious", 3), queries("benign", 3)
    data = Protocol(**{name: bad if "malicious" in name else good for name in Protocol.__dataclass_fields__})
    stages = Stages(tmp_path, Console())
    made = [fitted_vector(stages, model, data, "").undefended for model in (crop, crop, lvlm)]
    assert made == ["crop", "crop", "pad"] and capsys.readouterr().out.count("made anew") == 1


def test_a_sentence_below_the_table_says_what_no_defense_saw(lvlm: LVLM, folders: dict[str, Path]) -> None:
    some = [*queries("malicious", 3), type(queries("benign", 1)[0])("words", "what is this", "benign", "test")]
    said = note(facts(lvlm, some))
    assert said == (
        "No Defense, and whatever has no visual prompt, saw pictures that are not square (3 of 3) padded to a square "
        "(--undefended pad)."
    )
    qwen = note(facts(load(folders["qwen2_vl"]), some))
    assert qwen.endswith("(3 of 3) resized whole, each in its own shape.")
    remote = RemoteLVLM("m", "http://127.0.0.1:1/v1")
    assert "to the server as they are" in note(facts(remote, some)) and in_records(remote, some) == {}
    assert note(facts(remote, some[3:])) == note(None) == ""


def test_on_the_command_line(tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    save_queries(tmp_path / "data", [*queries("malicious", 3), *queries("benign", 2)])
    common = (
        "eval",
        "--model",
        tiny_folder,
        "--queries",
        tmp_path / "data",
        "--max-new-tokens",
        2,
        "--max-unscored",
        1,
    )
    manifests = {}
    for way in ("pad", "crop"):
        out = tmp_path / way
        assert davsp(*common, "--out", out, *(() if way == "pad" else ("--undefended", way))) == 0
        shown = " ".join(capsys.readouterr().out.split())
        page = (out / "report.html").read_text()
        manifests[way] = json.loads((out / "manifest.json").read_text())["undefended"]
        for text in (shown, page):
            assert f"(--undefended {way})." in text and "not square (5 of 5)" in text
    assert manifests["crop"] == {"way": "crop", "ways": ["pad", "crop"], "not_square": 5, "pictures": 5}
    texts = [(tmp_path / way / "responses.jsonl").read_text() for way in manifests]
    assert len({json.dumps([json.loads(line)["text"] for line in text.splitlines()]) for text in texts}) == 2
    assert davsp(*common, "--out", tmp_path / "crop") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "another undefended picture (see --undefended)" in error and "give another folder" in error
    assert davsp("judge", tmp_path / "crop", "--queries", tmp_path / "data", "--judge", "keyword-gcg") == 0
    assert "(--undefended crop)." in " ".join(capsys.readouterr().out.split())
    assert davsp(*common, "--out", tmp_path / "no", "--undefended", "stretch") == 2
    assert "undefended 'stretch' is not for" in capsys.readouterr().err and not (tmp_path / "no").exists()
    served = ("--engine", "openai", "--base-url", "http://127.0.0.1:1/v1", "--undefended", "pad")
    assert davsp(*common, "--out", tmp_path / "no", *served) == 2
    assert "--undefended goes with a model loaded here" in capsys.readouterr().err


def test_a_vector_of_another_way_is_told(tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    save_queries(tmp_path / "bad", queries("malicious", 3))
    save_queries(tmp_path / "good", queries("benign", 3))
    save_queries(tmp_path / "data", [*queries("malicious", 2), *queries("benign", 1)])
    sets = ("--malicious", tmp_path / "bad", "--benign", tmp_path / "good")
    assert davsp("vector", "--model", tiny_folder, *sets, "--undefended", "crop", "--out", tmp_path / "v") == 0
    asked = ("--model", tiny_folder, "--queries", tmp_path / "data", "--max-new-tokens", 2, "--max-unscored", 1)
    assert davsp("eval", *asked, "--vector", tmp_path / "v", "--out", tmp_path / "out") == 0
    assert "fitted with --undefended crop; undefended pictures are shown by pad now" in capsys.readouterr().err
    assert davsp("eval", *asked, "--vector", tmp_path / "v", "--out", tmp_path / "o", "--undefended", "crop") == 0
    assert "fitted with --undefended" not in capsys.readouterr().err
