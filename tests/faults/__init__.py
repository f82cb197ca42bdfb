"""Faults on purpose, drawn by seed: what davsp promises of inputs that nobody wrote by hand (`make faults`).

Each part is a module with `run(seed, count)`. It draws its inputs, sends them, and looks at what comes out by rules of its own, not by
the code that it tests. `python -m faults` runs them all and writes docs/reliability.md; the suite runs each in small.
"""

from collections import Counter
from dataclasses import dataclass, field

import httpx2

from proxy import Client


@dataclass
class Seen:
    """What a part saw.

    Attributes:
        tried: inputs.
        outcomes: what came of them -> how often.
        broken: a promise that did not hold, each with its input; none is what is wanted.
    """

    tried: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)


def session(caller: Client) -> httpx2.AsyncClient:
    """A client of a proxy in this process, for many requests one after the other."""
    transport = httpx2.ASGITransport(caller.proxy.app)
    return httpx2.AsyncClient(transport=transport, base_url="http://localhost:8100")


def shapeless(response: httpx2.Response) -> str:
    """What is wrong with a refusal; empty if it is a 4xx or 5xx in OpenAI's shape."""
    try:
        error = response.json()["error"]
        right = set(response.json()) == {"error"} and set(error) == {"message", "type", "param", "code"}
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} without an error in OpenAI's shape"
    if not right or not error["message"] or response.status_code < 400:
        return f"{response.status_code} with an odd error {sorted(error)}"
    return "the proxy's own code failed" if error["code"] == "internal" else ""
