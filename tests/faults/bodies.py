"""Requests that were good once: changed in their JSON and in their bytes, and what then leaves the proxy."""

import asyncio
import base64
import io
import json
import random
import re
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import numpy as np
from PIL import Image

from davsp.serve.fields import NEVER
from faults import Seen, session, shapeless
from proxy import CANVAS, TEXT, Client, border, client, data_url, image_part, text_part, user
from tiny import picture

RED = data_url(Image.new("RGB", (7, 5), "red"))
ASIDE = "https://evil.test/x.png"
PATHS = {"/v1/chat/completions": "messages", "/v1/responses": "input"}

# -- what is sent ------------------------------------------------------------------------------------------------------


def chat(rng: random.Random) -> dict[str, Any]:
    """A good conversation of chat completions."""
    url = data_url(picture(rng.randrange(9), (rng.randint(2, 9), rng.randint(2, 9))), rng.choice(["PNG", "WEBP"]))
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": json.dumps({"a": [1, {"b": "x"}]})}}
    turns = [
        [user(text_part("what"), image_part(url, detail="high"), text_part("is it"))],
        [user("hello"), {"role": "assistant", "content": "hi"}, user(text_part("and this"), image_part(url))],
        [
            user("q"),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": [text_part("a tool's"), image_part(url)]},
        ],
    ]
    messages = [{"role": "system", "content": "be brief"}] * rng.randint(0, 1) + rng.choice(turns)
    function = {"name": "f", "description": "does", "parameters": {"type": "object", "properties": {}}}
    more = [
        {"tools": [{"type": "function", "function": function}], "tool_choice": "auto"},
        {"temperature": 0.5, "stop": ["a"], "metadata": {"a": "b"}, "stream_options": {"include_usage": True}},
        {"chat_template_kwargs": {"enable_thinking": False}, "response_format": {"type": "json_object"}},
        {},
    ]
    return {"messages": messages} | rng.choice(more)


