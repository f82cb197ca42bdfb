"""The two kinds of requests that are defended, side by side."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from davsp.serve import fields, messages, responses


class Protocol(NamedTuple):
    """What the proxy needs to know of a kind of request.

    Attributes:
        path: below the upstream's /v1.
        conversation: the field that holds messages or items.
        check: a body -> its conversation, checked.
        known: the fields that pass, as `davsp.serve.fields.KNOWN`.
        picture_urls: a conversation -> its pictures' addresses.
        defended: as `davsp.serve.messages.defended`.
    """

    path: str
    conversation: str
    check: Callable[[Any], Any]
    known: Mapping[str, tuple[Callable[[Any], bool], str]]
    picture_urls: Callable[[Any], list[str]]
    defended: Callable[..., Any]


CHAT = Protocol("/chat/completions", "messages", messages.check, fields.KNOWN, messages.picture_urls, messages.defended)
RESPONSES = Protocol(
    "/responses", "input", responses.check, fields.RESPONSES, responses.picture_urls, responses.defended
)
