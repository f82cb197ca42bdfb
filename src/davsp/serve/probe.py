"""The look at the upstream before the first request: whether its model sees a canvas as it was sent."""

import random
from collections.abc import Sequence
from typing import Any

from PIL import Image

from davsp.defenses.gate.served import TOKENS
from davsp.errors import DavspError
from davsp.lvlm import Answer
from davsp.lvlm.remote import read_answer
from davsp.prompts.gate import Served
from davsp.serve.model import PIXELS, pixels_hash
from davsp.serve.pictures import to_data_url
from davsp.serve.refusals import Refusal
from davsp.serve.settings import ServeSettings
from davsp.serve.upstream import Upstream

QUESTION = "what is this ?"
NO_ANSWER = (401, 403, 408, 409, 425, 429)
"""Status of a server that says nothing of what it would tell."""


async def probe(
    settings: ServeSettings, model: str | None, transport: Any = None, served: Served | None = None
) -> list[str]:
    """Ask the upstream with a canvas of noise and without a picture, one token each.

    A `davsp serve-model` tells the pixels that its model saw; others tell at most how many tokens the picture took.

    Args:
        served: of a gate that needs log-probabilities, which are then asked for, too.

    Returns:
        Lines for the user: what was seen, and what must hold as it could not be seen.

    Raises:
        DavspError: the upstream's model sees other pixels than were sent, or no picture at all, or it tells no log-probabilities.
    """
    upstream = Upstream(settings, transport)
    try:
        told = [] if served is None else [await _tells(upstream, served)]
        return told + await _look(upstream, settings, model)
    except Refusal as refusal:
        return [f"the upstream could not be probed: {refusal.message}", *must_hold(settings.canvas)]
    finally:
        await upstream.http.aclose()


async def _look(upstream: Upstream, settings: ServeSettings, model: str | None) -> list[str]:
    name = model or await first_model(upstream)
    if settings.canvas is None:
        return [f"the upstream serves {name}; no visual prompt, so no picture is sent to try."]
    side = settings.canvas
    noise = Image.frombytes("RGB", (side, side), random.Random(0).randbytes(3 * side * side))
    picture = {"type": "image_url", "image_url": {"url": to_data_url(noise)}}
    with_picture, headers = await _ask(upstream, name, [picture, {"type": "text", "text": QUESTION}])
    without, _ = await _ask(upstream, name, [{"type": "text", "text": QUESTION}])
    seen_hash = headers.get(PIXELS)
    if seen_hash == pixels_hash(noise):
        return [f"the upstream's {name} sees a canvas of {side}x{side} pixels as it is sent, to the pixel."]
    if seen_hash is not None:
        raise DavspError(
            f"the upstream's {name} resamples a canvas of {side}x{side} pixels; give its own side (--canvas)."
        )
    if with_picture is None or without is None:
        return [f"the upstream's {name} answers, but tells no token counts.", *must_hold(side)]
    if with_picture == without:
        raise DavspError(f"the upstream's {name} takes as many tokens with a picture as without: it sees none.")
    return [
        f"to the upstream's {name} a canvas of {side}x{side} pixels is {with_picture - without} tokens.",
        *must_hold(side),
    ]


async def _tells(upstream: Upstream, served: Served) -> str:
    """That log-probabilities are told, in words."""
    message = {"role": "user", "content": QUESTION}
    body: dict[str, Any] = {"model": served.model, "messages": [message], "max_tokens": TOKENS, "temperature": 0}
    if served.template_kwargs:
        body["chat_template_kwargs"] = served.template_kwargs
    status, reply, _ = await upstream.ask(
        "POST", "/chat/completions", {}, body | {"logprobs": True, "top_logprobs": served.top}
    )
    if status in NO_ANSWER or status >= 500:
        raise Refusal(502, f"it answered {status} to a question with logprobs.", "probe")
    answer = read_answer(reply) if status == 200 else None
    tokens = answer.tokens if isinstance(answer, Answer) else ()
    where = f"the upstream's {served.model}"
    if not tokens:
        seen = "a reply without them" if status == 200 else f"{status}"
        raise DavspError(
            f"{where} gave no log-probabilities when asked for {served.top} top_logprobs (it answered {seen}), and gate:first sees by "
            "nothing else; take gate+NAME=FOLDER, which looks at the answer."
        )
    return f"{where} tells the log-probabilities of {len(tokens[0].top)} tokens at the answer's first place."


def must_hold(canvas: int | None) -> Sequence[str]:
    """What the proxy relies on and can't see."""
    if canvas is None:
        return ()
    return (
        f"must hold: its processor leaves a picture of {canvas}x{canvas} pixels alone (no resize, no crop, no tiles; see docs/serve.md),",
        "must hold: its chat template is the checkpoint's own, and nobody else reaches it past the proxy.",
    )


async def first_model(upstream: Upstream) -> str:
    """The first that the upstream lists; Refusal if it lists none."""
    status, listing, _ = await upstream.ask("GET", "/models", {})
    try:
        return str(listing["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as error:
        raise Refusal(502, f"it answered {status} without a list of models; name one (--model).", "probe") from error


async def _ask(upstream: Upstream, model: str, parts: list[dict[str, Any]]) -> tuple[int | None, Any]:
    """Tokens of the prompt, if the upstream counts them, and the reply's headers."""
    message = {"role": "user", "content": parts}
    body = {"model": model, "messages": [message], "max_tokens": 1, "temperature": 0}
    status, reply, headers = await upstream.ask("POST", "/chat/completions", {}, body)
    if status != 200:
        raise Refusal(502, f"it answered {status} to a picture of noise.", "probe")
    usage = reply.get("usage") if isinstance(reply, dict) else None
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return (count if isinstance(count, int) else None), headers
