"""Graders of MM-Vet and LLaVA-Bench: what they are asked, how replies are read, and a server that fails on demand."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmark_folders import answers, at
from command import run as davsp
from davsp import DavspError, Query, Response
from davsp.benchmarks import llava_bench, mm_vet
from davsp.embedded.counterparts import write
from davsp.errors import Interrupted
from davsp.judges.base import check_unscored
from davsp.judges.cache import VerdictCache
from davsp.judges.chat import ChatJudge
from davsp.judges.graders import GRADERS, LLAVA_BENCH, MM_VET, exact, grades_of, overlap
from davsp.judges.prompts import DAVSP
from davsp.query import Grade, read_jsonl, write_jsonl
from davsp.runtime.files import write_json
from judge_server import Judge, faulty, judge_server
from test_rescore import write_run


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with judge_server() as running:
        running.say = lambda n: f"{n % 11 / 10}"
        yield running


def grader(server: Judge, prompt=MM_VET, cache: Path | None = None, **options) -> ChatJudge:
    quick = {"backoff": 0.01, "timeout": 20.0, "concurrency": 16, "attempts": 8}
    return ChatJudge(prompt, "m", server.url, cache=VerdictCache(cache) if cache else None, **(quick | options))


def helpful(count: int) -> list[tuple[Query, Response]]:
    return [
        (Query(f"v1_{n}", "what is it?", "benign", "mm_vet", "rec", f"p{n}", "5<OR>five", context="A kite."),
         Response(f"v1_{n}", "none", f"item {n}: a kite"))
        for n in range(count)
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ texts and replies


def test_mm_vet_is_asked_as_published() -> None:
    query = Query("v1_0", "How many?", "benign", "mm_vet", "rec", reference="5<OR>five")
    (message,) = MM_VET.messages(query, "five {reference} kites")
    text = message["content"]
    assert text.startswith("Compare the ground truth and prediction from AI models")
    assert text.endswith("| 1.0\n\nHow many? | 5 <OR> five | five {reference} kites | ")
    assert text.count("Can you explain this meme? | This meme") == 2 and "-1 <AND> -5 | x = 3 | 0.0" in text
    again = MM_VET.messages(query, "five", unread=1)[0]["content"]
    assert again.endswith("| five | \nPredict the correctness of the answer (digit): ")


def test_llava_bench_is_asked_as_published() -> None:
    query = Query("0", "What?", "benign", "llava_bench", "conv", reference="Red.", context="A kite.")
    system, user = (message["content"] for message in LLAVA_BENCH.messages(query, "Blue."))
    assert system.startswith("You are a helpful and precise assistant")
    assert user.startswith("[Context]\nA kite.\n\n[Question]\nWhat?\n\n[Assistant 1]\nRed.\n\n[End of Assistant 1]\n\n")
    assert "\n\n[Assistant 2]\nBlue.\n\n[End of Assistant 2]\n\n[System]\nWe would like" in user
    assert user.endswith("affect your judgment.\n\n")


def test_texts_are_the_published_ones() -> None:
    """As in test_judge_prompts: a change must be meant, and raise the version."""
    query = helpful(1)[0][0]
    assert {name: (p.version, p.hash(query)) for name, p in GRADERS.items()} == {
        "mm-vet": (1, "6608bb34c369fb7f"),
        "llava-bench": (1, "3b57fb8e379f15dc"),
    }


@pytest.mark.parametrize(("reply", "label"), [
    ("0.5", "0.5"), (" 1.0\n", "1.0"), ("0", "0"), ("1", "1"), ('"0.3".', "0.3"), ("0.25", "0.25"),
    ("1.5", None), ("-0.1", None), ("nan", None), ("0.5 0.6", None), ("0.5 since", None), ("not 0.5", None), ("1.01", None),
    ("half", None), ("", None), (".", None), ("0,5", None), ("5", None), ("1e-1", None), ("\u0660.5", None),
])  # fmt: skip
def test_replies_to_mm_vet(reply: str, label: str | None) -> None:
    assert MM_VET.read(reply)[0] == (label or "unscored")


@pytest.mark.parametrize(("reply", "label"), [
    ("8 10\nBecause 3 4.", "8 10"), ("8,10", "8 10"), ("8, 10 ", "8 10"), ("\n8; 10", "8 10"), ("7.5 9", "7.5 9"),
    ("Scores: 8 10", None), ("8 10 9", None), ("8", None), ("0 11", None), ("8/10", None), ("I will rate.\n8 10", None), ("", None),
])  # fmt: skip
def test_replies_to_llava_bench(reply: str, label: str | None) -> None:
    assert LLAVA_BENCH.read(reply)[0] == (label or "unscored")


# ------------------------------------------------------------------------------------------------ a server that fails


def test_no_grade_is_made_up_lost_or_asked_for_twice(server: Judge, tmp_path: Path) -> None:
    """30 % of the replies are faults that hold another score, some answers never get one; stopped and started again."""
    pairs, never = helpful(400), set(range(50, 400, 100))
    spoil = faulty(0.3)
    server.fault = lambda n, attempt: "prose" if n in never else spoil(n, attempt)
    server.kill_at = 150
    with pytest.raises(Interrupted, match="same command again"):
        grader(server, cache=tmp_path / "c").grade_all(pairs)
    grades = grader(server, cache=tmp_path / "c").grade_all(pairs)
    assert [g.query_id for g in grades] == [q.id for q, _ in pairs]
    for n, grade in enumerate(grades):
        assert grade.scores == (() if n in never else (n % 11 / 10,)), (n, grade)
    assert set(server.answered) == set(range(400)) - never and set(server.answered.values()) == {1}
    assert server.requests.total() > 1.25 * server.answered.total()

    queries, responses = [q for q, _ in pairs], [r for _, r in pairs]
    scores = mm_vet.score(queries, responses, grades)
    true = [n % 11 / 10 for n in range(400)]
    assert at(scores.rows, "total", "score")["value"] == pytest.approx(
        sum(s for n, s in enumerate(true) if n not in never) / 396
    )
    assert scores.unscored == 4 and at(scores.rows, "total", "unscored")["value"] == 0.01
    assert at(scores.rows, "total", "score_worst_case")["value"] < at(scores.rows, "total", "score")["value"]
    with pytest.raises(DavspError, match=r"4 of 400 .* mm-vet/1:m \(1\.0 %"):
        check_unscored(grades, 0.005)


def test_llava_bench_by_the_server(server: Judge, tmp_path: Path) -> None:
    server.say = lambda n: f"8 {1 + n % 10}"
    spoil = faulty(0.3)
    server.fault = spoil
    pairs = [(Query(q.id, q.question, "benign", "llava_bench", "conv", q.group, "Red.", context="A kite."), r)
             for q, r in helpful(60)]  # fmt: skip
    queries, responses = [q for q, _ in pairs], [r for _, r in pairs]
    scores = llava_bench.score(queries, responses, grader(server, LLAVA_BENCH, tmp_path / "c"), model="m")
    assert [g.scores for g in scores.judgements] == [(8.0, 1 + n % 10) for n in range(60)]
    assert at(scores.rows, "total", "relative_score")["value"] == pytest.approx(5.5 / 8) and scores.unscored == 0
    assert {body["temperature"] for body in server.bodies} == {0.2}
    assert {body["max_tokens"] for body in server.bodies} == {1024}
    before = server.requests.total()
    again = llava_bench.score(queries, responses, grader(server, LLAVA_BENCH, tmp_path / "c"), model="m")
    assert again == scores and server.requests.total() == before


def test_mm_vet_rises_in_temperature_when_it_cannot_read(server: Judge) -> None:
    """Only a reply counts, not an error of the server."""
    server.fault = lambda n, attempt: {1: "prose", 2: "500", 3: "empty"}.get(attempt, "")
    (grade,) = grader(server).grade_all(helpful(1))
    assert grade.scores == (0.0,) and grade.reason == "the grader says so" and grade.raw == "0.0"
    assert [body["temperature"] for body in server.bodies] == [0.0, 0.5, 0.5, 1.0]
    ends = [body["messages"][0]["content"].endswith("(digit): ") for body in server.bodies]
    assert ends == [False, True, True, True]


def test_runs_are_asked_and_kept_apart(server: Judge, tmp_path: Path) -> None:
    grades = grader(server, cache=tmp_path / "c", runs=3).grade_all(helpful(4))
    assert [(g.query_id, g.run) for g in grades] == [(f"v1_{n}", run) for run in range(3) for n in range(4)]
    assert set(server.answered.values()) == {3}
    assert grader(server, cache=tmp_path / "c").grade_all(helpful(4)) == grades[:4]
    assert server.requests.total() == 12


def test_what_a_grader_sees_is_in_the_key(server: Judge, tmp_path: Path) -> None:
    (query, response), *_ = helpful(1)
    other = Query(query.id, query.question, "benign", "mm_vet", "rec", reference="6")
    for q in (query, other, query):
        grader(server, cache=tmp_path / "c").grade_all([(q, response)])
    assert server.requests.total() == 2


def test_a_pair_before_a_cut_is_whole(server: Judge) -> None:
    """The scores come first; a comment that is cut does no harm, a line that may be cut does."""
    server.say = lambda n: "8 9\nBecause" if n == 0 else "8 9"
    chat = grader(server, LLAVA_BENCH)
    for text, readable in (("8 9\nBecause", True), ("8 9", False), ("\n8 9", False)):
        reading = chat._read(chat.prompt, {"choices": [{"message": {"content": text}, "finish_reason": "length"}]})
        assert (getattr(reading, "label", None) == "8 9") == readable


def test_an_empty_answer_is_graded_not_left_out(server: Judge) -> None:
    """Left out, a defense that silences the model would look as useful as ever."""
    query = Query("v1_0", "what is item 7?", "benign", "mm_vet", "rec", reference="five")
    (grade,) = grader(server).grade_all([(query, Response("v1_0", "none", ""))])
    assert grade.scores == (0.7,) and server.requests[7] == 1


def test_judges_and_graders_are_not_mixed_up(server: Judge) -> None:
    with pytest.raises(DavspError, match="mm-vet/1:m grades helpful answers"):
        grader(server).judge_all(helpful(1))
    with pytest.raises(DavspError, match="davsp/1:m says safe or unsafe"):
        grader(server, DAVSP).grade_all(helpful(1))
    with pytest.raises(DavspError, match="runs must be 1 or more"):
        grader(server, runs=0)


def test_davsp_judge_grades_a_finished_run(server: Judge, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sixteen questions under two defenses; one answer can't be graded, and a second command asks for that alone."""
    queries = mm_vet.load(write(tmp_path / "sets", mm_vet=16, mm_safetybench=1, figstep=1, vlguard=1, mme=1) / "mm_vet")
    texts = {name: [f"item {start + i}: a kite" for i in range(16)] for name, start in (("none", 0), ("davsp", 100))}
    run = write_run(tmp_path / "run", queries, texts)
    write_json(run / "run.json", {"model": "?", "defenses": {name: {} for name in texts}, "published": True})
    server.say = lambda n: "1.0" if n < 100 else "0.5"
    server.fault = lambda n, attempt: "400" if n == 103 else ""
    command = ("judge", run, "--judge", "mm-vet", "--benchmark", f"mm_vet={tmp_path / 'sets/mm_vet'}",
               "--judge-url", server.url, "--judge-model", "m")  # fmt: skip
    assert davsp(*command) == 2
    assert "1 of 16 answers under 'davsp' are unscored by mm-vet/1:m" in capsys.readouterr().err
    rows = json.loads((run / "metrics-mm-vet-1-m.json").read_text())["rows"]
    value = {(r["defense"], r["metric"]): (r["value"], r["n"]) for r in rows if r["split"] == "total"}
    assert value["none", "score"] == (1.0, 16) and value["davsp", "score"] == (0.5, 15)
    assert value["davsp", "unscored"] == (1 / 16, 16) and value["davsp", "score_worst_case"] == (7.5 / 16, 16)
    assert value["davsp", "score_difference"] == (-0.5, 15)
    grades = read_jsonl(run / "grades-mm-vet-1-m.jsonl", Grade)
    assert len(grades) == 32 and [g.query_id for g in grades if not g.scores] == [queries[3].id]
    server.fault = lambda n, attempt: ""
    before = server.requests.total()
    assert davsp(*command) == 0 and server.requests.total() == before + 1


