"""Conversation templates that a checkpoint does not bring: those of LLaVA's own code, by its names for them.

Source: `llava/conversation.py` of haotian-liu/LLaVA. The converted checkpoints on the hub (llava-1.5-7b-hf, …) begin at `USER:`
and leave the system sentence out; all else is the same: a picture and a line break before the question, one space before
`ASSISTANT:`, `</s>` after an answer.
"""

from typing import Literal

Template = Literal["checkpoint", "llava_v1", "vicuna_v1"]

CHECKPOINT: Literal["checkpoint"] = "checkpoint"
"""The template that the checkpoint brings."""

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
