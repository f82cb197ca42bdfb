"""How a picture without a visual prompt comes to the model's shape, and where that is to be told (docs/families.md)."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from davsp.errors import DavspError
from davsp.query import Query

WAYS = {
    "pad": "padded to a square",
    "crop": "cut to the square in their middle",
    "stretch": "stretched to a square",
    "resize": "resized whole, each in its own shape",
    "tile": "cut into tiles, with the whole beside them",
}
"""What is done to pictures that are not square; `tile` and its rivals differ on large square ones, too."""

SERVER = "server"
MOST = 178_956_970
"""Pixels: Pillow opens no larger picture, so none larger is made of one on its way to the model."""
WHITE = (255, 255, 255)


def chosen(ways: tuple[str, ...], way: str | None, model: str) -> str:
    """The way that a user named, or the first of those that there are.

    Args:
        ways: of the model: as its authors show pictures, …, as its checkpoint's processor does.
        way: None: not named.
        model: which one, for the message.

    Raises:
        DavspError: the model has no such way.
    """
    if way is None or way in ways:
        return way or ways[0]
    there = " or ".join(f"{WAYS[one]} ({one})" for one in ways)
    raise DavspError(f"undefended {way!r} is not for {model}, whose undefended pictures are {there}; choose that")


def square(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """A picture in the middle of the smallest square that holds it; where that is between two pixels, up or left."""
    side = max(picture.size)
    if picture.size == (side, side):
        return picture
    whole = Image.new("RGB", (side, side), colour)
    whole.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return whole


def check_made(width: int, height: int, canvas: int, way: str) -> None:
    """Raises DavspError where the way to a square canvas leads over a larger picture than `MOST`: of a thin one, that is."""
    long, short = max(width, height), min(width, height)
    made = {"pad": (long, long), "crop": (canvas, -(-canvas * long // short))}.get(way, (0, 0))
    if made[0] * made[1] > MOST:
        raise DavspError(
            f"a picture of {width}x{height} pixels, {WAYS[way]} ({way}), would take {made[0]}x{made[1]} on its way; cut or shrink it"
        )


def not_square(queries: Sequence[Query]) -> int:
    """How many queries have a picture that is not square; of square ones all ways but `tile` make the same."""
    sizes = [query.size() for query in queries]
    return sum(size is not None and size[0] != size[1] for size in sizes)


def matters(lvlm: Any, *sets: Sequence[Query]) -> bool:
    """Whether another way could make other pixels of these queries."""
    if "tile" in lvlm.ways:
        return any(query.image is not None for queries in sets for query in queries)
    return any(map(not_square, sets))


def in_records(lvlm: Any, *sets: Sequence[Query]) -> dict[str, str]:
    """What decides that work on these queries may go on: the way, where the pixels are others than the checkpoint's processor makes.

    Empty where it makes no difference, so that older work, which knew of no other way, goes on.
    """
    if lvlm.server is not None or lvlm.undefended == lvlm.ways[-1] or not matters(lvlm, *sets):
        return {}
    return {"undefended_picture": lvlm.undefended}


def facts(lvlm: Any, queries: Sequence[Query]) -> dict[str, Any]:
    """What a manifest says: the way, whether the model has another, and how many pictures it changed."""
    pictures = sum(query.image is not None for query in queries)
    if lvlm.server is not None:
        return {"way": SERVER, "pictures": pictures}
    return {"way": lvlm.undefended, "ways": list(lvlm.ways), "not_square": not_square(queries), "pictures": pictures}


def note(said: Mapping[str, Any] | None) -> str:
    """A sentence for below a table on what No Defense saw; empty if all pictures are square, or if nothing was said."""
    if not said or not said["pictures"]:
        return ""
    if said["way"] == SERVER:
        return "Pictures without a visual prompt went to the server as they are; how it shapes them, it decides."
    if said["way"] == "tile":
        return (
            f"No Defense, and whatever has no visual prompt, saw pictures {WAYS['tile']} (--undefended tile); a visual prompt, its "
            "canvas alone."
        )
    if not said["not_square"]:
        return ""
    option = f" (--undefended {said['way']})" if len(said["ways"]) > 1 else ""
    return (
        f"No Defense, and whatever has no visual prompt, saw pictures that are not square ({said['not_square']} of "
        f"{said['pictures']}) {WAYS[said['way']]}{option}."
    )
