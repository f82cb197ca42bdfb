"""An error names its own cause: where one `except` stands for several, the sentence says which one was met."""

import errno
import io
import json
import os
import sys
from pathlib import Path

import httpx2
import pytest
from PIL import Image

from davsp import DavspError, cli
from davsp.app import sources
from davsp.attacks.records import picture_file
from davsp.benchmarks.figstep import find_font
from davsp.benchmarks.formats import parquet_has
from davsp.benchmarks.source import fault
from davsp.errors import words_of
from davsp.query import open_picture
from davsp.serve.bodies import parse
from davsp.serve.refusals import Refusal
from davsp.serve.settings import ServeSettings
from proxy import client, user


def png() -> bytes:
    out = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(out, "PNG")
    return out.getvalue()


def denied(*_: object, **__: object) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_a_key_alone_is_no_sentence() -> None:
    assert words_of(KeyError("mu")) == "KeyError: 'mu'" and words_of(MemoryError()) == "MemoryError"


@pytest.mark.parametrize(("data", "why"), [
    (b"words", "no picture of a known format"), (png()[:2000], "cannot be decoded (image file is truncated"),
])  # fmt: skip
def test_why_a_picture_cannot_be_opened(data: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(DavspError) as told:
        open_picture(tmp_path / "a.png")
    assert why in str(told.value) and "give a whole PNG" in str(told.value)
    assert why in fault(data) and "is truncated or no picture" in fault(data)


def test_a_picture_that_may_not_be_read_is_not_called_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(png())
    monkeypatch.setattr(Image, "open", denied)
    with pytest.raises(DavspError, match=r"a\.png: Permission denied$"):
        open_picture(tmp_path / "a.png")
    assert fault(tmp_path / "a.png") == "cannot be read (Permission denied)"
    record = {"file": "a.png", "sha256": "0"}
    (tmp_path / "pictures").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "pictures/a.png")
    with pytest.raises(DavspError, match=r"a\.png: Permission denied$"):
        picture_file(tmp_path, record)


def test_a_folder_in_a_pictures_place_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(DavspError, match=r"cannot open image .*: it is a folder; give a PNG, JPEG or WebP file in it"):
        open_picture(tmp_path)
    with pytest.raises(DavspError, match="cannot open image"):
        open_picture(Path("x" * 5000))


def test_the_page_says_that_a_picture_is_cut() -> None:
    import base64

    with pytest.raises(DavspError, match="image file is truncated"):
        sources.from_data_url("data:image/png;base64," + base64.b64encode(png()[:2000]).decode())


def test_a_font_that_is_there_but_broken(tmp_path: Path) -> None:
    (tmp_path / "face.ttf").write_bytes(b"no font")
    for path, why in ((tmp_path / "face.ttf", "unknown file format"), (tmp_path / "none.ttf", "cannot open resource")):
        with pytest.raises(DavspError, match=why):
            find_font(path)


def test_a_parquet_reader_that_is_broken_or_may_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyarrow").mkdir()
    (tmp_path / "pyarrow/__init__.py").write_text("raise ImportError('libarrow.so: no such file')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DavspError, match=r"cannot be imported \(libarrow\.so: no such file\); install pyarrow anew"):
        parquet_has(tmp_path / "a.parquet", ["a"])


@pytest.mark.parametrize(("body", "why"), [
    (b"{", "is not JSON in UTF-8"), (b"[" * 90_000 + b"]" * 90_000, "nested"),
    (b'{"a": ' + b"1" * 5000 + b"}", "a number of too many digits"),
])  # fmt: skip
def test_a_body_that_is_json_is_not_called_none(body: bytes, why: str) -> None:
    with pytest.raises(Refusal) as told:
        parse(body, ServeSettings(upstream="http://u/v1", canvas=56))
    assert why in told.value.message


@pytest.mark.parametrize(("error", "says"), [
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/a"), "davsp: out/a cannot be used: No space left on device; free space"),
    (OSError(errno.ENOENT, os.strerror(errno.ENOENT)), "davsp: No such file or directory"),
    (OSError("a library's own words"), "davsp: a library's own words"),
])  # fmt: skip
def test_an_error_of_the_system_gives_no_advice_that_is_not_its_own(
    error: OSError, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(**_: object) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["davsp", "--version"])
    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    told = capsys.readouterr()
    assert stop.value.code == 2 and " ".join((told.out + told.err).split()) == says


@pytest.mark.parametrize(("error", "code", "says"), [
    (httpx2.ConnectError("refused"), "upstream_unreachable", "cannot be reached"),
    (httpx2.ReadError("reset"), "upstream_broken", "was reached, but sent no reply (ReadError)"),
])  # fmt: skip
def test_an_upstream_that_hangs_up_was_reached(error: Exception, code: str, says: str) -> None:
    caller = client()
    caller.upstream.answer = lambda number, body: error
    told = json.loads(caller.post(user("q")).content)["error"]
    assert told["code"] == code and says in told["message"]
