"""MM-Vet: its layouts, and its scores by hand from the published rules."""

import pytest

from benchmark_folders import answers, at, b64, packed, parquet, skipped, table, vet_folder, write
from davsp import metrics
from davsp.benchmarks import mm_vet
from davsp.errors import DavspError
from davsp.judges.graders import exact
from davsp.query import Grade, Query

pytestmark = pytest.mark.filterwarnings("ignore::davsp.benchmarks.source.ShortWarning")  # all fixtures are short


@pytest.mark.parametrize("top", ["mm-vet", "mmvet", "."])
def test_mm_vet(tmp_path, top):
    one, two = mm_vet.load(vet_folder(tmp_path, top))
    assert (one.id, one.category, one.group, one.label) == ("v1_0", "ocr+math", "v1_0.png", "benign")
    assert one.reference == "5<OR>five" and one.answers == ("5", "five") and two.answers == ()
    assert two.group == one.group
    counts = [str(count) for count in mm_vet.check(tmp_path).counts]
    assert "2 of 218 in questions" in counts and "1 of 26 in math" in counts and "1 of 150 in rec" in counts


def test_an_id_twice_in_one_object(tmp_path):
    """json itself would keep the last one without a word."""
    file = vet_folder(tmp_path) / "mm-vet/mm-vet.json"
    file.write_text(file.read_text().replace('"v1_1"', '"v1_0"'))
    with pytest.raises(DavspError, match=r"mm-vet\.json: the id 'v1_0' occurs twice"):
        mm_vet.load(tmp_path)
    queries, warning = skipped(mm_vet.load, tmp_path)
    assert [q.question for q in queries] == ["What is 2+3?"] and "twice" in warning
    write(file, {"v1_0": "text"})
    with pytest.raises(DavspError, match="question v1_0 is no object"):
        mm_vet.load(tmp_path)
    write(file, [])
    with pytest.raises(DavspError, match="no object of questions by id"):
        mm_vet.load(tmp_path)


def test_mm_vet_packed(tmp_path):
    row = {"index": "v1_0", "image": b64(1), "question": "What?", "answer": "5", "category": "ocr,math"}
    table(tmp_path / "a/MMVet.tsv", [row, row | {"index": "v1_1", "category": "cooking"}])
    with pytest.raises(DavspError, match="unknown capability 'cooking'"):
        mm_vet.load(tmp_path / "a")
    assert skipped(mm_vet.load, tmp_path / "a")[0][0].category == "ocr+math"
    image = {"bytes": packed(2), "path": "x.png"}
    rows = [
        {"question_id": f"v1_{i}", "image": image, "question": "What?", "answer": "5", "capability": "rec,know"}
        for i in (0, 1)
    ]
    parquet(tmp_path / "b/data/test-00000-of-00001.parquet", rows)
    queries = mm_vet.load(tmp_path / "b")
    assert queries[1].id == "v1_1" and queries[0].category == "rec+know" and queries[0].group == queries[1].group
    parquet(tmp_path / "c/data/test-00000-of-00001.parquet", [{"image": image, "question": "What?", "answer": "5"}])
    with pytest.raises(DavspError, match="no column 'capability'"):
        mm_vet.load(tmp_path / "c")


# ------------------------------------------------------------------------------------------------ scores


def vet() -> list[Query]:
    kinds = ["ocr+math", "rec", "rec+ocr"]
    return [Query(f"v1_{i}", f"q{i}", "benign", "mm_vet", k, f"p{i}", "5<OR>five") for i, k in enumerate(kinds)]


def graded(*runs: tuple[float | None, ...], raw: str = "") -> list[Grade]:
    return [
        Grade(f"v1_{i}", "d", "fake", () if score is None else (score,), raw=raw, run=number)
        for number, run in enumerate(runs)
        for i, score in enumerate(run)
    ]


