"""`davsp judge`: a finished run scored again, from the command line and against a server on loopback."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from command import run as davsp
from davsp import DavspError, Query, Response, Verdict, embedded
from davsp.benchmarks.custom import load_queries, save_queries
from davsp.embedded.data import SIZES
from davsp.evaluation.rescore import rescore, slug
from davsp.judges.keyword import keyword
from davsp.judges.keyword_lists import GCG
from davsp.metrics import rates
from davsp.query import read_jsonl, write_jsonl
from davsp.runtime.files import write_json
from davsp.store import query_hash
from judge_server import Judge, judge_server
from tiny import queries

N = 8


def write_run(folder: Path, queries: list[Query], texts: dict[str, list[str]]) -> Path:
    """What `evaluate` leaves behind, with answers of our own."""
    responses = [Response(q.id, name, text) for name in texts for q, text in zip(queries, texts[name], strict=True)]
    write_jsonl(folder / "responses.jsonl", responses)
    write_json(folder / "run.json", {"model": "?", "defenses": {name: {} for name in texts}})
    write_json(folder / "queries.json", {q.id: query_hash(q) for q in queries})
    bad = {q.id for q in queries if q.label == "malicious"}
    labels = [Verdict(r.query_id, r.defense, "keyword/1", *keyword(r.text)) for r in responses if r.query_id in bad]
    write_jsonl(folder / "verdicts.jsonl", labels)
    write_json(folder / "metrics.json", {"schema": 1, "rows": [{"model": "tiny"}]})
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    bad = [replace(q, benchmark="sd", category="04-Physical_Harm", group=q.id) for q in queries("malicious", N)]
    save_queries(tmp_path / "test", [*bad, *queries("benign", 3)])
    return tmp_path / "test"


@pytest.fixture
def folder(data: Path, tmp_path: Path) -> Path:
    """Eight malicious queries and three benign ones under two defenses; every second answer is a refusal."""
    none = [f"item {i}: a kite" for i in range(N)] + ["red"] * 3
    davsp = [f"I'm sorry, not item {i + 10}." if i % 2 else f"item {i + 10}: a rock" for i in range(N)] + ["red"] * 3
    return write_run(tmp_path / "run", load_queries(data), {"none": none, "davsp": davsp})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("COLUMNS", "200")
    with judge_server() as running:
        running.say = lambda n: "unsafe" if n < 10 or n % 2 == 0 else "safe"
        yield running


def rows(folder: Path, name: str) -> dict[tuple[str, str], tuple[float, int]]:
    rows = json.loads((folder / f"metrics-{name}.json").read_text())["rows"]
    return {(r["defense"], r["metric"]): (r["value"], r["n"]) for r in rows}


@pytest.mark.parametrize("judge", ["davsp", "mm-safetybench"])
def test_judge_a_run(judge: str, folder: Path, data: Path, server: Judge, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*.json*")}
    command = ("judge", folder, "--judge", judge, "--queries", data, "--base-url", server.url, "--judge-model", "org/m")
    assert davsp(*command) == 0
    shown = capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    name = f"{judge}-1-org--m"
    verdicts = read_jsonl(folder / f"verdicts-{name}.jsonl", Verdict)
    assert [v.label for v in verdicts if v.defense == "davsp"] == ["unsafe", "safe"] * 4
    assert all(v.judge == f"{judge}/1:org/m" and v.raw == v.label and len(v.prompt) == 16 for v in verdicts)
    table = rows(folder, name)
    assert table["davsp", "rsr"] == table["davsp", "rsr_worst_case"] == (0.5, 8)
    assert table["none", "rsr"] == (0.0, 8) and table["davsp", "rsr_difference"] == (0.5, 8)
    assert table["davsp", "unscored"] == (0.0, 8) and ("none", "over_refusal") in table
    assert server.requests.total() == 2 * N
    assert "worst case" in shown and "Krippendorff's α 1.00 on 16 answers, 0 judged differently" in shown
    agreed = json.loads((folder / "agreement.json").read_text())
    assert agreed == {"judges": ["keyword/1", f"{judge}/1:org/m"], "alpha": 1.0, "n": 16, "disagreements": []}
    assert davsp(*command) == 0 and server.requests.total() == 2 * N  # a second run asks nothing


def test_too_many_unscored(folder: Path, data: Path, server: Judge, capsys: pytest.CaptureFixture[str]) -> None:
    server.fault = lambda n, attempt: "400" if n == 13 else ""
    command = ("judge", folder, "--judge", "davsp", "--queries", data, "--base-url", server.url, "--judge-model", "m")
    assert davsp(*command) == 2
    out, err = capsys.readouterr()
    assert "1 of 8 answers under 'davsp' are unscored by davsp/1:m (12.5 %, --max-unscored is 2 %" in err
    assert "unscored, 1: the judge's server failed (400)" in out
    table = rows(folder, "davsp-1-m")
    assert table["davsp", "rsr"] == (pytest.approx(3 / 7), 7) and table["davsp", "unscored"] == (0.125, 8)
    assert table["davsp", "rsr_worst_case"] == (3 / 8, 8)
    assert davsp(*command, "--max-unscored", "0.2") == 0
    server.fault = lambda n, attempt: ""
    before = server.requests.total()
    assert davsp(*command) == 0 and server.requests.total() == before + 1


def test_disagreements_are_listed(folder: Path, data: Path) -> None:
    assert davsp("judge", folder, "--judge", "keyword-gcg", "--queries", data) == 0
    assert json.loads((folder / "agreement.json").read_text())["disagreements"] == []
    verdicts = read_jsonl(folder / "verdicts.jsonl", Verdict)
    write_jsonl(folder / "verdicts.jsonl", [replace(verdicts[0], label="safe"), *verdicts[1:]])
    rescoring = rescore(folder, load_queries(data), GCG)
    assert rescoring.agreement.disagreements == {
        ("none", "malicious-0"): {"keyword/1": "safe", "keyword-gcg/1": "unsafe"}
    }
    answers = folder / "responses.jsonl"
    answers.write_text(answers.read_text().replace("kite", "kite, I'm sorry"))
    rescore(folder, load_queries(data), keyword)
    assert "keyword-gcg/1" not in json.loads((folder / "agreement.json").read_text())["judges"]  # of other answers


def test_the_embedded_test_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("vector", "sweep", "train"):  # drawn twice, and never looked at
        monkeypatch.setitem(SIZES, part, 1)
    queries = embedded.protocol(3).test
    texts = ["I'm sorry." if i % 2 else "take it" for i in range(len(queries))]
    run = write_run(tmp_path / "run", queries, {"none": texts})
    assert davsp("judge", run, "--judge", "keyword-lmms-eval", "--seed", 3) == 0
    assert "FigStep" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--judge", "oracle"), "there is no judge 'oracle'; choose one of keyword, keyword-gcg"),
        (("--judge", "davsp"), "--judge-model is missing"),
        (("--judge", "davsp", "--judge-model", "m"), "OPENAI_API_KEY is empty"),
        (("--judge", "davsp", "--judge-model", "m", "--base-url", "judge:80"), "is no address"),
        (("--judge", "harmbench", "--judge-model", "/no/such/folder"), "cannot be loaded"),
    ],
)
def test_mistakes(
    change: tuple[str, ...], words: str, folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert davsp("judge", folder, "--queries", data, *change) == 2
    assert words in capsys.readouterr().err


def test_runs_that_cannot_be_judged(folder: Path, data: Path, tmp_path: Path) -> None:
    queries = load_queries(data)
    with pytest.raises(DavspError, match="holds no answers"):
        rescore(tmp_path / "none", queries, keyword)
    with pytest.raises(DavspError, match="'malicious-0', which is not among these"):
        rescore(folder, queries[1:], keyword)
    with pytest.raises(DavspError, match="answers another query 'malicious-0'"):
        rescore(folder, [replace(queries[0], question="another"), *queries[1:]], keyword)
    (folder / "metrics.json").write_text('{"rows": []}')
    with pytest.raises(DavspError, match="names no model"):
        rescore(folder, queries, keyword)
    hashes = (folder / "queries.json").read_bytes()
    (folder / "queries.json").write_text("[]")
    with pytest.raises(DavspError, match="holds no hash by query id"):
        rescore(folder, queries, keyword)
    (folder / "queries.json").write_bytes(hashes)
    short = folder / "responses.jsonl"
    short.write_text("".join(short.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DavspError, match="has not all answers under 'davsp'"):
        rescore(folder, queries, keyword)


def test_worst_case_and_names() -> None:
    labels = ("safe", "unsafe", "unscored")
    assert [rates(label)["rsr_worst_case"] for label in labels] == [1.0, 0.0, 0.0]
    assert [rates(label)["unscored"] for label in labels] == [0.0, 0.0, 1.0]
    assert slug("davsp/1:org/model-v1.5") == "davsp-1-org--model-v1.5" != slug("davsp/1:org-model-v1.5")
    assert slug("davsp/1:../../x") == "davsp-1-..--..--x"


def test_a_folder_that_is_not_there_is_not_made(data: Path, server: Judge, tmp_path: Path, capsys) -> None:
    options = ("--queries", data, "--judge", "davsp", "--judge-model", "m", "--judge-url", server.url)
    assert davsp("judge", tmp_path / "rnu", *options) == 2
    assert "holds no answers" in capsys.readouterr().err and not (tmp_path / "rnu").exists()


def test_a_strange_file_beside_the_runs_own_is_passed_over(folder: Path, data: Path) -> None:
    (folder / "metrics-mine.json").write_text("[]")
    assert davsp("judge", folder, "--queries", data, "--judge", "keyword-gcg") == 0
