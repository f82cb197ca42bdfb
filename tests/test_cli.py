"""The command line as a user meets it: help, the road from data to a defended picture, and one sentence for every mistake."""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file, save_file

from davsp import HarmfulnessVector, TrainSettings, VisualSafetyPrompt, cli, embedded, evaluate
from davsp.benchmarks.custom import load_queries, save_queries
from davsp.cli.inputs import is_mini, is_shipped
from davsp.defenses import NoDefense, VisualPrompt
from davsp.embedded.words import vocabulary
from davsp.errors import DavspError
from davsp.prompts import load_prompt
from davsp.query import open_picture
from davsp.runtime.files import alone, sha256
from test_published import directions, published
from tiny import queries


def run(*arguments: str | Path) -> int:
    """The exit code of `davsp ARGUMENTS`, run in this process through its entry point."""
    old, sys.argv = sys.argv, ["davsp", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)
    finally:
        sys.argv = old


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


def test_help_does_not_import_torch():
    code = "import sys, davsp.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def commands(group: typer.core.TyperGroup, *words: str) -> Iterator[tuple[str, ...]]:
    """The words of every command, those of sub-commands too."""
    for name, command in group.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from commands(command, *words, name)
        else:
            yield (*words, name)


COMMANDS = sorted(commands(typer.main.get_group(cli.app)))


def test_every_command_is_found():
    assert len(COMMANDS) == 28 and {("eval",), ("baseline", "pat"), ("data", "split")} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_at_80_columns_gives_descriptions_half_of_the_width(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(*command, "--help") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert lines and max(map(len, lines)) == 80
    for line in lines:
        cells = [cell for cell in re.split(" {2,}", line.strip("│ ")) if cell[0] != "["]  # [default: …] is no column
        assert len(cells) <= 2, line
        goes_on = line.startswith("│   ")  # a description whose names stand above
        if cells and (goes_on or len(cells) == 2):
            start = line.index(cells[-1], 2 if goes_on else 2 + len(cells[0]))
            assert 80 - start - 2 >= 40, line


def test_help_has_a_panel_for_each_group_of_options(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("eval", "--help") == 0
    help = capsys.readouterr().out
    titles = re.findall(r"╭─ (.+?) ─+╮", help)
    assert titles == [
        "Options",
        "Defenses",
        "Test set",
        "Model",
        "Where the model runs",
        "Processes",
        "Judges",
        "Requests to servers",
    ]
    panel = help.split("╭─ Model ─")[1].split("╰")[0]
    assert re.findall(r"^│ (--[\w-]+)", panel, re.M) == [
        "--model", "--revision", "--device", "--dtype", "--quantization", "--attn-implementation", "--canvas", "--template", "--template-kwargs",
        "--undefended",
    ]  # fmt: skip


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


def test_the_embedded_test_comes_with_its_text_by_whatever_name_a_server_calls_the_model(tmp_path, monkeypatch, capsys):
    def stop(lvlm, defenses, *arguments, **options):
        raise DavspError(f"{lvlm.model_id} {defenses['safety-text'].text}")

    monkeypatch.setattr("davsp.evaluation.evaluate", stop)
    server = ("--engine", "openai", "--base-url", "http://127.0.0.1:9/v1", "--api-model", "served")
    assert run("eval", *server, "--limit", 1, "--out", tmp_path / "out") == 2
    assert f"served {embedded.SAFETY_TEXT}" in capsys.readouterr().err


def test_a_model_that_ships_is_known_by_name_and_by_folder(tiny_folder):
    for name in (None, *embedded.MODELS):
        assert is_shipped(name)
        assert is_shipped(folder := str(embedded.FOLDER.parent / (name or "davsp-mini"))) and is_shipped(folder + "/")
    for other in (str(tiny_folder), str(embedded.FOLDER.parent), "davsp-mini-wide", "llava-hf/llava-1.5-7b-hf"):
        assert not is_shipped(other)


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


def test_doctor_by_its_exit_code(monkeypatch, capsys):
    monkeypatch.setattr("davsp.doctor._failure", lambda code: None)
    assert run("doctor") == 0
    output = capsys.readouterr().out
    assert all(part in output for part in ("torch", "transformers", "cpu", "torchvision")) and "broken" not in output
    monkeypatch.setattr("davsp.doctor._failure", lambda code: "ImportError: a library is missing")
    assert run("doctor") == 2
    assert "broken: transformers" in capsys.readouterr().out


@pytest.mark.parametrize("error", [ImportError, RuntimeError])
def test_a_failing_import_is_explained_or_left_to_be_seen(error, monkeypatch, capsys):
    def fail(*args: object, **options: object) -> None:
        raise error("operator torchvision::nms does not exist")

    monkeypatch.setattr("davsp.experiments.demo.run_demo", fail)
    monkeypatch.setattr("davsp.doctor.explain_import_error", lambda error: f"said of: {error}")
    assert run("demo") == 2
    assert "davsp: said of: operator torchvision::nms" in capsys.readouterr().err
    monkeypatch.setattr("davsp.doctor.explain_import_error", lambda error: None)
    monkeypatch.setattr(sys, "argv", ["davsp", "demo"])
    with pytest.raises(error, match="nms"):
        cli.main()


def _nan(folder: Path, value: float = float("nan")) -> None:
    delta = load_file(folder / "vsp.safetensors")["delta"]
    delta[1, 0, 2] = value
    save_file({"delta": delta}, folder / "vsp.safetensors")


def _config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "vsp_config.json").read_text())
    (folder / "vsp_config.json").write_text(json.dumps(config | fields))


def _cut(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])


