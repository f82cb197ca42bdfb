"""The road from data to a defended picture, by commands, and one sentence for every mistake on it."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from command import run
from davsp import DavspError, HarmfulnessVector, TrainSettings, VisualSafetyPrompt, embedded, evaluate
from davsp.benchmarks.custom import save_queries
from davsp.defenses import NoDefense, VisualPrompt
from davsp.prompts import load_prompt
from davsp.query import open_picture
from davsp.runtime.files import alone, sha256
from test_cli_spoilt import _config
from test_published import directions, published
from tiny import queries


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both classes on disk."""
    folder = tmp_path_factory.mktemp("data")
    for label in ("malicious", "benign"):
        save_queries(folder / label, queries(label, 6))
    save_queries(folder / "test", [*queries("malicious", 4), *queries("benign", 4)])
    return folder


@pytest.fixture(scope="module")
def vectors(vector: HarmfulnessVector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of the tiny model, and one of another."""
    folder = tmp_path_factory.mktemp("vectors")
    vector.save(folder / "ours")
    replace(vector, vectors=vector.vectors[:, :5]).save(folder / "other")
    return folder


@pytest.mark.parametrize("shipped", [True, False])
@pytest.mark.parametrize("command", ["vector", "train", "eval", "attack"])
def test_words_follow_the_model_and_not_the_data(
    command, shipped, data: Path, vectors: Path, tiny_folder: Path, tmp_path, monkeypatch, capsys
):
    """A model that ships keeps its own text, and its recipe, on a user's own queries; another has neither."""

    class Enough(DavspError):
        pass

    calls = []

    def stop(*arguments, **options):
        calls.append((arguments, options))
        raise Enough("enough")

    importlib.import_module("davsp.attacks")  # or it would take a name that stands for `stop` now
    monkeypatch.setattr(f"davsp.{TARGETS[command]}", stop)
    monkeypatch.setattr(f"davsp.cli.{MODULES.get(command, command)}.is_shipped", lambda model: shipped)
    both = ["--malicious", data / "malicious", "--benign", data / "benign"]
    line = {
        "vector": both, "train": [*both, "--vector", vectors / "ours"],
        "eval": ["--queries", data / "test"], "attack": ["--queries", data / "test"],
    }[command]  # fmt: skip
    assert run(command, *line, "--model", tiny_folder, "--out", tmp_path / "out") == 2
    assert "enough" in capsys.readouterr().err
    ((arguments, options),) = calls
    text = embedded.SAFETY_TEXT if shipped else ""
    if command == "vector":
        assert options["text"] == text
    elif command == "train":
        assert arguments[1].text == text
        assert arguments[5] == (embedded.SETTINGS if shipped else TrainSettings())
    else:
        defenses = arguments[1]
        assert list(defenses) == ["none", *["safety-text"] * shipped]
        assert not shipped or defenses["safety-text"].text == text


TARGETS = {
    "vector": "vector.HarmfulnessVector.fit", "train": "training.train", "eval": "evaluation.evaluate",
    "attack": "attacks.attack",
}  # fmt: skip
MODULES = {"vector": "train", "eval": "evaluate"}


def test_from_data_to_a_defended_picture(data: Path, tiny_folder: Path, tmp_path: Path, capsys):
    both = ("--malicious", data / "malicious", "--benign", data / "benign", "--model", tiny_folder)
    assert run("vector", *both, "--out", tmp_path / "vector") == 0
    assert open_picture(tmp_path / "vector" / "layers.png").width > 300
    settings = ("--padding", 8, "--steps", 2, "--batch-size", 2, "--mu-plus", 50, "--mu-minus", -50)
    assert run("train", *both, "--vector", tmp_path / "vector", "--out", tmp_path / "prompt", *settings) == 0
    assert {"vsp.png", "vsp.safetensors", "vsp_config.json", "README.md"} <= {
        p.name for p in (tmp_path / "prompt").iterdir()
    }
    assert run("info", tmp_path / "prompt") == 0
    evaluated = (
        "--prompt",
        tmp_path / "prompt",
        "--queries",
        data / "test",
        "--model",
        tiny_folder,
        "--max-new-tokens",
        4,
        "--max-unscored",
        1,
    )
    assert run("eval", *evaluated, "--out", tmp_path / "eval") == 0
    rows = json.loads((tmp_path / "eval" / "metrics.json").read_text())["rows"]
    assert {r["defense"] for r in rows} == {"none", "davsp"}
    Image.new("RGB", (90, 40), "navy").save(tmp_path / "picture.jpg")
    assert run("apply", tmp_path / "picture.jpg", "--prompt", tmp_path / "prompt", "--out", tmp_path / "out.png") == 0
    assert open_picture(tmp_path / "out.png").size == (56, 56)
    assert "files agree" in capsys.readouterr().out


def test_a_second_vector_in_the_folder_is_refused_while_the_first_is_there(
    data: Path, tiny_folder: Path, tmp_path, capsys
):
    both = ("--malicious", data / "malicious", "--benign", data / "benign", "--model", tiny_folder)
    with alone(tmp_path):
        assert run("vector", *both, "--out", tmp_path) == 2
    assert "another davsp is writing" in capsys.readouterr().err and not list(tmp_path.iterdir())


BOTH = ["--malicious", "DATA/malicious", "--benign", "DATA/benign"]
QUERIES = ["--queries", "DATA/test"]  # the embedded test takes seconds to draw


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["info", "NOWHERE"], "NOWHERE"),
        (["apply", "missing.png", "--prompt", "NOWHERE"], "NOWHERE"),
        (["apply", "missing.png", "--prompt", "NOWHERE", "--out", "x.jpg"], "must end in .png"),
        (["vector", "--malicious", "DATA/malicious"], "--benign is missing"),
        (["vector", "--malicious", "DATA/none", "--benign", "DATA/benign"], "no queries at"),
        (["train", "--kind", "frame"], "--kind is border or additive"),
        (
            ["train", "--padding", "28", "--malicious", "DATA/malicious", "--benign", "DATA/benign"],
            "--vector is needed",
        ),
        (["train", "--padding", "0", *BOTH, "--vector", "VECTOR"], "padding 0 leaves no room"),
        (["train", "--refusal", "", *BOTH, "--vector", "VECTOR"], "--refusal '' is not possible"),
        (["vector", *BOTH, "--device", "foo"], "device 'foo' cannot be used here"),
        (["mini", "train", "--stage", "sleep"], "stages are tower"),
        (["mini", "train", "--device", "foo"], "device 'foo' cannot be used here"),
        (["eval", "--model", "MODEL"], "the embedded data is for davsp-mini"),
        (["eval", "--model", "someone/else", "--queries", "DATA/test"], "cannot load model someone/else"),
        (["eval", "--benchmark", "mm_bet=DATA"], "is not NAME=FOLDER with a NAME of mm_safetybench"),
        (["eval", "--benchmark", "figstep"], "is not NAME=FOLDER"),
        (["eval", "--benchmark", "figstep=NOWHERE"], "there is no folder"),
        (["eval", "--benchmark", "figstep=DATA"], "holds no figstep in a known layout"),
        (["eval", "--benchmark", "figstep=DATA", "--queries", "DATA/test"], "do not go together"),
        (["eval", "--defense", "davsp", *QUERIES], "is not known: give none; none:WAY"),
        (["eval", "--defense", "none", "--defense", "none", *QUERIES], "names 'none' twice"),
        (["eval", "--defense", "safety-text", "--queries", "DATA/test", "--model", "MODEL"], "needs a text"),
        (["eval", "--judge", "oracle", *QUERIES], "there is no judge 'oracle'"),
        (["eval", "--judge", "davsp", *QUERIES], "--judge-model is missing"),
        (["eval", "--judge", "exact"], "which no --benchmark names"),
        (["eval", "--engine", "vllm"], "choose transformers or openai"),
        (["eval", "--engine", "openai", "--base-url", "http://127.0.0.1:9/v1"], "needs --base-url and --api-model"),
        (["eval", "--base-url", "http://127.0.0.1:9/v1"], "goes with --engine openai"),
        (["eval", "--model", "MODEL", "--queries", "DATA/test", "--vector", "OTHER"], "the vector is of another model"),
        (["import-published", "missing.pt"], "cannot read missing.pt"),
        (["import-published", "missing.pt", "--form", "png"], "--form is displayable or exact, not 'png'"),
        (["train", "--stepz", "3"], "--stepz"),
        (["frame"], "frame"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    arguments, says, data: Path, vectors: Path, tiny_folder: Path, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    places = {"DATA": data, "VECTOR": vectors / "ours", "OTHER": vectors / "other", "MODEL": tiny_folder}
    for name, place in places.items():
        arguments = [a.replace(name, str(place)) for a in arguments]
    if arguments[0] in ("vector", "train") and "--malicious" in arguments:
        arguments += ["--model", str(tiny_folder)]
    assert run(*arguments) == 2
    output = capsys.readouterr().err
    assert says in output and "Traceback" not in output
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.safetensors"))


def test_noise_goes_the_same_road(data: Path, vectors: Path, tiny_folder: Path, tmp_path: Path, capsys):
    model = ("--model", tiny_folder)
    settings = ("--kind", "additive", "--steps", 1, "--batch-size", 2, "--text", "please be safe")
    both = ("--malicious", data / "malicious", "--benign", data / "benign", "--vector", vectors / "ours")
    assert run("train", *both, *model, *settings, "--mu-plus", 50, "--mu-minus", -50, "--out", tmp_path / "noise") == 0
    output = capsys.readouterr()
    assert "noise.safetensors is the noise" in output.out and "the vector was fitted with the text ''" in output.err
    assert run("info", tmp_path / "noise") == 0
    options = ("--prompt", tmp_path / "noise", "--queries", data / "test", "--max-new-tokens", 2, "--max-unscored", 1)
    assert run("eval", *options, *model, "--vector", vectors / "ours", "--out", tmp_path / "eval") == 0
    assert "the vector was fitted with the text ''" in capsys.readouterr().err
    rows = json.loads((tmp_path / "eval" / "metrics.json").read_text())["rows"]
    assert {r["defense"] for r in rows} == {"none", "additive"}
    Image.new("RGB", (90, 40), "navy").save(tmp_path / "picture.jpg")
    assert run("apply", tmp_path / "picture.jpg", "--prompt", tmp_path / "noise", "--out", tmp_path / "out.png") == 0
    assert open_picture(tmp_path / "out.png").size == (56, 56)


def test_the_published_border_in_both_forms(data: Path, tiny_folder: Path, tmp_path: Path, capsys):
    torch.save(published(torch.rand(3, 56, 56) * 1.2 - 0.1, 8), tmp_path / "noise.pt")
    importing = ("import-published", tmp_path / "noise.pt", "--padding", 8, "--text", "please be safe", "--layer", 2)
    for form in ("displayable", "exact"):
        assert run(*importing, "--model", "m", "--form", form, "--out", tmp_path / form) == 0
        output = capsys.readouterr().out
        assert all(word in output for word in ("red", "green", "blue", "all", "largest", "padding 8"))
        loaded = load_prompt(tmp_path / form)
        assert (loaded.text, loaded.config["layer"], loaded.config["model_id"]) == ("please be safe", 2, "m")
        assert f"{loaded.config['figures']['published_all_outside']}" in output
        assert run("info", tmp_path / form) == 0
        assert "files agree" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "exact").iterdir()} == {"exact.safetensors", "vsp_config.json"}
    Image.new("RGB", (90, 40), "navy").save(tmp_path / "picture.png")
    options = ("--queries", data / "test", "--model", tiny_folder, "--max-new-tokens", 2, "--out", tmp_path / "eval")
    for command in (
        ("eval", *options, "--max-unscored", 1),
        ("apply", tmp_path / "picture.png", "--out", tmp_path / "out.png"),
    ):
        assert run(*command, "--prompt", tmp_path / "exact") == 2
        assert "--form displayable" in capsys.readouterr().err
        assert run(*command, "--prompt", tmp_path / "displayable") == 0
    assert run(*importing, "--form", "displayable", "--out", tmp_path / "exact") == 2
    assert "already holds exact.safetensors" in capsys.readouterr().err