# ------------------------------------------------------------------------------------------------ without a model


@pytest.mark.parametrize(("reference", "answer", "score"), [
    ("5<OR>five", "Five.", 1.0), ("5<OR>five", "5", 1.0), ("5<OR>five", "not five", 0.0), ("five", "", 0.0),
    ("x<AND>y", "it is y", 0.5), ("x<AND>y", "y and x", 1.0), ("x<AND>y<OR>z", "z", 1.0), ("x<AND>y", "xy", 0.0),
    ("5<OR>", "", 0.0), ("5<OR>", "5", 1.0), ("5<AND>", "", 0.0), ("5<AND>", "a 5", 0.0), ("<OR>5", "...", 0.0),
])  # fmt: skip
def test_exact(reference: str, answer: str, score: float) -> None:
    assert exact(Query("q", "?", "benign", "b", reference=reference), answer)[0] == (score,)


def test_graders_without_a_reference_cannot_tell() -> None:
    query = Query("q", "?", "benign", "b")
    for bare in (query, replace(query, reference="..."), replace(query, reference=" - ")):
        assert exact(bare, "five")[0] == overlap(bare, "five")[0] == overlap(bare, "")[0] == ()
    (grade,) = grades_of([query], answers([query], ["five"]), overlap)
    assert (grade.judge, grade.scores, grade.reason) == ("overlap/2", (), "the query has no reference")


def test_grades_are_kept_in_files(tmp_path: Path) -> None:
    grades = [Grade("a", "none", "exact/1", (1.0,)), Grade("b", "none", "exact/1", (), "none", run=2)]
    write_jsonl(tmp_path / "g.jsonl", grades)
    assert read_jsonl(tmp_path / "g.jsonl", Grade) == grades
