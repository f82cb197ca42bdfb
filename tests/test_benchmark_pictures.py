"""Pictures of the published sets and of strangers' queries: broken, too large, outside the folder, or named to trick a terminal."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmark_folders import picture, safety_folder, skipped
from davsp.benchmarks import mm_safetybench, source
from davsp.benchmarks.custom import load_queries
from davsp.errors import DavspError
from davsp.runtime.terminal import plain

pytestmark = pytest.mark.filterwarnings("ignore::davsp.benchmarks.source.ShortWarning")  # all fixtures are short


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


@pytest.mark.parametrize("name", ["a\0.png", "\x1b[31m.png", "a.png\n"])
def test_the_name_of_a_strangers_picture_is_said_in_one_line_that_no_terminal_obeys(name, tmp_path):
    line = {"id": "1", "question": "q", "label": "benign", "image": name}
    (tmp_path / "queries.jsonl").write_text(json.dumps(line))
    with pytest.raises(DavspError, match="names the image") as refused:
        load_queries(tmp_path)
    assert str(refused.value).isprintable()


def test_what_is_said_of_strangers_words_is_plain():
    assert plain("a\x1b[31mb\u202ec\n\td\ud800\0") == "a\\x1b[31mb\\u202ec\n\td\\ud800\\x00"
