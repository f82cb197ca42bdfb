"""Who writes AdaShield-A's prompts: the interface, and a model behind a chat server.

For the models that ship a small grammar takes its place: `davsp.embedded.phrases`.
"""

from typing import Any, Protocol, runtime_checkable

from davsp.defenses.adashield_a.wording import VERSION, Proposal, messages, read_proposal
from davsp.errors import DavspError
from davsp.runtime.client import OPENAI, Client, Failure
from davsp.runtime.replies import one_line, told
from davsp.runtime.thought import split_thought

OPENAI_KEY = "OPENAI_API_KEY"


@runtime_checkable
class Defender(Protocol):
    """Writes a new prompt after one that failed."""

    def describe(self) -> dict[str, Any]:
        """All that decides what it writes, as JSON; no key."""
        ...

    def propose(self, scenario: str, prompt: str, output: str, seed: str) -> Proposal:
        """A new prompt in place of `prompt`, under which the LVLM gave `output`; `seed` tells one try from another.

        `scenario` is the category as the benchmark spells it.
        """
        ...


class ChatDefender:
    """A text model behind any server that speaks OpenAI's protocol; a local model is served by vLLM, llama.cpp or Ollama.

    As published: temperature 1, top-p 0.9, at most 500 new tokens, up to five replies until one holds the JSON. The published
    defender is vicuna-13b-v1.5. The LVLM's answers, which may be harmful, go to the server; pictures do not.

    Args:
        model: as the server calls it.
        base_url: up to and with `/v1`; None: OpenAI's.
        api_key_env: the environment variable with the key; None: OPENAI_API_KEY for OpenAI, no key for another server.
        temperature, top_p, max_tokens: of a reply.
        attempts: requests for one prompt at most, those that a server fails included.
        timeout, backoff, trust_env: see `davsp.runtime.client.Client`.

    Raises:
        DavspError: an address that is none or that holds a password; the variable is empty or no key.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key_env: str | None = None,
        *,
        temperature: float = 1.0,
        top_p: float = 0.9,
        max_tokens: int = 500,
        attempts: int = 5,
        timeout: float = 120.0,
        backoff: float = 1.0,
        trust_env: bool = False,
    ) -> None:
        url = base_url or OPENAI
        key = api_key_env or (OPENAI_KEY if url == OPENAI else None)
        self.client = Client(
            "defender", url, key, model,
            concurrency=1, attempts=attempts, timeout=timeout, backoff=backoff, trust_env=trust_env,
        )  # fmt: skip
        self.settings = {"model": model, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}

    def describe(self) -> dict[str, Any]:
        return {"kind": "chat", "server": self.client.where, "wording": VERSION, **self.settings}

    def propose(self, scenario: str, prompt: str, output: str, seed: str) -> Proposal:
        """Ask the server.

        Raises:
            DavspError: no reply that can be read after all attempts; none is made up.
        """
        body = {**self.settings, "messages": messages(scenario, prompt, output)}
        replies: list[Proposal | Failure] = []
        self.client.ask("chat/completions", {"": lambda unread: body}, _read, lambda _, one: replies.append(one))
        (reply,) = replies
        if isinstance(reply, Failure):
            raise DavspError(
                f"the defender gave no prompt after {self.client.attempts} attempts ({reply.reason}); the finished "
                "queries are kept: mend or change the defender and run again"
            )
        return reply


def _read(body: Any) -> Proposal | Failure:
    """The proposal in a reply's JSON."""
    try:
        choice = body["choices"][0]
        text, end = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        return Failure("the defender's server sent a reply without a choice")
    if end == "content_filter":
        return Failure("the defender's content filter cut its reply")
    if end not in ("stop", "length"):
        return Failure(f"the defender's reply was cut ({one_line(str(end))}){told(choice)}")
    return (
        read_proposal(split_thought(text).answer)
        if isinstance(text, str)
        else Failure("the defender's reply holds no text")
    )
