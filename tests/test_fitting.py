"""What a model has no room for is known before a run: long questions, thin pictures."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from command import run as davsp
from davsp import LVLM, AdditiveNoise, DavspError, HarmfulnessVector, Query, TrainSettings, VisualSafetyPrompt, train
from davsp.benchmarks.custom import save_queries
from davsp.defenses import ECSO, Chain, Defense, NoDefense, SafetyText, VisualPrompt
from davsp.evaluation import evaluate
from davsp.evaluation.fitting import fitting
from davsp.lvlm.remote import RemoteLVLM
from families import save_family
from tiny import picture, queries

LONG = Query("long", "what is this cake " * 200, "malicious", "test", image=picture(0))
BORDER = VisualSafetyPrompt.create(56, 4, text="please be safe")


@pytest.fixture(scope="module")
def short(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with 500 positions."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("short") / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 500
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def model(short: Path) -> LVLM:
    return LVLM.from_pretrained(short, device_map="cpu")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("qwen2_vl", tmp_path_factory.mktemp("qwen") / "qwen2_vl")


def test_a_question_that_is_too_long_is_named_before_anything_is_answered(model: LVLM, tmp_path: Path) -> None:
    some = [*queries("malicious", 3), LONG]
    with pytest.raises(
        DavspError, match=r"query 'long' cannot be asked under none: .* tokens, but .*model has 500 positions"
    ):
        evaluate(model, {"none": NoDefense()}, some, tmp_path / "out", max_new_tokens=5)
    assert not (tmp_path / "out").exists()


def test_the_text_of_a_defense_and_the_answer_need_room_as_well(model: LVLM) -> None:
    words = 500 - model.encode(["what"], True).ids.shape[1] - 4
    query = replace(LONG, question="what " * (words - 3))
    assert fitting(model, {"none": NoDefense()}, [query], 7) == ([query], "")
    for defenses, room in (({"none": NoDefense()}, 9), ({"text": SafetyText("please be safe " * 3)}, 7)):
        with pytest.raises(DavspError, match="cannot be asked"):
            fitting(model, defenses, [query], room)


def test_what_does_not_fit_is_left_out_and_said(model: LVLM) -> None:
    some = queries("malicious", 3)
    left, note = fitting(model, {"none": NoDefense()}, [*some, LONG], 5, skip_broken=True)
    assert left == some and note.startswith(
        "1 of 4 queries are left out, as the model cannot be asked them: 'long' under"
    )
    with pytest.raises(DavspError, match="query 'long' cannot be asked"):
        fitting(model, {"none": NoDefense()}, [LONG], 5, skip_broken=True)


def test_a_missing_picture_is_named_with_its_query(model: LVLM, tmp_path: Path) -> None:
    with pytest.raises(DavspError, match=r"query 'x' cannot be asked at all: cannot open image .*gone\.png"):
        fitting(model, {"none": NoDefense()}, [replace(LONG, id="x", image=tmp_path / "gone.png")], 5)


def test_a_server_judges_itself() -> None:
    assert fitting(RemoteLVLM("m", "http://127.0.0.1:1/v1"), {"none": NoDefense()}, [LONG], 5) == ([LONG], "")


@pytest.mark.parametrize(
    "defense",
    [
        NoDefense(),
        SafetyText("please be safe", placement="sandwich"),
        VisualPrompt(BORDER),
        VisualPrompt(AdditiveNoise.create(56)),
        Chain([SafetyText("red"), VisualPrompt(BORDER)]),
        ECSO(VisualPrompt(BORDER)),
    ],
)
def test_a_sketch_is_what_the_first_call_shows(defense: Defense) -> None:
    for query in queries("malicious", 2):
        (prepared,) = defense.prepare([query])
        assert defense.sketch(query.question, query.size()) == (prepared.question, prepared.size())
        assert defense.sketch(query.question, None)[1] is None


def test_the_size_of_a_query_is_read_without_its_pixels(tmp_path: Path) -> None:
    picture(0, (30, 20)).save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(data[: len(data) // 2])
    assert replace(LONG, image=tmp_path / "x.png").size() == (30, 20)
    assert (replace(LONG, image=Image.new("RGB", (3, 4))).size(), replace(LONG, image=None).size()) == ((3, 4), None)


@pytest.mark.parametrize("skip", [(), ("--skip-broken",)])
def test_thin_pictures_on_the_command_line(
    skip: tuple[str, ...], qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thin = replace(LONG, id="thin", question="what is this", image=picture(1, (3, 700)))
    save_queries(tmp_path / "data", [*queries("malicious", 2), thin])
    out = tmp_path / "out"
    command = ["eval", "--model", qwen, "--queries", tmp_path / "data", "--defense", "none", "--max-new-tokens", 2]
    code = davsp(*command, "--out", out, "--max-unscored", 1, *skip)
    said = capsys.readouterr().err
    assert "'thin'" in said and "a picture of 3x700 pixels is too thin: qwen2_vl takes up to 1:200" in said.replace(
        str(qwen.parent) + "/", ""
    )
    if not skip:
        assert code == 2 and "--skip-broken" in said and not (out / "responses.jsonl").exists()
    else:
        assert code == 0 and len((out / "responses.jsonl").read_text().splitlines()) == 2
        assert "'thin'" in json.loads((out / "manifest.json").read_text())["notes"][0]


@pytest.mark.parametrize("command", ["attack", "corruptions"])
def test_attack_and_corruptions_leave_out_what_does_not_fit(
    command: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_queries(
        tmp_path / "data", [*queries("malicious", 1), replace(queries("malicious", 2)[1], question="is " * 3000)]
    )
    VisualSafetyPrompt.create(56, 8, "random").save_pretrained(tmp_path / "prompt")
    more = ("--defense", "none", "--attack", "redraw", "--target", "a car", "--max-unscored", 1)
    options = {"attack": more, "corruptions": ("--prompt", tmp_path / "prompt", "--change", "png")}[command]
    out = tmp_path / "runs" / "out"
    whole = (
        command,
        "--model",
        tiny_folder,
        "--queries",
        tmp_path / "data",
        "--max-new-tokens",
        2,
        "--out",
        out,
        *options,
    )
    assert davsp(*whole) == 2
    said = capsys.readouterr().err
    assert "'malicious-1' cannot be asked under none: prompt and answer take" in said and "by --skip-broken" in said
    assert not out.exists() or not list(out.rglob("responses.jsonl"))
    assert davsp(*whole, "--skip-broken") == 0 and "1 of 2 queries are left out" in capsys.readouterr().err


def test_a_prompt_makes_a_thin_picture_a_square(qwen: Path) -> None:
    model = LVLM.from_pretrained(qwen, device_map="cpu", canvas=112)
    thin = replace(LONG, question="what is this", image=picture(1, (3, 700)))
    border = {"davsp": VisualPrompt(VisualSafetyPrompt.create(112, 8))}
    assert fitting(model, border, [thin], 5) == ([thin], "")


def test_making_refuses_at_once(model: LVLM, tmp_path: Path) -> None:
    bad, good = queries("malicious", 4), queries("benign", 4)
    with pytest.raises(DavspError, match=r"has 500 positions; shorten the question '.*what is this cake"):
        HarmfulnessVector.fit(model, [*bad, LONG], good, progress=False)
    vector = HarmfulnessVector.fit(model, bad, good, progress=False)
    settings = TrainSettings(steps=1, layer=2, mu_plus=1.0, mu_minus=0.0)
    with pytest.raises(
        DavspError, match=r"query long cannot be trained on: .*refusal \(--refusal\) 9, but .* has 500 positions"
    ):
        train(model, BORDER, [*bad, LONG], good, vector, settings, tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
