"""MM-SafetyBench: its layouts and splits."""

import json
import shutil

import numpy as np
import pytest
from PIL import ImageFont

from benchmark_folders import BREAD, MONO, TYPES, b64, lines, packed, parquet, safety_folder, skipped, table, write
from davsp import benchmarks
from davsp.benchmarks import mm_safetybench, source
from davsp.errors import DavspError

pytestmark = pytest.mark.filterwarnings("ignore::davsp.benchmarks.source.ShortWarning")  # all fixtures are short


@pytest.mark.parametrize("pictures", ["data/imgs", "MM-SafetyBench(imgs)", "images"])
def test_safetybench_folder(tmp_path, pictures):
    queries = mm_safetybench.load(safety_folder(tmp_path, pictures))
    assert len(queries) == 9 and {q.benchmark for q in queries} == {"sd", "sd_typo", "typo"}
    by_type = {q.benchmark: q for q in queries if q.group == "01-Illegal_Activitiy/1"}
    assert by_type["sd"].question == BREAD["Rephrased Question(SD)"]
    assert by_type["typo"].question == by_type["sd_typo"].question == BREAD["Rephrased Question"]
    assert {q.context for q in queries} == {BREAD["Changed Question"]}
    assert by_type["sd_typo"].image == tmp_path / pictures / "01-Illegal_Activitiy/SD_TYPO/1.jpg"
    assert all(q.label == "malicious" for q in queries) and len({q.group for q in queries}) == 3
    words = mm_safetybench.load(tmp_path, types=["text"])
    assert len(words) == 3 and words[0].image is None and words[0].question == BREAD["Changed Question"]


@pytest.mark.parametrize("pictures", ["data/imgs/MM-SafetyBench(imgs)", "imgs/MM-SafetyBench(imgs)"])
def test_the_archive_within_the_folder_of_the_pictures(tmp_path, pictures):
    """It has a top folder of its own, and the guide says to unpack it under data/imgs."""
    assert len(mm_safetybench.load(safety_folder(tmp_path, pictures))) == 9
    report = mm_safetybench.check(tmp_path)
    assert not report.broken and "2 of 97 in sd 01-Illegal_Activitiy" in map(str, report.counts)


def test_check_and_load_agree_on_pictures_at_another_place(tmp_path):
    safety_folder(tmp_path, "data/imgs/odd")
    (sentence,) = mm_safetybench.check(tmp_path).broken
    with pytest.raises(DavspError, match="holds no picture as <scenario>/SD, SD_TYPO or TYPO") as refused:
        mm_safetybench.load(tmp_path)
    assert str(refused.value).startswith(sentence)
    with pytest.raises(DavspError, match="holds no picture as"):
        mm_safetybench.load(tmp_path, types=["text"])


def test_check_says_how_to_ask_for_what_is_here(tmp_path):
    safety_folder(tmp_path)
    for folder in (tmp_path / "data/imgs").glob("*/SD"):
        shutil.rmtree(folder)
    assert (
        "no pictures of SD here, so davsp eval needs --type sd_typo --type typo" in mm_safetybench.check(tmp_path).note
    )
    with pytest.raises(DavspError, match=r"holds no picture of SD; .*--type sd_typo --type typo"):
        mm_safetybench.load(tmp_path)
    assert len(mm_safetybench.load(tmp_path, types=["sd_typo", "typo"])) == 6
    queries, warning = skipped(mm_safetybench.load, tmp_path)
    assert len(queries) == 6 and "holds no picture of SD" in warning
    shutil.rmtree(tmp_path / "data/imgs")
    assert "--type text, or --rebuild --type typo" in mm_safetybench.check(tmp_path).note


def test_safetybench_alias_and_png(tmp_path):
    safety_folder(tmp_path, folder="01-Illegal_Activity")
    jpg = tmp_path / "data/imgs/02-HateSpeech/SD/0.jpg"
    jpg.rename(jpg.with_suffix(".png"))
    queries = mm_safetybench.load(tmp_path)
    assert len(queries) == 9 and {q.category for q in queries} == {"01-Illegal_Activitiy", "02-HateSpeech"}
    assert mm_safetybench.scenario("Illegal_Activity") == "01-Illegal_Activitiy"
    assert mm_safetybench.scenario("03-HateSpeech") is None and mm_safetybench.scenario("09-Baking") is None


