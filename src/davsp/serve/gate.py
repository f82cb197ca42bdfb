"""The gate in service: a request is looked at through a defense, and what is no refusal goes on with its pictures undefended.

The look is the request as the inner defense alone would send it, every turn of it, so that whatever the answer will see is looked at.
It is greedy, short and whole. Of the client's fields only those pass that choose the model, bring messages and tools, or set how long it
thinks: a client's `stop` or penalties could keep a refusal from being said. Tools are shown, and none may be called.

`answer` reads the beginning of an answer. `first` asks for one token and its log-probabilities, with the score and the threshold that
were calibrated through this upstream (`davsp.defenses.gate.served`); it refuses in the words that were given there.

It fails closed: without an answer to look at there is an error, and no second request.
"""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any, NamedTuple

from starlette.responses import Response, StreamingResponse

from davsp.defenses import Defense, Gate, NoDefense, VisualPrompt
from davsp.defenses.gate.served import TOKENS, UNTOLD, log_odds
from davsp.errors import DavspError
from davsp.judges.keyword import has_words, refused
from davsp.lvlm import Answer
from davsp.lvlm.templates import named
from davsp.prompts.gate import Served
from davsp.runtime.client import Failure
from davsp.runtime.thought import CUT, Tags, split_thought
from davsp.serve.calls import asks_once
from davsp.serve.protocols import CHAT, Protocol
from davsp.serve.refusals import Refusal, bad
from davsp.serve.replies import Completion

HEAD = "x-davsp-gate"
REFUSED, PASSED = "refused", "passed"
NOTE = (
    "the gate asks first through the defense; what passes goes upstream a second time with its pictures undefended, by design: who can "
    "read the upstream's logs can read them."
)
BARE = (
    "the gate looks without a border: every request goes upstream with its pictures undefended, by design, and what passes goes twice: "
    "who can read the upstream's logs can read them."
)
WORDS = 12
"""That must follow a thought, which took some of the tokens, where the answer is cut: about what 16 tokens hold."""

KEPT = {
    "model", "messages", "input", "instructions", "tools", "functions", "user", "safety_identifier", "service_tier", "priority",
    "prompt_cache_key", "prompt_cache_retention", "cache_salt", "reasoning", "reasoning_effort", "chat_template_kwargs",
    "thinking_token_budget",
}  # fmt: skip
COUNTS = ("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens", "total_tokens")

Send = Callable[[dict[str, Any], Defense, bool], Awaitable[Response]]


class Look(NamedTuple):
    """What the look shows.

    Attributes:
        refused: whether it is a refusal.
        ended: whether that is all of it.
        text: as the upstream wrote it.
        usage: the upstream's counts, by its names.
    """

    refused: bool
    ended: bool
    text: str
    usage: dict[str, int]


def gate_of(defense: Defense) -> Gate | None:
    """The gate that a defense is; None if there is none in it.

    Raises:
        DavspError: one that cannot be served.
    """
    if not isinstance(defense, Gate):
        if any(isinstance(part, Gate) for part in _parts(defense)):
            raise DavspError(
                f"{defense.name} has a gate inside, which is not served; put the gate first: gate+NAME=FOLDER."
            )
        return None
    if defense.kind == "states":
        raise DavspError(
            "gate:states looks inside the model, which a server does not show; take gate+NAME=FOLDER, which looks at the answer."
        )
    if defense.kind == "first" and defense.served is None:
        raise DavspError(
            "gate:first has no threshold for a server yet: make one with davsp gate --engine openai, or take gate+NAME=FOLDER."
        )
    for one in (defense.inner, defense.else_):
        if not asks_once(one):
            raise DavspError(
                f"{one.name} asks the model more than once, which is not served inside a gate; take a border or a text."
            )
    if isinstance(defense.inner, NoDefense) and defense.kind == "answer":
        raise DavspError("gate+none looks through nothing; put a border or a text behind the plus.")
    return defense


def note(gate: Gate) -> str:
    """What whoever starts it has to know of the pictures that leave."""
    return NOTE if paints(gate.inner) else BARE


def paints(defense: Defense) -> bool:
    """Whether a visual prompt changes the pictures."""
    return isinstance(defense, VisualPrompt) or any(map(paints, _parts(defense)))


