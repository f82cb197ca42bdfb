"""`davsp serve-model`: one loaded model behind OpenAI's protocol, to try the proxy on. One question at a time, greedily.

It answers exactly as `davsp eval` does here, and takes no more than that: one user message, at most one picture.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from davsp.errors import DavspError
from davsp.lvlm import LVLM, states_served
from davsp.lvlm.states_served import ServedStates
from davsp.prompts.base import to_bytes
from davsp.serve import calls, refusals
from davsp.serve.admission import Room, admit, read
from davsp.serve.bodies import Body, parse
from davsp.serve.connections import Drained
from davsp.serve.pictures import decode, from_data_url
from davsp.serve.protocols import CHAT, RESPONSES, Protocol
from davsp.serve.refusals import Refusal, bad
from davsp.serve.replies import Completion, reply, response
from davsp.serve.settings import ServeSettings

PIXELS = "x-davsp-pixels"
"""Header of every reply to a picture: sha256 of the 8-bit RGB pixels that the model saw, after the server's own resizing."""
TOP = 20  # as many as OpenAI tells
FIELDS = {
    "messages": calls.FIELDS | {"repetition_penalty", "logprobs", "top_logprobs", "chat_template_kwargs"},
    "input": {"model", "input", "max_output_tokens", "stream", "stream_options", "temperature", "top_p", "user", "metadata", "store"},
}  # fmt: skip


def model_app(lvlm: LVLM, name: str, settings: ServeSettings, states: ServedStates | None = None) -> Starlette:
    """An ASGI app that serves the model under a name. Of the settings, limits, token and host count.

    Args:
        states: where the hidden states of each prompt are written, as vLLM does; None: nowhere.
    """
    thread, token, room = ThreadPoolExecutor(1), settings.token, Room(settings.max_held)

    async def answer(protocol: Protocol, request: Request) -> Response:
        with room.seat() as seat:
            whole = await asyncio.to_thread(parse, await read(request, seat, settings), settings)
            body, (question, file) = whole.value, _question_and_file(protocol, whole, name, settings)
        longest = calls.longest(body, lvlm.longest)
        written = states if protocol is CHAT and not body.get("stream") else None  # no other reply says where they are
        completion, seen_hash = await asyncio.get_running_loop().run_in_executor(
            thread, _answer, _told(lvlm, body), question, file, longest, _top(body), settings, written
        )
        result = (reply if protocol is CHAT else response)(completion, body)
        if seen_hash:
            result.headers[PIXELS] = seen_hash
        return result

    async def models(request: Request) -> Response:
        return JSONResponse(
            {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "davsp"}]}
        )

    def shaped(handler: Any) -> Any:
        async def endpoint(request: Request) -> Response:
            try:
                admit(request, token, settings.loopback)
                return await handler(request)
            except Refusal as refusal:
                return refusals.response(refusal)
            except DavspError as error:
                return refusals.response(bad(str(error)))

        return endpoint

    routes = [
        Route("/v1/chat/completions", shaped(partial(answer, CHAT)), methods=["POST"]),
        Route("/v1/responses", shaped(partial(answer, RESPONSES)), methods=["POST"]),
        Route("/v1/models", shaped(models)),
        Route("/health", lambda request: JSONResponse({"status": "ok"})),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Drained)])


def _question_and_file(protocol: Protocol, whole: Body, name: str, settings: ServeSettings) -> tuple[str, bytes | None]:
    body, conversation = whole.value, protocol.check(whole.value)
    if body.get("model") != name:
        raise Refusal(404, f"model {body.get('model')!r} is not served; it is {name!r}.", "model_not_found", "model")
    for field in sorted(body.keys() - FIELDS[protocol.conversation]):
        raise bad(f"{field} is not known to this server; leave it out.", "field", field)
    for field, known in (calls.GREEDY | {"top_p": (1,), "repetition_penalty": (1,)}).items():
        if body.get(field) is not None and body[field] not in known:
            raise bad(f"{field} must be {known[0]} or left out: answers are greedy.", "field", field)
    urls = protocol.picture_urls(conversation)
    if isinstance(conversation, str):
        return conversation, None
    if len(conversation) != 1:
        raise bad(
            f"{protocol.conversation} must hold one message of role user and no other.", param=protocol.conversation
        )
    if len(urls) > 1:
        raise bad("the model takes one picture.", "several_pictures", protocol.conversation)
    content = conversation[0]["content"]
    texts = [content] if isinstance(content, str) else [part["text"] for part in content if "text" in part]
    return "\n".join(texts), from_data_url(urls[0], settings.max_picture_bytes, whole.pictures) if urls else None


def _told(lvlm: LVLM, body: Mapping[str, Any]) -> LVLM:
    """The model as a request has its template told: what it was started with, and over that the request's `chat_template_kwargs`."""
    kwargs = body.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise bad("chat_template_kwargs must be an object.", "field", "chat_template_kwargs")
    return lvlm.told({**lvlm.template_kwargs, **kwargs}) if kwargs else lvlm


def _top(body: Mapping[str, Any]) -> int | None:
    """How many of the likeliest tokens are asked for at each place; None: no log-probabilities at all."""
    wanted, top = body.get("logprobs") or False, body.get("top_logprobs")
    if not isinstance(wanted, bool):
        raise bad("logprobs must be true or false.", "field", "logprobs")
    if top is not None and not (wanted and type(top) is int and 0 <= top <= TOP):
        raise bad(f"top_logprobs must be a whole number from 0 to {TOP}, with logprobs true.", "field", "top_logprobs")
    return (top or 0) if wanted else None


def _answer(
    lvlm: LVLM,
    question: str,
    file: bytes | None,
    longest: int,
    top: int | None,
    settings: ServeSettings,
    states: ServedStates | None,
) -> tuple[Completion, str | None]:
    canvas = None if file is None else lvlm.preprocess([decode(file, settings)])
    (answer,) = lvlm.ask(canvas, [question], longest) if top is None else lvlm.likely(canvas, [question], longest, top)
    tokens = len(lvlm.tokenizer(answer.text, add_special_tokens=False)["input_ids"])
    prompt_tokens = answer.prompt_tokens or 0
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}
    seen_hash = None if canvas is None else pixels_hash(Image.fromarray(to_bytes(canvas[0])))
    logprobs = None if top is None else [_logprob(*one) for one in answer.tokens]
    written = None if states is None else states_served.write(lvlm, canvas, question, states)
    return Completion(answer.text, answer.finish, usage, logprobs, written), seen_hash


def _logprob(text: str, logprob: float, top: Sequence[tuple[str, float]] | None = None) -> dict[str, Any]:
    """A token in OpenAI's form; a part of a letter is no text, so its bytes are not told."""
    whole = None if "\ufffd" in text else list(text.encode())
    more = {} if top is None else {"top_logprobs": [_logprob(*one) for one in top]}
    return {"token": text, "logprob": logprob, "bytes": whole} | more


def pixels_hash(picture: Image.Image) -> str:
    """sha256 of a picture's RGB pixels and size."""
    return sha256(json.dumps(picture.size).encode() + picture.convert("RGB").tobytes()).hexdigest()