def test_a_published_vector_and_noise_go_where_ours_go(data: Path, tiny_folder: Path, tmp_path: Path, capsys):
    """The kinds of files are told apart by what they hold; noise by --kind."""
    model = ("--model", tiny_folder)
    torch.save(directions(4, 32), tmp_path / "vector.pt")
    theirs = ("import-published", tmp_path / "vector.pt", "--layer", 2, "--out", tmp_path / "vector")
    assert run(*theirs) == 2 and "give --layer, --mu-plus and --mu-minus" in capsys.readouterr().err
    assert run(*theirs, "--mu-plus", 4, "--mu-minus", -1) == 0
    output = capsys.readouterr().out
    assert "layers 1 to 3; layer 4 is left out" in output and "so not known: the model, the text before" in output
    assert "Their code asks by the template llava_v1, pictures padded to a square in white" in output
    both = ("--malicious", data / "malicious", "--benign", data / "benign")
    steps = ("--steps", 1, "--batch-size", 2)
    assert run("train", *model, *both, *steps, "--vector", tmp_path / "vector", "--out", tmp_path / "prompt") == 0
    error = capsys.readouterr().err
    assert "nobody says which text stood before every question" in error
    assert (
        "note: the vector was trained under the template llava_v1" in error and "fitted with --undefended" not in error
    )
    torch.save(torch.full((3, 56, 56), 64 / 255), tmp_path / "safety_patch_eps32.pt")
    noise = ("import-published", tmp_path / "safety_patch_eps32.pt", "--out", tmp_path / "noise")
    assert run(*noise) == 2 and "is imported with --kind uniguard" in capsys.readouterr().err
    assert run(*noise, "--kind", "uniguard", "--text-part", "fixed") == 0
    output = capsys.readouterr().out
    assert "the bound as measured is 64/255" in output and "its negative half is lost" in output
    assert load_prompt(tmp_path / "noise").question("Q").startswith("Q\nDO NOT INCLUDE any harmful")
    test = ("--queries", data / "test", "--max-new-tokens", 2, "--vector", tmp_path / "vector", "--max-unscored", 1)
    arms = (
        "--defense",
        "none",
        "--defense",
        f"uniguard={tmp_path / 'noise'}",
        "--defense",
        f"ours={tmp_path / 'prompt'}",
    )
    assert run("eval", *model, *test, *arms, "--out", tmp_path / "eval") == 0
    rows = json.loads((tmp_path / "eval" / "metrics.json").read_text())["rows"]
    assert {r["defense"] for r in rows} == {"none", "uniguard", "ours"}
    for option, says in (
        (("--kind", "png"), "--kind is border, vector or uniguard, not 'png'"),
        (("--kind", "uniguard", "--padding", 8), "--padding is for --kind border"),
        (("--kind", "uniguard", "--layer", 8), "UniGuard's noise has none"),
        (("--kind", "uniguard", "--text-part", "searched"), "--text-part is none, fixed or optimised"),
        (("--kind", "border", "--mu-plus", 8), "--mu-plus is for --kind vector"),
    ):
        assert run(*noise, *option) == 2 and says in capsys.readouterr().err


