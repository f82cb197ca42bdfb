"""Pictures in and out: data URL to an upright RGB picture, and back as lossless PNG."""

import base64
import binascii
import io
import re
import struct
import zlib

from PIL import Image

from davsp.query import flatten
from davsp.serve.refusals import Refusal, bad
from davsp.serve.settings import ServeSettings

FORMATS = ("JPEG", "PNG", "WEBP")
STORED = 2**21  # pixels up to which a PNG is stored, not packed
_HEAD = re.compile(r"data:image/[a-z+.-]{1,20};base64,", re.IGNORECASE)


def from_data_url(url: str, max_bytes: int) -> bytes:
    """The file in a data URL.

    Raises:
        Refusal: it is none in base64, or larger than `max_bytes`.
    """
    head = _HEAD.match(url)
    if head is None:
        raise bad("image_url must be data:image/png;base64,… (or jpeg, webp).", "image_url")
    if (len(url) - head.end()) * 3 // 4 > max_bytes + 2:
        raise bad(f"image_url: the picture has more than {max_bytes} bytes.", "image_too_large")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad("image_url: what follows base64, is not base64.", "image_url") from error


def decode(data: bytes, settings: ServeSettings) -> Image.Image:
    """The picture in a file, as `davsp eval` reads it: RGB, upright, on white. Its size is seen before it is decoded.

    Raises:
        Refusal: no whole JPEG, PNG or WebP picture, more than one frame, or too many pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check(image, settings)
            return flatten(image)
    except Refusal:
        raise
    except Image.DecompressionBombError as error:
        raise bad("image_url: the picture has too many pixels.", "image_pixels") from error
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to
        raise bad(
            "image_url: the picture cannot be read; send a whole JPEG, PNG or WebP file.", "image_broken"
        ) from error


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
    return "data:image/png;base64," + base64.b64encode(png(image.convert("RGB"))).decode()


def png(image: Image.Image) -> bytes:
    """An RGB picture as PNG.

    A canvas is stored: noise does not shrink, and Pillow takes ten times as long to find that out (docs/serve.md).
    """
    if image.width * image.height > STORED:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
    row, pixels = 3 * image.width, image.tobytes()
    rows = b"".join(b"\0" + pixels[at : at + row] for at in range(0, len(pixels), row))  # filter 0 before each
    header = struct.pack(">2I5B", image.width, image.height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
        for kind, data in chunks
    )
