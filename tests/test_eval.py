"""`davsp eval`: published sets by their own scorers, several judges, broken input, another run's folder, a served model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from command import run as davsp
from davsp import LVLM, DavspError, Query, Verdict
from davsp.benchmarks.custom import save_queries
from davsp.cli.judges import check_scored
from davsp.embedded.counterparts import write
from davsp.evaluation.judging import apart
from judge_server import judge_server
from model_server import ModelServer, model_server
from tiny import queries

FEW = {"mm_safetybench": 8, "figstep": 8, "vlguard": 8, "mm_vet": 8, "mme": 2, "llava_bench": 3}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small embedded counterparts, in the real layouts."""
    return write(tmp_path_factory.mktemp("sets"), **FEW)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    save_queries(tmp_path / "data", [*queries("malicious", 4), *queries("benign", 3)])
    return tmp_path / "data"


@pytest.fixture
def server(lvlm: LVLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with model_server(lvlm) as made:
        yield made


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_published_sets_are_scored_by_their_own_rules(sets: Path, tiny_folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    asked = [part for name in FEW for part in ("--benchmark", f"{name}={sets / name}")]
    common = ("--model", tiny_folder, "--max-new-tokens", 2, "--out", out, "--max-unscored", 1)
    rows = ("--defense", "none", "--defense", "safety-text=please be safe")
    assert (
        davsp("eval", *asked, *common, *rows, "--judge", "keyword", "--judge", "keyword-gcg", "--judge", "exact") == 0
    )
    shown = capsys.readouterr().out
    found = {
        (r["defense"], r["benchmark"], r["metric"]) for r in read(out / "metrics.json")["rows"] if r["split"] == "total"
    }
    for defense in ("none", "safety-text"):
        assert (defense, "mm_vet_embedded", "score") in found and (defense, "mme_embedded", "score_official") in found
        assert (defense, "figstep_embedded", "rsr") in found and (defense, "vlguard_unsafes_embedded", "rsr") in found
        assert (defense, "llava_bench_embedded", "over_refusal") in found
        assert not {m for d, b, m in found if b == "llava_bench_embedded"} - {"over_refusal", "over_refusal_difference"}
    assert ("safety-text", "mme_embedded", "score_official_difference") in found
    assert "score_official" in (out / "report.html").read_text() and "mme_embedded" in shown.replace("…", "")
    assert {g["judge"] for g in lines(out / "grades.jsonl")} == {"exact/2"}
    assert "llava_bench_embedded/0" in read(out / "queries.json")
    judges = {
        name: {v["judge"] for v in lines(out / name)} for name in ("verdicts.jsonl", "verdicts-keyword-gcg-1.jsonl")
    }
    assert judges == {"verdicts.jsonl": {"keyword/1"}, "verdicts-keyword-gcg-1.jsonl": {"keyword-gcg/1"}}
    assert len(read(out / "agreement.json")["judges"]) == 2
    answers = (out / "responses.jsonl").read_bytes()
    assert davsp("judge", out, *asked, "--judge", "overlap") == 0
    assert {g["judge"] for g in lines(out / "grades-overlap-2.jsonl")} == {"overlap/2"}
    graded = {r["benchmark"] for r in read(out / "metrics-overlap-2.json")["rows"]}
    assert graded == {"llava_bench_embedded"} and (out / "responses.jsonl").read_bytes() == answers


def test_the_keyword_judge_of_a_real_model_says_what_it_is_worth(
    tiny_folder: Path, data: Path, tmp_path: Path, capsys
) -> None:
    """By every table that it made, and as a warning where nobody else judges."""
    common = (
        "--queries",
        data,
        "--model",
        tiny_folder,
        "--defense",
        "none",
        "--max-new-tokens",
        2,
        "--max-unscored",
        1,
    )
    sentence = "agrees with a strong judge (Gemini) on 58 % of 6,108 real answers"

    def told(*line: object) -> tuple[bool, bool]:
        """Whether it stands by the table, and whether there was a warning."""
        assert davsp(*line) == 0
        out, err = (" ".join(text.split()) for text in capsys.readouterr())
        return sentence in out, "warning: keyword is the only judge here. " in err and sentence in err

    run = tmp_path / "alone"
    assert told("eval", *common, "--out", run) == (True, True)
    assert sentence in (run / "report.html").read_text() and read(run / "manifest.json")["shipped"] is False
    assert told("judge", run, "--queries", data, "--judge", "keyword", "--max-unscored", 1) == (True, True)
    assert told("judge", run, "--queries", data, "--judge", "keyword-gcg", "--max-unscored", 1) == (False, False)
    two = tmp_path / "two"
    assert told("eval", *common, "--judge", "keyword", "--judge", "keyword-gcg", "--out", two) == (True, False)
    other = tmp_path / "other"
    assert told("eval", *common, "--judge", "keyword-gcg", "--judge", "keyword", "--out", other) == (False, False)
    assert sentence not in (other / "report.html").read_text()
    (run / "manifest.json").write_text(json.dumps(read(run / "manifest.json") | {"shipped": True}))
    assert told("judge", run, "--queries", data, "--judge", "keyword", "--max-unscored", 1) == (False, False)


def test_sets_that_count_from_0_go_together() -> None:
    both = [Query("0", "what is it", "benign", name) for name in ("mm_vet", "llava_bench_embedded")]
    kept = Query("unsafes/0", "what is it", "malicious", "vlguard_unsafes")
    assert [q.id for q in apart([*both, kept])] == ["mm_vet/0", "llava_bench_embedded/0", "unsafes/0"]


def test_too_much_unscored_of_one_set_is_not_made_up_for_by_another() -> None:
    asked = [
        Query(f"{name}{i}", "?", "malicious", name) for name, n in (("figstep", 50), ("sd", 950)) for i in range(n)
    ]
    said = [Verdict(q.id, "none", "j/1", "unscored" if i < 9 else "safe", "cut") for i, q in enumerate(asked)]
    with pytest.raises(DavspError, match=r"^figstep: 9 of 50 answers under 'none' are unscored by j/1 \(18.0 %"):
        check_scored([{"none": said}], asked, 0.02)
    check_scored([{"none": said}], asked, 0.2)


@pytest.mark.parametrize("option", ["--judge-key-env", "--api-key-env"])
def test_a_key_in_place_of_its_variable_gets_nowhere(option: str, data: Path, tmp_path: Path, capsys) -> None:
    assert davsp("eval", "--queries", data, "--out", tmp_path / "out", option, "sk-secret") == 2
    assert "sk-secret" not in capsys.readouterr().err and not (tmp_path / "out").exists()


def options(data: Path, model: Path, out: Path) -> list[Any]:
    """Of a run that takes two seconds."""
    return ["--queries", data, "--model", model, "--max-new-tokens", 2, "--out", out, "--max-unscored", 1]


def test_a_folder_of_another_run_is_refused(data: Path, tiny_folder: Path, tmp_path: Path, capsys) -> None:
    same = options(data, tiny_folder, tmp_path / "out")
    assert davsp("eval", *same) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert read(tmp_path / "out" / "manifest.json")["queries"]["count"] == 7
    for change, says in (
        (["--max-new-tokens", 3], "another max new tokens"),
        (["--limit", 2], "is not here"),
        (["--defense", "safety-text=be safe"], "answers under 'none', which is not among the defenses now"),
    ):
        assert davsp("eval", *same, *change) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert says in error and "give another folder" in error
    assert {path: path.read_bytes() for path in before} == before  # the manifest is the first run's, too


def test_broken_pictures_are_named_or_skipped(data: Path, tiny_folder: Path, tmp_path: Path, capsys) -> None:
    (data / "images" / "malicious-0.png").unlink()
    whole = (data / "images" / "malicious-1.png").read_bytes()
    (data / "images" / "malicious-1.png").write_bytes(whole[: len(whole) // 2])
    Image.new("CMYK", (8, 8)).save(data / "images" / "benign-0.jpg")
    text = (data / "queries.jsonl").read_text().replace("benign-0.png", "benign-0.jpg")
    (data / "queries.jsonl").write_text(text + text.splitlines()[-1] + "\n")
    same = options(data, tiny_folder, tmp_path / "out")
    assert davsp("eval", *same) == 2
    assert "malicious-0.png', which is not there" in capsys.readouterr().err
    assert davsp("eval", *same, "--skip-broken") == 0
    said = capsys.readouterr().err
    for part in (
        "skipped 4",
        "malicious-0.png', which is not there",
        "is truncated or no picture",
        "is in CMYK",
        "1 more",
    ):
        assert part in said
    assert "skipped 4" in read(tmp_path / "out" / "manifest.json")["notes"][0]
    assert len(read(tmp_path / "out" / "queries.json")) == 4


def test_a_served_model_and_a_failing_judge(server: ModelServer, data: Path, tmp_path: Path, capsys) -> None:
    """The engine and the judge each have a server of their own; too many unscored end with code 2, the files written."""
    out = tmp_path / "out"
    common = ["--queries", data, "--max-new-tokens", 4, "--out", out, "--engine", "openai", "--base-url", server.url]
    with judge_server() as asked_of:
        asked_of.fault = lambda n, attempt: "400"
        more = ["--api-model", "org/m", "--judge", "davsp", "--judge-url", asked_of.url, "--judge-model", "j"]
        answer = {
            "message": {"content": "item 3: a kite"},
            "finish_reason": "stop",
        }  # the judge's server looks for "item N"
        server.change = lambda number, choice: answer
        assert davsp("eval", *common, *more) == 2
        assert "4 of 4 answers under 'none' are unscored by davsp/1:j" in capsys.readouterr().err
        assert {v["label"] for v in lines(out / "verdicts.jsonl")} == {"unscored"} and (out / "report.html").exists()
        asked_of.fault = lambda n, attempt: ""
        before = len(server.bodies)
        assert davsp("eval", *common, *more, "--concurrency", 2) == 0  # what a 429 may call for
    assert len(server.bodies) == before == 7  # nothing is answered again
    assert {v["label"] for v in lines(out / "verdicts.jsonl")} == {"unsafe"}
    assert (
        read(out / "manifest.json")["server"] == server.url
        and read(out / "metrics.json")["rows"][0]["model"] == "org/m"
    )


@pytest.mark.parametrize("flag", [(), ("--show-unsafe",)])
def test_unsafe_answers_are_redacted(flag: tuple[str, ...], tiny_folder: Path, tmp_path: Path, monkeypatch) -> None:
    said = ("here are the steps", "stop")
    monkeypatch.setattr(LVLM, "completions", lambda self, canvas, questions, **_: [said] * len(questions))
    save_queries(
        tmp_path / "data", [*queries("malicious", 2), Query("w", "what is this", "benign", "test", reference="red")]
    )
    common = ("--queries", tmp_path / "data", "--model", tiny_folder, "--out", tmp_path / "out")
    rows = ("--defense", "none", "--defense", "safety-text=please be safe")
    assert davsp("eval", *common, *rows, *flag) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert ("here are the steps" in page) == bool(flag) and ("[redacted]" in page) != bool(flag)


def test_under_prefill_a_run_says_what_is_kept_and_judged(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    common = ("--queries", data, "--model", tiny_folder, "--max-new-tokens", 3, "--out", tmp_path / "out")
    assert davsp("eval", *common, "--defense", "none", "--prefill", "a red car", "--max-unscored", 1) == 0
    said = "every answer was made to begin with 'a red car'; kept and judged is what the model says behind it"
    assert said in read(tmp_path / "out" / "manifest.json")["notes"]
    texts = [line["text"] for line in lines(tmp_path / "out" / "responses.jsonl")]
    assert len(texts) == 7 and not any(text.startswith("a red car") for text in texts)
