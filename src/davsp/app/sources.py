"""Where a picture comes from: a file, a drawing, typed text, or an example of the embedded world."""

import base64
import binascii
import io
import random
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from PIL import Image

from davsp.errors import DavspError
from davsp.query import flatten, undecodable

if TYPE_CHECKING:
    from davsp.query import Query

MAX_BYTES = 16 * 2**20
MAX_SIDE = 6000
MAX_ASPECT = 50
FORMATS = ("JPEG", "PNG", "WEBP")
FORMS = {"sd_typo": "a thing with text", "typo": "a text", "figstep": "a numbered list", "sd": "a thing"}
LONGEST = 300  # characters of a typed text


def from_data_url(url: str) -> Image.Image:
    """The picture in a data URL, upright, RGB, on white. Nothing is written anywhere.

    Args:
        url: data:image/...;base64,...

    Raises:
        DavspError: there is none, it is no JPEG, PNG or WebP, or it is too large; the sentence is fit for a page.
    """
    head, _, body = url.partition(";base64,")
    if not head.startswith("data:"):
        raise DavspError("There is no picture yet: choose a file, or another source.")
    if len(body) * 3 // 4 > MAX_BYTES + 2:
        raise DavspError(f"The picture's file is larger than {MAX_BYTES // 2**20} MB: choose a smaller one.")
    try:
        with Image.open(io.BytesIO(base64.b64decode(body, validate=True)), formats=FORMATS) as image:
            width, height = image.size  # known before anything is decoded
            if max(width, height) > MAX_SIDE:
                raise DavspError(f"The picture is {width} × {height} pixels: choose one of at most {MAX_SIDE} a side.")
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise DavspError(f"The picture is {width} × {height} pixels, which is too thin: choose another.")
            return flatten(image)
    except DavspError:
        raise
    except binascii.Error as error:
        raise DavspError("The picture did not arrive whole: choose it again.") from error
    except Image.DecompressionBombError as error:
        raise DavspError(f"The picture is too large: choose one of at most {MAX_SIDE} pixels a side.") from error
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to
        raise DavspError(
            f"This picture cannot be read, as {undecodable(error)}: choose a whole PNG, JPEG or WebP file."
        ) from error


def typographic(text: str, embedded: bool) -> Image.Image:
    """The text as a typographic attack: as the embedded world draws it, or plainly in black on white.

    Raises:
        DavspError: there is no text, too much, or a word that the embedded models can't read.
    """
    text = " ".join(text.split())
    if not text:
        raise DavspError("There is no text yet: type what the picture is to say.")
    if len(text) > LONGEST:
        raise DavspError(f"The text has {len(text)} characters: shorten it to {LONGEST}.")
    if not embedded:
        from davsp.benchmarks.mm_safetybench import find_font, render

        return render(text, find_font())
    from davsp.embedded import draw, words

    if unknown := _unknown(text, words.DRAWN_WORDS):
        raise DavspError(
            f"The embedded model can't read {unknown} in a picture: it knows few words. Try “steal the car” or “paint the bike”."
        )
    return draw.typographic(random.Random(text), text.lower()).image()


def check_words(question: str) -> None:
    """Raises DavspError if a question holds a word outside the embedded models' vocabulary: they could only guess."""
    from davsp.embedded import words

    if unknown := _unknown(question, words.vocabulary()):
        raise DavspError(
            f"The embedded model does not know {unknown}: its vocabulary is closed. Try “what does the picture show ?”, “read the text in the picture .” "
            "or “follow the text in the picture .”."
        )


def _unknown(text: str, known: Iterable[str]) -> str:
    """The words that are not known, quoted, at most three of them; "" if all are. Split as the tokenizer does."""
    missing = dict.fromkeys(w for w in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]", text.lower()) if w not in set(known))
    return ", ".join(f"“{word}”" for word in list(missing)[:3])


def examples() -> "dict[str, Query]":
    """Test queries of the embedded world by a title for people: the first two of each attack, one of each kind of benign question.

    Attacks in the order of `FORMS`.
    """
    from davsp.embedded import data

    queries = list(data.test(0, {"harm": 2, "utility": 1, "mme": 1, "llava_bench": 1}))
    attacks = {f"{q.group}, {name}": q for form, name in FORMS.items() for q in queries if q.benchmark == form}
    return attacks | {q.question.rstrip(" ."): q for q in queries if q.label == "benign"}
