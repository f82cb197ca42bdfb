"""The defense at a conversation: every picture of every message, and the text of every question.

Each message of the user is defended as a query of its own, so it looks the same in every turn, and servers can keep what they
computed of it. Only roles, parts and fields that are known to hold no other picture pass.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from davsp.defenses import Defense
from davsp.query import Query
from davsp.serve.refusals import Refusal, bad

Send = Callable[[Image.Image], str]


class Types(NamedTuple):
    """What a protocol calls the parts of a message that the defense is put at."""

    text: str
    image: str


CHAT = Types("text", "image_url")
ROLES = ("assistant", "developer", "function", "system", "tool", "user")
PARTS = {"text": {"type", "text"}, "refusal": {"type", "refusal"}, "image_url": {"type", "image_url"}}
FIELDS = {  # of a message, as OpenAI and the servers in docs/serve.md know them; others could hold a picture (Ollama's `images`)
    "role", "content", "name", "refusal", "tool_calls", "tool_call_id", "function_call", "reasoning", "reasoning_content",
    "annotations", "audio",
}  # fmt: skip
TEXTS = ("name", "tool_call_id", "refusal", "reasoning", "reasoning_content")


def check(body: Any) -> list[dict[str, Any]]:
    """The messages of a request.

    Raises:
        Refusal: a role, part, or field of these that is not known to leave pictures alone, or no question of a user.
    """
    if not isinstance(body, dict):
        raise bad("the body must be a JSON object.")
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise bad("messages must be a list of objects.", param="messages")
    for at, message in enumerate(messages):
        _check_message(message, f"messages[{at}]")
    if not any(message["role"] == "user" for message in messages):
        raise bad("messages holds none of role user, so there is nothing to defend.", param="messages")
    return messages


def _check_message(message: dict[str, Any], where: str) -> None:
    if message.get("role") not in ROLES:
        raise bad(f"{where}.role must be one of {', '.join(ROLES)}.", param=f"{where}.role")
    if unknown := message.keys() - FIELDS:
        raise bad(f"{where} has an unknown field {min(unknown)!r}; leave it out.", "field", where)
    for name in TEXTS:
        if not isinstance(message.get(name), str | None):
            raise bad(f"{where}.{name} must be a text.", param=f"{where}.{name}")
    content = message.get("content")
    if isinstance(content, str) or (content is None and message["role"] != "user"):
        return
    if not isinstance(content, list):
        raise bad(f"{where}.content must be a text or a list of parts.", param=f"{where}.content")
    for number, part in enumerate(content):
        _check_part(part, f"{where}.content[{number}]")


def _check_part(part: Any, where: str) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in PARTS:
        raise bad(f"{where} must be of type text or image_url; no other can be defended.", "part", where)
    if unknown := part.keys() - PARTS[kind]:
        raise bad(f"{where} has an unknown field {min(unknown)!r}; leave it out.", "field", where)
    value = part.get(kind)
    if kind == "image_url":
        if not isinstance(value, dict) or not isinstance(value.get("url"), str) or value.keys() - {"url", "detail"}:
            raise bad(f"{where}.image_url must hold a url, and at most a detail besides.", "image_url", where)
        if not isinstance(value.get("detail", ""), str):
            raise bad(f"{where}.image_url.detail must be a text.", "image_url", where)
    elif not isinstance(value, str):
        raise bad(f"{where}.{kind} must be a text.", param=where)


def picture_urls(messages: Sequence[Mapping[str, Any]], types: Types = CHAT) -> list[str]:
    """Of all messages, in their order."""
    return [
        url if isinstance(url := part["image_url"], str) else url["url"]
        for message in messages
        if isinstance(message.get("content"), list)
        for part in message["content"]
        if part["type"] == types.image
    ]


def without_pictures(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages but for their image parts."""
    return [
        {**message, "content": [part for part in content if part["type"] != "image_url"]}
        if isinstance(content := message.get("content"), list)
        else dict(message)
        for message in messages
    ]


def defended(
    defense: Defense,
    messages: Sequence[Mapping[str, Any]],
    pictures: Iterable[Image.Image],
    send: Send,
    text: bool = True,
    types: Types = CHAT,
) -> list[dict[str, Any]]:
    """The messages as the model is to see them; `messages` itself is left as it is.

    Args:
        defense: one that only changes the input.
        messages: checked; what has no role (a tool call of `davsp.serve.responses`) stays as it is.
        pictures: those of `picture_urls`, read; each is asked for when the one before it is sent.
        send: a finished picture -> its address in the message.
        text: whether the questions of users get the defense's text.
        types: of the protocol's parts.

    Raises:
        Refusal: 500 if the defense takes a picture away; 400 if it wants another text for each picture of one message.
        DavspError: the defense can't be applied.
    """
    left = iter(pictures)
    return [_message(defense, message, left, send, text, types) for message in messages]


def _message(
    defense: Defense, message: Mapping[str, Any], pictures: Iterator[Image.Image], send: Send, text: bool, types: Types
) -> dict[str, Any]:
    content = message.get("content")
    asks = text and message.get("role") == "user"
    if isinstance(content, str):
        return {**message, "content": _text(defense, content)} if asks else dict(message)
    parts = [dict(part) for part in content or []]
    image_parts = [part for part in parts if part["type"] == types.image]
    text_parts = [part for part in parts if part["type"] == types.text]
    if not image_parts and not asks:
        return dict(message)
    question = "\n".join(part["text"] for part in text_parts)  # as servers join them
    texts = set[str]()
    for part in image_parts:  # one after the other, so that one is in memory
        prepared, image = _prepare(defense, question, next(pictures))
        url, was = send(image), part["image_url"]
        part["image_url"] = url if isinstance(was, str) else {**was, "url": url}
        texts.add(prepared)
    if len(texts) > 1:
        raise bad(f"{defense.name} puts another text at each picture; send one picture a message.", "several_pictures")
    prepared = texts.pop() if texts else _text(defense, question)
    if asks and text_parts:
        _place(text_parts, question, prepared)
    elif asks and prepared:
        parts.append({"type": types.text, "text": prepared})
    return {**message, "content": parts}


def _prepare(defense: Defense, question: str, picture: Image.Image) -> tuple[str, Image.Image]:
    (query,) = defense.prepare([Query("", question, "benign", "", image=picture)])
    if not isinstance(query.image, Image.Image):
        raise Refusal(500, f"{defense.name} left a picture out, so nothing was sent on.", "defense")
    return query.question, query.image


def _text(defense: Defense, question: str) -> str:
    (query,) = defense.prepare([Query("", question, "benign", "")])
    return query.question


def _place(parts: list[dict[str, Any]], question: str, prepared: str) -> None:
    """Put what the defense wrote before and after the question at the first and the last of its parts, which may lie between pictures."""
    if len(parts) == 1:
        parts[0]["text"] = prepared
        return
    before, middle, after = prepared.partition(question)
    if not middle:
        raise bad("the defense changes the question itself; send one text a message.", "several_texts")
    parts[0]["text"] = before + parts[0]["text"]
    parts[-1]["text"] += after
