"""A request's bytes, read so that no client decides what that takes.

Pictures are cut out of the bytes before these are parsed, so that the parser, which holds the interpreter while it works, never
sees them. What is left is text: its length, its values and its nesting are counted in the bytes, and only then is it parsed.
"""

import json
import re
import secrets
from collections.abc import Iterator
from typing import Any, NamedTuple

from davsp.serve.refusals import Refusal, bad
from davsp.serve.settings import ServeSettings

Bytes = bytes | bytearray | memoryview
START = b'"data:image'  # a slash follows, before which some encoders put a backslash
HEAD = re.compile(  # with a payload, as a text may begin with the head alone
    rb'"data:image\\?/[a-z+.-]{1,20};base64,(?=[\w+/=\\-]{16})', re.IGNORECASE
)
MARK = "data:image/cut;base64,"
"""How a mark begins. It looks like what it stands for, so whatever refuses a data URL refuses it, too."""
CUTS = 256  # more pictures than any limit lets pass; those beyond stay in the text
ESCAPED = 16  # of so many letters of a picture one may be; some encoders escape slashes, of which there is one in 64
DEEPEST = 64  # OpenAI's own requests nest less than 20 deep, schemas of tools included
HALF = re.compile(rb"\\u[dD][89a-fA-F]")
PAIR = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_MARKS = b"[]{},"
_REST = bytes(set(range(256)) - set(_MARKS))


class Body(NamedTuple):
    """A request that was read.

    Attributes:
        value: its JSON, where a mark stands for each picture that came as a data URL.
        pictures: mark -> the picture in base64, a view of the request's bytes.
    """

    value: Any
    pictures: dict[str, Bytes]


def parse(data: bytes | bytearray, settings: ServeSettings) -> Body:
    """Read a request's body. Of the settings `max_text` and `max_values` count.

    Raises:
        Refusal: 413 if it holds too much besides its pictures; 400 if it has too many values, is nested too deeply, holds half a
            surrogate pair or is no JSON.
    """
    pieces, pictures, at = list[Bytes](), dict[str, Bytes](), 0
    view, secret = memoryview(data), secrets.token_hex(16)  # no client can know the marks
    try:
        for begins, base64, ends in _data_urls(data):
            mark = f"{MARK}{secret}{len(pictures):03}"
            escaped = data.find(b"\\", base64, ends) >= 0  # slash or plus, by some encoders
            pictures[mark] = json.loads(b'"' + view[base64:ends] + b'"').encode() if escaped else view[base64:ends]
            pieces += [view[at:begins], mark.encode()]
            at = ends
        pieces.append(view[at:])
        if sum(map(len, pieces)) > settings.max_text + 64 * len(pictures):
            raise too_much_text(settings.max_text)
        text = b"".join(pieces)
        check_size(text, settings.max_values)
        if HALF.search(text) and HALF.search(PAIR.sub(b"", text.replace(b"\\\\", b""))):
            raise bad("the body holds half a surrogate pair, which is no character.", "no_character")
        return Body(
            json.loads(text.decode("utf-8-sig")), pictures
        )  # in UTF-16 a quote is not the byte that was counted
    except RecursionError as error:
        raise bad("the body is nested too deeply.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise bad("the body is not JSON in UTF-8.") from error
    except ValueError as error:  # Python reads no whole number of more than 4300 digits
        raise bad("the body holds a number of too many digits.") from error


def _data_urls(data: bytes | bytearray) -> Iterator[tuple[int, int, int]]:
    """Of each text that is a picture's data URL: where it begins, where its base64 begins, where it ends.

    A quote that stands before `data:` and behind no backslash opens a text, in whatever is JSON. No quote is between it and the end, and
    none is in a mark: with marks the bytes are JSON if, and only if, they were before.
    """
    at = 0
    for _ in range(CUTS):
        quote = data.find(START, at)
        ends = data.find(b'"', quote + 1)
        if quote < 0 or ends < 0:
            return
        at = ends
        head = HEAD.match(data, quote)
        if not head or data[quote - 1 : quote] == b"\\" or data[ends - 1 : ends] == b"\\":
            continue
        if data.count(b"\\", head.end(), ends) <= (ends - quote) // ESCAPED:
            yield quote + 1, head.end(), ends


def check_size(text: bytes, most: int) -> None:
    """Count values and nesting of JSON in its bytes; in what is no JSON, what a parser might meet.

    Raises:
        Refusal: more values than `most`, or deeper than `DEEPEST`.
    """
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")  # now each quote begins or ends a text
    if text.count(b'"') // 2 > 2 * most:  # keys are texts, too
        raise _too_many(most)
    marks = b"".join(text.split(b'"')[::2]).translate(None, _REST)
    opened, commas = marks.count(b"[") + marks.count(b"{"), marks.count(b",")
    if opened + commas > most:
        raise _too_many(most)
    if len(marks) - commas > 2 * opened:  # so that no more of them are walked through, either
        raise bad("the body is not JSON in UTF-8.")
    depth = deepest = 0
    for mark in marks.replace(b",", b""):
        depth += 1 if mark in b"[{" else -1
        deepest = max(depth, deepest)
    if deepest > DEEPEST:
        raise bad(f"the body is nested more than {DEEPEST} deep.", "too_deep")


def too_much_text(most: int) -> Refusal:
    """More than so many bytes besides pictures."""
    return Refusal(413, f"the body holds more than {most} bytes besides its pictures.", "body_too_large")


def _too_many(most: int) -> Refusal:
    return bad(f"the body holds more than {most} values.", "too_many_values")
