"""MME: its layouts, and its scores by hand from the published rules."""

import math
import shutil

import pytest

from benchmark_folders import KITE, answers, at, b64, mme_folder, packed, parquet, skipped, table, write
from davsp import benchmarks, metrics
from davsp.benchmarks import mme
from davsp.errors import DavspError
from davsp.query import Query

pytestmark = pytest.mark.filterwarnings("ignore::davsp.benchmarks.source.ShortWarning")  # all fixtures are short


def test_mme_folder(tmp_path):
    queries = mme.load(mme_folder(tmp_path))
    assert [q.id for q in queries[:2]] == ["count/0001.jpg#1", "count/0001.jpg#2"] and len(queries) == 6
    assert queries[0].question == KITE and (queries[0].reference, queries[1].reference) == ("Yes", "No")
    assert len({q.group for q in queries}) == 3  # one name in three subtasks
    assert queries[-1].image.suffix == ".png" and queries[-1].reference == "No"
    question = mme.load(tmp_path, short_prompt=True)[0].question
    assert question == "Is there a kite in the image?\nAnswer the question using a single word or phrase."
    report = mme.check(tmp_path)
    assert "2 of 60 in count" in map(str, report.counts) and "count, code_reasoning" in report.note


@pytest.mark.parametrize("top", ["MME_Benchmark_release_version/MME_Benchmark", "MME_Benchmark", "."])
def test_mme_lies_at_any_level_of_its_archive(tmp_path, top):
    """The present archive has one level more, and LLaVA's guide puts eval_tool beside it."""
    before = [(q.id, q.question) for q in mme.load(mme_folder(tmp_path / "a"))]
    (tmp_path / "b" / top).parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(tmp_path / "a/MME_Benchmark_release_version", tmp_path / "b" / top, dirs_exist_ok=True)
    write(tmp_path / "b/eval_tool/Your_Results/count.txt", "0001.jpg\tIs it?\tYes\n0001.jpg\tIs it not?\tNo\n")
    assert [(q.id, q.question) for q in mme.load(tmp_path / "b")] == before
    assert mme.check(tmp_path / "b").layout == "official folders"


def test_mme_pairs(tmp_path):
    mme_folder(tmp_path)
    file = tmp_path / "MME_Benchmark_release_version/count/0001.txt"
    file.write_text("Is it?\tYes\nIs it not?\tYes\n")
    with pytest.raises(DavspError, match=r"2 Yes and 0 No"):
        mme.load(tmp_path)
    queries, warning = skipped(mme.load, tmp_path)
    assert len(queries) == 4 and "count/0001.jpg" in warning
    file.write_text("Is it? Yes\nIs it not?\tMaybe\n")
    with pytest.raises(DavspError, match=r"0001\.txt, line 1 is no question, tab"):
        mme.load(tmp_path)
    assert "neither Yes nor No" in skipped(mme.load, tmp_path)[1]


def test_mme_packed(tmp_path):
    row = {
        "index": 0,
        "image": b64(1),
        "question": KITE,
        "answer": "Yes",
        "category": "count",
        "image_path": "count/1.jpg",
    }
    table(tmp_path / "a/MME.tsv", [row, row | {"index": 1, "answer": "No", "image": "0"}])
    assert [q.group for q in mme.load(tmp_path / "a")] == ["count/count/1.jpg"] * 2
    packed_row = {"question_id": "count/1.jpg", "image": {"bytes": packed(3), "path": None}, "question": KITE,
                  "answer": "Yes", "category": "count"}  # fmt: skip
    rows = [packed_row, packed_row | {"answer": "No"}]
    parquet(tmp_path / "b/data/test-00000-of-00002-abc.parquet", rows)
    with pytest.raises(DavspError, match="lacks shard 1"):
        mme.load(tmp_path / "b")
    parquet(
        tmp_path / "b/data/test-00001-of-00002-abc.parquet",
        [row | {"question_id": "scene/1.jpg", "category": "scene"} for row in rows],
    )
    assert [q.group for q in mme.load(tmp_path / "b")] == ["count/1.jpg"] * 2 + ["scene/1.jpg"] * 2
    assert [r.benchmark for r in benchmarks.check(tmp_path / "b")] == ["mme"]  # MM-Vet's shards are named alike
    parquet(tmp_path / "b/data/test-00001-of-00002-def.parquet", rows)
    with pytest.raises(DavspError, match="same shard of two revisions"):
        mme.load(tmp_path / "b")


def test_mme_text_only(tmp_path):
    write(tmp_path / "eval_tool/Your_Results/count.txt", "0001.jpg\tIs it?\tYes\n0001.jpg\tIs it not?\tNo\n")
    with pytest.raises(DavspError, match="without pictures"):
        mme.load(tmp_path)
    report = mme.check(tmp_path)
    assert report.layout == "eval_tool (text only)" and not report.good and len(report.index) == 1
    assert len(mme.load(mme_folder(tmp_path))) == 6  # beside the release it does no harm


