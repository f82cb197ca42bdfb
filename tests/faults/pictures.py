"""Pictures in forms that no camera makes: each is answered with the canvas of `davsp eval`, or refused."""

import asyncio
import base64
import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from davsp import DavspError
from davsp.query import open_picture
from faults import Seen, session, shapeless
from proxy import Client, border, client, image_part, picture_of, user

READ = ("PNG", "JPEG", "WEBP")
OTHERS = ("GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "PCX", "JPEG2000")
MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P",),
}
ADAM7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
"""Of each pass of an interlaced PNG: first row and column, steps between rows and columns."""

# -- files that are whole -------------------------------------------------------------------------------------------------


def noise(rng: random.Random) -> Image.Image:
    """Noise of an odd size, or a plane with some noise in it."""
    width, height = rng.choice([(1, 1), (1, 7), (50, 1), (8, 8)] + 6 * [(rng.randint(2, 90), rng.randint(2, 90))])
    image = Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))
    return image if rng.random() < 0.5 else Image.blend(image, Image.new("RGB", image.size, "green"), 0.9)


def saved(rng: random.Random, form: str) -> bytes:
    """A file that Pillow writes, in one of the modes and ways of its form."""
    image, mode = noise(rng), rng.choice(MODES.get(form, ("RGB",)))
    options: dict[str, Any] = {}
    if mode == "RGBA" or mode == "LA":
        image.putalpha(Image.frombytes("L", image.size, rng.randbytes(image.width * image.height)))
    if mode == "I;16":
        image = Image.fromarray(
            np.frombuffer(rng.randbytes(2 * image.width * image.height), np.uint16).reshape(image.size[::-1])
        )
    elif mode == "P":
        image = image.quantize(rng.choice([2, 4, 16, 200]))
    else:
        image = image.convert(mode)
    if form == "PNG" and mode in ("1", "L", "P", "RGB") and rng.random() < 0.4:
        options["transparency"] = (
            (1, 2, 3) if mode == "RGB" else rng.choice([0, 1, rng.randbytes(2)] if mode == "P" else [0, 1])
        )
    if form == "JPEG":
        options |= {
            "progressive": rng.random() < 0.5,
            "quality": rng.choice([1, 30, 95]),
            "subsampling": rng.choice([0, 1, 2]),
        }
    if form == "WEBP":
        options |= {"lossless": rng.random() < 0.5, "exact": rng.random() < 0.5}
    if form in READ and rng.random() < 0.4:
        exif = Image.Exif()
        exif[0x0112] = rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 300])
        options["exif"] = exif
    return _file(image, form, **options)


def animated(rng: random.Random) -> bytes:
    frames = [Image.frombytes("RGB", (9, 7), rng.randbytes(189)) for _ in range(rng.randint(2, 4))]
    return _file(frames[0], rng.choice(["WEBP", "PNG"]), save_all=True, append_images=frames[1:])


def several(rng: random.Random) -> bytes:
    """A phone's JPEG with a second picture behind the first."""
    return _file(noise(rng), "MPO", save_all=True, append_images=[noise(rng)])