def test_a_runs_figures_get_on_the_card(lvlm, tmp_path: Path, capsys):
    prompt = VisualSafetyPrompt.create(56, 9, "random", text="please be safe")
    prompt.save_pretrained(tmp_path / "p")
    test = [*queries("malicious", 4), *queries("benign", 4)]
    defenses = {"none": NoDefense(), "mine": VisualPrompt(prompt)}
    evaluation = evaluate(
        lvlm, defenses, test, tmp_path / "run", manifest={"revision": "abc", "time": "now"}, max_new_tokens=4
    )
    assert run("card", tmp_path / "p", "--run", tmp_path / "run") == 0
    card, out = (tmp_path / "p" / "README.md").read_text(), capsys.readouterr().out
    rate = next(r for r in evaluation.rows if (r["defense"], r["metric"]) == ("mine", "rsr"))
    assert "| test | rsr | 4 |" in card and f"{rate['value']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]" in card
    assert "8 queries, judged by keyword/1, now" in card and "at abc" in card and "figures of" in out
    for name in ("manifest.json", "run.json", "responses.jsonl", "verdicts.jsonl", "metrics.json"):
        assert f"| {name} | `{sha256(tmp_path / 'run' / name)}` |" in card
    for heading in ("Intended use", "Limits", "Licence", "Measured"):
        assert f"## {heading}" in card
    said = "No Defense, and whatever has no visual prompt, saw pictures that are not square (8 of 8) padded to a square"
    assert f"\n\n{said}" in card and "Answers were cut after 4 tokens." in card
    assert run("info", tmp_path / "p") == 0
    out = capsys.readouterr().out
    assert "judged by keyword/1" in out and said in out and "cut after 4 tokens" in out
    loaded = VisualSafetyPrompt.from_pretrained(tmp_path / "p")
    trained_on = loaded.with_delta(1 - loaded.delta)
    trained_on.save_pretrained(tmp_path / "q")  # the figures are not of these pixels
    assert "measured" not in VisualSafetyPrompt.from_pretrained(tmp_path / "q").config
    assert "measured" not in loaded.with_texts("another").config
    assert run("card", tmp_path / "q", "--run", tmp_path / "run") == 2
    assert "names no defense with this prompt's pixels and text" in capsys.readouterr().err
    (tmp_path / "run" / "manifest.json").write_text('{"undefended": "pad"}')
    assert run("card", tmp_path / "p", "--run", tmp_path / "run") == 2
    assert "holds no run of davsp eval or demo" in capsys.readouterr().err
    measured = json.loads((tmp_path / "p" / "vsp_config.json").read_text())["measured"]
    _config(tmp_path / "p", measured=measured | {"pixels": "0"})
    assert (
        run("info", tmp_path / "p") == 2 and "field 'measured.pixels' is of another border" in capsys.readouterr().err
    )
    for arguments, says in (
        (["card", tmp_path / "none", "--run", tmp_path], "there is no folder"),
        (["card", tmp_path / "q", "--run", tmp_path], "run.json"),
        (["push", tmp_path / "q", "me/vsp"], "names no licence"),
        (["push", tmp_path / "q", "me/vsp", "--license", "mit"], "cannot be pushed to the hub"),
    ):
        assert run(*arguments) == 2 and says in capsys.readouterr().err