def test_safetybench_splits(tmp_path):
    safety_folder(tmp_path)
    write(tmp_path / "TinyVersion_ID_List.json", [{"Scenario": "01-Illegal_Activitiy", "Sampled_ID_List": [1]}])
    assert {q.group for q in mm_safetybench.load(tmp_path, "tiny")} == {"01-Illegal_Activitiy/1"}
    write(tmp_path / "TinyVersion_ID_List.json", [{"Scenario": "01-Illegal_Activitiy", "Sampled_ID_List": [1, 7]}])
    with pytest.raises(DavspError, match="lists question 7 of 01-Illegal_Activitiy, which is not in"):
        mm_safetybench.load(tmp_path, "tiny")
    for split in ("train", "dev"):
        with pytest.raises(DavspError, match=split):
            mm_safetybench.load(tmp_path, split)


def test_safetybench_adashield(tmp_path):
    safety_folder(tmp_path, "data/QueryRelated")
    top = "data/QueryRelated/01-Illegal_Activitiy/SD"
    parts = {"train": [f"{top}/0.jpg"], "valid": [], "test": [f"{top}/1.jpg"]}
    lines(tmp_path / "data/datasplit/query_related.jsonl", [{"01-Illegal_Activitiy": parts}])
    assert [q.id for q in mm_safetybench.load(tmp_path, "train")] == ["sd/01-Illegal_Activitiy/0"]
    assert [q.id for q in mm_safetybench.load(tmp_path)] == ["sd/01-Illegal_Activitiy/1"]
    assert len(mm_safetybench.load(tmp_path, "all")) == 9
    assert mm_safetybench.check(tmp_path).layout == "AdaShield's mirror"
    for file in (tmp_path / "data/processed_questions").iterdir():
        file.unlink()
    (tmp_path / "data/processed_questions").rmdir()
    with pytest.raises(DavspError, match="processed_questions"):
        mm_safetybench.load(tmp_path)


def test_safetybench_parquet(tmp_path):
    for name in mm_safetybench.COUNTS:
        for kind, colour in TYPES.items():
            rows = [{"id": "0", "question": f"{kind}?", "image": {"bytes": packed(colour), "path": None}}]
            parquet(tmp_path / f"data/{name[3:]}/{kind}.parquet", rows)
        parquet(tmp_path / f"data/{name[3:]}/Text_only.parquet", [{"id": "0", "question": "plain?", "image": None}])
    queries = mm_safetybench.load(tmp_path)
    assert len(queries) == 39 and queries[0].picture().size == (8, 8) and queries[0].question == "SD_TYPO?"
    assert queries[0].id == "sd_typo/01-Illegal_Activitiy/0"
    assert mm_safetybench.load(tmp_path, types=["text"])[0].image is None
    (tmp_path / "data/Fraud/SD.parquet").unlink()
    with pytest.raises(DavspError, match=r"Fraud/SD\.parquet"):
        mm_safetybench.load(tmp_path)
    report = mm_safetybench.check(tmp_path)
    assert report.layout == "parquet" and str(report.counts[0]) == "1 of 97 in sd_typo 01-Illegal_Activitiy"
    with pytest.raises(DavspError, match="key phrases"):
        mm_safetybench.load(tmp_path, rebuild=True)
    (tmp_path / "data/Fraud/TYPO.parquet").write_bytes(b"no parquet")
    with pytest.raises(DavspError, match="no readable parquet"):
        mm_safetybench.load(tmp_path, types=["typo"])


def test_safetybench_tsv(tmp_path):
    row = {"index": 0, "image": b64(1), "question": "How?", "answer": "", "category": "02-HateSpeech"}
    table(tmp_path / "MMSafetyBench.tsv", [row, row | {"index": 1, "image": "0"}])  # the picture of row 0
    queries = mm_safetybench.load(tmp_path)
    assert [q.id for q in queries] == ["mm_safetybench/02-HateSpeech/0", "mm_safetybench/02-HateSpeech/1"]
    assert queries[0].picture().tobytes() == queries[1].picture().tobytes()
    with pytest.raises(DavspError, match="only all questions"):
        mm_safetybench.load(tmp_path, "tiny")
    table(tmp_path / "MMSafetyBench.tsv", [row, row | {"index": 1, "category": "14-Baking"}])
    with pytest.raises(DavspError, match=r"MMSafetyBench\.tsv, row 3 is of the unknown category '14-Baking'"):
        mm_safetybench.load(tmp_path)
    queries, warning = skipped(mm_safetybench.load, tmp_path)
    assert len(queries) == 1 and "14-Baking" in warning


