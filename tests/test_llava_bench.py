"""LLaVA-Bench: its layouts, and its scores by hand from the published rules."""

from dataclasses import replace

import pytest

from benchmark_folders import answers, at, b64, bench_folder, lines, packed, parquet, table
from davsp.benchmarks import llava_bench
from davsp.errors import DavspError
from davsp.judges.graders import overlap
from davsp.query import Grade, Query

pytestmark = pytest.mark.filterwarnings("ignore::davsp.benchmarks.source.ShortWarning")  # all fixtures are short


def test_llava_bench(tmp_path):
    queries = llava_bench.load(bench_folder(tmp_path))
    assert [(q.id, q.category, q.reference) for q in queries] == [
        ("0", "conv", "Answer 0."),
        ("1", "detail", "Answer 1."),
    ]
    assert queries[0].group == "001.jpg" and {q.context for q in queries} == {"A kite.\nA boat."}
    assert "1 of 17 in conv" in map(str, llava_bench.check(tmp_path).counts)
    lines(tmp_path / "answers_gpt4.jsonl", [{"question_id": 0, "text": "Answer."}])
    with pytest.raises(DavspError, match=r"answers_gpt4\.jsonl has nothing on 1"):
        llava_bench.load(tmp_path)


def test_llava_bench_packed(tmp_path):
    row = {
        "index": 3, "image": b64(1), "question": "What?", "gpt4_ans": "A kite.", "caption": "A boat.", "category": "conv",
    }  # fmt: skip
    table(tmp_path / "a/LLaVABench.tsv", [row])
    (query,) = llava_bench.load(tmp_path / "a")
    assert (query.reference, query.context) == ("A kite.", "A boat.")
    row = {"question_id": 3, "image": {"bytes": packed(1), "path": ""}, "question": "What?", "gpt_answer": "A kite.",
           "caption": ["A", "B"], "category": "complex"}  # fmt: skip
    parquet(tmp_path / "b/data/train-00000-of-00001.parquet", [row])
    (query,) = llava_bench.load(tmp_path / "b")
    assert (query.category, query.context) == ("complex", "A\nB")


# ------------------------------------------------------------------------------------------------ scores


def bench() -> list[Query]:
    return [Query(str(i), "q", "benign", "llava_bench", c, f"p{i}") for i, c in enumerate(["conv", "conv", "complex"])]


def graded(*pairs: tuple[float, float] | None, raw: str = "") -> list[Grade]:
    return [Grade(str(i), "d", "fake", pair or (), raw=raw) for i, pair in enumerate(pairs)]


def score(*pairs: tuple[float, float] | None, mode: str = "sound", before: list[Grade] | None = None, raw: str = ""):
    responses = answers(bench(), ["a", "b", "c"])
    baseline = None if before is None else llava_bench.score(bench(), responses, before, mode=mode)
    return llava_bench.score(bench(), responses, graded(*pairs, raw=raw), model="m", baseline=baseline, mode=mode)


def test_llava_bench_by_hand():
    """conv (4 + 8) / (8 + 10), complex 8 / 8, total 20 / 26 and not the mean of the two."""
    scores = score((8, 4), (10, 8), (8, 8))
    value = {r["split"]: r["value"] for r in scores.rows if r["metric"] == "relative_score"}
    assert value == {"conv": pytest.approx(12 / 18), "detail": None, "complex": 1.0, "total": pytest.approx(20 / 26)}
    total = at(scores.rows, "total", "relative_score")
    assert total["low"] < 20 / 26 < total["high"]
    assert at(scores.rows, "complex", "relative_score")["low"] is None  # one picture has no spread
    assert at(scores.rows, "total", "unscored")["value"] == 0 and at(scores.rows, "total", "over_refusal")["value"] == 0


def test_llava_bench_failed_pairs():
    sound = score((8.0, 4.0), None, (8.0, 8.0))
    assert at(sound.rows, "conv", "relative_score")["value"] == 0.5
    assert at(sound.rows, "total", "relative_score")["n"] == 2 and sound.unscored == 1
    assert at(sound.rows, "total", "unscored")["value"] == pytest.approx(1 / 3)
    worst = at(sound.rows, "total", "relative_score_worst_case")
    assert (worst["value"], worst["n"]) == (pytest.approx(13 / 26), 3)  # the failed pair as (10, 1)
    official = score((8.0, 4.0), None, (8.0, 8.0), mode="official").rows
    # conv: mean references (8 - 1) / 2 = 3.5, answers (4 - 1) / 2 = 1.5, ratio 42.857... % to one decimal
    assert at(official, "conv", "relative_score_official")["value"] == pytest.approx(0.429)
    assert at(official, "total", "relative_score_official")["value"] == pytest.approx(0.733)  # 11 / 15


def test_llava_bench_difference():
    rows = score((8, 4), (10, 8), (8, 8), before=graded((8, 8), (10, 8), None)).rows
    change = at(rows, "total", "relative_score_difference")
    assert change["value"] == pytest.approx(12 / 18 - 16 / 18) and change["n"] == 2
    assert not [r for r in rows if r["metric"] == "relative_score_worst_case_difference"]


@pytest.mark.parametrize(("reply", "official"), [
    ("8 10\nBecause.", (8, 10)),
    ("8,10", (8, 10)),
    ("8, 10", (-1, -1)),
    ("8 10 ", (-1, -1)),
    ("\n8 10", (-1, -1)),
    ("7.5 9", (7.5, 9)),
    ("Scores: 8 10", (-1, -1)),
    ("8 10 9", (-1, -1)),
    ("8", (-1, -1)),
    ("0 11", (0, 11)),
    ("", (-1, -1)),
])  # fmt: skip
def test_llava_bench_official_reads_single_spaces(reply, official):
    assert llava_bench.parse_official(reply) == official


def test_llava_bench_official_reads_the_reply_again():
    """The sound reader took "8, 10"; the official one fails on it, and its references then have the mean -1."""
    with pytest.raises(DavspError, match="mean score -1"):
        score((8, 10), (8, 10), (8, 10), mode="official", raw="8, 10")
    rows = score(None, None, None, mode="official", raw="8 11").rows
    assert at(rows, "total", "relative_score_official")["value"] == pytest.approx(1.375)


def test_llava_bench_with_a_grader():
    queries = [replace(q, reference="a red kite") for q in bench()]
    scores = llava_bench.score(queries, answers(queries, ["a red kite", "", "a kite"]), overlap)
    assert [g.scores for g in scores.judgements] == [(10, 10), (10, 1), (10, pytest.approx(1 + 9 * 4 / 5))]


def test_llava_bench_errors():
    with pytest.raises(DavspError, match="2 has no grade"):
        score((8, 4), (10, 8))
    with pytest.raises(DavspError, match="lies between 1 and 10"):
        score((8, -1), (10, 8), (8, 8))
    with pytest.raises(DavspError, match="mean score -1"):
        score(None, None, None, mode="official")
