"""Answers in OpenAI's form, whole and as a stream, where they are not the upstream's own bytes."""

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

from starlette.responses import JSONResponse, Response


class Completion(NamedTuple):
    """An answer: its text, `stop` or `length`, tokens as in OpenAI's usage (None: not known), log-probabilities as in OpenAI's
    `logprobs.content` (None: not asked for), and where the prompt's hidden states are, as vLLM says it (None: nowhere)."""

    text: str
    finish: str = "stop"
    usage: dict[str, int] | None = None
    logprobs: list[dict[str, Any]] | None = None
    written: dict[str, str] | None = None


def reply(completion: Completion, request: dict[str, Any]) -> Response:
    """The answer to a request, as it asked for it: `stream`, `stream_options.include_usage`."""
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.get("model")}
    if request.get("stream"):
        options = request.get("stream_options")
        usage = isinstance(options, dict) and bool(options.get("include_usage"))
        return Response("".join(_events(completion, head, usage)), media_type="text/event-stream")
    message = {"role": "assistant", "content": completion.text}
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": completion.finish,
        "logprobs": _logprobs(completion.logprobs),
    }
    whole = head | {"object": "chat.completion", "choices": [choice]}
    if completion.written is not None:
        whole |= {"kv_transfer_params": completion.written}
    return JSONResponse(whole | ({} if completion.usage is None else {"usage": completion.usage}))


def _events(completion: Completion, head: dict[str, Any], usage: bool) -> Iterator[str]:
    head = head | {"object": "chat.completion.chunk"}
    yield _event(
        head | {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    )
    told = [{"delta": {"content": one["token"]}, "logprobs": _logprobs([one])} for one in completion.logprobs or ()]
    for part in told or [{"delta": {"content": piece}} for piece in _pieces(completion.text)]:
        yield _event(head | {"choices": [{"index": 0, "finish_reason": None} | part]})
    yield _event(head | {"choices": [{"index": 0, "delta": {}, "finish_reason": completion.finish}]})
    if usage:
        yield _event(head | {"choices": [], "usage": completion.usage})
    yield "data: [DONE]\n\n"


def _logprobs(content: list[dict[str, Any]] | None) -> dict[str, Any] | None:
    return None if content is None else {"content": content, "refusal": None}


def _pieces(text: str) -> list[str]:
    pieces = [" " * (i > 0) + word for i, word in enumerate(text.split(" "))]
    return [piece for piece in pieces if piece]


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def response(completion: Completion, request: dict[str, Any]) -> Response:
    """The answer to a Responses request, whole or as a stream."""
    head: dict[str, Any] = {
        "id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time()), "model": request.get("model"),
        "error": None, "incomplete_details": None, "instructions": None, "metadata": request.get("metadata") or {}, "tools": [],
        "tool_choice": "auto", "parallel_tool_calls": True, "temperature": 0, "top_p": 1, "max_output_tokens": request.get("max_output_tokens"),
        "store": False,
    }  # fmt: skip
    cut = completion.finish == "length"
    status = "incomplete" if cut else "completed"
    part = {"type": "output_text", "text": completion.text, "annotations": [], "logprobs": []}
    item = {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [part],
    }
    details = {"incomplete_details": {"reason": "max_output_tokens"}} if cut else {}
    whole = head | {"status": status, "output": [item], "usage": _usage(completion.usage)} | details
    if not request.get("stream"):
        return JSONResponse(whole)
    opening = head | {"status": "in_progress", "output": [], "usage": None}
    events = _response_events(completion.text, opening, item, whole)
    texts = (
        f"event: {event['type']}\n{_event(event | {'sequence_number': number})}" for number, event in enumerate(events)
    )
    return Response("".join(texts), media_type="text/event-stream")


def _response_events(
    text: str, opening: dict[str, Any], item: dict[str, Any], whole: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    (part,) = item["content"]
    yield {"type": "response.created", "response": opening}
    yield {"type": "response.in_progress", "response": opening}
    empty = item | {"status": "in_progress", "content": []}
    yield {"type": "response.output_item.added", "output_index": 0, "item": empty}
    at = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    yield {"type": "response.content_part.added", "part": part | {"text": ""}} | at
    for piece in _pieces(text):
        yield {"type": "response.output_text.delta", "delta": piece, "logprobs": []} | at
    yield {"type": "response.output_text.done", "text": text, "logprobs": []} | at
    yield {"type": "response.content_part.done", "part": part} | at
    yield {"type": "response.output_item.done", "output_index": 0, "item": item}
    yield {"type": f"response.{whole['status']}", "response": whole}


def _usage(usage: dict[str, int] | None) -> dict[str, Any] | None:
    if usage is None:
        return None
    return {
        "input_tokens": usage["prompt_tokens"], "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": usage["total_tokens"],
    }  # fmt: skip
