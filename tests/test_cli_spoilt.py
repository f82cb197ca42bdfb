"""What is broken is named: a spoilt prompt, a line that is no query, an installation, Ctrl-C."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from command import run
from davsp import VisualSafetyPrompt, cli
from davsp.benchmarks.custom import load_queries, save_queries
from davsp.errors import DavspError
from tiny import queries


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
