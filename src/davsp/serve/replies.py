"""Answers in OpenAI's form, whole and as a stream, where they are not the upstream's own bytes."""

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

from starlette.responses import JSONResponse, Response


class Completion(NamedTuple):
    """An answer: its text, `stop` or `length`, and tokens as in OpenAI's usage; None: not known."""

    text: str
    finish: str = "stop"
    usage: dict[str, int] | None = None


def reply(completion: Completion, request: dict[str, Any]) -> Response:
    """The answer to a request, as it asked for it: `stream`, `stream_options.include_usage`."""
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.get("model")}
    if request.get("stream"):
        options = request.get("stream_options")
        usage = isinstance(options, dict) and bool(options.get("include_usage"))
        return Response("".join(_events(completion, head, usage)), media_type="text/event-stream")
    message = {"role": "assistant", "content": completion.text}
    choice = {"index": 0, "message": message, "finish_reason": completion.finish, "logprobs": None}
    whole = head | {"object": "chat.completion", "choices": [choice]}
    return JSONResponse(whole | ({} if completion.usage is None else {"usage": completion.usage}))


def _events(completion: Completion, head: dict[str, Any], usage: bool) -> Iterator[str]:
    head = head | {"object": "chat.completion.chunk"}
    words = completion.text.split(" ")
    pieces = [" " * (i > 0) + word for i, word in enumerate(words)]
    deltas = [{"role": "assistant", "content": ""}, *({"content": piece} for piece in pieces if piece)]
    for delta in deltas:
        yield _event(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    yield _event(head | {"choices": [{"index": 0, "delta": {}, "finish_reason": completion.finish}]})
    if usage:
        yield _event(head | {"choices": [], "usage": completion.usage})
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
