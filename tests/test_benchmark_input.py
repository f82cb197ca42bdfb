"""Files of the published sets that are spoilt, odd or saved anew: each is read past or named with its mend."""

import json
import shutil
import sys

import pytest

from benchmark_folders import (
    FOLDERS,
    b64,
    bench_folder,
    change,
    figstep_clone,
    figstep_rows,
    guard_folder,
    guard_rows,
    lines,
    safety_folder,
    skipped,
    table,
    vet_folder,
    write,
)
from davsp import benchmarks
from davsp.benchmarks import figstep, llava_bench, mm_safetybench, mm_vet, mme, source, vlguard
from davsp.benchmarks.custom import load_queries
from davsp.errors import DavspError

pytestmark = pytest.mark.filterwarnings("ignore::davsp.benchmarks.source.ShortWarning")  # all fixtures are short


@pytest.mark.parametrize("name", FOLDERS)
def test_a_byte_order_mark_is_no_part_of_a_file(name, tmp_path):
    """Editors on Windows put one first; every loader reads past it."""
    load = benchmarks.BENCHMARKS[name].load
    queries = load(FOLDERS[name](tmp_path))
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".jsonl", ".csv", ".txt")]
    for path in files:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert files and load(tmp_path) == queries


def test_a_byte_order_mark_is_no_part_of_queries_or_tables(tmp_path):
    line = {"id": "a", "question": "what ?", "label": "benign"}
    (tmp_path / "queries.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(line).encode())
    assert [q.id for q in load_queries(tmp_path)] == ["a"]
    row = {"index": "0", "image": b64(1), "question": "q", "answer": "Yes", "category": "count", "image_path": "1.jpg"}
    table(tmp_path / "MME.tsv", [row, row | {"index": "1", "image": "0", "answer": "No"}])
    (tmp_path / "MME.tsv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "MME.tsv").read_bytes())
    assert len(mme.load(tmp_path)) == 2


def test_a_file_that_is_not_utf_8_is_named(tmp_path):
    bench_folder(tmp_path)
    file = tmp_path / "questions.jsonl"
    file.write_bytes(file.read_text().encode("utf-16"))
    with pytest.raises(DavspError, match=r"questions\.jsonl is not UTF-8 text .*; save it as UTF-8"):
        llava_bench.load(tmp_path)


@pytest.mark.parametrize("name", FOLDERS)
def test_what_macos_leaves_beside_files_is_not_read(name, tmp_path):
    """`._name` beside every file, `.DS_Store` in every folder, and `__MACOSX` beside what was unpacked."""
    root = tmp_path / "set"
    load = benchmarks.BENCHMARKS[name].load
    queries, report = load(FOLDERS[name](root)), benchmarks.check(tmp_path)
    litter = b"\0\5\x16\7\0\2\0\0Mac OS X        \0\2\0\0\0\t\xb0\xff"
    shutil.copytree(root, tmp_path / "__MACOSX/set")
    shutil.copytree(root, root / "__MACOSX/set")
    for path in [*root.rglob("*"), *(tmp_path / "__MACOSX").rglob("*")]:
        path.with_name(f"._{path.name}").write_bytes(litter)
        path.with_name(".DS_Store").write_bytes(litter)
    assert load(root) == queries and benchmarks.check(tmp_path) == report


def test_a_field_of_another_type_is_named(tmp_path):
    """Not a traceback; a short caption may be a number."""
    safety_folder(tmp_path / "safety")
    first = tmp_path / "safety/data/processed_questions/01-Illegal_Activitiy.json"
    change(first, "Rephrased Question", 5)
    cases = [(mm_safetybench, "safety", "Rephrased Question")]
    vet_folder(tmp_path / "vet")
    change(tmp_path / "vet/mm-vet/mm-vet.json", "answer", 5)
    cases += [(mm_vet, "vet", "answer")]
    guard_folder(tmp_path / "guard", guard_rows())
    change(tmp_path / "guard/test.json", "image", 7)
    cases += [(vlguard, "guard", "image")]
    bench_folder(tmp_path / "bench")
    lines(tmp_path / "bench/answers_gpt4.jsonl", [{"question_id": 0, "text": ["a kite"]}])
    cases += [(llava_bench, "bench", "text")]
    for module, folder, field in cases:
        with pytest.raises(DavspError, match=f"has no text in {field}"):
            module.load(tmp_path / folder)
    change(first, "Rephrased Question", "a kite")
    change(first, "Changed Question", 5)
    assert mm_safetybench.load(tmp_path / "safety")[0].context == "5"
    change(tmp_path / "vet/mm-vet/mm-vet.json", "answer", "5")
    change(tmp_path / "vet/mm-vet/mm-vet.json", "capability", 5)
    with pytest.raises(DavspError, match="unknown capability '5'"):
        mm_vet.load(tmp_path / "vet")
    change(tmp_path / "guard/test.json", "image", "bad_ads/a.png")
    change(tmp_path / "guard/test.json", "instr-resp", [{"instruction": 5}])
    with pytest.raises(DavspError, match="has not the instructions"):
        vlguard.load(tmp_path / "guard")


def test_empty_and_odd_fields_are_named(tmp_path):
    """Each was a traceback, in a loader or, after all answers were paid for, in a scorer."""
    vet_folder(tmp_path / "vet")
    change(tmp_path / "vet/mm-vet/mm-vet.json", "capability", [])
    with pytest.raises(DavspError, match="has no capability"):
        mm_vet.load(tmp_path / "vet")
    guard_folder(tmp_path / "guard", guard_rows())
    change(tmp_path / "guard/test.json", "image", "")
    with pytest.raises(DavspError, match="item 1 names no picture"):
        vlguard.load(tmp_path / "guard")
    figstep_clone(tmp_path / "steps", [row | {"category_id": "\u00b2"} for row in figstep_rows()])
    with pytest.raises(DavspError, match="unknown category \u00b2"):
        figstep.load(tmp_path / "steps")
    safety_folder(tmp_path / "safety")
    write(tmp_path / "safety/TinyVersion_ID_List.json", [{"Scenario": [], "Sampled_ID_List": [1]}])
    with pytest.raises(DavspError, match="is no list of Scenario"):
        mm_safetybench.load(tmp_path / "safety", "tiny")


def test_json_that_python_cannot_take_is_named(tmp_path):
    """Nested beyond its depth, and half of a surrogate pair, which no tokenizer and no file takes."""
    guard_folder(tmp_path / "guard", guard_rows())
    (tmp_path / "guard/test.json").write_text("[" * 100_000)
    with pytest.raises(DavspError, match="is not JSON"):
        vlguard.load(tmp_path / "guard")
    vet_folder(tmp_path / "vet")
    change(tmp_path / "vet/mm-vet/mm-vet.json", "question", "what \ud83d")
    with pytest.raises(DavspError, match="has no text in question"):
        mm_vet.load(tmp_path / "vet")
    for line, says in (("[" * 100_000, "is not JSON"),
                       ('{"id": "a", "question": "what \\ud83d", "label": "benign"}', "half of a character")):  # fmt: skip
        (tmp_path / "q.jsonl").write_text(line + "\n")
        with pytest.raises(DavspError, match=rf"line 1 .*{says}"):
            load_queries(tmp_path / "q.jsonl")


def test_two_references_of_one_question_are_named(tmp_path):
    """The last one would have counted in silence."""
    for name, row in (
        ("answers_gpt4", {"question_id": 0, "text": "Other."}),
        ("context", {"image": "001.jpg", "caption": "x"}),
    ):
        file = bench_folder(tmp_path / name) / f"{name}.jsonl"
        file.write_text(file.read_text() + json.dumps(row) + "\n")
        with pytest.raises(DavspError, match=rf"{name}\.jsonl, line \d is the second one on"):
            llava_bench.load(tmp_path / name)
        queries, _ = skipped(llava_bench.load, tmp_path / name)
        assert queries[0].reference == "Answer 0." and queries[0].context != "x"


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_nothing_known(tmp_path, name):
    with pytest.raises(DavspError, match=f"no {name} in a known layout"):
        benchmarks.BENCHMARKS[name].load(tmp_path)
    assert benchmarks.BENCHMARKS[name].check(tmp_path).layout == ""


def test_everything_broken_is_an_error(tmp_path):
    figstep_clone(tmp_path, figstep_rows(1)[:1])
    (tmp_path / "data/images/SafeBench/query_ForbidQI_1_1_6.png").unlink()
    with pytest.warns(source.SkippedWarning), pytest.raises(DavspError, match="no usable question"):
        figstep.load(tmp_path, skip_broken=True)


def test_parquet_without_its_reader(tmp_path, monkeypatch):
    write(tmp_path / "data/HateSpeech/SD.parquet", "x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DavspError, match=r"davsp\[parquet\]"):
        mm_safetybench.load(tmp_path, types=["sd"], skip_broken=True)
