"""The keys of servers: read from the environment variable that is named, and never shown."""

import os
import re

from davsp.errors import DavspError

_SURELY_A_NAME = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+")


def read(variable: str | None, whose: str) -> str | None:
    """The key in an environment variable.

    Args:
        variable: its name; None has no key.
        whose: "judge" or "model", for messages.

    Raises:
        DavspError: the variable is empty or holds no key. What could itself be a key, given in place of the variable's name, is
            not repeated.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if key and key.isascii() and key.isprintable():
        return key
    if key:
        raise DavspError(f"what is in the environment variable {variable} is no key: it holds odd characters.")
    if _SURELY_A_NAME.fullmatch(variable):
        raise DavspError(f"the environment variable {variable} is empty; put the {whose}'s key there.")
    raise DavspError(
        f"there is no environment variable of the name that was given for the {whose}'s key, which is not repeated as it "
        "might be the key; put the key into a variable and give that one's name, such as MY_KEY."
    )