def _parts(defense: Defense) -> Iterator[Defense]:
    inside = [getattr(defense, name, None) for name in ("inner", "instead", "else_")]
    for part in (*inside, *getattr(defense, "defenses", ())):
        if part is not None:
            yield part
            yield from _parts(part)


async def answer(gate: Gate, protocol: Protocol, body: dict[str, Any], tags: Tags, send: Send) -> Response:
    """The reply to a request, with the road that it took in its head.

    Args:
        body: the request, checked.
        tags: around what the upstream's model thinks.
        send: a body, the defense of its conversation, and whether it is the last one -> the upstream's reply.

    Raises:
        Refusal: there is nothing to look at, or what `send` raises.
    """
    served = gate.served
    looking = _looking(protocol, body, TOKENS if served else gate.tokens)
    if served:
        _check_served(served, protocol, body)
        looking |= {"logprobs": True, "top_logprobs": served.top}
    reply = await send(looking, gate.inner, False)
    if reply.status_code >= 400:
        return reply  # the upstream's own error, which is no answer
    look = _read_first(protocol, reply, served, tags) if served else _read(protocol, reply, gate.tokens, tags)
    if not look.refused:
        reply, road = _summed(await send(body, gate.else_, True), look.usage), PASSED
    elif served:
        reply, road = protocol.reply(Completion(look.text, "stop", _usage(look.usage)), body), REFUSED
    elif not look.ended or min(_limits(protocol, body).values(), default=gate.tokens) < gate.tokens:
        reply, road = _summed(await send(_refusing(protocol, body), gate.inner, True), look.usage), REFUSED
    else:
        reply = protocol.reply(Completion(look.text, "stop", _usage(look.usage)), body) if body.get("stream") else reply
        road = REFUSED
    reply.headers[HEAD] = road
    return reply


# -- the look ----------------------------------------------------------------------------------------------------------


def _limits(protocol: Protocol, body: Mapping[str, Any]) -> dict[str, int]:
    """The longest answer, as the client has it."""
    return {name: body[name] for name in protocol.lengths if body.get(name) is not None}


def _greedy(body: Mapping[str, Any]) -> dict[str, Any]:
    """What the look keeps of a request."""
    kept = {name: value for name, value in body.items() if name in KEPT} | {"temperature": 0, "top_p": 1}
    if "messages" in body:
        kept["repetition_penalty"] = 1  # a server would else take the checkpoint's own
    if body.get("tools"):
        kept["tool_choice"] = "none"
    if body.get("functions"):
        kept["function_call"] = "none"
    return kept


