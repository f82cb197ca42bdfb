"""The records, and how a picture becomes plain RGB."""

import io
import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from davsp import DavspError, Query, Response, Verdict
from davsp.lvlm.remote import RemoteLVLM
from davsp.query import flatten, read_jsonl, write_jsonl
from davsp.store import query_hash


def test_records_round_trip(tmp_path):
    path = tmp_path / "r.jsonl"
    responses = [Response("1", "none", "å\n\u2028b", 0.1, 2.5), Response("2", "none", "")]
    write_jsonl(path, responses)
    assert read_jsonl(path, Response) == responses
    verdicts = [Verdict("1", "none", "keyword", "unscored", "empty")]
    write_jsonl(path, verdicts)
    assert read_jsonl(path, Verdict) == verdicts
    query = Query("1", "what?", "benign", "mme", answers=("a", "b"))
    write_jsonl(path, [query])
    assert read_jsonl(path, Query) == [query]


def test_a_picture_is_written_as_its_hash(tmp_path):
    write_jsonl(tmp_path / "q.jsonl", [Query("1", "?", "benign", "b", image=Image.new("RGB", (3, 2)))])
    image = json.loads((tmp_path / "q.jsonl").read_text())["image"]
    assert image["size"] == [3, 2] and len(image["sha256"]) == 64
    assert read_jsonl(tmp_path / "q.jsonl", Query)[0].image is None


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_a_picture_from_memory_stays_packed(form):
    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(file, form)
    query = Query("1", "?", "benign", "b", image=Image.open(file))
    opened = Query("1", "?", "benign", "b", image=Image.open(io.BytesIO(file.getvalue())))
    opened.image.load()
    assert query_hash(query) == query_hash(opened) and query.picture().tobytes() == opened.image.tobytes()
    assert query.image.fp is file and opened.image.fp is None  # Pillow lets go of the file as soon as it is decoded
    opened.image.putpixel((0, 0), (255, 0, 0))
    assert query_hash(query) != query_hash(opened) and opened.picture().getpixel((0, 0)) == (255, 0, 0)


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"query_id": "1", "defense": "none", "text": ""}\n{"query_id"\n')
    with pytest.raises(DavspError, match=r"r\.jsonl, line 2 is no Response"):
        read_jsonl(tmp_path / "r.jsonl", Response)
    with pytest.raises(DavspError, match="line 1 is no Verdict"):
        read_jsonl(tmp_path / "r.jsonl", Verdict)


def test_pictures_are_opened_upright_on_white(tmp_path):
    image = Image.new("RGB", (4, 2), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert Query("1", "?", "benign", "b", image=tmp_path / "turned.jpg").picture().size == (2, 4)
    clear = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    palette = Image.new("P", (1, 1))
    palette.info["transparency"] = 0
    seen = [Query("1", "?", "benign", "b", image=i).picture().getpixel((0, 0)) for i in (clear, half, palette)]
    assert seen == [(255, 255, 255), (127, 127, 127), (255, 255, 255)]
    assert Query("1", "?", "benign", "b").picture() is None


def test_16_bit_grey_keeps_its_levels(tmp_path):
    levels = np.arange(0, 65536, 257, dtype=np.uint16)
    Image.fromarray(levels.reshape(16, 16)).save(tmp_path / "x.png")
    picture = Query("1", "?", "benign", "b", image=tmp_path / "x.png").picture()
    assert np.asarray(picture)[..., 0].ravel().tolist() == list(range(256))


def png(mode_bits: tuple[int, int], row: bytes, key: bytes) -> bytes:
    """A PNG of one row of two pixels with one transparent colour; (bits a channel, 0 for grey or 2 for RGB)."""
    bits, colour = mode_bits
    head = struct.pack(">IIBBBBB", 2, 1, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"tRNS", key), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_one_transparent_colour_is_laid_on_white():
    file = png((8, 2), bytes([255, 0, 0, 0, 255, 0]), struct.pack(">HHH", 255, 0, 0))
    picture = flatten(Image.open(io.BytesIO(file)))
    assert [picture.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 255, 0)]
    assert "transparency" not in picture.info  # who looks again finds none
    (sent,) = RemoteLVLM("m", "http://127.0.0.1:1/v1").preprocess([Image.open(io.BytesIO(file))])
    assert Image.open(io.BytesIO(sent)).tobytes() == picture.tobytes() and b"tRNS" not in sent


@pytest.mark.parametrize("form", ["PNG", "PPM", "TIFF"])
@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_16_bit_grey_shows_its_levels_in_every_byte_order_and_file(mode, form):
    levels = np.arange(0, 65536, 257, dtype="<u2" if mode == "I;16" else ">u2")
    buffer = io.BytesIO()
    image = Image.frombytes(mode, (16, 16), levels.tobytes())
    (image if form != "PPM" else Image.fromarray(levels.astype("<u2").reshape(16, 16))).save(buffer, form)
    for picture in (image, Image.open(buffer)):
        assert np.asarray(flatten(picture))[..., 0].ravel().tolist() == list(range(256))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_without_a_white_are_refused(mode, tmp_path):
    image = Image.new(mode, (4, 4), 7)
    image.save(tmp_path / "x.tiff")
    for query in (
        Query("1", "?", "benign", "b", image=image),
        Query("1", "?", "benign", "b", image=tmp_path / "x.tiff"),
    ):
        with pytest.raises(DavspError, match=rf"numbers \(mode {mode}\) do not say which one is white; save it as"):
            query.picture()


@pytest.mark.parametrize(("kind", "row", "key"), [((16, 0), b"\0\4\1\4", b"\0\4"), ((16, 2), bytes(12), bytes(6))])
def test_16_bits_with_one_transparent_colour_are_refused(kind, row, key, tmp_path):
    (tmp_path / "x.png").write_bytes(png(kind, row, key))
    with pytest.raises(DavspError, match=r"x\.png: the picture has 16 bits a channel and one transparent colour"):
        Query("1", "?", "benign", "b", image=tmp_path / "x.png").picture()


@pytest.mark.parametrize("content", [None, b"", b"no picture", b"\x89PNG\r\n\x1a\n1234"])
def test_an_unreadable_picture_is_named(tmp_path, content):
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DavspError, match=r"cannot open image .*x\.png"):
        Query("1", "?", "benign", "b", image=path).picture()


