"""What the user did wrong, in one sentence."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class DavspError(Exception):
    """A mistake the user can mend; the message names the file, field or argument and the mend."""


class Interrupted(DavspError):
    """The user stopped a run; the state is on disk and the message says how to go on."""


class Lost(DavspError):
    """Another of the processes that share the work has ended, so this one cannot go on."""


@contextmanager
def refused_as(sentence: Callable[[str, str, Any], str]) -> Iterator[None]:
    """Around the making of a pydantic model: its first complaint becomes a DavspError.

    Args:
        sentence: makes the message of the field ("a.b" for a nested one, "" for the whole), pydantic's reason and the value.

    Raises:
        DavspError: pydantic refuses a value.
    """
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        raise DavspError(sentence(".".join(map(str, first["loc"])), first["msg"], first["input"])) from error


def words_of(error: BaseException) -> str:
    """What a library says of its error, in one line: all of it, as the first of its lines is often a heading.

    A `KeyError` says the key alone, so its name stands before it.
    """
    words = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):
        words = f"KeyError: {words}"
    return words[:600].rstrip(" .:")
