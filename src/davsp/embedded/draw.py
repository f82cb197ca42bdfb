"""Pictures of the little world: typographic phrases, things, both, sums, pages of words. All seeded, all drawn by code.

A `Picture` is uint8 pixels plus the boxes of what stands in it; the boxes give the label of each patch, from which
the vision tower learns to see before it is joined to the decoder (docs/log.md).
"""

import functools
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from davsp.embedded import words
from davsp.embedded.pictograms import paint

SIDE, PATCH = 168, 14  # canvas and patch in pixels: 12 x 12 = 144 image tokens; a border of 14 covers 44 (30.6 %)

# Faces that come with matplotlib. Four are never seen in training: they test reading.
HELD_FACES = ("DejaVuSansMono-Oblique", "DejaVuSerif-Italic", "STIXGeneralBol", "cmss10")
FACES = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono",
    "DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmb10", "cmtt10",
)  # fmt: skip

CLASSES = ("", *words.DRAWN_WORDS, *(f"[{t}]" for t in words.THINGS))  # patch labels; "" = nothing, [x] = picture of x
CLASS_ID = {c: i for i, c in enumerate(CLASSES)}
COLOUR_ID = {c: i for i, c in enumerate(words.COLOURS)}
LETTERS = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz0123456789+-")}


@dataclass
class Box:
    """Something drawn: its class, its box in pixels, a thing's colour, a word's letters' right edges."""

    label: str
    x0: float
    y0: float
    x1: float
    y1: float
    colour: str = ""
    edges: tuple[float, ...] = ()


@dataclass
class Picture:
    """pixels: uint8 (h, w, 3); boxes: what stands where."""

    pixels: np.ndarray
    boxes: list[Box] = field(default_factory=list)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.pixels.shape[0] // PATCH, self.pixels.shape[1] // PATCH

    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)

    def resized(self, grid: tuple[int, int]) -> "Picture":
        """The picture on another number of patches (rows, columns), with its boxes; itself if that is the same."""
        if grid == self.grid:
            return self
        height, width = grid[0] * PATCH, grid[1] * PATCH
        y, x = height / self.pixels.shape[0], width / self.pixels.shape[1]
        moved = [
            replace(b, x0=b.x0 * x, x1=b.x1 * x, y0=b.y0 * y, y1=b.y1 * y, edges=tuple(e * x for e in b.edges))
            for b in self.boxes
        ]
        return Picture(np.asarray(self.image().resize((width, height), Image.Resampling.BICUBIC)), moved)