def _looking(protocol: Protocol, body: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """A request for the beginning of the answer. A client's smaller limit does not count: it would hide a refusal."""
    lengths = dict.fromkeys(_limits(protocol, body) or protocol.lengths[-1:], tokens)
    return _greedy(body) | lengths | ({"store": False} if "input" in body else {})


def _refusing(protocol: Protocol, body: Mapping[str, Any]) -> dict[str, Any]:
    """A request for the whole of a refusal, as the client wants it sent."""
    return _greedy(body) | {
        name: body[name] for name in (*protocol.lengths, "stream", "stream_options", "store") if name in body
    }


def _check_served(served: Served, protocol: Protocol, body: Mapping[str, Any]) -> None:
    """Raises Refusal for what the threshold was not made for."""
    if protocol.path != CHAT.path:
        raise Refusal(
            501,
            "gate:first asks for log-probabilities by /v1/chat/completions alone; ask there, or take gate:answer.",
            "not_served",
        )
    if body["model"] != served.model:
        raise Refusal(
            404, f"gate:first was calibrated on {served.model!r} and on no other model of the upstream; ask for that.",
            "model_not_found", "model",
        )  # fmt: skip
    told = body.get("chat_template_kwargs") or {}
    if named(told) != named(served.template_kwargs):
        raise bad(
            f"gate:first was calibrated with chat_template_kwargs {json.dumps(served.template_kwargs)}; send these and no others.",
            "field", "chat_template_kwargs",
        )  # fmt: skip


def _read_first(protocol: Protocol, reply: Response, served: Served, tags: Tags) -> Look:
    """Raises Refusal unless the first token's log-probabilities can be seen."""
    value, seen = _answer(protocol, reply)
    split = split_thought(seen.opened + seen.text, tags)
    if seen.thought or split.thought or split.cut:
        raise _nothing("a thought stands before the answer, so its first token shows nothing; take gate:answer")
    if not seen.tokens:
        raise _nothing(f"the upstream {UNTOLD}")
    no = log_odds(seen.tokens[0], served.refusal_text) > served.first.threshold
    return Look(no, True, served.refusal_text, _counted(value))


def _read(protocol: Protocol, reply: Response, tokens: int, tags: Tags) -> Look:
    """Raises Refusal unless there is an answer whose beginning can be seen."""
    value, seen = _answer(protocol, reply)
    split = split_thought(seen.opened + seen.text, tags)
    thought = bool(seen.thought or split.thought or split.cut)
    more = f"within {tokens} tokens: a model that thinks needs more (davsp serve --gate-tokens)"
    if seen.cut or split.cut:
        raise _nothing(f"{CUT} {more}")
    if not has_words(split.answer):
        raise _nothing(
            f"it holds no words {more}" if seen.finish == "length" else "the upstream's answer holds no words"
        )
    no = refused(split.answer)
    if thought and not no and seen.finish == "length" and len(split.answer.split()) < WORDS:
        raise _nothing(f"too little follows the thought {more}")
    return Look(no, seen.finish == "stop", seen.text, _counted(value))


def _answer(protocol: Protocol, reply: Response) -> tuple[dict[str, Any], Answer]:
    """The reply's JSON and the answer in it. Raises Refusal if there is none."""
    if reply.status_code != 200 or isinstance(reply, StreamingResponse):
        raise _nothing(f"the upstream's reply ({reply.status_code}) is no single message")
    try:
        value = json.loads(bytes(reply.body))
    except (ValueError, RecursionError) as error:
        raise _nothing("the upstream's reply is no JSON") from error
    seen = protocol.read(value)
    if isinstance(seen, Failure):
        raise _nothing(seen.reason)
    return value, seen


def _counted(value: Mapping[str, Any]) -> dict[str, int]:
    """The upstream's counts, by its names."""
    usage = value.get("usage") or {}
    return {name: usage[name] for name in COUNTS if isinstance(usage.get(name), int)}


def _nothing(why: str) -> Refusal:
    return Refusal(
        502, f"the gate has no answer to look at, so nothing was sent on undefended: {why}.", "gate_no_answer"
    )


# -- what it took ------------------------------------------------------------------------------------------------------


def _usage(usage: Mapping[str, int]) -> dict[str, int] | None:
    """By the names of chat completions."""
    read, written = (
        usage.get(a, usage.get(b))
        for a, b in (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens"))
    )
    if read is None or written is None:
        return None
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _summed(reply: Response, usage: Mapping[str, int]) -> Response:
    """The reply with the look's tokens added to its own, as a defense that asks more than once counts all its calls."""
    if isinstance(reply, StreamingResponse):
        reply.body_iterator = _events(reply.body_iterator, usage)
    elif reply.status_code == 200:
        reply.body = _added(bytes(reply.body), usage)
        reply.headers["content-length"] = str(len(reply.body))
    return reply


async def _events(chunks: Any, usage: Mapping[str, int]) -> AsyncIterator[bytes]:
    """A stream as it comes, line by line."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        if lines:
            yield b"".join(_line(line, usage) + b"\n" for line in lines)
    if rest:
        yield rest


def _line(line: bytes, usage: Mapping[str, int]) -> bytes:
    head, data = line[:5], line[5:]
    return head + b" " + _added(data, usage) if head == b"data:" and b'"usage"' in data else line


def _added(data: bytes, usage: Mapping[str, int]) -> bytes:
    """JSON with the counts raised where it has them; the bytes themselves where it has none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return data
    for place in (value, value.get("response") if isinstance(value, dict) else None):
        counts = place.get("usage") if isinstance(place, dict) else None
        if isinstance(counts, dict):
            raised = {name: counts[name] + more for name, more in usage.items() if isinstance(counts.get(name), int)}
            if raised:
                counts |= raised
                return json.dumps(value).encode()
    return data
