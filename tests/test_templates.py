"""The conversation templates of LLaVA's own code: texts, tokens, who takes them, and who keeps them."""

import json
from itertools import chain
from pathlib import Path

import pytest
import torch
from transformers import LlamaTokenizer

import families
from davsp import LVLM, DavspError, HarmfulnessVector, Query, VisualSafetyPrompt, cli, evaluate
from davsp.cli import reproduce
from davsp.cli.inputs import compare_templates, load_lvlm
from davsp.cli.options import ModelOptions
from davsp.defenses import NoDefense, VisualPrompt
from davsp.defenses.ecso import ECSO, PUBLISHED
from davsp.defenses.pat.defense import PAT, PatConfig
from davsp.embedded import FOLDER as MINI
from davsp.embedded.data import Protocol
from davsp.lvlm import fingerprint
from davsp.lvlm.remote import RemoteLVLM
from davsp.lvlm.templates import CHECKPOINT
from davsp.training import TrainSettings, train
from tiny import picture

QUESTION = "Is a car red?"
HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the human's questions."
)


def llama(style: str = "llava") -> LlamaTokenizer:
    """As LLaVA-1.5's: words are marked, what is not in the vocabulary falls back to bytes; here every character is a token."""
    letters = sorted({*HUMAN, *QUESTION, *"USER: ASSISTANT: what is this user's sorry no"} - {" "})
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    return LlamaTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], pad_token="</s>", add_bos_token=True,
        chat_template=families.TEMPLATES["llava"], extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def main(arguments: list[str]) -> int:
    """The exit code of `davsp ARGUMENTS`."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr("sys.argv", ["davsp", *arguments])
        cli.main()
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "tokenizer", llama)
        return families.save_family("llava", tmp_path_factory.mktemp("llava") / "llava-1.5")


def load(folder: Path, template: str = CHECKPOINT) -> LVLM:
    return LVLM.from_pretrained(folder, device_map="cpu", template=template)


def piece(lvlm: LVLM, text: str) -> list[int]:
    """SentencePiece's rule, written out: a space before the text, spaces as marks, a token a character, else its bytes."""
    names = [("▁" if letter == " " else letter) for letter in " " + text]
    vocabulary = lvlm.tokenizer.get_vocab()
    tokens = [[name] if name in vocabulary else [f"<0x{byte:02X}>" for byte in name.encode()] for name in names]
    return [vocabulary[token] for token in ("<s>", *chain(*tokens))]


def theirs(lvlm: LVLM, text: str) -> list[int]:
    """LLaVA's road: pieces around <image> are tokenised apart, and only the first keeps its <s>."""
    first, *others = [piece(lvlm, part) for part in text.split("<image>")]
    for other in others:
        first = [*first, *[lvlm.image_token_id] * lvlm.tokens_per_image, *other[1:]]
    return first


@pytest.mark.parametrize(("template", "system"), [("llava_v1", HUMAN), ("vicuna_v1", HUMAN.replace("human", "user"))])
@pytest.mark.parametrize("has_image", [True, False])
def test_text_and_tokens_are_those_of_llavas_own_code(folder, template, system, has_image):
    lvlm = load(folder, template)
    text = f"{system} USER: {'<image>' + chr(10) if has_image else ''}{QUESTION} ASSISTANT:"
    assert lvlm.prompt(QUESTION, has_image) == text
    assert lvlm.encode([QUESTION], has_image).ids[0].tolist() == theirs(lvlm, text)


def test_the_checkpoints_own_road_tokenises_the_whole(folder):
    """So no mark stands between the picture and the line break there; LLaVA's has one."""
    mark = load(folder).tokenizer.convert_tokens_to_ids("▁")
    after = {}
    for template in (CHECKPOINT, "llava_v1"):
        lvlm = load(folder, template)
        ids = lvlm.encode([QUESTION], True).ids[0].tolist()
        after[template] = ids[len(ids) - ids[::-1].index(lvlm.image_token_id) :]
    assert after["llava_v1"] == [mark, *after[CHECKPOINT]]
    assert load(folder).prompt(QUESTION, True) == f"USER: <image>\n{QUESTION} ASSISTANT:"


