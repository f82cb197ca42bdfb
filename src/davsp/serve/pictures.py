"""Pictures in and out: data URL to an upright RGB picture, and back as lossless PNG."""

import binascii
import io
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import pybase64
from PIL import Image, PngImagePlugin
from PIL.ImageFile import ImageFile

from davsp.errors import DavspError
from davsp.query import flatten
from davsp.serve.bodies import Bytes
from davsp.serve.refusals import Refusal, bad
from davsp.serve.settings import ServeSettings

FORMATS = ("JPEG", "PNG", "WEBP")
BYTES = {"JPEG": 8, "MPO": 8, "PNG": 8, "WEBP": 20}  # a pixel: four as it is, four in RGB, twelve in WebP's decoder
STORED = 2**21  # pixels up to which a PNG is stored, not packed
READS = 100_000  # pieces that a file is read in; a PNG of 16 MiB in chunks of 8 KiB, libpng's own, has 9,000
SEGMENTS = 500  # of a JPEG; of 64 KiB at the most, so that 16 MiB have 256
SCANS = 64  # of a JPEG; libjpeg itself writes up to 18
MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")  # no stuffed byte, restart or start of image
STEP = 2**20  # bytes that are searched at a time, as a search holds the interpreter
_HEAD = re.compile(r"data:image/[a-z+.-]{1,20};base64,", re.IGNORECASE)


PngImagePlugin.MAX_TEXT_MEMORY = 2**22
"""Letters of all texts of a PNG. Pillow unpacks and keeps them: 64 MiB of its own accord, out of a file of 70 KB."""


def quiet() -> None:
    """Have this process not warn of odd bytes in pictures: Python keeps every new text of a warning, and clients would write them."""
    warnings.filterwarnings("ignore", module="PIL")


class Budget:
    """Bytes of pixels that threads may take at a time. One that needs more than there is waits for its turn; one that needs more than
    all takes all.

    Args:
        size: in bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = self.left = size
        self.turn, self.changed = threading.Lock(), threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Take them, once they are there, until the end of a `with`."""
        taken = min(size, self.size)
        with self.turn, self.changed:  # in the order of arrival, so that small pictures don't pass a large one for ever
            self.changed.wait_for(lambda: self.left >= taken)
            self.left -= taken
        try:
            yield
        finally:
            with self.changed:
                self.left += taken
                self.changed.notify_all()