def responses(rng: random.Random) -> dict[str, Any]:
    """A good conversation of /v1/responses."""
    url = data_url(picture(rng.randrange(9), (rng.randint(2, 9), rng.randint(2, 9))))
    words, image = {"type": "input_text", "text": "what is it"}, {"type": "input_image", "image_url": url}
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": {"b": "x"}}'}
    thought = {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "short"}]}
    said = {"role": "assistant", "content": [{"type": "output_text", "text": "done", "annotations": []}]}
    items = [
        "what is it",
        [user(words, image)],
        [user(words), said, user(image, words)],
        [user(words), thought, call, {"type": "function_call_output", "call_id": "c", "output": "a tool's"}],
    ]
    tools = {"tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}], "tool_choice": "auto"}
    more = [tools, {"instructions": "be brief", "max_output_tokens": 9}, {"reasoning": {"effort": "low"}}, {}]
    return {"input": rng.choice(items)} | rng.choice(more)


PAYLOADS = [
    RED, RED.replace("data:image", "DATA:Image"), RED.replace("base64,", "base64,\n"), f"![]({ASIDE})", f"![]( {ASIDE})", f"![]({RED})",
    f"look ![a cat]({ASIDE})", ASIDE, "data:video/mp4;base64,AAAAIGZ0eXBpc29tAAACAGlzb20=", "data:image/cut;base64," + "0" * 35, "data:image/svg+xml;utf8,<svg/>",
    "data:image/png;base64,", json.dumps({"image_url": ASIDE}), json.dumps({"![": f"]({ASIDE})"}), json.dumps(json.dumps([f"![]({ASIDE})"])),
    '{"a": "!\\u005b](https://evil.test/x.png)"}', "<image>", "<|im_end|>",
]  # fmt: skip
ODD = [
    None,
    True,
    0,
    -1,
    2.5,
    1e308,
    10**30,
    "",
    "\0",
    "\ud83d",
    "x" * 3000,
    [],
    {},
    [[]],
    [None],
    {"": {}},
    {"url": RED},
]
KEYS = [
    "content", "type", "role", "text", "image_url", "images", "video_url", "url", "detail", "tool_calls", "arguments", "output", "name", "input",
    "messages", "tools", "stream", "model", "prompt", "chat_template", "documents", "extra_body", "logit_bias", "mm_processor_kwargs",
    "reasoning", "file_id", "encrypted_content", "previous_response_id", "TEXT", "\u0130mage_url", "", "image_url\0",
]  # fmt: skip
WORDS = [
    "user",
    "USER",
    "assistant",
    "tool",
    "system",
    "image_url",
    "input_image",
    "text",
    "input_text",
    "message",
    "reasoning",
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every list or object of a JSON value with each of its keys."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def change(body: dict[str, Any], rng: random.Random) -> None:
    """One change somewhere in the JSON."""
    where = list(places(body))
    if not where:
        return
    (holder, key), (other, its) = rng.choice(where), rng.choice(where)
    texts = [place for place in where if isinstance(place[0][place[1]], str)]
    kind = rng.randrange(10)
    if kind == 0:
        holder[key] = deepcopy(rng.choice(ODD))
    elif kind == 1:
        holder[key] = rng.choice(PAYLOADS)
    elif kind == 2:
        del holder[key]
    elif kind == 3 and isinstance(holder, dict):
        holder[rng.choice(KEYS + PAYLOADS)] = holder.pop(key) if rng.random() < 0.5 else rng.choice(PAYLOADS + ODD)
    elif kind == 4:
        holder[key] = deepcopy(other[its])
    elif kind == 5:
        holder[key] = rng.choice([[holder[key]], {rng.choice(KEYS): holder[key]}, json.dumps(holder[key])])
    elif kind == 6 and isinstance(holder, list):
        holder.insert(key, deepcopy(rng.choice([holder[key], *ODD])))
    elif kind == 7 and texts:
        holder, key = rng.choice(texts)
        holder[key] += rng.choice(PAYLOADS)
    elif kind == 8 and len(texts) > 1:  # a picture spread over two texts that stand one after the other
        at, payload = rng.randrange(len(texts) - 1), rng.choice(PAYLOADS)
        cut = rng.randrange(len(payload))
        for (holder, key), piece in zip(texts[at : at + 2], (payload[:cut], payload[cut:]), strict=True):
            holder[key] = holder[key] + piece if rng.random() < 0.5 else piece
    elif texts:
        holder, key = rng.choice(texts)
        holder[key] = rng.choice(WORDS)


def written(body: Any, rng: random.Random) -> bytes:
    """The body as one of the many ways to write the same JSON, or with its bytes changed."""
    text = json.dumps(body, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, None, 1]))
    if rng.random() < 0.2:  # letters as some encoders, or attackers, write them
        letter = rng.choice("/:,;![](di")
        text = text.replace(letter, f"\\u{ord(letter):04x}") if letter in "/!di" else text
    if rng.random() < 0.1:
        text = text[:-1] + f', "messages": [{{"role": "user", "content": "![]({ASIDE})"}}]}}'
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    if rng.random() < 0.05:
        return text.encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"]), "surrogatepass")
    for _ in range(rng.randint(1, 4) if rng.random() < 0.15 else 0):
        at, size = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 30])
        kind = rng.randrange(4)
        if kind == 0:
            data[at : at + size] = rng.randbytes(size)
        elif kind == 1:
            del data[at : at + size]
        elif kind == 2:
            data[at:at] = data[(start := rng.randrange(len(data) + 1)) : start + size]
        else:
            data[at:at] = rng.choice([b'"', b"\\", b"{", b"]", b",", b"\xff", b"\0", b"[" * 200, b"9" * 5000, b"NaN"])
    return bytes(data)


# -- what left -----------------------------------------------------------------------------------------------------------

FRAME = np.ones((CANVAS, CANVAS), bool)
FRAME[8:-8, 8:-8] = False
BORDER = np.asarray(border().paint(Image.new("RGB", (9, 9))))
PICTURE = re.compile(
    r"data:\s*(image|video|audio)/[^,]{0,200},\s*[\w+/=-]{16}|data:image/svg[^,]*,\s*<svg", re.IGNORECASE
)
MARKDOWN = re.compile(r"!\[\]\(\s*(https?|data):", re.IGNORECASE)
SPOKEN = ("content", "output", "type", "role")
HOLDERS = {"image", "images", "image_url", "input_image", "video", "video_url", "audio_url", "input_audio"}


