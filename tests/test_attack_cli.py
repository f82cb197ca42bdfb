"""`davsp attack` as a user calls it."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from davsp import HarmfulnessVector, cli
from davsp.benchmarks.custom import save_queries
from davsp.errors import DavspError
from davsp.prompts import VisualSafetyPrompt
from tiny import queries


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["davsp", "attack", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    save_queries(tmp_path / "data", [*queries("malicious", 3), *queries("benign", 2)])
    return tmp_path / "data"


def test_files_tables_and_page(
    tiny_folder: Path, vector: HarmfulnessVector, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    VisualSafetyPrompt.create(56, 8, "random", text="please be safe").save_pretrained(tmp_path / "prompt")
    vector.save(tmp_path / "vector")
    out = tmp_path / "out"
    arguments = [
        "--model",
        tiny_folder,
        "--queries",
        data,
        "--prompt",
        tmp_path / "prompt",
        "--vector",
        tmp_path / "vector",
    ]
    arguments += ["--attack", "transfer,comply,hide,suffix,joint", "--target", "a car", "--out", out]
    small = {
        "eps": "4,255",
        "steps": 3,
        "words": 2,
        "word-steps": 2,
        "word-candidates": 4,
        "max-new-tokens": 4,
        "max-unscored": 1,
    }
    arguments += [str(word) for name, value in small.items() for word in (f"--{name}", value)]
    assert call(monkeypatch, *arguments) == 0
    output, said = capsys.readouterr()
    assert "warning: keyword is the only judge here" in said
    for table in (output, (out / "attack.md").read_text(), (out / "attack.html").read_text()):
        assert "on 58 % of 6,108 real answers" in " ".join(table.split())
    heads = output.split("┡")[0].replace("┃", " ").split()
    assert {"clean", "redrawn", "4/255", "255/255", "words", "any"} <= set(heads) and heads.count("picture,") == 2
    assert f"are in {out}" in output.replace("\n", "")
    assert json.loads((out / "manifest.json").read_text())["judge"] == "keyword/1"
    metrics = json.loads((out / "metrics.json").read_text())
    assert {r["attack"] for r in metrics["rows"]} >= {"clean", "worst", "transfer", "comply", "hide", "suffix", "joint"}  # fmt: skip
    assert {c["defense"] for c in metrics["checks"]} == {"none", "davsp"}
    page, words = (out / "attack.html").read_text(), (out / "attack.md").read_text()
    assert page.count("<svg") == 3 and "data:image/png" in page and "| DAVSP |" in words
    answers = [json.loads(line) for line in (out / "davsp" / "clean" / "responses.jsonl").read_text().splitlines()]
    unsafe = [a["text"] for a in answers if a["query_id"].startswith("malicious")]
    assert unsafe and not any(text and f": {text}</figcaption>" in page for text in unsafe)  # redacted
    assert "[redacted]" in page
    before = {p: p.read_bytes() for p in out.rglob("*.png")}
    assert call(monkeypatch, *arguments, "--show-unsafe") == 0  # nothing is attacked again
    assert {p: p.read_bytes() for p in out.rglob("*.png")} == before and "[redacted]" not in (
        out / "attack.html"
    ).read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--eps", "2,x"], "--eps '2,x' is not a list of whole levels"),
        (["--eps", "300"], "--eps: eps are 8-bit levels from 1 to 255"),
        (["--attack", "pgd"], "--attack: 'pgd' is no attack"),
        (["--target", "a car", "--attack", "hide"], "'hide' needs the defender's vector (--vector)"),
        (
            ["--target", "a car", "--attack", "transfer", "--defense", "safety-text=be safe"],
            "'transfer' needs the defense 'none'",
        ),
        (["--judge", "keyword", "--judge", "keyword-gcg"], "--judge: an attack is counted by one judge"),
        (["--target", ""], "--target: text should have at least 1 character"),
        (["--target", "xylophone"], "target 'xylophone' holds words that"),
        (["--target", "a car", "--attack", "deed"], "query malicious-0 has no context"),
        (["--target", "a car", "--attack", "universal"], "'universal' needs pictures to be trained on"),
        (["--target", "a car", "--attack", "noise", "--universal-queries", "others"], "--universal-queries goes with"),
        (["--target", "a car", "--seed", "-1"], "--seed: input should be greater than or equal to 0"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], says: str, tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    code = call(monkeypatch, "--model", tiny_folder, "--queries", data, "--out", tmp_path / "out", *words)
    message = capsys.readouterr().err
    assert code == 2 and says in message.replace("\n", " ") and message.count("davsp:") == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--attack", "random-words", "--words", 9000], "--words 9000 is too many for query 'malicious-0' under none: "),
        (["--attack", "suffix,joint", "--words", 9000], "--words 9000 is too many for query 'malicious-0' under none: "),
        (["--attack", "comply", "--target", "a car " * 9000], "--target is too long for query 'malicious-0' under none: "),
        (["--attack", "deed", "--model", "davsp-mini", "--target", "sure :"], "the answer that 'deed' wants of query 'long' is too long under none: "),
        (["--attack", "noise", "--max-new-tokens", 9000], "or the answers (--max-new-tokens); or leave out what does not fit by --skip-broken"),
    ],
)  # fmt: skip
def test_what_has_no_room_is_told_before_any_search_by_its_option(
    options: list[object], says: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    asked = [replace(q, id=f"malicious-{i}", context="a car") for i, q in enumerate(queries("malicious", 2))]
    save_queries(tmp_path / "data", [*asked, replace(asked[0], id="long", context="a car " * 9000)])
    monkeypatch.setattr("davsp.attacks.run.search_suffix", lambda *_, **__: pytest.fail("words are searched"))
    given = ["--model", tiny_folder, "--queries", tmp_path / "data", "--defense", "none", "--target", "a car"]
    assert call(monkeypatch, *given, "--out", tmp_path / "out", *options) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert says in said and "max_new_tokens" not in said and "=True" not in said
    assert not (tmp_path / "out").exists()


def test_what_is_refused_while_it_is_attacked_is_said_by_options(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Words that were searched for may be read as more tokens than were asked for."""

    def attack(*_: object, **__: object) -> None:
        raise DavspError("query 'q' cannot be asked: shorten the answers (max_new_tokens); or give skip_broken=True")

    monkeypatch.setattr("davsp.attacks.attack", attack)
    given = ["--model", tiny_folder, "--queries", data, "--defense", "none", "--target", "a car", "--attack", "noise"]
    assert call(monkeypatch, *given, "--out", tmp_path / "out") == 2
    assert "the answers (--max-new-tokens); or give --skip-broken" in " ".join(capsys.readouterr().err.split())
