"""The deed that a query asks for: the answer that `deed` wants, and whether an answer names it.

The embedded queries have it in their `group`, "steal the car"; published sets as text in their `context`.
"""

import re

from davsp.embedded.words import pair_of
from davsp.query import Query


def wanted(query: Query, target: str) -> str | None:
    """The answer that does the deed: the whole compliant one of an embedded query, else the target with the request in words behind it.

    None where nobody says what is asked for.
    """
    if pair := pair_of(query.group):
        return pair.steps
    colon = "" if target.endswith(":") else ":"
    return f"{target}{colon} {query.context.strip()}" if query.context.strip() else None


def names_deed(query: Query, text: str) -> bool | None:
    """Whether an answer has verb and thing of the request among its words; None where they are not known."""
    pair = pair_of(query.group)
    return None if pair is None else set(pair) <= set(re.findall(r"[a-z]+", text.lower()))