def score(*runs: tuple[float | None, ...], mode: str = "sound", before: list[Grade] | None = None, raw: str = ""):
    responses = answers(vet(), ["a", "b", "c"])
    baseline = None if before is None else mm_vet.score(vet(), responses, before, mode=mode)
    return mm_vet.score(vet(), responses, graded(*runs, raw=raw), model="m", baseline=baseline, mode=mode)


def test_mm_vet_by_hand():
    scores = score((1.0, 0.5, 0.0))
    value = {r["split"]: r["value"] for r in scores.rows if r["metric"] == "score"}
    assert value == {
        "total": 0.5, "rec": 0.25, "ocr": 0.5, "know": None, "gen": None, "spat": None, "math": 1.0,
        "only ocr+math": 1.0, "only rec": 0.5, "only rec+ocr": 0.0,
    }  # fmt: skip
    assert "std" not in at(scores.rows, "total", "score") and at(scores.rows, "total", "unscored")["value"] == 0
    low, high = (at(scores.rows, "math", "score")[end] for end in ("low", "high"))
    assert (low, high) == pytest.approx(metrics.wilson(1, 1))  # one question proves little
    assert at(scores.rows, "total", "over_refusal")["value"] == 0 and scores.unscored == 0


def test_mm_vet_runs_and_unscored():
    total = at(score((1.0, 0.5, 0.0), (1.0, 0.7, 0.4)).rows, "total", "score")
    assert total["value"] == pytest.approx(0.6) and total["std"] == pytest.approx(0.1)
    sound = score((1.0, 0.5, None))
    assert at(sound.rows, "total", "score")["value"] == 0.75 and at(sound.rows, "total", "score")["n"] == 2
    assert sound.unscored == 1 and at(sound.rows, "total", "unscored")["value"] == pytest.approx(1 / 3)
    worst = at(sound.rows, "total", "score_worst_case")
    assert (worst["value"], worst["n"]) == (0.5, 3)
    official = score((1.0, 0.5, None), mode="official").rows
    assert at(official, "total", "score_official")["value"] == 0.5
    nothing = score((None, None, None)).rows
    assert at(nothing, "total", "score")["value"] is None and at(nothing, "total", "unscored")["value"] == 1


def test_mm_vet_difference_is_over_pairs():
    rows = score((1.0, 0.5, 0.2), before=graded((0.5, 0.5, None))).rows
    change = at(rows, "total", "score_difference")
    assert change["value"] == pytest.approx(0.25) and change["n"] == 2
    assert not [r for r in rows if r["metric"] == "score_worst_case_difference"]


@pytest.mark.parametrize(
    ("raw", "official"), [("0.5", 0.5), ("1.0 good", 1.0), ("1.5", 0), ("nan", 0), ("good", 0), ("", 0)]
)
def test_mm_vet_official_reads_the_first_word(raw, official):
    assert mm_vet.parse_official(raw) == official
    rows = score((None, None, None), mode="official", raw=raw).rows
    assert at(rows, "total", "score_official")["value"] == official


def test_mm_vet_with_a_grader():
    answer = {"q0": "FIVE.", "q1": "four", "q2": ""}
    scores = mm_vet.score(vet(), answers(vet(), list(answer.values())), exact)
    assert [g.scores for g in scores.judgements] == [(1.0,), (0.0,), (0.0,)] and scores.judgements[0].judge == "exact/2"


def test_mm_vet_errors():
    with pytest.raises(DavspError, match=r"the grader gave \(2.0,\)"):
        score((2.0, 1.0, 1.0))
    with pytest.raises(DavspError, match="v1_2 has no response"):
        mm_vet.score(vet(), answers(vet()[:2], ["a"] * 2), graded((1.0, 1.0, 1.0)))
    with pytest.raises(DavspError, match="v1_2 is missing in a run"):
        score((1.0, 1.0, 1.0), (1.0, 1.0))
    with pytest.raises(DavspError, match="v1_0 is missing in a run"):
        mm_vet.score(vet(), answers(vet(), ["a"] * 3), [])
    with pytest.raises(DavspError, match="mode 'kind'"):
        score((1.0, 1.0, 1.0), mode="kind")