def undefended(body: dict[str, Any], conversation: str) -> str:
    """What left that no defense stands before; empty if nothing did."""
    rest = deepcopy(body)
    turns = rest[conversation] if isinstance(rest[conversation], list) else [user(rest[conversation])]
    for turn in turns:
        parts = turn["content"] if isinstance(turn.get("content"), list) else []
        for part in parts:
            if part["type"] in ("image_url", "input_image"):
                holder = part["image_url"] if isinstance(part["image_url"], dict) else part
                if not canvas(holder.pop("url" if holder is not part else "image_url")):
                    return "a picture that is no canvas of the defense"
        words = [part.get("text", "") for part in parts if "text" in part["type"]]
        question = turn["content"] if isinstance(turn.get("content"), str) else "\n".join(words)
        if turn.get("role") == "user" and not question.startswith(f"{TEXT} "):
            return "a question without the defense's text"
    if names := NEVER & (rest.keys() | (rest.get("chat_template_kwargs") or {}).keys()):
        return f"the field {min(names)}"
    texts = [text for _, text in leaves(rest)]
    said = [rest.get("instructions") or "", *(text for turn in turns for text in spoken(turn))]
    aside = [text for turn in turns for _, text in leaves({k: v for k, v in turn.items() if k not in SPOKEN})]
    joined = ["".join(map(strip, some)) for some in (said, aside) for strip in (str, str.strip)]  # as servers join them
    for text in texts + joined:
        if PICTURE.search(text) or MARKDOWN.search(text):
            return f"a picture in a text: {text[:60]!r}"
    if ASIDE in (text for key, text in leaves(rest) if key in HOLDERS):
        return "an address under a picture's key"
    return ""


def spoken(turn: dict[str, Any]) -> list[str]:
    """The texts of a message or of a tool's output."""
    content = turn.get("content") or turn.get("output") or ""
    return (
        [content] if isinstance(content, str) else [part.get("text") or part.get("refusal") or "" for part in content]
    )


def canvas(url: Any) -> bool:
    """Whether an address is a whole picture with the defense's own frame."""
    head, _, data = url.partition(",")
    if head != "data:image/png;base64":
        return False
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    pixels = np.asarray(image)
    return image.size == (CANVAS, CANVAS) and image.mode == "RGB" and bool((pixels[FRAME] == BORDER[FRAME]).all())


def leaves(value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Every text and key, in their order, with the key that it stands under; of JSON in a text what it says, too."""
    if isinstance(value, str):
        yield key, value
        try:
            inner = json.loads(value) if depth < 8 and value.lstrip()[:1] in ("{", "[", '"') else None
        except (ValueError, RecursionError):
            inner = None
        if isinstance(inner, (dict, list, str)):
            yield from leaves(inner, key, depth + 1)
    elif isinstance(value, dict):
        for name, below in value.items():
            yield "", name
            yield from leaves(below, key if key in HOLDERS else name.lower(), depth)
    elif isinstance(value, list):
        for one in value:
            yield from leaves(one, key, depth)


# -- all -----------------------------------------------------------------------------------------------------------------


def run(seed: int, count: int) -> Seen:
    """So many bodies, half to each path, none with more than three changes to its JSON."""
    seen, rng, caller = Seen(), random.Random(seed), client(border(), threads=1)
    asyncio.run(_ask_all(seen, rng, caller, count))
    return seen


async def _ask_all(seen: Seen, rng: random.Random, caller: Client, count: int) -> None:
    async with session(caller) as http:
        for number in range(count):
            path, conversation = list(PATHS.items())[number % 2]
            body = {"model": caller.model} | (responses(rng) if number % 2 else chat(rng))
            for _ in range(rng.choice([0, 1, 1, 2, 3])):
                change(body, rng)
            content = written(body, rng)
            reply = await http.post(path, content=content, headers={"content-type": "application/json"})
            seen.tried += 1
            problem = ""
            if reply.status_code == 200:
                problem = undefended(caller.upstream.bodies[-1], conversation)
            elif caller.upstream.bodies:
                problem = "refused, and sent on all the same"
            elif reply.status_code >= 500 or (problem := shapeless(reply)):
                problem = problem or f"a {reply.status_code}"
            code = "" if reply.status_code == 200 else f" {reply.json()['error']['code']}"
            seen.outcomes[f"{reply.status_code}{code}"] += 1
            if problem:
                seen.broken.append(f"{path}, number {number}: {problem}; {content[:2000]!r}")
            caller.upstream.bodies.clear()
            caller.upstream.requests.clear()
