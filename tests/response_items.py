"""Requests of `/v1/responses` and their parts."""

import json
from typing import Any

import httpx2

from proxy import Client

ANSWER = {"id": "resp_1", "object": "response", "output": [{"type": "message", "content": []}]}


def asking(caller: Client, items: Any, **more: Any) -> httpx2.Response:
    caller.upstream.answer = lambda number, body: ANSWER
    body = {"model": caller.model, "input": items} | more
    return caller.raw(json.dumps(body).encode(), path="/v1/responses")


def message(*parts: Any, role: str = "user", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": list(parts)} | more


def text(words: str) -> dict[str, Any]:
    return {"type": "input_text", "text": words}


def image(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "input_image", "image_url": url} | more


def output(words: str) -> dict[str, Any]:
    return {"type": "output_text", "text": words, "annotations": [], "logprobs": []}


CALL = {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": "{}", "status": "completed"}
OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "a tool's words"}
THOUGHT = {
    "type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "short"}],
    "content": [{"type": "reasoning_text", "text": "long"}], "encrypted_content": None, "status": None,
}  # fmt: skip
