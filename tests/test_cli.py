"""The command line as a user meets it: help, the road from data to a defended picture, and one sentence for every mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny import queries

from davsp import cli
from davsp.dataset import load_queries, save_queries
from davsp.errors import DavspError


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


def test_help_does_not_import_torch():
    code = "import sys, davsp.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_from_data_to_a_defended_picture(data: Path, tiny_folder: Path, tmp_path: Path, capsys):
    both = ("--malicious", data / "malicious", "--benign", data / "benign", "--model", tiny_folder)
    assert run("vector", *both, "--out", tmp_path / "vector") == 0
    settings = ("--padding", 8, "--steps", 2, "--batch-size", 2, "--mu-plus", 50, "--mu-minus", -50)
    assert run("train", *both, "--vector", tmp_path / "vector", "--out", tmp_path / "prompt", *settings) == 0
    assert {"vsp.png", "vsp.safetensors", "vsp_config.json", "README.md"} <= {p.name for p in (tmp_path / "prompt").iterdir()}
    assert run("info", tmp_path / "prompt") == 0
    evaluated = ("--prompt", tmp_path / "prompt", "--queries", data / "test", "--model", tiny_folder, "--max-new-tokens", 4)
    assert run("eval", *evaluated, "--out", tmp_path / "eval") == 0
    rows = json.loads((tmp_path / "eval" / "metrics.json").read_text())["rows"]
    assert {r["defense"] for r in rows} == {"none", "davsp"}
    Image.new("RGB", (90, 40), "navy").save(tmp_path / "picture.jpg")
    assert run("apply", tmp_path / "picture.jpg", "--prompt", tmp_path / "prompt", "--out", tmp_path / "out.png") == 0
    assert Image.open(tmp_path / "out.png").size == (56, 56)
    assert "files agree" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["info", "NOWHERE"], "NOWHERE"),
        (["apply", "missing.png", "--prompt", "NOWHERE"], "NOWHERE"),
        (["apply", "missing.png", "--prompt", "NOWHERE", "--out", "x.jpg"], "must end in .png"),
        (["vector", "--malicious", "DATA/malicious"], "--benign is missing"),
        (["vector", "--malicious", "DATA/none", "--benign", "DATA/benign"], "no queries at"),
        (["train", "--kind", "frame"], "--kind is border or additive"),
        (["train", "--padding", "28", "--malicious", "DATA/malicious", "--benign", "DATA/benign"], "--vector is needed"),
        (["mini", "train", "--stage", "sleep"], "the stages are"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, says, data: Path, tiny_folder: Path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = [a.replace("DATA", str(data)) for a in arguments]
    if arguments[0] in ("vector", "train") and "--malicious" in arguments:
        arguments += ["--model", str(tiny_folder)]
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.safetensors"))


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
    save_queries(tmp_path, before)
    after = load_queries(tmp_path)
    for a, b in zip(before, after, strict=True):
        assert (a.id, a.question, a.label, a.reference, a.group) == (b.id, b.question, b.label, b.reference, b.group)
        assert a.picture().tobytes() == b.picture().tobytes()