def by_hand(rng: random.Random, odd: int = 0) -> bytes:
    """A PNG that Pillow does not write: interlaced, 16 bits a channel, 1 to 8 bits of grey; with so many odd chunks."""
    kind, depth = rng.choice(
        [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (4, 8), (4, 16), (6, 8), (6, 16)]
    )
    bits = depth * {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    width, height, interlaced = rng.randint(1, 40), rng.randint(1, 40), rng.random() < 0.6
    data = b""
    for top, left, down, right in ADAM7 if interlaced else [(0, 0, 1, 1)]:
        columns, rows = len(range(left, width, right)), len(range(top, height, down))
        if columns:
            data += b"".join(bytes([rng.randrange(5)]) + rng.randbytes((columns * bits + 7) // 8) for _ in range(rows))
    chunks = [(b"IHDR", struct.pack(">2I5B", width, height, depth, kind, 0, 0, interlaced))]
    for name in rng.sample([b"tEXt", b"eXIf", b"gAMA", b"iCCP", b"pHYs", b"tRNS", b"puRr", b"zTXt"], odd):
        chunks.append((name, rng.randbytes(rng.choice([0, 1, 4, 6, 30]))))
    packed, split = zlib.compress(data), rng.randrange(4)
    return _png([*chunks, (b"IDAT", packed[:split]), (b"IDAT", packed[split:]), (b"IEND", b"")])


def _file(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    whole = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole)


# -- and files that are not ------------------------------------------------------------------------------------------------


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def trailing(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice([b"\0", rng.randbytes(500), data, b"<svg/>", b"PK\x03\x04"])


def flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        changed[min(rng.randrange(len(data)), rng.randrange(len(data)))] = rng.randrange(256)  # more of them in front
    return bytes(changed)


def headed(data: bytes, rng: random.Random) -> bytes:
    """With the head of another file, or its own with a piece too much or too little."""
    heads = [
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"RIFF\xff\xff\xff\xffWEBPVP8X",
        b"GIF89a",
        b"",
        b"\xef\xbb\xbf",
    ]
    return rng.choice(heads) + data[rng.choice([0, 0, 2, 8, 12]) :]


def huge(data: bytes, rng: random.Random) -> bytes:
    """A small PNG that says that it is large."""
    side = [6001, 9500, 14_000, 60_000, 2**31 - 1, 2**32 - 1, 0]
    head = struct.pack(
        ">2I5B",
        rng.choice([1, *side]),
        rng.choice(side),
        rng.choice([1, 8, 16]),
        rng.choice([0, 2, 3, 6]),
        0,
        0,
        rng.randrange(2),
    )
    return _png([(b"IHDR", head), (b"IDAT", zlib.compress(rng.randbytes(90))), (b"IEND", b"")])


def bomb(data: bytes, rng: random.Random) -> bytes:
    """Few bytes that become as many pixels as the settings let pass, or a few more."""
    width = rng.choice([2999, 3000, 3001])
    rows = zlib.compress(b"\0" * (3000 * (1 + (width + 7) // 8)), 9)
    return _png([(b"IHDR", struct.pack(">2I5B", width, 3000, 1, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")])


WHOLE: dict[str, tuple[int, Callable[[random.Random], bytes]]] = {
    "as Pillow writes it": (8, lambda rng: saved(rng, rng.choice(READ))),
    "PNG, interlaced or of odd depth": (3, by_hand),
    "PNG with odd chunks": (2, lambda rng: by_hand(rng, rng.randint(1, 3))),
    "two pictures in a JPEG": (1, several),
    "animated": (1, animated),
    "of another format": (1, lambda rng: saved(rng, rng.choice(OTHERS))),
}
DAMAGE: dict[str, tuple[int, Callable[[bytes, random.Random], bytes]]] = {
    "whole": (60, lambda data, rng: data),
    "cut": (20, cut),
    "bytes behind its end": (10, trailing),
    "bytes changed": (30, flipped),
    "another head": (10, headed),
    "says that it is huge": (8, huge),
    "few bytes, many pixels": (1, bomb),
}
PIXELS = 9_000_000  # so that a bomb takes little here
MUST = ("as Pillow writes it", "PNG, interlaced or of odd depth", "two pictures in a JPEG")
"""Whole ones of these are answered, not refused."""


def run(seed: int, count: int) -> Seen:
    """So many pictures, each a request of its own."""
    seen, rng, caller = Seen(), random.Random(seed), client(border(), threads=1, max_pixels=PIXELS)
    with TemporaryDirectory() as folder:
        asyncio.run(_ask_all(seen, rng, caller, count, Path(folder, "x")))
    return seen


async def _ask_all(seen: Seen, rng: random.Random, caller: Client, count: int, path: Path) -> None:
    paint = border().paint
    async with session(caller) as http:
        for number in range(count):
            form = rng.choices(list(WHOLE), [often for often, _ in WHOLE.values()])[0]
            harm = rng.choices(list(DAMAGE), [often for often, _ in DAMAGE.values()])[0]
            data = DAMAGE[harm][1](WHOLE[form][1](rng), rng)
            url = f"data:image/{rng.choice(['png', 'jpeg', 'webp', 'x-odd'])};base64,{base64.b64encode(data).decode()}"
            body = {"model": caller.model, "messages": [user(image_part(url))]}
            reply = await http.post("/v1/chat/completions", json=body)
            seen.tried += 1
            path.write_bytes(data)
            problem = _problem(reply, caller, path, paint, must=harm == "whole" and form in MUST)
            code = "answered" if reply.status_code == 200 else reply.json()["error"]["code"]
            seen.outcomes[f"{form if harm == 'whole' else harm}: {code}"] += 1
            if problem:
                seen.broken.append(
                    f"number {number}, {form}, {harm}: {problem}; {len(data)} bytes, {data[:1500].hex()}"
                )
            caller.upstream.bodies.clear()
            caller.upstream.requests.clear()


def _problem(reply: Any, caller: Client, path: Path, paint: Callable[[Image.Image], Image.Image], must: bool) -> str:
    try:
        want = open_picture(path)  # as `davsp eval` does
    except DavspError:
        want = None
    if reply.status_code != 200:
        if must:
            return f"a good picture is refused: {reply.json()}"
        if reply.status_code >= 500 or caller.upstream.bodies:
            return f"a {reply.status_code}, and {len(caller.upstream.bodies)} requests sent on"
        return shapeless(reply)
    if want is None:
        return "answered, and `davsp eval` cannot read it"
    sent = picture_of(caller.sent()[0]["content"][0]["image_url"]["url"])
    return "" if sent.tobytes() == paint(want).tobytes() else "another canvas than that of `davsp eval`"