@pytest.mark.parametrize("template", [CHECKPOINT, "llava_v1"])
def test_a_question_that_holds_the_placeholder_is_refused(folder, template):
    with pytest.raises(DavspError, match="holds the image placeholder <image>"):
        load(folder, template).encode([f"{QUESTION} <image>"], True)


def test_who_does_not_take_them(folder, tmp_path):
    with pytest.raises(DavspError, match="template 'llava_v2' is not known: choose checkpoint, llava_v1 or vicuna_v1"):
        load(folder, "llava_v2")
    for name in ("qwen2_vl", "deepseek_vl"):
        with pytest.raises(DavspError, match=r"llava_v1 is of LLaVA-1\.5, and .* does not ask by USER: and ASSISTANT:"):
            load(families.save_family(name, tmp_path / name), "llava_v1")
    with pytest.raises(DavspError, match="does not ask by USER"):
        load(MINI, "llava_v1")


@pytest.mark.parametrize("name", [None, "davsp-mini-qwen"])
def test_the_models_that_ship_have_their_own(name):
    with pytest.raises(DavspError, match="--template-kwargs are for other models; those that ship have their own"):
        load_lvlm(ModelOptions(name=name, template="llava_v1"))
    assert load_lvlm(ModelOptions(name=name, template=CHECKPOINT)).template == CHECKPOINT


def test_a_server_asks_by_its_own(tmp_path, capsys):
    line = ["eval", "--engine", "openai", "--base-url", "http://127.0.0.1:9/v1", "--api-model", "m"]
    assert main([*line, "--template", "llava_v1", "--out", str(tmp_path)]) == 2
    assert "--template and --num-processes go with a model loaded here" in capsys.readouterr().err


# -- who keeps it -----------------------------------------------------------------------------------------------------