def test_typo_is_rebuilt_and_says_in_which_font(tmp_path, monkeypatch):
    safety_folder(tmp_path)
    monkeypatch.setattr(mm_safetybench, "FONTS", ())
    queries = mm_safetybench.load(tmp_path, types=["typo", "sd"], rebuild=True)
    assert [q.benchmark for q in queries[:2]] == ["typo_rebuilt_Aileron"] * 2 and queries[-1].benchmark == "sd"
    assert benchmarks.data_set("typo_rebuilt_Aileron_embedded") == "mm_safetybench"
    assert queries[0].picture().size == (1024, 180) and "here in Aileron" in mm_safetybench.check(tmp_path).note
    monkeypatch.setattr(mm_safetybench, "FONTS", ("no-such-font.ttf", str(MONO)))
    assert mm_safetybench.load(tmp_path, types=["typo"], rebuild=True)[0].benchmark == "typo_rebuilt_DejaVuSansMono"
    monkeypatch.setattr(ImageFont.FreeTypeFont, "getname", lambda self: ("Arial", "Regular"))
    assert mm_safetybench.load(tmp_path, types=["typo"], rebuild=True)[0].benchmark == "typo_rebuilt"
    assert "here in Arial" in mm_safetybench.check(tmp_path).note


def test_typo_is_laid_out_as_the_authors_script_does():
    """creation/2_img_process.py by hand, in a font of one width: 54 pixels a letter, so 18 of them are too long for 1,024."""
    face = ImageFont.truetype(str(MONO), mm_safetybench.SIZE)
    assert face.getlength("a") == pytest.approx(54, abs=0.5)
    assert mm_safetybench.lines_of("aaaa bbbb cccc dddd", face) == ["aaaa bbbb cccc", " dddd"]  # the space stays
    assert mm_safetybench.lines_of("aaaa bbbb cccc dd", face) == ["aaaa bbbb cccc dd"]
    assert mm_safetybench.lines_of("a" * 30 + " b", face) == ["a" * 30, " b"]  # a long word is not broken
    one, two = (mm_safetybench.render(text, face) for text in ("aaaa", "aaaa bbbb cccc dddd"))
    assert one.size == (1024, 180) and two.size == (1024, 270)
    dark = np.asarray(one.convert("L")) < 128
    assert dark[:, :10].any() and not dark[:, 220:].any() and not dark[:45].any()  # left, from (0, 45)


def test_a_tsv_takes_neither_types_nor_rebuild(tmp_path):
    row = {"index": 0, "image": b64(0), "question": "q", "answer": "", "category": "02-HateSpeech"}
    table(tmp_path / "MMSafetyBench.tsv", [row])
    assert len(mm_safetybench.load(tmp_path)) == 1
    for options in ({"types": ["sd"]}, {"rebuild": True}):
        with pytest.raises(DavspError, match=r"MMSafetyBench.tsv names neither picture types nor key phrases"):
            mm_safetybench.load(tmp_path, **options)


def test_short_download_is_counted(tmp_path):
    safety_folder(tmp_path)
    (tmp_path / "data/imgs/01-Illegal_Activitiy/SD/1.jpg").unlink()
    report = mm_safetybench.check(tmp_path)
    counts = {count.name: count for count in report.counts}
    assert str(counts["sd 01-Illegal_Activitiy"]) == "1 of 97 in sd 01-Illegal_Activitiy"
    assert counts["typo 01-Illegal_Activitiy"].here == 2 and counts["sd 13-Gov_Decision"].here == 0
    assert not report.good and len(report.broken) == 1 and "SD/1.jpg is missing" in report.broken[0]
    index = report.index["data/processed_questions/02-HateSpeech.json"]
    import hashlib

    assert index == hashlib.sha256(json.dumps({"0": BREAD}).encode()).hexdigest()


def test_a_short_download_is_told_when_it_is_loaded(tmp_path, recwarn, monkeypatch):
    safety_folder(tmp_path)
    with pytest.warns(
        source.ShortWarning, match=r"0 of 44 in sd 03-Malware_Generation.* and 10 more; `davsp data check"
    ):
        mm_safetybench.load(tmp_path, types=["sd"], limit=1)
    write(tmp_path / "TinyVersion_ID_List.json", [{"Scenario": "01-Illegal_Activitiy", "Sampled_ID_List": [1]}])
    monkeypatch.setattr(mm_safetybench, "COUNTS", {"01-Illegal_Activitiy": 2, "02-HateSpeech": 1})
    recwarn.clear()
    assert len(mm_safetybench.load(tmp_path)) == 9 and len(mm_safetybench.load(tmp_path, "tiny")) == 3
    assert not recwarn


def test_a_whole_download_is_good(tmp_path, monkeypatch):
    monkeypatch.setattr(mm_safetybench, "COUNTS", {"01-Illegal_Activitiy": 2, "02-HateSpeech": 1})
    assert mm_safetybench.check(safety_folder(tmp_path)).good
