"""Broken pictures, limits, short downloads, and `davsp data check`."""

import json
import re
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from benchmark_folders import (
    b64,
    bench_folder,
    figstep_clone,
    figstep_rows,
    guard_folder,
    guard_rows,
    holisafe_folder,
    lines,
    mme_folder,
    moss_folder,
    mss_folder,
    picture,
    plus_folder,
    safety_folder,
    siuo_folder,
    skipped,
    table,
    vet_folder,
    write,
)
from davsp import benchmarks
from davsp.benchmarks import (
    figstep,
    llava_bench,
    mm_safetybench,
    mm_vet,
    mme,
    mossbench,
    official,
    siuo,
    source,
    vlguard,
)
from davsp.benchmarks.custom import load_queries
from davsp.cli import app
from davsp.errors import DavspError
from davsp.runtime.files import sha256_bytes
from davsp.runtime.terminal import plain

pytestmark = pytest.mark.filterwarnings("ignore::davsp.benchmarks.source.ShortWarning")  # all fixtures are short


@pytest.mark.parametrize("benchmark", [mm_vet, mme, llava_bench])
def test_a_set_that_is_a_test_as_a_whole_has_no_other_split(benchmark, tmp_path):
    with pytest.raises(DavspError, match=f"{benchmark.NAME} has only the split test, not 'train'"):
        benchmark.load(tmp_path, "train")


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


FOLDERS = {
    "mm_safetybench": safety_folder, "figstep": figstep_clone, "mm_vet": vet_folder, "mme": mme_folder, "llava_bench": bench_folder,
    "vlguard": lambda root: guard_folder(root, guard_rows()), "mossbench": moss_folder, "siuo": siuo_folder,
    "mssbench": mss_folder, "holisafe": holisafe_folder, "mm_safetybench_pp": plus_folder,
}  # fmt: skip


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


def put_png(path: Path, head: bytes, data: bytes) -> None:
    chunks = [b"IHDR" + head, b"IDAT" + data, b"IEND"]
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def spoil(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "truncated jpeg" or how == "truncated png":
        noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, how.split()[1])
        path.write_bytes(path.read_bytes()[:-3000])
    elif how == "text":
        path.write_text("404 not found")
    elif how == "cmyk":
        Image.new("CMYK", (20, 20)).save(path, "JPEG")
    elif how == "16 bit":
        Image.fromarray(np.zeros((20, 20), np.uint16)).save(path, "PNG")
    elif how == "48 bit":  # Pillow opens it as RGB
        rows = zlib.compress(b"\0" * 20 * (1 + 6 * 20))
        put_png(path, struct.pack(">IIBBBBB", 20, 20, 16, 2, 0, 0, 0), rows)
    elif how == "animated":
        picture(1).save(path, "PNG", save_all=True, append_images=[picture(90)])
    elif how == "pixel":
        picture(side=1).save(path)
    elif how == "giga":  # a PNG head that promises 40,000 x 40,000
        put_png(path, struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0), b"")
    elif how == "half a page":  # a TIFF whose second page says nothing of its size: Pillow raises TypeError
        picture().save(path, "TIFF")
        data = bytearray(path.read_bytes() + b"\0" * (path.stat().st_size % 2))
        at = 10 + 12 * struct.unpack_from("<H", data, 8)[0]
        struct.pack_into("<I", data, at, len(data))
        path.write_bytes(bytes(data) + b"\0" * 6)
    elif how == "large":
        Image.new("1", (10_000, 10_000)).save(path, "PNG")


FAULTS = {
    "missing": "is missing",
    "truncated jpeg": "truncated",
    "truncated png": "truncated",
    "text": "no picture",
    "half a page": "no picture",
    "cmyk": "CMYK",
    "16 bit": "more than 8 bits",
    "48 bit": "more than 8 bits",
    "animated": "animated",
    "pixel": "single pixel",
    "giga": "million pixels",
    "large": "million pixels",
}


def change(path: Path, key: str, value: object) -> None:
    """Another value for a field of the first row of a JSON file."""
    body = json.loads(path.read_text())
    row = body[0] if isinstance(body, list) else next(iter(body.values()))
    row[key] = value
    write(path, body)


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


