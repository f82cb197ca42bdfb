"""Pictures of the proxy: what is read, and as what; what is refused before it is decoded; where pictures are fetched from."""

import asyncio
import io
import struct
import warnings
import zlib
from typing import Any

import httpx2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from davsp import AdditiveNoise, DavspError, VisualSafetyPrompt
from davsp.query import open_picture
from davsp.serve.fetch import Fetcher, is_public
from davsp.serve.pictures import STORED, decode, from_data_url, png, quiet
from davsp.serve.refusals import Refusal
from davsp.serve.settings import ServeSettings
from proxy import border, client, data_url, file, image_part, picture_of, text_part, user
from tiny import picture

LIMITS = ServeSettings(upstream="http://u/v1")


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 40), st.integers(1, 50), st.integers(1, 50), st.integers(0, 99), st.randoms())
def test_a_painter_makes_the_same_picture(canvas, width, height, seed, random):
    border = VisualSafetyPrompt.create(canvas, random.randint(1, (canvas - 1) // 2), "random", seed)
    for prompt in (border, border.quantised(), AdditiveNoise.create(canvas, 0.1, "random", seed)):
        paint = prompt.painter()
        for number in range(2):  # the first picture must leave nothing behind
            image = picture(number, (width, height))
            assert paint(image).tobytes() == prompt.image(image).tobytes()


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (336, 336), (1500, 1400)])
def test_png_loses_nothing(size):
    image = picture(0, size)
    reread = Image.open(io.BytesIO(png(image)))
    reread.load()
    assert (reread.format, reread.mode, reread.size, reread.info) == ("PNG", "RGB", size, {})
    assert reread.tobytes() == image.tobytes() and (size[0] * size[1] > STORED) == (size == (1500, 1400))


def kinds() -> dict[str, bytes]:
    """One picture in many forms."""
    rgb = picture(5, (30, 20))
    turned = Image.Exif()
    turned[0x0112] = 6
    alpha = rgb.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(rgb.size))
    grey16 = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)
    return {
        "jpeg": file(rgb, "JPEG"), "progressive": file(rgb, "JPEG", progressive=True), "webp": file(rgb, "WEBP"),
        "turned jpeg": file(rgb, "JPEG", exif=turned), "turned png": file(rgb, "PNG", exif=turned), "alpha png": file(alpha, "PNG"),
        "alpha webp": file(alpha, "WEBP", lossless=True), "cmyk": file(rgb.convert("CMYK"), "JPEG"), "grey": file(rgb.convert("L"), "JPEG"),
        "palette": file(rgb.quantize(16), "PNG"), "clear palette": file(rgb.quantize(16), "PNG", transparency=3),
        "bits": file(rgb.convert("1"), "PNG"), "grey alpha": file(rgb.convert("LA"), "PNG"), "16 bit": file(grey16, "PNG"),
        "one pixel": file(rgb.resize((1, 1)), "PNG"), "thin": file(rgb.resize((500, 10)), "PNG"), "two in one": file(rgb, "MPO", save_all=True, append_images=[rgb]),
        "one clear colour": file(rgb, "PNG", transparency=rgb.getpixel((0, 0))),
    }  # fmt: skip


def test_what_reading_refuses_is_said():
    grey = Image.fromarray(np.zeros((4, 4), np.uint16))
    with pytest.raises(Refusal) as caught:
        decode(file(grey, "PNG", transparency=0), LIMITS)
    assert "16 bits a channel and one transparent colour" in caught.value.message


@pytest.mark.parametrize("name", kinds())
def test_a_picture_is_read_as_davsp_eval_reads_it(name, tmp_path):
    data = kinds()[name]
    (tmp_path / "x").write_bytes(data)
    want, decoded = open_picture(tmp_path / "x"), decode(data, LIMITS)
    assert (decoded.mode, decoded.size, decoded.tobytes()) == ("RGB", want.size, want.tobytes())
    assert decoded.size == (20, 30) or "turned" not in name
    caller = client()
    caller.post(user(image_part("data:image/png;base64," + data_url(decoded).partition(",")[2])))
    sent = picture_of(caller.sent()[0]["content"][0]["image_url"]["url"])
    assert sent.tobytes() == border().paint(want).tobytes() and sent.size == (56, 56)


