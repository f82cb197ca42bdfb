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

# Each takes time in proportion to the text, whatever it says: nothing is tried twice (`*+`), and letters before which it could begin
# are looked for as they are, not in both cases.
MARKDOWN = re.compile(r"!\[\]\(\s*+(?i:data:|https?:)")  # TGI takes a picture from the text by it
DATA = re.compile(  # in lower case; its head alone, as in code that puts one together, is no picture
    r"data:(image|video|audio)/(?:(?!data:(?:image|video|audio)/)[^,]){0,120}+,\s*+([\w+/=-]{16}|<svg|%3c)"
)
ADDRESS = re.compile(r"\s*(https?|file|ftp|data|blob):", re.IGNORECASE)
PICTURE_KEYS = {
    "image", "images", "image_url", "image_urls", "input_image", "img", "picture", "video", "videos", "video_url", "input_video",
    "audio_url", "input_audio", "image_data", "image_embeds",
}  # fmt: skip
DEEPEST = 4  # JSON in texts in texts


def sweep(body: Mapping[str, Any], canvases: Collection[str] = (), most: int = 100_000) -> None:
    """Look at a body that is about to leave.

    Args:
        body: with a checked conversation.
        canvases: the addresses that stand for the defense's own canvases; each may be the url of an image part.
        most: values that the JSON inside its texts may have, all together.

    Raises:
        Refusal: a picture, video or audio as data URL, as markdown, or as an address under a key that servers take pictures from; too
            many values.
    """
    try:
        _look_over(body, canvases, _Inner(most))
    except RecursionError as error:
        raise bad("the body is nested too deeply.") from error


class _Inner:
    """Reads JSON inside texts, and no more of it than `most` values: a text is small, but what it says may be a million lists."""

    def __init__(self, most: int) -> None:
        self.most, self.left = most, 2 * most  # each text is read twice

    def __call__(self, text: str) -> Any:
        """What a text says as JSON, if that is an object, a list or a text; else None."""
        if text.lstrip()[:1] not in ("{", "[", '"'):
            return None
        self.left -= text.count("{") + text.count("[") + text.count(",")
        if self.left < 0:
            raise bad(f"the JSON inside the texts holds more than {self.most} values.", "too_many_values")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, (dict, list, str)) else None


def _look_over(body: Mapping[str, Any], canvases: Collection[str], inner: _Inner) -> None:
    _values(body, "", canvases, inner)
    texts: list[str] = []  # of the conversation; those of a message stand beside each other in it
    calls: list[str] = []
    for message in _conversation(body):
        for name, value in message.items():
            if name in ("content", "output"):  # an output is a tool's message
                texts += [value] if isinstance(value, str) else _texts(value or [])
            elif name not in ("type", "role"):
                calls += _leaves({name: value}, inner)
    for joined in (texts, calls):
        if len(joined) > 1:  # one by itself was looked at
            _look("".join(joined))
            _look("".join(map(str.strip, joined)))  # as templates write them


def _conversation(body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Everything of a body that becomes a message, in its order."""
    for name in ("instructions", "messages", "input"):
        value = body.get(name)
        if isinstance(value, str):
            yield {"content": value}
        elif isinstance(value, list):
            yield from (message for message in value if isinstance(message, dict))


def _values(value: Any, key: str, canvases: Collection[str], inner: _Inner, depth: int = 0) -> None:
    """Every key and every value by itself."""
    if isinstance(value, str):
        if value in canvases:
            return
        if key in PICTURE_KEYS and ADDRESS.match(value):
            raise bad(f"a field {key!r} holds an address that a server could take a picture from.", "hidden_picture")
        _look(value)
        if (says := inner(value)) is not None:
            if depth == DEEPEST:
                raise bad(
                    f"JSON in a text holds JSON in a text, more than {DEEPEST} times; send it plainer.", "deep_json"
                )
            _values(says, key, canvases, inner, depth + 1)
    elif isinstance(value, Mapping):
        for name, below in value.items():
            word = f"{name}".lower()  # a program's own may be a number
            _look(word)
            # what stands below image_url is a picture's address, whatever its own key
            under = word if word in PICTURE_KEYS or key not in PICTURE_KEYS else key
            _values(below, under, canvases, inner, depth)
    elif isinstance(value, Sequence):
        for one in value:
            _values(one, key, canvases, inner, depth)


def _look(text: str) -> None:
    """One text, or several as a server joins them."""
    if "![](" in text and MARKDOWN.search(text):
        raise bad(
            "a text, or texts that a server joins, hold a picture as ![](…); send it as image_url.", "markdown_picture"
        )
    if picture := DATA.search(text.lower()):
        raise bad(
            f"a text holds a {picture[1]} as a data URL, which a server could read undefended (quoted code counts, too); send "
            "pictures as image_url, and leave other data out.",
            "data_url",
        )


def _texts(parts: Sequence[Any]) -> Iterator[str]:
    for part in parts:
        if isinstance(part, dict):
            yield from (value for name, value in part.items() if name in ("text", "refusal") and isinstance(value, str))


def _leaves(value: Any, inner: _Inner) -> Iterator[str]:
    """Keys and values in their order; JSON in a text as what it says."""
    if isinstance(value, str):
        says = inner(value)  # not too deep: `_values` has looked
        if says is None:
            yield value
        else:
            yield from _leaves(says, inner)
    elif isinstance(value, Mapping):
        for name, below in value.items():
            yield name
            yield from _leaves(below, inner)
    elif isinstance(value, Sequence):
        for one in value:
            yield from _leaves(one, inner)