def test_a_picture_outside_the_folder_is_taken_only_when_it_may_be(tmp_path):
    """A file of queries from a stranger could name any picture of the machine, by a path or by a link."""
    Image.new("RGB", (20, 20)).save(tmp_path / "private.png")
    folder = tmp_path / "queries"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "private.png")
    for image in ("../private.png", str(tmp_path / "private.png"), "link.png"):
        line = {"id": "a", "question": "what ?", "label": "benign", "image": image}
        (folder / "queries.jsonl").write_text(json.dumps(line) + "\n")
        with pytest.raises(DavspError, match=r"outside .*allow_outside=True"):
            load_queries(folder)
        (query,) = load_queries(folder, allow_outside=True)
        assert query.picture().size == (20, 20)


def test_questions_without_any_picture_are_looked_at_too(tmp_path):
    """No type was here, so nothing was counted and all seemed well."""
    safety_folder(tmp_path)
    shutil.rmtree(tmp_path / "data/imgs")
    first = tmp_path / "data/processed_questions/01-Illegal_Activitiy.json"
    report = mm_safetybench.check(tmp_path)
    assert not report.good and "2 of 97 in text 01-Illegal_Activitiy" in map(str, report.counts)
    change(first, "Changed Question", 5)
    assert "has no text in Changed Question" in mm_safetybench.check(tmp_path).broken[0]


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


@pytest.mark.parametrize("how", FAULTS)
def test_broken_pictures(tmp_path, how):
    safety_folder(tmp_path)
    path = tmp_path / "data/imgs/01-Illegal_Activitiy/SD/1.jpg"
    spoil(path, how)
    with pytest.raises(DavspError) as caught:
        mm_safetybench.load(tmp_path)
    assert str(path) in str(caught.value) and FAULTS[how] in str(caught.value) and "skip_broken" in str(caught.value)
    queries, warning = skipped(mm_safetybench.load, tmp_path)
    assert len(queries) == 8 and str(path) in warning
    assert FAULTS[how] in mm_safetybench.check(tmp_path).broken[0]


def test_ordinary_pictures_pass(tmp_path):
    for name, image in {"grey.jpg": Image.new("L", (9, 9)), "palette.png": Image.new("P", (9, 9)),
                        "alpha.png": Image.new("RGBA", (9, 9)), "tall.png": Image.new("RGB", (1, 9))}.items():  # fmt: skip
        image.save(tmp_path / name)
        assert source.fault(tmp_path / name) == ""
    picture().save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[picture(9)])  # with a preview
    assert source.fault(tmp_path / "phone.jpg") == ""


def test_limit_is_a_seeded_draw_in_order(tmp_path):
    figstep_clone(tmp_path, figstep_rows(20))
    every = [q.id for q in figstep.load(tmp_path)]
    ids = [q.id for q in figstep.load(tmp_path, limit=7, seed=3)]
    assert ids == [q.id for q in figstep.load(tmp_path, limit=7, seed=3)] == [i for i in every if i in ids]
    assert len(ids) == 7 and ids != [q.id for q in figstep.load(tmp_path, limit=7, seed=4)]
    assert len(figstep.load(tmp_path, limit=99)) == 40
    with pytest.raises(DavspError, match="limit=0"):
        figstep.load(tmp_path, limit=0)


def test_limit_draws_whole_groups(tmp_path):
    """Half a picture of MME would make acc+ a mere acc; an intent of MM-SafetyBench has all its pictures or none."""
    mme_folder(tmp_path)
    for limit, count in ((2, 2), (3, 2), (5, 4), (1, 1)):
        queries = mme.load(tmp_path, limit=limit)
        assert len(queries) == count and len({q.group for q in queries}) == max(1, count // 2)
    safety_folder(tmp_path / "mm")
    assert {q.benchmark for q in mm_safetybench.load(tmp_path / "mm", limit=5)} == set(mm_safetybench.TYPES)


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


@pytest.mark.parametrize("name", ["a\0.png", "\x1b[31m.png", "a.png\n"])
def test_the_name_of_a_strangers_picture_is_said_in_one_line_that_no_terminal_obeys(name, tmp_path):
    line = {"id": "1", "question": "q", "label": "benign", "image": name}
    (tmp_path / "queries.jsonl").write_text(json.dumps(line))
    with pytest.raises(DavspError, match="names the image") as refused:
        load_queries(tmp_path)
    assert str(refused.value).isprintable()


def test_what_is_said_of_strangers_words_is_plain():
    assert plain("a\x1b[31mb\u202ec\n\td\ud800\0") == "a\\x1b[31mb\\u202ec\n\td\\ud800\\x00"
