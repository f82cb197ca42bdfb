"""What a model thinks is not what it answers: the two are told apart by the tags around a thought."""

import json
from collections.abc import Sequence
from typing import NamedTuple

from davsp.errors import DavspError

Tags = Sequence[tuple[str, str]]
"""Pairs of what opens and what closes a thought. An empty opening: every answer begins in a thought, as the prompt opened it."""

TAGS: Tags = (("<think>", "</think>"), ("<analysis>", "</analysis>"))
"""As lmms-eval has them (`--reasoning_tags` in lmms_eval/__main__.py)."""

CUT = "the thought was cut before there was an answer"
"""Why an answer is unscored of which there is none yet."""


class Split(NamedTuple):
    """A text told apart: the thoughts, what is answered outside of them, and whether the last thought has no end."""

    thought: str
    answer: str
    cut: bool


def split_thought(text: str, tags: Tags = TAGS) -> Split:
    """Tell thoughts and answer apart.

    A closing tag with no opening one before it ends a thought that began in the prompt. Every other thought is the text between two
    tags, as lmms-eval takes it out. One that is opened and not closed is cut: whatever stands before it, there is no answer yet.
    A text without tags is all answer, and stays as it is.
    """
    thoughts, answer, cut = [], text, False
    for opening, closing in tags:
        before, closed, after = answer.partition(closing)
        if (closed and opening not in before) or not opening:
            thoughts.append(before)
            answer, cut = after, cut or not closed
        while opening and opening in answer:
            before, _, rest = answer.partition(opening)
            thought, closed, after = rest.partition(closing)
            thoughts.append(thought)
            answer, cut = before + after, cut or not closed
    if not thoughts:
        return Split("", text, False)
    return Split("\n".join(thought.strip() for thought in thoughts).strip(), answer.strip(), cut)


def read_tags(value: str) -> Tags:
    """What --reasoning-tags says: pairs as JSON, or "none".

    Raises:
        DavspError: it is neither.
    """
    if value == "none":
        return ()
    try:
        pairs = json.loads(value)
    except (ValueError, RecursionError):
        pairs = None
    good = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(tag, str) for tag in pair) and pair[1]
        for pair in pairs
    )
    if not good:
        raise DavspError(
            f'--reasoning-tags is {value!r}; give pairs as JSON, such as [["<think>", "</think>"]], or none.'
        )
    return tuple((opening, closing) for opening, closing in pairs)
