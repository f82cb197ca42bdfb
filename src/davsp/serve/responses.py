"""The defense at a Responses request: its `input` is a text, or items, of which messages hold pictures and questions.

The defense acts by the code of `davsp.serve.messages`, so pixels and texts are those of chat completions. The request that leaves is still
a Responses request. Only items, parts and fields that are known to hold no other picture pass.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from davsp.defenses import Defense
from davsp.lvlm import Answer
from davsp.lvlm.remote import read_answer as read_message
from davsp.runtime.client import Failure
from davsp.serve import messages
from davsp.serve.fields import ELSEWHERE
from davsp.serve.refusals import bad

TYPES = messages.Types("input_text", "input_image")
ROLES = ("assistant", "developer", "system", "user")
ITEMS = {  # type -> its fields
    "message": {"type", "role", "content", "id", "status", "phase"},
    "function_call": {"type", "id", "call_id", "name", "namespace", "arguments", "status"},
    "function_call_output": {"type", "id", "call_id", "name", "output", "status"},
    "reasoning": {"type", "id", "summary", "content", "encrypted_content", "status"},
}
PARTS = {
    "input_text": {"type", "text"}, "input_image": {"type", "image_url", "detail", "file_id"},
    "output_text": {"type", "text", "annotations", "logprobs"}, "refusal": {"type", "refusal"},
    "summary_text": {"type", "text"}, "reasoning_text": {"type", "text"},
}  # fmt: skip
QUESTION_PARTS, ANSWER_PARTS = ("input_text", "input_image"), ("output_text", "refusal", "input_text")
TEXTS = {  # texts that must be there
    "function_call": ("call_id", "name", "arguments"), "function_call_output": ("call_id", "output"), "input_text": ("text",),
    "input_image": ("image_url",), "output_text": ("text",), "refusal": ("refusal",), "summary_text": ("text",), "reasoning_text": ("text",),
}  # fmt: skip
LISTS = ("content", "summary", "annotations", "logprobs")
OPAQUE = {  # field of an item or part -> why it must be left out
    "encrypted_content": "cannot be read by the proxy; leave it out",
    "file_id": "names a picture that the proxy does not see; send it as image_url",
}


def check(body: Any) -> str | list[dict[str, Any]]:
    """The input of a request.

    Raises:
        Refusal: an item, part, or field of these that is not known to leave pictures alone, something that only the server knows, or no
            question of a user.
    """
    if not isinstance(body, dict):
        raise bad("the body must be a JSON object.")
    for name, why in ELSEWHERE.items():
        if body.get(name) is not None and not (name == "background" and body[name] is False):
            raise bad(f"{name} {why}.", "elsewhere", name)
    _check_tools(body.get("tools"))
    items = body.get("input")
    if isinstance(items, str):
        return items
    if not isinstance(items, list):
        raise bad("input must be a text or a list of items.", param="input")
    for at, item in enumerate(items):
        _check_item(item, f"input[{at}]")
    of_users = [at for at, item in enumerate(items) if item.get("role") == "user"]
    if not of_users:
        raise bad("input holds no message of role user, so there is nothing to defend.", param="input")
    for at, item in enumerate(items[of_users[-1] :], of_users[-1]):
        if item.get("status") not in (None, "completed"):  # vLLM takes it for the beginning of the answer
            where = f"input[{at}].status"
            raise bad(
                f"{where} must be completed, as a server would go on with what is not; leave it out.", "status", where
            )
    return items


def _check_tools(tools: Any) -> None:
    if tools is not None and not isinstance(tools, list):
        raise bad("tools must be a list.", param="tools")
    for at, tool in enumerate(tools or []):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise bad(
                f"tools[{at}] must be of type function: what another one makes or fetches, the server reads undefended, and the grammar "
                "of a custom tool can force words.",
                "tool",
                f"tools[{at}]",
            )


def _check_item(item: Any, where: str) -> None:
    kind = item.get("type", "message" if "role" in item else None) if isinstance(item, dict) else None
    if not isinstance(kind, str) or kind not in ITEMS:
        raise bad(
            f"{where} must be a message, function_call, function_call_output or reasoning, written out; no other item can be defended.",
            "item",
            where,
        )
    if kind == "function_call_output" and not isinstance(item.get("output"), str):
        raise bad(
            f"{where}.output must be a text; send the pictures of a tool in a message of role user.",
            "output",
            f"{where}.output",
        )
    _check_fields(item, ITEMS[kind], TEXTS.get(kind, ()), where)
    if kind == "message":
        if item.get("role") not in ROLES:
            raise bad(f"{where}.role must be one of {', '.join(ROLES)}.", param=f"{where}.role")
        if not isinstance(item.get("content"), str):
            _check_parts(
                item.get("content"), ANSWER_PARTS if item["role"] == "assistant" else QUESTION_PARTS, f"{where}.content"
            )
    elif kind == "reasoning":
        _check_parts(item.get("summary") or [], ("summary_text",), f"{where}.summary")
        _check_parts(item.get("content") or [], ("reasoning_text",), f"{where}.content")


def _check_parts(parts: Any, types: Sequence[str], where: str) -> None:
    if not isinstance(parts, list):
        raise bad(f"{where} must be a list of parts{' or a text' if 'input_text' in types else ''}.", param=where)
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in types:
            raise bad(
                f"{where}[{number}] must be of type {' or '.join(types)}; no other can be defended here.",
                "part",
                f"{where}[{number}]",
            )
        _check_fields(part, PARTS[kind], TEXTS[kind], f"{where}[{number}]")


def _check_fields(value: Mapping[str, Any], known: set[str], texts: Sequence[str], where: str) -> None:
    """Every field is a text or left out, but for those in LISTS."""
    if unknown := value.keys() - known:
        raise bad(f"{where} has an unknown field {min(unknown)!r}; leave it out.", "field", where)
    for name, inner in value.items():
        if name in OPAQUE and inner is not None:
            raise bad(f"{where}.{name} {OPAQUE[name]}.", "field", f"{where}.{name}")
        if inner is not None and not isinstance(inner, (list, str) if name in LISTS else str):
            raise bad(f"{where}.{name} must be a {'list' if name in LISTS else 'text'}.", param=f"{where}.{name}")
    for name in texts:
        if not isinstance(value.get(name), str):
            raise bad(f"{where}.{name} must be a text.", param=f"{where}.{name}")


def picture_urls(items: str | Sequence[Mapping[str, Any]]) -> list[str]:
    """Of all messages, in their order."""
    return [] if isinstance(items, str) else messages.picture_urls(items, TYPES)


def defended(
    defense: Defense,
    items: str | Sequence[Mapping[str, Any]],
    pictures: Iterable[Image.Image],
    send: messages.Send,
    text: bool = True,
) -> str | list[dict[str, Any]]:
    """The input as the model is to see it; as `davsp.serve.messages.defended`."""
    if isinstance(items, str):
        (message,) = messages.defended(defense, [{"role": "user", "content": items}], [], send, text)
        return str(message["content"])
    return messages.defended(defense, items, pictures, send, text, TYPES)


def read_answer(reply: Any) -> Answer | Failure:
    """The answer in a reply, as `davsp.lvlm.remote.read_answer`: the texts of its messages; reasoning is told apart.

    What ended by anything but the model itself or the length, or holds a call, is none.
    """
    try:
        items, status, why = reply["output"], reply["status"], reply.get("incomplete_details") or {}
        parts = [part for item in items if item["type"] == "message" for part in item["content"]]
        texts = [part["text"] for part in parts if part["type"] == "output_text"]
        thought = any(item["type"] == "reasoning" for item in items)
        end = {
            "completed": "stop",
            "incomplete": "length" if why.get("reason") == "max_output_tokens" else "incomplete",
        }
        finish = end.get(status, status) if {item["type"] for item in items} <= {"message", "reasoning"} else "a call"
        message = {"content": "".join(texts) if texts else None, "reasoning": "…" if thought else None}
    except (KeyError, TypeError, AttributeError):
        return Failure("its reply holds no answer")
    return read_message({"choices": [{"message": message, "finish_reason": finish}], "usage": None})