@functools.lru_cache(maxsize=512)
def _font(face: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"), size)


@functools.lru_cache(maxsize=60_000)
def _word(text: str, face: str, size: int) -> tuple[np.ndarray, tuple[float, ...], int, int]:
    """A word's coverage (float32 h x w), its letters' right edges, ink top and bottom. Cached: it is most of the cost."""
    font = _font(face, size)
    edges = tuple(font.getlength(text[: i + 1]) for i in range(len(text)))
    height = int(size * 1.35)
    stamp = Image.new("L", (int(edges[-1]) + size // 3 + 2, height))
    ImageDraw.Draw(stamp).text((1, size), text, fill=255, font=font, anchor="ls")
    mask = np.asarray(stamp, np.float32) / 255
    rows = np.flatnonzero(mask.max(1) > 0.3)
    return mask, edges, int(rows[0]), int(rows[-1]) + 1


def put_word(picture: Picture, text: str, x: int, y: int, face: str, size: int, ink: tuple, label: bool = True) -> int:
    """Draw `text` with its line's top at y; returns its width in pixels."""
    mask, edges, top, bottom = _word(text, face, size)
    h, w = picture.pixels.shape[:2]
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + mask.shape[1], w), min(y + mask.shape[0], h)
    if x1 > x0 and y1 > y0:
        a = mask[y0 - y : y1 - y, x0 - x : x1 - x, None]
        region = picture.pixels[y0:y1, x0:x1]
        region[:] = (region * (1 - a) + np.array(ink, np.float32) * a + 0.5).astype(np.uint8)
        if label:
            picture.boxes.append(Box(text, x, y + top, x + edges[-1], y + bottom, edges=tuple(x + e for e in edges)))
    return int(edges[-1])


def put_thing(
    picture: Picture, name: str, x: int, y: int, size: int, colour: str, rng: random.Random | None = None
) -> None:
    rgb: tuple[int, ...] = words.COLOURS[colour]
    if rng:  # no two reds are the same
        rgb = tuple(int(np.clip(c + rng.randint(-16, 16), 0, 255)) for c in rgb)
    paint(picture.pixels, name, x, y, size, (rgb[0], rgb[1], rgb[2]))
    picture.boxes.append(Box(f"[{name}]", x, y, x + size, y + size, colour=colour))


def ground(rng: random.Random, side: int = SIDE) -> tuple[np.ndarray, tuple]:
    """A background and an ink that can be read on it: light paper mostly, dark or coloured at times."""
    roll = rng.random()
    paper: tuple[int, ...]
    ink: tuple[int, ...]
    if roll < 0.35:
        paper, ink = (255, 255, 255), tuple(rng.randint(0, 40) for _ in range(3))
    elif roll < 0.75:
        paper, ink = tuple(rng.randint(190, 255) for _ in range(3)), tuple(rng.randint(0, 90) for _ in range(3))
    else:
        paper, ink = tuple(rng.randint(0, 80) for _ in range(3)), tuple(rng.randint(190, 255) for _ in range(3))
    pixels = np.empty((side, side, 3), np.uint8)
    pixels[:] = paper
    if rng.random() < 0.25:  # a gentle shade from one side to the other
        ramp = np.linspace(-1, 1, side)[:, None] * rng.uniform(6, 16)
        shade = ramp[:, :, None] if rng.random() < 0.5 else ramp.T[:, :, None]
        pixels = np.clip(pixels + shade, 0, 255).astype(np.uint8)
    return pixels, ink


def paper(rng: random.Random, side: int = SIDE) -> np.ndarray:
    """A light ground on which every colour of a thing shows."""
    pixels = np.empty((side, side, 3), np.uint8)
    pixels[:] = (255, 255, 255) if rng.random() < 0.4 else tuple(rng.randint(205, 255) for _ in range(3))
    return pixels


def lines(text: str, face: str, size: int, width: int) -> list[list[str]]:
    """Wrap `text` to `width` pixels."""
    rows: list[list[str]] = [[]]
    gap, used = _gap(face, size), 0.0
    for word in text.split():
        need = _word(word, face, size)[1][-1]
        if rows[-1] and used + gap + need > width:
            rows.append([])
            used = 0.0
        used += need + (gap if rows[-1] else 0)
        rows[-1].append(word)
    return rows


def _gap(face: str, size: int) -> int:
    return max(4, int(_font(face, size).getlength(" ")))


def write(picture: Picture, rng: random.Random, text: str, area: tuple[int, int, int, int], face: str, size: int, ink: tuple,
          ) -> None:  # fmt: skip
    """Write `text` wrapped somewhere inside `area` (x0, y0, x1, y1); shrinks the letters until it fits."""
    x0, y0, x1, y1 = area
    while True:
        rows, step = lines(text, face, size, x1 - x0), int(size * rng.uniform(1.15, 1.4))
        widths = [sum(_word(w, face, size)[1][-1] for w in r) + _gap(face, size) * (len(r) - 1) for r in rows]
        if (step * len(rows) <= y1 - y0 and max(widths) <= x1 - x0) or size <= 12:
            break
        size -= 1
    centred = rng.random() < 0.5
    left = x0 + rng.randint(0, max(0, int(x1 - x0 - max(widths))))
    y = y0 + rng.randint(0, max(0, y1 - y0 - step * len(rows)))
    for row, width in zip(rows, widths, strict=True):
        x = left + int((max(widths) - width) / 2) if centred else left
        for word in row:
            x += put_word(picture, word, x, y, face, size, ink) + _gap(face, size)
        y += step


def typographic(rng: random.Random, text: str, faces: tuple[str, ...] = FACES, plain: bool = False) -> Picture:
    """A picture of a phrase (MM-SafetyBench's TYPO): any face, 17-30 px letters, any colours and place."""
    pixels, ink = ground(rng)
    if plain:
        pixels[:], ink = 255, (0, 0, 0)
    picture = Picture(pixels)
    write(picture, rng, text, (4, 4, SIDE - 4, SIDE - 4), rng.choice(faces), rng.randint(17, 30), ink)
    return picture


def sum_picture(rng: random.Random, text: str, faces: tuple[str, ...] = FACES) -> Picture:
    """A sum in large figures, 26-44 px: at a phrase's size a digit is narrower than a patch, and two of three sums were misread."""
    pixels, ink = ground(rng)
    picture = Picture(pixels)
    write(picture, rng, text, (4, 4, SIDE - 4, SIDE - 4), rng.choice(faces), rng.randint(26, 44), ink)
    return picture


def numbered(rng: random.Random, text: str, faces: tuple[str, ...] = FACES) -> Picture:
    """FigStep's layout: a title and an empty numbered list. Never drawn in training."""
    picture = Picture(np.full((SIDE, SIDE, 3), 255, np.uint8))
    face, size = rng.choice(faces), rng.randint(17, 20)
    rows = lines(text, face, size, SIDE - 12)
    y, step = rng.randint(4, 14), int(size * 1.3)
    for row in rows:
        x = 6
        for word in row:
            x += put_word(picture, word, x, y, face, size, (0, 0, 0)) + _gap(face, size)
        y += step
    for n in "123":
        put_word(picture, f"{n}.", 6, y, face, size, (0, 0, 0), label=False)
        y += step
    return picture


@dataclass(frozen=True)
class Thing:
    name: str
    colour: str
    cell: int  # 0..8, row by row


def scene(rng: random.Random, things: list[Thing], alike: bool = False) -> Picture:
    """Things in the cells of a 3 x 3 grid (MM-SafetyBench's SD plays this part: a picture that shows, and says nothing).

    `alike`: all of about one size, as things to be counted are.
    """
    picture = Picture(paper(rng))
    cell = SIDE // 3
    for thing in things:
        size = (
            rng.randint(44, 48)
            if alike
            else rng.randint(40, 54)
            if len(things) > 1 or rng.random() < 0.5
            else rng.randint(54, 74)
        )
        cx, cy = (thing.cell % 3) * cell + cell // 2, (thing.cell // 3) * cell + cell // 2
        x = int(np.clip(cx - size // 2 + rng.randint(-4, 4), 0, SIDE - size))
        y = int(np.clip(cy - size // 2 + rng.randint(-4, 4), 0, SIDE - size))
        put_thing(picture, thing.name, x, y, size, thing.colour, rng)
    return picture


def captioned(rng: random.Random, thing: str, colour: str, text: str, faces: tuple[str, ...] = FACES) -> Picture:
    """A thing with a phrase beneath (or above) it: SD+TYPO."""
    picture = Picture(paper(rng))
    ink = tuple(rng.randint(0, 70) for _ in range(3))
    size, below = rng.randint(60, 84), rng.random() < 0.7
    x = rng.randint(20, SIDE - 20 - size)
    put_thing(picture, thing, x, 6 if below else SIDE - 6 - size, size, colour, rng)
    area = (4, 8 + size, SIDE - 4, SIDE - 4) if below else (4, 4, SIDE - 4, SIDE - 8 - size)
    write(picture, rng, text, area, rng.choice(faces), rng.randint(17, 24), ink)
    return picture


def page(rng: random.Random, faces: tuple[str, ...] = FACES, whole: bool = False) -> Picture:
    """A page dense with words and things, each patch a lesson: what the tower trains on first.

    Args:
        rng: decides everything.
        faces: of the lettering.
        whole: words only, none cut off at the edge.
    """
    pixels, ink = ground(rng)
    light = pixels.mean() > 150 and not whole
    picture = Picture(pixels)
    y = rng.randint(0, 8) if whole else rng.randint(-6, 4)
    while y < SIDE - (22 if whole else 12):
        things = light and rng.random() < 0.4
        figures = whole and rng.random() < 0.2  # twelve classes of a hundred: a line of their own, as large as in sums
        face, size = rng.choice(faces), rng.randint(22, 46) if figures else rng.randint(15, 30)
        height = rng.randint(36, 76) if things else int(size * 1.25)
        x = rng.randint(0, 12) if whole else rng.randint(-8, 10)
        while x < SIDE - 10:
            if things:
                put_thing(picture, rng.choice(words.THINGS), x, y, height, rng.choice(tuple(words.COLOURS)), rng)
                x += height + rng.randint(2, 12)
            else:
                word = rng.choice(words.DIGITS if figures else words.DRAWN_WORDS)
                if whole and (x + _word(word, face, size)[1][-1] > SIDE - 2 or y + height > SIDE):
                    break
                x += put_word(picture, word, x, y, face, size, ink) + rng.randint(5, 14)
        y += height + rng.randint(0, 5)
    return picture


def shrink(rng: random.Random, picture: Picture, margin: int, jitter: int = 0, fill: str = "colour") -> Picture:
    """The picture made smaller with something around it: what stands where a border will be.

    fill: "colour" (plain), "words" (odd words and things), "sign" (words that ask for care), "noise".
    """
    side = SIDE - 2 * margin
    outer = Picture(np.empty_like(picture.pixels))
    outer.pixels[:] = tuple(rng.randint(0, 255) for _ in range(3)) if rng.random() < 0.6 else rng.choice((0, 128, 255))
    if fill == "noise":
        seed = rng.getrandbits(32)
        outer.pixels[:] = np.random.default_rng(seed).integers(0, 256, outer.pixels.shape, dtype=np.uint8)
    if fill in ("words", "sign"):
        base = outer.pixels[0, 0].astype(int)
        ink = (0, 0, 0) if base.mean() > 120 else (255, 255, 255)
        face, size = rng.choice(FACES), rng.randint(13, 17)
        for y in [1, *range(margin + 2, SIDE - margin - 14, 20), SIDE - margin - 3]:
            x = rng.randint(0, 6)
            while x < SIDE - 12:
                text = rng.choice(words.SIGNS) if fill == "sign" else rng.choice(words.DRAWN_WORDS)
                for word in text.split():
                    x += put_word(outer, word, x, y, face, size, ink) + 5
                x += 6
    dx = margin + (rng.randint(-jitter, jitter) if jitter else 0)
    dy = margin + (rng.randint(-jitter, jitter) if jitter else 0)
    small = np.asarray(picture.image().resize((side, side), Image.Resampling.BICUBIC))
    outer.pixels[dy : dy + side, dx : dx + side] = small
    scale = side / SIDE
    inner = Box("", dx, dy, dx + side, dy + side)  # covers what was written behind the picture
    boxes = [b for b in outer.boxes if not _hidden(b, dx, dy, side)] + [inner]
    moved = [
        replace(b, x0=b.x0 * scale + dx, y0=b.y0 * scale + dy, x1=b.x1 * scale + dx, y1=b.y1 * scale + dy,
                edges=tuple(e * scale + dx for e in b.edges))
        for b in picture.boxes
    ]  # fmt: skip
    return Picture(outer.pixels, boxes + moved)


def _hidden(box: Box, dx: int, dy: int, side: int) -> bool:
    cx, cy = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
    return dx <= cx < dx + side and dy <= cy < dy + side


def patch_labels(picture: Picture) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class, colour and letter of each patch, each int64 (n,), row by row; -100 where there is nothing to say.

    A patch belongs to the box that holds its centre; one that is only grazed is left out of the class loss.
    """
    down, across = picture.grid
    label, colour, letter = (np.full(picture.grid, x, np.int64) for x in (0, -100, -100))
    for box in picture.boxes:
        if not box.label:
            continue
        graze = _cells(box.x0 + 1, box.x1 - 1, 0.5, across), _cells(box.y0 + 1, box.y1 - 1, 0.5, down)
        region = label[graze[1], graze[0]]
        region[region == 0] = -100
    for box in picture.boxes:
        slack = 0.15 if box.edges else 0.0  # letters are often a little lower than a patch
        cols, rows = _cells(box.x0, box.x1, 0.0, across), _cells(box.y0, box.y1, slack, down)
        label[rows, cols] = CLASS_ID[box.label]
        colour[rows, cols] = letter[rows, cols] = -100
        if box.colour:
            colour[rows, cols] = COLOUR_ID[box.colour]
        for col in range(cols.start, cols.stop) if box.edges else ():
            i = int(np.searchsorted(box.edges, (col + 0.5) * PATCH))
            if i < len(box.label):
                letter[rows, col] = LETTERS[box.label[i]]
    return label.ravel(), colour.ravel(), letter.ravel()


def centres(picture: Picture) -> np.ndarray:
    """1 in each patch that holds the centre of a thing, else 0: int64 (n,). What can be counted."""
    down, across = picture.grid
    marks = np.zeros(picture.grid, np.int64)
    for box in picture.boxes:
        if box.label.startswith("["):
            column, row = (
                int(np.clip((a + b) / 2 / PATCH, 0, n - 1))
                for a, b, n in ((box.x0, box.x1, across), (box.y0, box.y1, down))
            )
            marks[row, column] = 1
    return marks.ravel()


def _cells(low: float, high: float, slack: float, n: int) -> slice:
    """Which of `n` patches in a line have their centre, give or take `slack` patches, in [low, high)."""
    first = int(np.ceil(low / PATCH - 0.5 - slack))
    last = int(np.ceil(high / PATCH - 0.5 + slack))
    return slice(int(np.clip(first, 0, n)), int(np.clip(last, 0, n)))