def from_data_url(url: str, max_bytes: int, cut: Mapping[str, Bytes] | None = None) -> bytes:
    """The file in a data URL.

    Args:
        url: a data URL, or the mark of one.
        max_bytes: of the file.
        cut: mark -> base64 (`davsp.serve.bodies`).

    Raises:
        Refusal: it is none in base64, or larger than `max_bytes`.
    """
    letters: str | Bytes | None = (cut or {}).get(url)
    if letters is None:
        head = _HEAD.match(url)
        if head is None:
            raise bad("image_url must be data:image/png;base64,… (or jpeg, webp).", "image_url")
        letters = url[head.end() :]
    if len(letters) * 3 // 4 > max_bytes + 2:
        raise bad(f"image_url: the picture has more than {max_bytes} bytes.", "image_too_large")
    try:
        return pybase64.b64decode(letters, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad("image_url: what follows base64, is not base64.", "image_url") from error


def decode(data: bytes, settings: ServeSettings) -> Image.Image:
    """The picture in a file, as `davsp eval` reads it: RGB, upright, on white. Its size is seen before it is decoded.

    Raises:
        Refusal: as `decoded`.
    """
    (picture,) = decoded([data], settings)
    return picture


def decoded(
    files: Sequence[bytes], settings: ServeSettings, budget: Budget | None = None
) -> Generator[Image.Image, None, None]:
    """The pictures in files, one at a time: what one takes of the budget is given back when the next one is asked for.

    Raises:
        Refusal: one is no whole JPEG, PNG or WebP picture, has more than one frame, or too many pixels, or all together have; all this
            but for broken pixels is seen before the first one is decoded.
    """
    pixels, costs = 0, list[int]()
    for file in files:  # what a head holds is let go of before the next
        image, cost = _opened(file, settings)
        pixels += image.width * image.height
        costs.append(cost)
    if pixels > settings.max_request_pixels:
        most = f"the pictures have more than {settings.max_request_pixels} pixels together"
        raise bad(f"{most}; send fewer or smaller ones.", "image_pixels")
    for at, (file, cost) in enumerate(zip(files, costs, strict=True)):
        with (budget or Budget(0)).hold(cost):
            yield _flat(image if at == len(files) - 1 else _opened(file, settings)[0])


class _File(io.BytesIO):
    """A file that ends a reader in Python who takes it in ever so small pieces."""

    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        if self.reads > READS:
            raise bad(f"image_url: the picture's file has more than {READS // 3} pieces; save it anew.", "image_pieces")
        return super().read(size)


def _opened(file: bytes, settings: ServeSettings) -> tuple[ImageFile, int]:
    """A picture whose head was read, no more, and the bytes that it takes."""
    scans = _scans(file) if file.startswith(b"\xff\xd8") else 1
    with _readable():
        image = Image.open(_File(file), formats=FORMATS)
        _check(image, settings)
        return image, _cost(image, scans)


def _scans(file: bytes) -> int:
    """Scans of a JPEG. Each costs a look at every pixel, and 82 bytes are one. Pillow's time for a head grows with the square of its segments."""
    at, segments, scans = 2, 0, 0
    while at < len(file):
        marker = MARKER.search(file, at, at + STEP)
        if marker is None:
            at += STEP - 1
            continue
        if marker[1] == b"\xd9":
            break
        at = marker.end()
        if marker[1] >= b"\xc0":  # a segment begins with its length; libjpeg passes the rest by like what is no marker
            at += int.from_bytes(file[at : at + 2])
        segments += 1
        scans += marker[1] == b"\xda"
        if segments > SEGMENTS or scans > SCANS:
            most = f"{SCANS} scans or {SEGMENTS} segments"
            raise bad(f"image_url: the JPEG has more than {most}; save it anew.", "image_pieces")
        if marker[1] == b"\xda" and file.find(b"\xff\xda", at) < 0:
            break
    return scans


def _flat(image: Image.Image) -> Image.Image:
    with _readable():
        return flatten(image)


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except Refusal:
        raise
    except Image.DecompressionBombError as error:
        raise bad("image_url: the picture has too many pixels.", "image_pixels") from error
    except DavspError as error:
        raise bad(f"image_url: {error}.", "image_broken") from error
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to
        raise bad(
            "image_url: the picture cannot be read; send a whole JPEG, PNG or WebP file.", "image_broken"
        ) from error


def _cost(image: Image.Image, scans: int) -> int:
    """Bytes that a picture takes at the most from its file to its canvas: the decoder's, one as it is, one in RGB, one padded to a square."""
    decoder = 2 * len(image.getbands()) if scans > 1 else 0  # all coefficients of a JPEG that comes in passes
    return image.width * image.height * (BYTES[image.format or "WEBP"] + decoder) + 4 * max(image.size) ** 2


def _check(image: Image.Image, settings: ServeSettings) -> None:
    long, short = max(image.size), min(image.size)
    if long * long > settings.max_pixels:
        side = int(settings.max_pixels**0.5)
        raise bad(f"image_url: the picture is {image.width}x{image.height}, at most {side} a side.", "image_pixels")
    if long > settings.max_aspect * short:
        raise bad(f"image_url: the picture is thinner than 1:{settings.max_aspect:g}.", "image_aspect")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a phone's JPEG with a second, smaller picture
        raise bad("image_url: the picture is animated; send one frame.", "image_animated")


def to_data_url(image: Image.Image) -> str:
    """The picture as PNG in a data URL, no pixel changed."""
    return url_bytes(image).decode()


def url_bytes(image: Image.Image) -> bytes:
    """`to_data_url` in bytes, as it goes over the wire."""
    return b"data:image/png;base64," + pybase64.b64encode(png(image if image.mode == "RGB" else image.convert("RGB")))


def png(image: Image.Image) -> bytes:
    """An RGB picture as PNG.

    A canvas is stored: noise does not shrink, and Pillow takes ten times as long to find that out (docs/serve.md).
    """
    if image.width * image.height > STORED:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
    rows = np.zeros((image.height, 1 + 3 * image.width), np.uint8)  # filter 0 before each
    rows[:, 1:] = np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, -1)
    header = struct.pack(">2I5B", image.width, image.height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows.data, 0)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
        for kind, data in chunks
    )
