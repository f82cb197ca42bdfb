"""What may be printed of words that come from strangers: a terminal obeys control characters."""

import re

CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
"""Control characters but for tabs and ends of lines, halves of characters, and marks that turn around what follows."""


def plain(text: str) -> str:
    """The text with each of these as Python writes it."""
    return CONTROLS.sub(lambda character: repr(character[0])[1:-1], text)
