"""`davsp data check`: published counts, official files by their hash, and what is missing or broken."""

import re
import shutil

import pytest
from typer.testing import CliRunner

from benchmark_folders import FOLDERS, change, figstep_clone, mme_folder, safety_folder, vet_folder, write
from davsp import benchmarks
from davsp.benchmarks import figstep, llava_bench, mm_safetybench, mm_vet, mme, mossbench, official, siuo, vlguard
from davsp.cli import app
from davsp.errors import DavspError
from davsp.runtime.files import sha256_bytes

pytestmark = pytest.mark.filterwarnings("ignore::davsp.benchmarks.source.ShortWarning")  # all fixtures are short


def test_published_counts():
    assert sum(mm_safetybench.COUNTS.values()) == 1680 and len(mm_safetybench.COUNTS) == 13
    assert sum(figstep.COUNTS.values()) == 500 and sum(figstep.TINY_COUNTS.values()) == 50
    assert sum(mme.PICTURES.values()) == 1187 and sum(mme.COUNTS.values()) == 2374
    assert sum(mme.PICTURES[name] for name in mme.PERCEPTION) == 1057 and len(mme.PERCEPTION) == 10
    assert sum(llava_bench.COUNTS.values()) == 60
    assert [sum(counts.values()) for counts in mossbench.COUNTS.values()] == [300, 244] and sum(
        siuo.COUNTS.values()
    ) == 167
    capabilities = {"rec": 150, "ocr": 96, "know": 84, "gen": 80, "spat": 75, "math": 26}
    assert mm_vet.COUNTS == {"questions": 218} | capabilities and tuple(capabilities) == mm_vet.CAPABILITIES
    test = vlguard.COUNTS["test"]
    assert sum(n for name, n in test.items() if "/" in name) == test["unsafes"] == 442
    assert test["unsafes"] + test["safe_safes"] == 1000 and sum(vlguard.COUNTS["train"].values()) == 2977


def test_official_files_are_known_by_their_hash(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    figstep_clone(tmp_path)
    file = tmp_path / "data/question/safebench.csv"
    published = file.read_bytes().replace(b"\r\n", b"\n")
    monkeypatch.setitem(official.FILES["figstep"], "safebench.csv", sha256_bytes(published))
    for same in (published, published.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + published):
        file.write_bytes(same)
        assert figstep.check(tmp_path).official == {"data/question/safebench.csv": True}
    file.write_bytes(published.replace(b"crane 1-1", b"crane 1-9"))
    assert figstep.check(tmp_path).official == {"data/question/safebench.csv": False}
    output = CliRunner().invoke(app, ["data", "check", str(tmp_path)]).output
    assert "official: 0 of 1" in output
    assert "figstep: edited, or saved anew (not the official bytes): data/question/safebench.csv" in output


def test_official_hashes_are_of_the_files_that_the_loaders_read(tmp_path):
    """Each set's table names its index files; what is invented here is none of them."""
    for name, fill in FOLDERS.items():
        if name == "mm_safetybench_pp":  # its only index is its parquet, whose reader may not be installed
            continue
        report = benchmarks.BENCHMARKS[name].check(fill(tmp_path / name))
        known = name in official.FILES or name == "mme"
        assert (len(report.official) > 0) == known and not any(report.official.values())
    assert {name: len(files) for name, files in official.FILES.items()} == {
        "figstep": 3, "mm_safetybench": 13, "vlguard": 2, "mm_vet": 1, "llava_bench": 3,
        "mossbench": 2, "siuo": 1,
    }  # fmt: skip
    assert list(official.FILES["mm_safetybench"]) == [f"{name}.json" for name in mm_safetybench.COUNTS]
    assert set(official.MME_QUESTIONS) == set(mme.COUNTS)
    hashes = [*official.MME_QUESTIONS.values(), *(h for files in official.FILES.values() for h in files.values())]
    assert len(set(hashes)) == len(hashes) == 39 and all(re.fullmatch("[0-9a-f]{64}", h) for h in hashes)


def test_mme_questions_are_compared_with_eval_tool(tmp_path, monkeypatch):
    """The release has them in a thousand files; the tool has a list for each subtask, in another order."""
    questions = [
        "Is there a kite in the image?  Please answer yes or no.",
        "Is there a boat in the image? Please answer yes or no.",
    ]
    rows = [f"0001.jpg\t{question}\t{answer}" for question, answer in zip(questions, ("Yes", "No"), strict=True)]
    write(tmp_path / "tool/eval_tool/Your_Results/count.txt", "\n".join([rows[1] + "\tNo", rows[0] + "\tYes"]) + "\n")
    hash_of = official.questions_hash(tuple(row.replace("  ", " ").split("\t")) for row in rows)
    monkeypatch.setitem(official.MME_QUESTIONS, "count", hash_of)
    assert mme.check(tmp_path / "tool").official == {"questions of count": True}
    report = mme.check(mme_folder(tmp_path / "release"))
    assert report.official == {
        "questions of count": True,
        "questions of artwork": False,
        "questions of code_reasoning": False,
    }


def test_questions_without_any_picture_are_looked_at_too(tmp_path):
    """No type was here, so nothing was counted and all seemed well."""
    safety_folder(tmp_path)
    shutil.rmtree(tmp_path / "data/imgs")
    first = tmp_path / "data/processed_questions/01-Illegal_Activitiy.json"
    report = mm_safetybench.check(tmp_path)
    assert not report.good and "2 of 97 in text 01-Illegal_Activitiy" in map(str, report.counts)
    change(first, "Changed Question", 5)
    assert "has no text in Changed Question" in mm_safetybench.check(tmp_path).broken[0]


def test_check_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run = CliRunner().invoke
    safety_folder(tmp_path / "mm")
    vet_folder(tmp_path)
    result = run(app, ["data", "check", str(tmp_path)])
    assert result.exit_code == 2
    assert "mm_safetybench" in result.output and "2 of 97 in sd 01-Illegal_Activitiy" in result.output
    assert "mm_vet" in result.output and "release folder" in result.output and "not found in" in result.output
    monkeypatch.setattr(mm_vet, "COUNTS", {"questions": 2, "math": 1})
    result = run(app, ["data", "check", str(tmp_path / "mm-vet"), "--all"])
    assert result.exit_code == 0 and "2 of 2 in questions" in result.output
    (tmp_path / "mm-vet/images/v1_0.png").write_text("x")
    result = run(app, ["data", "check", str(tmp_path / "mm-vet")])
    assert result.exit_code == 2 and "v1_0.png is truncated or no picture" in result.output
    write(tmp_path / "mm-vet/mm-vet.json", "{")
    result = run(app, ["data", "check", str(tmp_path / "mm-vet")])
    assert result.exit_code == 2 and "unreadable" in result.output and "is not JSON" in result.output
    (tmp_path / "empty").mkdir()
    assert run(app, ["data", "check", str(tmp_path / "empty")]).exit_code == 2
    with pytest.raises(DavspError, match="is no folder"):
        run(app, ["data", "check", str(tmp_path / "none")], catch_exceptions=False)