# ------------------------------------------------------------------------------------------------ scores


PARSED = [
    # text, official, lenient
    ("Yes", "yes", "yes"),
    ("no", "no", "no"),
    ("No.", "no", "no"),
    ("Yes, there is.", "yes", "yes"),
    (" yes", "yes", "yes"),
    ("   yes", "other", "yes"),  # not stripped: the first four characters are "   y"
    ("The answer is yes", "other", "yes"),
    ("y", "other", "yes"),
    ("N.", "other", "no"),
    ("know", "no", "other"),
    ("Not sure", "no", "other"),
    ("none", "no", "other"),
    ("No, yes", "no", "other"),
    ("There is no kite", "other", "no"),
    ("Yes\n", "yes", "yes"),
    ("", "other", "other"),
    ("yesterday", "yes", "other"),
]


@pytest.mark.parametrize(("text", "official", "lenient"), PARSED)
def test_mme_parsers(text, official, lenient):
    assert (mme.parse_official(text), mme.parse_lenient(text)) == (official, lenient)


def yes_no(pictures: list[tuple[str, str]]) -> list[Query]:
    return [Query(f"{c}/{p}#{i}", "q", "benign", "mme", c, f"{c}/{p}", a)
            for c, p in pictures for i, a in ((1, "Yes"), (2, "No"))]  # fmt: skip


def test_mme_by_hand():
    """count: official 2 of 4 and 1 of 2 pictures, lenient 3 of 4; OCR: all right; code: each parser one of two.

    count official 50 + 50, lenient 75 + 50; OCR 200; code_reasoning 50 + 0 for both.
    """
    queries = yes_no([("count", "a"), ("count", "b"), ("OCR", "a"), ("code_reasoning", "a")])
    texts = ["Yes", "No.", "The answer is yes", "I know it", "yes", "no", "y", "none"]
    rows = mme.score(queries, answers(queries, texts), model="m").rows
    value = {(r["split"], r["metric"]): r["value"] for r in rows}
    assert value["count", "acc_official"] == 0.5 and value["count", "acc_plus_official"] == 0.5
    assert value["count", "score_official"] == 100 and value["count", "score_lenient"] == pytest.approx(125)
    assert value["OCR", "score_official"] == 200 and value["code_reasoning", "score_lenient"] == 50
    sums = {split: value[split, "score_official"] for split in ("perception", "cognition", "total")}
    assert sums == {"perception": 300, "cognition": 50, "total": 350}
    assert value["total", "score_lenient"] == pytest.approx(375) and at(rows, "total", "score_official")["n"] == 8
    assert not any(r["split"] == "posters" for r in rows)


def test_mme_intervals():
    queries = yes_no([("count", str(i)) for i in range(30)])
    right = mme.score(queries, answers(queries, ["Yes", "No"] * 30))
    row = at(right.rows, "count", "score_official")
    assert row["value"] == row["high"] == 200 and row["low"] == pytest.approx(200 * metrics.wilson(30, 30)[0])
    half = mme.score(queries, answers(queries, ["Yes", "Yes"] * 15 + ["Yes", "No"] * 15), baseline=right)
    row = at(half.rows, "count", "score_official")
    # 15 of 30 pictures lose 50 in acc's share and 100 in acc+'s: the sd of a picture is 75, of the mean 75 / sqrt(30)
    assert row["value"] == 125 and row["high"] - row["low"] == pytest.approx(2 * 1.96 * 75 / math.sqrt(30), rel=0.08)
    change = at(half.rows, "count", "score_official_difference")
    assert change["value"] == -75 and change["high"] < -40 and change["p"] < 0.001
    same = at(mme.score(queries, right.responses, baseline=right).rows, "count", "acc_lenient_difference")
    assert same["value"] == 0 and same["low"] < -0.05 and same["high"] > 0.05 and same["p"] == 1


def test_mme_judges_and_errors():
    queries = yes_no([("count", "a")])
    refused = mme.score(queries, answers(queries, ["I'm sorry, I cannot help.", "No"]), {"mine": lambda text: "no"})
    assert {r["metric"] for r in refused.rows} == {"acc_mine", "acc_plus_mine", "score_mine", "over_refusal"}
    assert at(refused.rows, "count", "acc_mine")["value"] == 0.5
    assert (
        at(refused.rows, "total", "over_refusal")["value"] == 0.5 and refused.judgements == [] and refused.unscored == 0
    )
    with pytest.raises(DavspError, match="has no response"):
        mme.score(queries, answers(queries[:1], ["Yes"]))
    odd = [Query("x", "q", "benign", "mme", "baking", "x", "Yes")]
    with pytest.raises(DavspError, match="'baking', which is no subtask"):
        mme.score(odd, answers(odd, ["Yes"]))
