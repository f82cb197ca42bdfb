"""The two kinds of requests that are defended, side by side."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from starlette.responses import Response

from davsp.lvlm import Answer
from davsp.lvlm.remote import read_answer
from davsp.runtime.client import Failure
from davsp.serve import fields, messages, replies, responses


class Protocol(NamedTuple):
    """What the proxy needs to know of a kind of request.

    Attributes:
        path: below the upstream's /v1.
        conversation: the field that holds messages or items.
        check: a body -> its conversation, checked.
        known: the fields that pass, as `davsp.serve.fields.KNOWN`.
        picture_urls: a conversation -> its pictures' addresses.
        defended: as `davsp.serve.messages.defended`.
        lengths: the fields with the longest answer, the usual one last.
        read: the upstream's reply -> its answer, as `davsp.lvlm.remote.read_answer`.
        reply: a completion and the request -> a reply.
    """

    path: str
    conversation: str
    check: Callable[[Any], Any]
    known: Mapping[str, tuple[Callable[[Any], bool], str]]
    picture_urls: Callable[[Any], list[str]]
    defended: Callable[..., Any]
    lengths: tuple[str, ...]
    read: Callable[[Any], Answer | Failure]
    reply: Callable[[replies.Completion, dict[str, Any]], Response]


CHAT = Protocol(
    "/chat/completions", "messages", messages.check, fields.KNOWN, messages.picture_urls, messages.defended,
    ("max_completion_tokens", "max_tokens"), read_answer, replies.reply,
)  # fmt: skip
RESPONSES = Protocol(
    "/responses", "input", responses.check, fields.RESPONSES, responses.picture_urls, responses.defended,
    ("max_output_tokens",), responses.read_answer, replies.response,
)  # fmt: skip