def bomb(width: int, height: int) -> bytes:
    """A PNG of so many pixels and few bytes."""
    packed = zlib.compress(b"\0" * (height * (1 + width // 8)), 9)
    chunks = [(b"IHDR", struct.pack(">2I5B", width, height, 1, 0, 0, 0, 0)), (b"IDAT", packed), (b"IEND", b"")]
    made = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def broken() -> dict[str, tuple[bytes, str]]:
    rgb, frames = picture(5, (30, 20)), [picture(seed, (9, 9)) for seed in range(3)]
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"/>'
    return {
        "nothing": (b"", "image_broken"), "text": (b"hello", "image_broken"), "svg": (svg, "image_broken"),
        "cut jpeg": (file(rgb, "JPEG")[:-40], "image_broken"), "cut png": (file(rgb, "PNG")[:-400], "image_broken"),
        "cut webp": (file(rgb, "WEBP")[:-40], "image_broken"), "head": (file(rgb, "PNG")[:33], "image_broken"),
        "gif": (file(rgb, "GIF"), "image_broken"), "bmp": (file(rgb, "BMP"), "image_broken"), "tiff": (file(rgb, "TIFF"), "image_broken"),
        "animated webp": (file(frames[0], "WEBP", save_all=True, append_images=frames[1:]), "image_animated"),
        "animated png": (file(frames[0], "PNG", save_all=True, append_images=frames[1:]), "image_animated"),
        "bomb": (bomb(6001, 6001), "image_pixels"), "thin bomb": (bomb(40_000, 1), "image_pixels"), "line": (bomb(510, 10), "image_aspect"),
    }  # fmt: skip


@pytest.mark.parametrize("name", broken())
def test_a_picture_that_is_refused(name):
    data, code = broken()[name]
    caller = client()
    response = caller.post(user(image_part(f"data:image/png;base64,{__import__('base64').b64encode(data).decode()}")))
    assert (response.status_code, response.json()["error"]["code"]) == (400, code) and not caller.upstream.requests


def test_pixels_beyond_pillows_own_limit_are_refused_undecoded(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for side in (9_500, 14_000, 60_000):  # beyond its warning, and its error
        head = bomb(8, 8)[:16] + struct.pack(">2I5B", side, side, 1, 0, 0, 0, 0)
        data = head + struct.pack(">I", zlib.crc32(head[12:])) + bomb(8, 8)[33:]
        with pytest.raises(Refusal) as stop:
            decode(data, LIMITS)
        assert stop.value.code in ("image_pixels", "image_broken")


def test_odd_bytes_in_pictures_leave_no_warnings_behind():
    """Pillow warns of each in a text of its own, and Python keeps them all."""
    odd = [
        b"Exif\0\0MM\0*" + struct.pack(">IHHHIII", 8, 1, tag, 3, 9999, 2**31, 0) for tag in range(3)
    ]  # beyond its end
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        decode(file(picture(0), "JPEG", exif=odd[0]), LIMITS)
        assert len(seen) == 1
        quiet()
        for exif in odd:
            decode(file(picture(0), "JPEG", exif=exif), LIMITS)
        assert len(seen) == 1


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png,abc", "data:text/html;base64,QUJD", "data:image/png;base64,QU JD", "data:image/png;base64,QUJ", "data:;base64,QUJD",
        "data:image/png;base64,Ünï", "data:image/png;charset=x;base64,QUJD", "data:image/png;base64,QUJD\n", "data:", "", " https://h.test/",
    ],
)  # fmt: skip
def test_what_is_no_data_url(url):
    caller = client(allow_hosts=("h.test",))
    response = caller.post(user(image_part(url)))
    assert response.status_code == 400 and not caller.upstream.requests


def test_a_files_bytes_are_capped():
    assert from_data_url("data:image/png;base64,QUJD", 3) == b"ABC"
    with pytest.raises(Refusal) as stop:
        from_data_url("data:image/png;base64," + "QUJD" * 10, 3)
    assert stop.value.code == "image_too_large"


# -- fetching ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "198.18.0.1",
        "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "fe80::1%eth0", "fc00::1", "fec0::1",
        "ff02::1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:1::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


class Net(httpx2.AsyncBaseTransport):
    """What would go out; `answer` answers it."""

    def __init__(self, answer: Any) -> None:
        self.requests: list[httpx2.Request] = []
        self.answer = answer

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        return self.answer()


class Trickle(httpx2.AsyncByteStream):
    def __init__(self, chunk: bytes, wait: float, count: int = 1000) -> None:
        self.chunk, self.wait, self.count, self.count_sent = chunk, wait, count, 0

    async def __aiter__(self) -> Any:
        for _ in range(self.count):
            await asyncio.sleep(self.wait)
            self.count_sent += 1
            yield self.chunk


def fetcher(
    answer: Any, addresses: Any = ("93.184.216.34",), hosts: Any = ("pictures.test",), **options: Any
) -> tuple[Fetcher, Net, list[str]]:
    net, lookups = Net(answer), []

    async def resolve(host: str, port: int) -> list[str]:
        lookups.append(f"{host}:{port}")
        if isinstance(addresses, Exception):
            raise addresses
        return list(addresses)

    return Fetcher(hosts, options.get("max_bytes", 10_000), options.get("timeout", 5), resolve, net), net, lookups


def ok(data: bytes = b"", **options: Any) -> Any:
    return lambda: httpx2.Response(200, stream=Trickle(data, 0, 1), **options)


def test_a_picture_from_a_host_on_the_list_is_defended():
    image = picture(7, (40, 30))
    fetch, net, looked = fetcher(ok(file(image, "PNG")), hosts=["Pictures.test", "bücher.test:8443"])
    caller = client(fetcher=fetch)
    assert caller.post(user(image_part("https://pictures.test/a?b=c#d"), text_part("q"))).status_code == 200
    assert picture_of(caller.sent()[0]["content"][0]["image_url"]["url"]).tobytes() == border().paint(image).tobytes()
    (sent,) = net.requests  # to the very address that was looked at, under the host's own name
    assert (sent.url.host, sent.headers["host"], sent.extensions["sni_hostname"]) == (
        "93.184.216.34",
        "pictures.test",
        "pictures.test",
    )
    assert sent.url.raw_path == b"/a?b=c" and looked == ["pictures.test:443"]
    assert not {"authorization", "cookie", "referer"} & set(sent.headers)
    assert caller.post(user(image_part("https://bücher.test:8443/"))).status_code == 200
    assert looked[1] == "xn--bcher-kva.test:8443" and net.requests[1].url.port == 8443


@pytest.mark.parametrize(
    "url",
    [
        "http://pictures.test/a", "ftp://pictures.test/a", "file:///etc/passwd", "//pictures.test/a", "https://other.test/a",
        "https://user:pw@pictures.test/", "https://pictures.test@evil.test/", "https://pictures.test:8443/", "https://pictures.test./",
        "https://pictures.test.evil.test/", "https://evil.test/#@pictures.test", "https://evil.test\\@pictures.test/", "https://127.0.0.1/",
        "https://2130706433/", "https://0x7f000001/", "https://0177.0.0.1/", "https://127.1/", "https://[::1]/", "https://[::ffff:127.0.0.1]/",
        "https://pictures.test\t.evil.test/", "https://pictures%2etest/", "https://" + "a" * 70_000, "https://\ud83d/", "https:///a", "https://pictures.test:99999/",
    ],
)  # fmt: skip
def test_an_address_that_may_not_be_asked(url):
    fetch, net, looked = fetcher(ok())
    caller = client(fetcher=fetch)
    response = caller.post(user(image_part(url)))
    assert response.status_code == 400 and not net.requests and not looked and not caller.upstream.requests


@pytest.mark.parametrize("entry", ["127.0.0.1", "2130706433", "0x7f.1", "[::1]", "[::ffff:7f00:1]", "localhost"])
def test_this_machine_is_not_asked_even_if_it_is_on_the_list(entry):
    """With the system's own look-up, which knows all ways to write an address."""
    net = Net(ok())
    caller = client(fetcher=Fetcher([entry], 100, 5, None, net))
    response = caller.post(user(image_part(f"https://{entry}/a")))
    assert response.status_code in (400, 502) and not net.requests and not caller.upstream.requests


@pytest.mark.parametrize(
    ("addresses", "status", "code"),
    [
        (["10.0.0.1"], 400, "image_url_private"), (["93.184.216.34", "127.0.0.1"], 400, "image_url_private"), (["::ffff:10.0.0.1"], 400, "image_url_private"),
        ([], 400, "image_url_private"), (OSError("no such host"), 502, "image_unreachable"), (UnicodeError(), 502, "image_unreachable"),
    ],
)  # fmt: skip
def test_a_name_that_leads_inside_is_not_asked(addresses, status, code):
    fetch, net, _ = fetcher(ok(), addresses)
    response = client(fetcher=fetch).post(user(image_part("https://pictures.test/a")))
    assert (response.status_code, response.json()["error"]["code"]) == (status, code) and not net.requests


def test_a_name_is_looked_up_once_so_that_a_second_answer_leads_nowhere():
    answers = iter([["93.184.216.34"], ["127.0.0.1"]])
    fetch, net, _ = fetcher(ok(b"x"))

    async def rebinding(host: str, port: int) -> list[str]:
        return next(answers)

    fetch.resolve = rebinding
    assert asyncio.run(fetch("https://pictures.test/a")) == b"x"
    assert [r.url.host for r in net.requests] == ["93.184.216.34"]
    with pytest.raises(Refusal, match="image_url_private"):
        asyncio.run(fetch("https://pictures.test/a"))


def raising(error: Exception) -> Any:
    def raise_it() -> httpx2.Response:
        raise error

    return raise_it


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (lambda: httpx2.Response(302, headers={"location": "https://127.0.0.1/"}), 502, "image_unreachable"),
        (lambda: httpx2.Response(404), 502, "image_unreachable"),
        (ok(zlib.compress(b"x"), headers={"content-encoding": "gzip"}), 502, "image_unreachable"),
        (ok(b"x" * 10_001), 400, "image_too_large"),
        (lambda: httpx2.Response(200, stream=Trickle(b"x", 0.05)), 504, "image_timeout"),
        (raising(httpx2.ConnectError("no")), 502, "image_unreachable"), (raising(httpx2.ReadTimeout("no")), 502, "image_unreachable"),
        (ok(b"no picture"), 400, "image_broken"),
    ],
)  # fmt: skip
def test_a_host_that_sends_no_picture(answer, status, code):
    fetch, net, _ = fetcher(answer, timeout=0.4)
    caller = client(fetcher=fetch)
    reply = caller.post(user(image_part("https://pictures.test/a")))
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert len(net.requests) == 1 and not caller.upstream.requests


def test_an_endless_picture_is_cut_at_the_cap():
    stream = Trickle(b"x" * 1000, 0)
    fetch, _, _ = fetcher(lambda: httpx2.Response(200, stream=stream))
    with pytest.raises(Refusal, match="image_too_large"):
        asyncio.run(fetch("https://pictures.test/a"))
    assert stream.count_sent <= 75  # of chunks joined to 64 KiB


@pytest.mark.parametrize("entry", ["*", "*.test", "https://a.test", "a.test/x", "u@a.test", "", "a b"])
def test_an_entry_that_is_no_host(entry):
    with pytest.raises(DavspError, match="--allow-host"):
        Fetcher([entry], 1, 1)


def test_no_host_is_on_the_list_by_default():
    caller = client()
    response = caller.post(user(image_part("https://example.org/a.png")))
    assert response.status_code == 400 and response.json()["error"]["code"] == "image_url_host"
