"""Pictures that take much to decode: pixels are counted before, held in turn and given back, and files of ever so many pieces are refused."""

import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
from PIL import Image

from davsp.serve.pictures import Budget, decode, decoded
from davsp.serve.refusals import Refusal
from davsp.serve.settings import ServeSettings
from proxy import client, data_url, file, image_part, until, user
from tiny import picture


def test_a_budget_is_kept_in_turn_and_what_is_too_large_goes_alone():
    budget, most, lock, order = Budget(100), [0], threading.Lock(), list[int]()
    now = [0]

    def work(number: int, size: int) -> None:
        with budget.hold(size):
            with lock:
                order.append(number)
                now[0] += min(size, 100)
                most[0] = max(most[0], now[0])
            time.sleep(0.002)
            with lock:
                now[0] -= min(size, 100)

    sizes = [30, 500, 60, 30, 100, 10] * 10
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(len(sizes)), sizes))
    assert most[0] <= 100 and budget.left == 100 and sorted(order) == list(range(60))

    order.clear()
    with ThreadPoolExecutor(2) as pool:
        with budget.hold(90):
            large = pool.submit(work, 1, 50)
            until(budget.turn.locked)
            small = pool.submit(work, 2, 5)  # there is room for it, and it came later
            time.sleep(0.1)
            assert not small.done() and not large.done()
        large.result(), small.result()
    assert order == [1, 2]


def test_a_picture_is_decoded_when_it_is_asked_for_and_given_back_before_the_next():
    budget, limits = Budget(10**6), ServeSettings(upstream="http://u/v1")
    files = [file(picture(seed, (20, 30)), "PNG") for seed in range(3)]
    pictures = decoded(files, limits, budget)
    assert budget.left == 10**6
    next(pictures)
    first = budget.left
    assert first < 10**6
    next(pictures)
    assert budget.left == first
    pictures.close()
    assert budget.left == 10**6


def test_pixels_of_a_request_are_counted_before_any_is_decoded(monkeypatch):
    caller = client(max_request_pixels=2000)
    fits, one = data_url(picture(0, (40, 25))), data_url(Image.new("RGB", (41, 25)))
    assert caller.post(user(image_part(fits), image_part(fits))).status_code == 200
    monkeypatch.setattr("davsp.serve.pictures.flatten", None)
    response = caller.post(user(image_part(fits), image_part(one)))
    assert response.status_code == 400 and "2000 pixels together" in response.json()["error"]["message"]
    assert len(caller.upstream.bodies) == 1


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@cache
def hostile_files() -> dict[str, bytes]:
    """Small pictures in files that make their reader unpack, keep or repeat much."""
    png, jpeg = file(picture(0, (8, 8)), "PNG"), file(Image.new("RGB", (512, 512)), "JPEG", progressive=True)
    start, idat = png[:33], png[33:]
    scan = jpeg[jpeg.rfind(b"\xff\xc4") : -2]

    def segment(marker: int, data: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data

    def text(number: int) -> bytes:
        return chunk(b"zTXt", b"k%d\0\0" % number + zlib.compress(b"a" * (2**20 - 8)))

    return {
        "texts": start + b"".join(map(text, range(60))) + idat,
        "texts behind": png[:-12] + b"".join(map(text, range(60))) + png[-12:],
        "chunks": start + chunk(b"abCd", b"") * 200_000 + idat,
        "IDATs": png[:-12].replace(idat[:-12], chunk(b"IDAT", idat[8:20]) + chunk(b"IDAT", b"") * 200_000 + png[-12:]),
        "EXIF": jpeg[:2] + segment(0xE1, b"Exif\0\0" + b"x" * 600) * 20_000 + jpeg[2:],
        "comments": jpeg[:2] + segment(0xFE, b"") * 500_000 + jpeg[2:],
        "reserved": jpeg[:2] + b"\xff\x02" * 500_000 + jpeg[2:],
        "fill": jpeg[:2] + b"\xff" * 2_000_000 + jpeg[2:],
        "scans": jpeg[:-2] + scan * 3000 + jpeg[-2:],
    }


@pytest.mark.parametrize("name", hostile_files())
def test_a_file_of_ever_so_many_pieces_is_refused(name):
    """Each took seconds or hundreds of megabytes."""
    with pytest.raises(Refusal) as refusal:
        decode(hostile_files()[name], ServeSettings(upstream="http://u/v1"))
    assert refusal.value.code == ("image_broken" if name.startswith("texts") else "image_pieces")


def test_a_photo_with_a_film_behind_it_and_a_picture_in_it_passes():
    """Phones put films behind pictures and small pictures before them, in which the marker of a scan stands by chance."""
    inner, film = file(picture(0, (9, 9)), "JPEG"), b"\xff\xda\0\0" * 1000
    jpeg = file(picture(1, (30, 20)), "JPEG", progressive=True, exif=b"Exif\0\0" + inner * 20)
    limits = ServeSettings(upstream="http://u/v1")
    assert decode(jpeg + film, limits).tobytes() == decode(jpeg, limits).tobytes()
