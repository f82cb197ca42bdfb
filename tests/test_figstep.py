"""FigStep: its layouts, and its pictures typeset anew."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from benchmark_folders import MONO, figstep_clone, figstep_rows, lines, put, skipped, table, write
from command import run as davsp
from davsp import benchmarks
from davsp.benchmarks import figstep
from davsp.errors import DavspError

MISSING = "FreeMonoBold.ttf is not installed (Debian: fonts-freefont-ttf)"

pytestmark = pytest.mark.filterwarnings("ignore::davsp.benchmarks.source.ShortWarning")  # all fixtures are short


def test_figstep_clone(tmp_path):
    queries = figstep.load(figstep_clone(tmp_path))
    assert [q.id for q in queries] == ["1_1", "1_2", "10_1", "10_2"]
    assert queries[2].category == "Health Consultation" and queries[2].group == "Steps to fold crane 10-1."
    assert {q.question for q in queries} == {figstep.PROMPT} and queries[0].benchmark == "figstep"
    assert all(q.context == q.group for q in queries)
    with pytest.raises(DavspError, match="choose test, tiny, pro or benign"):
        figstep.load(tmp_path, "train")


def test_figstep_tiny_joins_by_its_own_csv(tmp_path):
    row = figstep_rows()[1] | {"task_id": 1}  # renumbered: task 2 of the full set
    table(tmp_path / "data/question/SafeBench-Tiny.csv", [row], ",")
    put(tmp_path / "data/images/SafeBench-Tiny/query_ForbidQI_1_1_6.png")
    figstep_clone(tmp_path)
    tiny, full = figstep.load(tmp_path, "tiny"), figstep.load(tmp_path)
    assert tiny[0].id == "1_1" == full[0].id and tiny[0].group == full[1].group != full[0].group


def test_figstep_adashield(tmp_path):
    for i in (1, 2):
        put(tmp_path / f"data/FigStep/01-Illegal_Activity/query_ForbidQI_1_{i}_6.png", i)
    assert [q.group for q in figstep.load(tmp_path)] == ["1_1", "1_2"]
    name = "data/FigStep/01-Illegal_Activity/query_ForbidQI_1_2_6.png"
    lines(tmp_path / "data/datasplit/figstep.jsonl", [{"01-Illegal_Activity": {"train": [name], "test": []}}])
    assert [q.id for q in figstep.load(tmp_path, "train")] == ["1_2"]
    table(tmp_path / "data/question/safebench.csv", figstep_rows(), ",")
    assert figstep.load(tmp_path, "all")[0].group == "Steps to fold crane 1-1."
    put(tmp_path / "data/FigStep/11-Baking/query_ForbidQI_11_1_6.png")
    with pytest.raises(DavspError, match="no known topic"):
        figstep.load(tmp_path, "all")


def test_figstep_from_the_csv_alone(tmp_path):
    table(tmp_path / "safebench.csv", figstep_rows(), ",")
    with pytest.raises(DavspError, match="rebuild=True"):
        figstep.load(tmp_path)
    queries = figstep.load(tmp_path, rebuild=True, font=MONO)
    assert queries[0].benchmark == "figstep_rebuilt_DejaVuSansMonoBold" and queries[0].picture().size == (760, 760)
    with pytest.raises(DavspError, match="fonts-freefont-ttf"):
        figstep.load(tmp_path, rebuild=True, font="no-such-font.ttf")


def test_figstep_check(tmp_path, monkeypatch):
    table(tmp_path / "a/SafeBench-Tiny.csv", figstep_rows()[:1], ",")
    real = figstep.find_font
    monkeypatch.setattr(figstep, "find_font", lambda: real(MONO))
    report = figstep.check(tmp_path / "a")
    assert report.layout == "csv alone" and "1 of 5 in Illegal Activity" in map(str, report.counts)
    monkeypatch.setattr(figstep, "find_font", lambda: real("no-such-font.ttf"))
    report = figstep.check(tmp_path / "a")
    assert not report.good and "fonts-freefont-ttf" in report.note and len(report.index) == 1
    put(tmp_path / "b/data/FigStep/01-Illegal_Activity/query_ForbidQI_1_1_6.png")
    table(tmp_path / "b/safebench.csv", figstep_rows(), ",")
    assert figstep.check(tmp_path / "b").layout == "AdaShield's mirror"
    report = figstep.check(figstep_clone(tmp_path / "c"))
    assert report.layout == "official clone" and "2 of 50 in Health Consultation" in map(str, report.counts)


def test_figstep_text_by_hand():
    assert figstep.text_of("Steps to fold a paper crane.\n") == "Steps to fold a\npaper crane.\n1. \n2. \n3. "
    assert figstep.text_of("Abcdefghijklmnopqr is-hyphened.") == "Abcdefghijklmno\npqr is-\nhyphened.\n1. \n2. \n3. "


def test_figstep_render_is_laid_out_by_the_rules():
    face = ImageFont.truetype(str(MONO), figstep.SIZE)
    image = figstep.render("H H", face)
    ink = np.asarray(image.convert("L")) < 128
    assert image.size == (760, 760) and image.mode == "RGB"
    top = np.flatnonzero(ink.any(1))[0]
    box = face.getbbox("H")
    assert top == pytest.approx(figstep.CORNER[1] + box[1], abs=1)
    left = np.flatnonzero(ink[: top + 60].any(0))[0]
    assert figstep.CORNER[0] <= left < figstep.CORNER[0] + face.getlength("H") / 3
    pitch = face.getbbox("A")[3] + figstep.SPACING
    lines = [ink[figstep.CORNER[1] + i * pitch :][:pitch].any() for i in range(5)]
    assert lines == [True] * 4 + [False]  # the statement and three empty items
    long = figstep.render("word " * 40, face)
    assert (np.asarray(long.convert("L"))[-5:] < 128).any()  # cut off, not shrunk


def test_figstep_with_the_published_font():
    """By the measured facts of the published pictures: 48 px a character, 75 px a line."""
    try:
        face = figstep.find_font()
    except DavspError:
        pytest.skip(MISSING)
    assert face.getname() == ("FreeMono", "Bold")
    assert face.getlength("H") == 48 and face.getmetrics() == (64, 16)
    rows = (np.asarray(figstep.render("H", face).convert("L")) < 128)[:, :60].any(1)
    starts = [i for i in range(1, 760) if rows[i] and not rows[i - 1]]
    assert len(starts) == 4 and starts[2] - starts[1] == pytest.approx(75, abs=1)  # the digits are of one height
    assert starts[3] - starts[2] == pytest.approx(75, abs=1)


def test_figstep_bad_csv(tmp_path):
    rows = figstep_rows()
    figstep_clone(tmp_path, [{k: v for k, v in row.items() if k != "instruction"} for row in rows])
    with pytest.raises(DavspError, match=r"safebench\.csv lacks the column instruction"):
        figstep.load(tmp_path)
    figstep_clone(tmp_path, [*rows, rows[0]])
    with pytest.raises(DavspError, match=r"safebench\.csv, row 6: the id '1_1' occurs twice"):
        figstep.load(tmp_path)
    queries, warning = skipped(figstep.load, tmp_path)
    assert len(queries) == 4 and "twice" in warning
    figstep_clone(tmp_path, [*rows, rows[0] | {"category_id": 11}])
    with pytest.raises(DavspError, match="unknown category 11"):
        figstep.load(tmp_path)
    figstep_clone(tmp_path, rows)
    write(
        tmp_path / "data/question/safebench.csv",
        (tmp_path / "data/question/safebench.csv").read_text() + "ForbidQI,1\n",
    )
    with pytest.raises(DavspError, match="row 6 has not as many fields"):
        figstep.load(tmp_path, skip_broken=False)
    (tmp_path / "data/question/safebench.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DavspError, match="not UTF-8"):
        figstep.load(tmp_path)


def test_the_command_line_rebuilds_from_the_csv_alone(tiny_folder: Path, tmp_path: Path, capsys):
    try:
        figstep.find_font()
    except DavspError:
        pytest.skip(MISSING)
    table(tmp_path / "data/safebench.csv", figstep_rows(), ",")
    options = ("--benchmark", f"figstep={tmp_path / 'data'}")
    run = ("eval", *options, "--model", tiny_folder, "--max-new-tokens", 1, "--max-unscored", 1, "--defense", "none",
           "--out", tmp_path / "out")  # fmt: skip
    assert davsp(*run) == 2 and "give --rebuild to typeset them" in capsys.readouterr().err
    assert davsp(*run, "--rebuild") == 0
    before = (tmp_path / "out/responses.jsonl").read_bytes()
    rows = json.loads((tmp_path / "out/metrics.json").read_text())["rows"]
    assert {r["benchmark"] for r in rows if r["metric"] == "rsr"} == {"figstep_rebuilt"}
    assert davsp(*run, "--rebuild") == 0 and (tmp_path / "out/responses.jsonl").read_bytes() == before
    again = ("judge", tmp_path / "out", *options, "--judge", "keyword-gcg", "--max-unscored", 1)
    assert davsp(*again, "--rebuild") == 0
    put(tmp_path / "data/SafeBench/query_ForbidQI_1_1_6.png")
    assert davsp(*again, "--skip-broken") == 2  # pictures that were downloaded are other queries
    assert "give the --queries that it answered" in capsys.readouterr().err


def test_the_command_line_says_that_the_font_is_missing(tmp_path: Path, capsys, monkeypatch):
    for variable in ("XDG_DATA_HOME", "XDG_DATA_DIRS"):  # where fonts are looked for
        monkeypatch.setenv(variable, str(tmp_path / "none"))
    table(tmp_path / "data/safebench.csv", figstep_rows(), ",")
    options = ("--benchmark", f"figstep={tmp_path / 'data'}", "--rebuild")
    assert davsp("eval", *options, "--out", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "the font FreeMonoBold.ttf cannot be opened" in message and "fonts-freefont-ttf" in message
    assert not (tmp_path / "out").exists()


def pro_clone(root: Path) -> Path:
    """Two invented sentences, the Tiny statements that they belong to, and pieces of two colours."""
    figstep_clone(root)
    rows = [row | {"instruction": f"Steps to fold a paper crane {i}."} for i, row in enumerate(figstep_rows(1))]
    table(root / "data/question/SafeBench-Tiny.csv", rows, ",")
    write(
        root / "data/question/benign_sentences_without_harmful_phase.csv",
        "sentence\nSteps to fold *.\nTo fold *, or not.\n",
    )
    for i in range(2):
        for k in range(3 + i):
            path = root / f"data/images/FigStep-Pro/image_{i}_splits/image_{i}_split_{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (10 + k, 20), (50 * k, 0, 0)).save(path)
    return root


def test_figstep_pro_is_joined_into_one_picture(tmp_path):
    one, two = figstep.load(pro_clone(tmp_path), "pro")
    assert (one.id, one.label, one.benchmark, one.category) == (
        "pro/1_1",
        "malicious",
        "figstep_pro_joined",
        "Illegal Activity",
    )
    assert one.question.startswith("Steps to fold *.\n1.\n2.\n3.\n\nThe text above shows a list numbered 1, 2, 3, etc.")
    assert (
        two.question.startswith("To fold *, or not.\n1.")
        and two.context == two.group == "Steps to fold a paper crane 1."
    )
    assert (one.picture().size, two.picture().size) == ((10 + 11 + 12, 20), (10 + 11 + 12 + 13, 20))
    assert [two.picture().getpixel((x, 5))[0] for x in (0, 10, 21, 33)] == [0, 50, 100, 150]  # in their order
    assert benchmarks.data_set(one.benchmark) == "figstep"
    folder = tmp_path / "data/images/FigStep-Pro"
    with zipfile.ZipFile(tmp_path / "sub-figures.zip", "w") as archive:  # as published
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(folder))
        archive.writestr("__MACOSX/image_0_splits/._image_0_split_0.png", b"x")
    shutil.rmtree(folder)
    folder.mkdir()
    (tmp_path / "sub-figures.zip").rename(folder / "sub-figures.zip")
    packed = figstep.load(tmp_path, "pro")
    assert [q.id for q in packed] == [one.id, two.id] and packed[1].picture().tobytes() == two.picture().tobytes()
    report = figstep.check(tmp_path)
    assert {"2 of 50 in FigStep-Pro", "2 of 50 in benign sentences", "2 of 50 in Fraud"} & set(map(str, report.counts)) == {
        "2 of 50 in FigStep-Pro", "2 of 50 in benign sentences"
    }  # fmt: skip
    assert len(report.index) == 3 and not report.broken
    (folder / "sub-figures.zip").write_bytes(b"PK")
    with pytest.raises(DavspError, match=r"sub-figures\.zip cannot be unpacked"):
        figstep.load(tmp_path, "pro")


def test_a_broken_piece_of_figstep_pro_is_named(tmp_path):
    pro_clone(tmp_path)
    (tmp_path / "data/images/FigStep-Pro/image_1_splits/image_1_split_2.png").write_text("x")
    with pytest.raises(DavspError, match="picture 1 has a piece that is truncated or no picture"):
        figstep.load(tmp_path, "pro")
    shutil.rmtree(tmp_path / "data/images/FigStep-Pro/image_1_splits")
    queries, warning = skipped(figstep.load, tmp_path, "pro")
    assert [q.id for q in queries] == ["pro/1_1"] and "picture 1 has no piece" in warning


def test_the_benign_sentences_are_benign_and_in_words(tmp_path):
    one, two = figstep.load(pro_clone(tmp_path), "benign")
    assert (one.id, one.question, one.label, one.benchmark) == (
        "benign/0",
        "Steps to fold *.",
        "benign",
        "figstep_benign",
    )
    assert one.image is None and (one.category, two.category) == ("Illegal Activity", "Health Consultation")
    for split in ("pro", "benign"):
        with pytest.raises(DavspError, match=f"rebuild goes with the splits test and tiny, not with '{split}'"):
            figstep.load(tmp_path, split, rebuild=True)
    table(tmp_path / "data/question/SafeBench-Tiny.csv", figstep_rows(2), ",")
    with pytest.raises(DavspError, match=r"has 2 rows and .* has 4"):
        figstep.load(tmp_path, "benign")
    (tmp_path / "data/question/benign_sentences_without_harmful_phase.csv").unlink()
    with pytest.raises(DavspError, match="holds no figstep in a known layout"):
        figstep.load(tmp_path, "benign")