def _swapped(folder: Path) -> None:
    VisualSafetyPrompt.create(24, 5, "random", seed=9).save_pretrained(folder / "other")
    (folder / "vsp.png").write_bytes((folder / "other" / "vsp.png").read_bytes())


def _packed_anew(folder: Path) -> None:
    with Image.open(folder / "vsp.png") as image:
        image.load()
        image.save(folder / "vsp.png", compress_level=0)


SPOILT = {
    "NaN": (_nan, r"vsp\.safetensors: delta holds NaN or values outside \[0, 1\], the first one nan at \[1, 0, 2\]"),
    "1.5": (lambda f: _nan(f, 1.5), r"vsp\.safetensors: delta holds .* the first one 1\.5 at \[1, 0, 2\]"),
    "shape": (lambda f: _config(f, canvas=25), r"vsp\.safetensors must hold one float tensor 'delta' of shape \(3, 25"),
    "unknown key": (lambda f: _config(f, colour="red"), r"vsp_config\.json: field 'colour'"),
    "unknown key within": (lambda f: _config(f, measured={"rsr": 1}), r"vsp_config\.json: field 'measured\."),
    "truncated tensor": (lambda f: _cut(f, "vsp.safetensors"), r"vsp\.safetensors is not a safetensors file"),
    "truncated picture": (lambda f: _cut(f, "vsp.png"), r"cannot open image .*vsp\.png|vsp\.png is not the file"),
    "swapped picture": (_swapped, r"vsp\.png shows another border than .*vsp\.safetensors"),
    "picture packed anew": (_packed_anew, r"vsp\.png is not the file that was saved: .*'files\.vsp\.png'"),
    "padding": (lambda f: _config(f, padding=6), r"vsp\.png shows another border|its text 'padding' is not that of"),
    "text": (
        lambda f: _config(f, safety_text="x"),
        r"vsp\.png: its text 'safety_text' is not that of .*vsp_config\.json",
    ),
    "a name that leads out": (lambda f: _config(f, files={"../x": "0"}), r"field 'files' names '\.\./x'"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_prompt_is_one_sentence_and_exit_2(case: str, tmp_path: Path, capsys):
    change, says = SPOILT[case]
    VisualSafetyPrompt.create(24, 5, "random", text="be safe").save_pretrained(tmp_path / "p")
    assert run("info", tmp_path / "p") == 0 and capsys.readouterr().out.count("as saved") == 3
    change(tmp_path / "p")
    assert run("info", tmp_path / "p") == 2
    output = capsys.readouterr().err
    assert re.search(says, output) and output.startswith("davsp: ") and len(output.splitlines()) == 1


def test_info_says_when_a_card_was_edited_and_when_there_are_no_hashes(tmp_path: Path, capsys):
    VisualSafetyPrompt.create(24, 5, "random").save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    assert run("info", tmp_path) == 0
    assert re.search(r"README\.md: SHA-256 \w{64}, changed since", capsys.readouterr().out)
    _config(tmp_path, files={})
    assert run("info", tmp_path) == 0 and "keeps no hashes" in capsys.readouterr().out


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


@pytest.mark.parametrize("command", [["demo"], ["info", "x"], ["mini", "data"]])
def test_ctrl_c_anywhere_says_how_to_go_on(command, monkeypatch, tmp_path, capsys):
    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    for name in ("experiments.demo.run_demo", "prompts.load_prompt", "embedded.data.protocol"):
        monkeypatch.setattr(f"davsp.{name}", stop)
    assert run(*command) == 130
    output = capsys.readouterr().err.strip()
    assert output == cli.STOPPED and "give the same command again" in output


def test_a_folder_is_davsp_mini_by_its_canvas_and_words(tiny_folder: Path, tmp_path: Path):
    assert not is_mini(tmp_path) and not is_mini(tiny_folder)
    (tmp_path / "config.json").write_text("[1]")
    assert not is_mini(tmp_path)
    size = len(vocabulary())
    for canvas, words in ((168, size), (192, size), (336, size), (168, size + 1)):
        config = {"vision_config": {"image_size": canvas}, "text_config": {"vocab_size": words}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert is_mini(tmp_path) == (canvas != 336 and words == size)
    config = {"model_type": "qwen2_vl", "vision_config": {}, "text_config": {"vocab_size": size}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert is_mini(tmp_path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "is not JSON"),
        ("[1]", "not a JSON object"),
        ('{"id": "a", "question": "q", "label": "bad"}', "label must be"),
        ('{"id": "a", "question": "q", "label": "benign", "picture": "x"}', "unknown field 'picture'"),
        ('{"id": "a", "label": "benign"}', "lacks an id or a question"),
        ('{"id": "a", "question": "q", "label": "benign", "image": "no.png"}', "which is not there"),
        ('{"id": "a", "question": "q", "label": "benign", "answers": "x"}', "must be a list"),
        ('{"id": 3, "question": "q", "label": "benign"}', "id must be a text"),
        ("", "holds no query"),
    ],
)
def test_a_line_that_is_no_query_is_named(line: str, says: str, tmp_path: Path):
    (tmp_path / "queries.jsonl").write_text(line + "\n")
    with pytest.raises(DavspError, match=says):
        load_queries(tmp_path)


def test_queries_come_back_as_they_were(tmp_path: Path):
    before = queries("malicious", 3) + queries("benign", 3)
    before[0] = replace(before[0], question="two\u2028lines\x85of one question")
    save_queries(tmp_path, before)
    after = load_queries(tmp_path)
    for a, b in zip(before, after, strict=True):
        assert (a.id, a.question, a.label, a.reference, a.group) == (b.id, b.question, b.label, b.reference, b.group)
        assert a.picture().tobytes() == b.picture().tobytes()
