"""VLGuard: its layout."""

import pytest

from benchmark_folders import guard_folder, guard_rows, write
from davsp.benchmarks import vlguard
from davsp.errors import DavspError

pytestmark = pytest.mark.filterwarnings("ignore::davsp.benchmarks.source.ShortWarning")  # all fixtures are short


@pytest.mark.parametrize("lead", ["test/", ""])
def test_vlguard(tmp_path, lead):
    query_of = {q.id: q for q in vlguard.load(guard_folder(tmp_path, guard_rows(), lead=lead))}
    assert len(query_of) == 5
    harm, odd, kind = query_of["unsafes/x1"], query_of["safe_unsafes/x3"], query_of["safe_safes/x3"]
    assert (harm.label, harm.category, harm.benchmark) == ("malicious", "risky behavior/political", "vlguard_unsafes")
    assert (odd.label, odd.question) == ("malicious", "Do something odd.")  # found by key, not by position
    assert (kind.label, kind.question, kind.reference) == ("benign", "What colour is the kite?", "Red.")
    assert odd.group == kind.group == "privacyAlert/c.jpg" and odd.category == "privacyAlert"
    assert [q.benchmark for q in vlguard.load(tmp_path, subsets=["safe_safes"])] == ["vlguard_safe_safes"] * 2
    with pytest.raises(DavspError, match="no vlguard"):
        vlguard.load(tmp_path, "train")
    report = vlguard.check(tmp_path)
    assert "1 of 442 in test unsafes" in map(str, report.counts) and "no train.json" in report.note
    assert "1 of 57 in test risky behavior/political" in map(str, report.counts) and report.broken == ()


def test_vlguard_bad_rows(tmp_path):
    rows = guard_rows()
    guard_folder(tmp_path, [*rows, rows[0] | {"harmful_category": "baking"}])
    with pytest.raises(DavspError, match="unknown category 'baking/political'"):
        vlguard.load(tmp_path)
    guard_folder(tmp_path, [*rows, rows[0]])
    with pytest.raises(DavspError, match="'unsafes/x1' occurs twice"):
        vlguard.load(tmp_path)
    guard_folder(tmp_path, [*rows, rows[1] | {"id": "x4", "instr-resp": rows[1]["instr-resp"][:1]}])
    with pytest.raises(DavspError, match="item 4 has not the instructions"):
        vlguard.load(tmp_path)
    write(tmp_path / "test.json", [*rows, {"id": "x5"}])
    with pytest.raises(DavspError, match="item 4 lacks image, safe, instr-resp"):
        vlguard.load(tmp_path)
    with pytest.raises(DavspError, match="subset 'odd'"):
        vlguard.load(tmp_path, subsets=["odd"])
    guard_folder(tmp_path, [*rows, rows[0]], "train", "train/")  # published so: one picture twice
    assert [q.id for q in vlguard.load(tmp_path, "train", subsets=["unsafes"])] == ["unsafes/x1", "unsafes/x1~2"]


def test_a_picture_in_both_splits_is_no_fault(tmp_path, monkeypatch):
    """Eight published test pictures, with their ids, are in train.json, too: each split is looked at by itself."""
    monkeypatch.setattr(
        vlguard, "COUNTS", {split: {"unsafes": 1, "safe_unsafes": 2, "safe_safes": 2} for split in vlguard.COUNTS}
    )
    for split in vlguard.COUNTS:
        guard_folder(tmp_path, guard_rows(), split, f"{split}/")
    report = vlguard.check(tmp_path)
    assert report.good and [str(count) for count in report.counts if "safe_safes" in count.name] == [
        "2 of 2 in train safe_safes", "2 of 2 in test safe_safes"
    ]  # fmt: skip
    assert set(report.index) == {"train.json", "test.json"} and not report.note
    (tmp_path / "test/privacyAlert/b.jpg").unlink()
    broken = vlguard.check(tmp_path).broken
    assert len(broken) == 1 and "test/privacyAlert/b.jpg is missing" in broken[0]
    rows = guard_rows()
    guard_folder(tmp_path, [*rows, rows[0]])
    assert "'unsafes/x1' occurs twice" in vlguard.check(tmp_path).broken[0]


def test_an_archive_unpacked_into_a_folder_of_its_name(tmp_path):
    guard_folder(tmp_path, guard_rows(), lead="test/test/")
    assert {q.image.parent.parent for q in vlguard.load(tmp_path)} == {tmp_path / "test/test"}
