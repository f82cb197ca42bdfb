"""The last look at what leaves: outside the canvases that the defense made, no picture in any form that a server reads.

The other checks are for good messages; this one holds whatever the parsing did. Texts are looked at one by one and joined without a
separator, a message and the conversation as a whole, since TGI joins the parts of a message so. Keys count, and so does JSON inside
texts (the arguments of a tool call), since templates write both out. The conversation is `messages` of chat completions, `instructions`
and `input` of responses.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from davsp.serve.refusals import bad

MARKDOWN = re.compile(r"!\[\]\(\s*(data:|https?:)", re.IGNORECASE)  # TGI takes a picture from the text by it
DATA = re.compile(r"data:(image|video|audio)/[\w.+-]*\s*[;,]", re.IGNORECASE)
ADDRESS = re.compile(r"\s*(https?|file|ftp|data|blob):", re.IGNORECASE)
PICTURE_KEYS = {
    "image", "images", "image_url", "image_urls", "input_image", "img", "picture", "video", "videos", "video_url", "input_video",
    "audio_url", "input_audio", "image_data", "image_embeds",
}  # fmt: skip
DEEPEST = 4  # JSON in texts in texts


def sweep(body: Mapping[str, Any], canvases: Collection[str] = ()) -> None:
    """Look at a body that is about to leave.

    Args:
        body: with a checked conversation.
        canvases: the addresses that stand for the defense's own canvases; each may be the url of an image part.

    Raises:
        Refusal: a picture, video or audio as data URL, as markdown, or as an address under a key that servers take pictures from.
    """
    try:
        _look_over(body, canvases)
    except RecursionError as error:
        raise bad("the body is nested too deeply.") from error


def _look_over(body: Mapping[str, Any], canvases: Collection[str]) -> None:
    _values(body, "", canvases)
    texts: list[str] = []  # of the conversation; those of a message stand beside each other in it
    calls: list[str] = []
    for message in _conversation(body):
        for name, value in message.items():
            if name in ("content", "output"):  # an output is a tool's message
                texts += [value] if isinstance(value, str) else _texts(value or [])
            elif name not in ("type", "role"):
                calls += _leaves({name: value})
    _look("".join(texts))
    _look("".join(calls))


def _conversation(body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Everything of a body that becomes a message, in its order."""
    for name in ("instructions", "messages", "input"):
        value = body.get(name)
        if isinstance(value, str):
            yield {"content": value}
        elif isinstance(value, list):
            yield from (message for message in value if isinstance(message, dict))


def _values(value: Any, key: str, canvases: Collection[str], depth: int = 0) -> None:
    """Every key and every value by itself."""
    if isinstance(value, str):
        if value in canvases:
            return
        if key in PICTURE_KEYS and ADDRESS.match(value):
            raise bad(f"a field {key!r} holds an address that a server could take a picture from.", "hidden_picture")
        _look(value)
        if (inner := _json(value)) is not None and depth < DEEPEST:
            _values(inner, key, canvases, depth + 1)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            _look(f"{name}")
            # what stands below image_url is a picture's address, whatever its own key
            below = name.lower() if name.lower() in PICTURE_KEYS or key not in PICTURE_KEYS else key
            _values(inner, below, canvases, depth)
    elif isinstance(value, Sequence):
        for inner in value:
            _values(inner, key, canvases, depth)


def _look(text: str) -> None:
    """One text, or several as a server joins them."""
    if "![](" in text and MARKDOWN.search(text):
        raise bad(
            "a text, or texts that a server joins, hold a picture as ![](…); send it as image_url.", "markdown_picture"
        )
    if "data:" in text.lower() and (picture := DATA.search(text)):
        raise bad(
            f"a text holds a {picture[1].lower()} as a data URL, which a server could read undefended (quoted code counts, too); send "
            "pictures as image_url, and leave other data out.",
            "data_url",
        )


def _texts(parts: Sequence[Any]) -> Iterator[str]:
    for part in parts:
        if isinstance(part, dict):
            yield from (value for name, value in part.items() if name in ("text", "refusal") and isinstance(value, str))


def _leaves(value: Any, depth: int = 0) -> Iterator[str]:
    """Keys and values in their order; JSON in a text as what it says."""
    if isinstance(value, str):
        inner = _json(value) if depth < DEEPEST else None
        if inner is None:
            yield value
        else:
            yield from _leaves(inner, depth + 1)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield name
            yield from _leaves(inner, depth)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _leaves(inner, depth)


def _json(text: str) -> Any:
    """What a text says as JSON, if that is an object, a list or a text; else None."""
    if text.lstrip()[:1] not in ("{", "[", '"'):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, (dict, list, str)) else None
