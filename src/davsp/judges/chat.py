"""A judge behind any server that speaks OpenAI's protocol: hosted services, vLLM, SGLang, llama.cpp, Ollama.

What is not a label is unscored, never guessed: errors, time-outs, cut or filtered replies, refusals and prose are
asked for again a few times, with back-off (`davsp.runtime.client`), and then given up.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from rich.console import Console

from davsp.judges.base import Keep, PromptJudge, read_reply
from davsp.judges.cache import Ruling, VerdictCache
from davsp.judges.prompts import JudgePrompt
from davsp.query import Query
from davsp.runtime.client import OPENAI, Client, Failure
from davsp.runtime.replies import one_line, told
from davsp.runtime.thought import TAGS, Tags


class ChatJudge(PromptJudge):
    """A judge asked over HTTP.

    Args:
        prompt: one of `davsp.judges.prompts.CHAT` or `davsp.judges.guard.GUARDS`.
        model: as the server calls it.
        base_url, api_key_env, concurrency, attempts, timeout, backoff, trust_env: see `davsp.runtime.client.Client`.
        temperature, cache, console, runs, max_tokens, reasoning_tags: see `PromptJudge`.

    Raises:
        DavspError: an address that is none or that holds a password; the variable is empty or no key.
    """

    def __init__(
        self,
        prompt: JudgePrompt,
        model: str,
        base_url: str = OPENAI,
        api_key_env: str | None = None,
        *,
        cache: VerdictCache | None = None,
        concurrency: int = 8,
        attempts: int = 6,
        timeout: float = 60.0,
        backoff: float = 1.0,
        temperature: float | None = None,
        console: Console | None = None,
        runs: int = 1,
        max_tokens: int | None = None,
        reasoning_tags: Tags = TAGS,
        trust_env: bool = False,
    ) -> None:
        self.client = Client(
            "judge", base_url, api_key_env, model,
            concurrency=concurrency, attempts=attempts, timeout=timeout, backoff=backoff, trust_env=trust_env,
        )  # fmt: skip
        super().__init__(
            prompt, model, self.client.where, temperature, cache, console, runs, max_tokens, reasoning_tags
        )

    def _ask(self, pending: Mapping[str, tuple[Query, str]], keep: Keep) -> None:
        def keep_reading(key: str, reading: Ruling | Failure) -> None:
            keep(key, Ruling("unscored", reading.reason, reading.raw) if isinstance(reading, Failure) else reading)

        path = "completions" if self.prompt.plain else "chat/completions"
        self.client.ask(
            path, {key: partial(self._request, *one) for key, one in pending.items()}, self._read, keep_reading
        )

    def _request(self, query: Query, answer: str, unread: int) -> dict[str, Any]:
        """The body to send after `unread` replies that could not be read."""
        messages = self.prompt.messages(query, answer, unread)
        content = {"prompt": messages[0]["content"]} if self.prompt.plain else {"messages": messages}
        return {
            "model": self.model,
            "temperature": self.temperatures[min(unread, len(self.temperatures) - 1)],
            "max_tokens": self.max_tokens,
        } | content

    def _read(self, body: Any) -> Ruling | Failure:
        """The verdict in a reply's JSON: in its one choice, which the model ended itself."""
        try:
            (choice,) = body["choices"]
            message = choice if self.prompt.plain else choice["message"]
            text, refusal = message["text" if self.prompt.plain else "content"], message.get("refusal")
            end = choice.get("finish_reason")
        except (KeyError, TypeError, ValueError, AttributeError):
            return Failure("the judge's server sent a reply without a choice, or with several")
        raw = text if isinstance(text, str) else ""
        if refusal:
            return Failure("the judge refuses", str(refusal))
        if end not in ("stop", "length"):
            return Failure(f"the judge's reply was cut ({one_line(str(end))}){told(choice)}", raw)
        ruling = read_reply(self.prompt, raw, self.reasoning_tags, end)
        return Failure(ruling.reason, ruling.raw) if ruling.label == "unscored" else ruling