def queries(label: str, count: int = 3) -> list[Query]:
    return [
        Query(
            f"{label}-{i}", QUESTION, label, "b", reference="no", image=picture(i + 9 * (label == "benign"), (60, 60))
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory) -> Path:
    """A vector and a border of the model asked by llava_v1, on disk."""
    lvlm, out = load(folder, "llava_v1"), tmp_path_factory.mktemp("made")
    vector = HarmfulnessVector.fit(lvlm, queries("malicious"), queries("benign"), progress=False)
    vector.save(out / "vector")
    start = VisualSafetyPrompt.create(lvlm.canvas, 6)
    settings = TrainSettings(steps=2, batch_size=2)
    sets = queries("malicious"), queries("benign")
    train(lvlm, start, *sets, vector, settings, out / "training", progress=False).save_pretrained(out / "border")
    with pytest.raises(DavspError, match=r"other settings \((weights, template|template, weights)\)"):
        train(load(folder), start, *sets, vector, settings, out / "training", progress=False)
    return out


def test_vector_and_prompt_keep_it(made):
    assert HarmfulnessVector.load(made / "vector").template == "llava_v1"
    border = VisualSafetyPrompt.from_pretrained(made / "border")
    assert border.template == "llava_v1" and border.resized(112).template == "llava_v1"
    assert "| template | llava_v1 |" in (made / "border" / "README.md").read_text()


def test_files_of_before_mean_the_checkpoints(lvlm, vector, tmp_path):
    """And those of the checkpoint's template look as they did."""
    vector.save(tmp_path / "vector")
    assert "template" not in json.loads((tmp_path / "vector" / "vector.json").read_text())
    assert HarmfulnessVector.load(tmp_path / "vector").template == CHECKPOINT
    VisualSafetyPrompt.create(56, 6).save_pretrained(tmp_path / "border")
    assert "template" not in (tmp_path / "border" / "vsp_config.json").read_text()
    assert VisualSafetyPrompt.from_pretrained(tmp_path / "border").template == CHECKPOINT


def test_another_template_is_another_model(folder, tmp_path):
    """A run does not go on under it, in either direction, and says so."""
    own, asked = load(folder), load(folder, "llava_v1")
    assert fingerprint(own) != fingerprint(asked)
    for first, second, out in ((own, asked, tmp_path / "a"), (asked, own, tmp_path / "b")):
        rows = {"none": NoDefense()}
        evaluate(first, rows, queries("malicious", 1), out, max_new_tokens=2)
        with pytest.raises(DavspError, match="another model, template"):
            evaluate(second, rows, queries("malicious", 1), out, max_new_tokens=2)


def sentence(text: str) -> str:
    return " ".join(text.split())


def asked_by(out: Path) -> str:
    return str(json.loads((out / "manifest.json").read_text())["template"])


def test_another_one_is_said_and_the_same_is_not(folder, made, tmp_path, capsys):
    data = tmp_path / "queries.jsonl"
    picture(0, (60, 60)).save(tmp_path / "0.png")
    row = {"id": "a", "question": QUESTION, "label": "malicious", "image": "0.png"}
    data.write_text(json.dumps(row) + "\n")
    said = "was trained under the template llava_v1, and"
    model, rows = ["--model", str(folder), "--device", "cpu"], ["--defense", f"davsp={made / 'border'}"]
    line = [
        "eval",
        *model,
        *rows,
        "--vector",
        str(made / "vector"),
        "--queries",
        str(data),
        "--max-new-tokens",
        "2",
        "--max-unscored",
        "1",
    ]
    for template, notes in (("checkpoint", 2), ("llava_v1", 0)):
        out = tmp_path / template
        assert main([*line, "--template", template, "--out", str(out)]) == 0
        err = sentence(capsys.readouterr().err)
        assert err.count(said) == notes and asked_by(out) == template
    attack = [
        "attack",
        *model,
        *rows,
        "--queries",
        str(data),
        "--attack",
        "redraw",
        "--max-new-tokens",
        "2",
        "--max-unscored",
        "1",
    ]
    assert main([*attack, "--out", str(tmp_path / "attack")]) == 0
    assert said in sentence(capsys.readouterr().err) and asked_by(tmp_path / "attack") == CHECKPOINT


def test_the_proxy_says_it_too(made, monkeypatch, capsys):
    monkeypatch.setattr("davsp.cli.serve._run", lambda *_: None)
    line = [
        "serve",
        "--prompt",
        str(made / "border"),
        "--canvas",
        "56",
        "--upstream",
        "http://127.0.0.1:9/v1",
        "--no-probe",
    ]
    assert main(line) == 0
    assert "under the template llava_v1, and the server asks by its own" in capsys.readouterr().err


def test_prompts_are_found_in_every_defense(made, capsys):
    border = VisualPrompt(VisualSafetyPrompt.from_pretrained(made / "border"))
    server = RemoteLVLM("m", "http://127.0.0.1:9/v1")
    for defense in (border, ECSO(border, templates=PUBLISHED), ECSO(instead=border, templates=PUBLISHED)):
        compare_templates(server, {"the prompt": defense})
        assert capsys.readouterr().err.count("llava_v1, and the server asks by its own") == 1
    for tokens, notes in (
        (PAT("b", "", config=PatConfig(control="b", data={"template": "llava_v1"})), 1),
        (PAT("b"), 0),
    ):
        compare_templates(server, {"the prompt of pat": tokens})
        assert capsys.readouterr().err.count("the prompt of pat was trained under the template llava_v1") == notes
    compare_templates(server, {"the prompt": NoDefense(), "the vector": None})
    assert capsys.readouterr().err == ""


def test_reproduce_asks_as_published_where_the_checkpoint_is_llavas(folder, tmp_path, monkeypatch, capsys):
    """And by the checkpoint's template if that is wanted, or if it is another model."""
    monkeypatch.setattr("davsp.experiments.paper.run.make_kit", lambda lvlm, *_, **__: lvlm)
    data = Protocol([], [], [], [], [], [], [])
    qwen = families.save_family("qwen2_vl", tmp_path / "qwen")
    for where, given, expected in (
        (folder, None, "llava_v1"),
        (folder, CHECKPOINT, CHECKPOINT),
        (qwen, None, CHECKPOINT),
    ):
        model = ModelOptions(name=str(where), device="cpu", template=given)
        lvlm = reproduce._kit(model, data, tmp_path, reproduce.MethodOptions(), 0, None, None)
        assert lvlm.template == expected
        assert ("is asked by the template llava_v1" in capsys.readouterr().err) == (expected == "llava_v1")


def test_states_follow_the_template(folder):
    canvas = load(folder).preprocess([picture(0, (60, 60))])
    own, asked = (load(folder, name).states(canvas, [QUESTION], [2]) for name in (CHECKPOINT, "llava_v1"))
    assert not torch.allclose(own, asked)
