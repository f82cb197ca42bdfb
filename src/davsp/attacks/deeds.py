"""The deed that a query asks for: the answer that `deed` wants, and whether an answer names it.

The embedded queries have it in their `group`, "steal the car"; published sets as text in their `context`.
"""

import re

from davsp.embedded.words import pair_of
from davsp.query import Query


def wanted(query: Query, target: str) -> str | None:
    """The answer that does the deed: the target with the request in words behind it, or the whole compliant one of an embedded query.

    Embedded queries have no context; a user's own may have both, and then it says more. None where nobody says what is asked for.
    """
    if context := query.context.strip():
        colon = "" if target.endswith(":") else ":"
        return f"{target}{colon} {context}"
    pair = pair_of(query.group)
    return None if pair is None else pair.steps


def names_deed(query: Query, text: str) -> bool | None:
    """Whether an answer has verb and thing of the request among its words; None where they are not known."""
    pair = pair_of(query.group)
    return None if pair is None else set(pair) <= set(re.findall(r"[a-z]+", text.lower()))
