"""Conversation templates: those of LLaVA's own code, by its names for them, and what a checkpoint's own template is told.

Source: `llava/conversation.py` of haotian-liu/LLaVA. The converted checkpoints on the hub (llava-1.5-7b-hf, …) begin at `USER:`
and leave the system sentence out; all else is the same: a picture and a line break before the question, one space before
`ASSISTANT:`, `</s>` after an answer.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jinja2 import TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from davsp.errors import DavspError

CHECKPOINT: Literal["checkpoint"] = "checkpoint"
"""The template that the checkpoint brings."""

NAME = r"^(llava_v1|vicuna_v1|checkpoint( [A-Za-z_][A-Za-z0-9_]*=[ -~]+)?)$"
"""What names a template in records: one of LLaVA's, or the checkpoint's with what it is told (`named`)."""

SYSTEM = {
    "llava_v1": (
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions."
    ),
    "vicuna_v1": (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
}
"""The system sentences: DAVSP's code asks by `llava_v1`, LLaVA-1.5 was trained and is evaluated by its authors on `vicuna_v1`."""

_TURNS = (
    " {% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

TEMPLATES = {name: sentence + _TURNS for name, sentence in SYSTEM.items()}
"""In jinja, as transformers reads them."""

TURN = "USER: <image> a ASSISTANT:"
"""How a checkpoint that these are for asks about a picture, with single spaces: LLaVA-1.5 and what is made of it."""


def named(kwargs: Mapping[str, Any]) -> str:
    """The checkpoint's template and what it is told, as records name it: `checkpoint enable_thinking=false`, keys in their order.

    Raises:
        DavspError: a key that is no name, or a value that is not JSON.
    """
    parts: list[str] = [CHECKPOINT]
    for key in sorted(kwargs):
        try:
            parts.append(f"{key}={json.dumps(kwargs[key], sort_keys=True, allow_nan=False)}")
        except (TypeError, ValueError, RecursionError) as error:
            raise DavspError(
                f"--template-kwargs {key}: its value is not JSON; give a text, a number or a flag"
            ) from error
        if not (key.isascii() and key.isidentifier()):
            raise DavspError(f"--template-kwargs {key!r} is no name that a template could read; give KEY=VALUE")
    return " ".join(parts)


def kwargs_of(name: str) -> dict[str, Any]:
    """What the template of that name is told, `named` read back; nothing for LLaVA's own."""
    kwargs: dict[str, Any] = {}
    rest = name.partition(" ")[2]
    while rest:
        key, _, rest = rest.partition("=")
        kwargs[key], end = json.JSONDecoder().raw_decode(rest)
        rest = rest[end:].lstrip()
    return kwargs


def read_kwargs(pairs: Sequence[str] | None) -> dict[str, Any]:
    """What --template-kwargs says: KEY=VALUE each, VALUE as JSON where it is that, else as text.

    Raises:
        DavspError: no KEY=VALUE, a key twice, or a flag as Python writes it, which would be a text that counts as true.
    """
    kwargs: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise DavspError(f"--template-kwargs {pair!r} is not KEY=VALUE, such as enable_thinking=false")
        if key in kwargs:
            raise DavspError(f"--template-kwargs gives {key} twice; leave one out")
        if value in ("True", "False", "None"):
            right = {"True": "true", "False": "false", "None": "null"}[value]
            raise DavspError(f"--template-kwargs {pair} would be a text; write {key}={right} as in JSON")
        kwargs[key] = _value(value)
    named(kwargs)
    return kwargs


def read_extra(pairs: Sequence[str] | None) -> dict[str, Any]:
    """What --extra-body says: KEY=VALUE each, VALUE as JSON where it is that, else as text; or a whole JSON object.

    Raises:
        DavspError: neither, or a key twice.
    """
    body: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        whole = _value(pair)
        if not isinstance(whole, dict) and not (key and equals):
            raise DavspError(f"--extra-body {pair!r} is not KEY=VALUE, such as top_k=1, nor a JSON object")
        given = whole if isinstance(whole, dict) else {key: _value(text)}
        if twice := sorted(set(given) & set(body)):
            raise DavspError(f"--extra-body gives {twice[0]} twice; leave one out")
        body |= given
    return body


def _value(text: str) -> Any:
    def no_number(name: str) -> Any:
        raise ValueError(name)

    try:
        return json.loads(text, parse_constant=no_number)
    except (ValueError, RecursionError):
        return text


def names_read(template: str) -> set[str] | None:
    """The names that a template reads and does not set; None: it cannot be told, since it has tags of its own."""
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return meta.find_undeclared_variables(environment.parse(template))
    except TemplateSyntaxError:
        return None