def test_a_truncated_picture_is_named(tmp_path):
    path = tmp_path / "x.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DavspError, match=r"cannot open image .*x\.png"):
        Query("1", "?", "benign", "b", image=path).picture()


def test_importing_davsp_does_not_import_torch():
    code = "import davsp, davsp.query, sys; davsp.Query; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_public_names():
    import davsp

    assert set(davsp.__all__) == {"__version__", *davsp._HOMES}
    assert davsp.VisualSafetyPrompt.kind == "border" and "train" in dir(davsp)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = davsp.nonsense


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "1", "L", "CMYK", "RGBa"])
def test_a_large_picture_goes_on_white_in_bands_as_it_would_at_once(mode, monkeypatch):
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (37, 23, 4), dtype=np.uint8), "RGBA")
    image = rgba.convert("RGB").quantize(16).convert(mode) if mode in ("P", "PA") else rgba.convert(mode)
    if mode == "P":
        image.info["transparency"] = 3
    clear = "a" in mode.lower() or "transparency" in image.info
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    want = Image.alpha_composite(white, layer).convert("RGB") if clear else image.convert("RGB")
    monkeypatch.setattr("davsp.query.BAND", 50)  # pixels: two rows
    assert flatten(image).tobytes() == want.tobytes()


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("byte_order", [b":M", b"\0\0"])
def test_broken_exif_is_passed_over_however_often_a_picture_is_made_plain(mode, byte_order):
    """As by the proxy, which reads a picture and hands it to the defense, which does so again."""
    image, turned, file = Image.new(mode, (4, 3)), Image.Exif(), io.BytesIO()
    turned[ExifTags.Base.Orientation] = 6
    image.save(file, "JPEG", exif=turned)
    data = file.getvalue().replace(b"Exif\0\0MM", b"Exif\0\0" + byte_order)
    once = flatten(Image.open(io.BytesIO(data)))
    assert data != file.getvalue() and once.size == (4, 3) and flatten(once).tobytes() == once.tobytes()


def test_a_picture_that_is_rgb_and_upright_is_not_copied():
    image = Image.new("RGB", (4, 3))
    assert flatten(image) is image
    turned = image.copy()
    turned.getexif()[ExifTags.Base.Orientation] = 6
    assert flatten(turned).size == (3, 4)
