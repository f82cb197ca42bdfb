"""A judge behind any server that speaks OpenAI's protocol: hosted services, vLLM, SGLang, llama.cpp, Ollama.

What is not a label is unscored, never guessed: errors, time-outs, cut or filtered replies, refusals and prose are
asked for again a few times, with back-off (`davsp.runtime.client`), and then given up.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from rich.console import Console

from davsp.errors import DavspError
from davsp.judges.base import Keep, PromptJudge, read_reply
from davsp.judges.cache import Ruling, VerdictCache
from davsp.judges.prompts import JudgePrompt
from davsp.judges.seeing import drawn, number, sight
from davsp.query import Query
from davsp.runtime.client import OPENAI, Client, Failure
from davsp.runtime.pictures import part, png
from davsp.runtime.replies import one_line, told
from davsp.runtime.thought import TAGS, Tags


class ChatJudge(PromptJudge):
    """A judge asked over HTTP.

    Args:
        prompt: one of `davsp.judges.prompts.CHAT` or `davsp.judges.guard.GUARDS`; `davsp.judges.seeing.seeing` of the former
            shows the picture, as PNG of its own size.
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
        self.sees = False
        """Whether the model has read a picture; asked once, when the first one is to be judged."""
        super().__init__(
            prompt, model, self.client.where, temperature, cache, console, runs, max_tokens, reasoning_tags
        )

    def _ask(self, pending: Mapping[str, tuple[Query, str]], keep: Keep) -> None:
        def keep_reading(key: str, reading: Ruling | Failure) -> None:
            keep(key, Ruling("unscored", reading.reason, reading.raw) if isinstance(reading, Failure) else reading)

        if self.prompt.picture and not self.sees and any(query.image is not None for query, _ in pending.values()):
            self._check_sight()
        path = "completions" if self.prompt.plain else "chat/completions"
        bodies = {key: partial(self._request, self.prompt, *one) for key, one in pending.items()}
        self.client.ask(path, bodies, partial(self._read, self.prompt), keep_reading)

    def _check_sight(self) -> None:
        """Raise DavspError unless the model reads a number in a picture: a server may refuse pictures, or drop them in silence."""
        digits = number()
        prompt, query = sight(digits), Query("sight", "", "benign", "", image=drawn(digits))
        found: list[Ruling | Failure] = []
        body = partial(self._request, prompt, query, "")
        self.client.ask(
            "chat/completions", {"sight": body}, partial(self._read, prompt), lambda _, reading: found.append(reading)
        )
        (reading,) = found
        if isinstance(reading, Failure):
            raise DavspError(
                f"the judge {self.model} at {self.client.where} does not show that it sees pictures ({reading.reason}); "
                "give a model that does, or leave --judge-sees out."
            )
        self.sees = True

    def _request(self, prompt: JudgePrompt, query: Query, answer: str, unread: int) -> dict[str, Any]:
        """The body to send after `unread` replies that could not be read."""
        messages: list[dict[str, Any]] = [dict(message) for message in prompt.messages(query, answer, unread)]
        picture = query.picture() if prompt.picture else None
        if picture is not None:
            messages[-1]["content"] = [part(png(picture)), {"type": "text", "text": messages[-1]["content"]}]
        content = {"prompt": messages[0]["content"]} if prompt.plain else {"messages": messages}
        return {
            "model": self.model,
            "temperature": self.temperatures[min(unread, len(self.temperatures) - 1)],
            "max_tokens": self.max_tokens,
        } | content

    def _read(self, prompt: JudgePrompt, body: Any) -> Ruling | Failure:
        """The verdict in a reply's JSON: in its one choice, which the model ended itself."""
        try:
            (choice,) = body["choices"]
            message = choice if prompt.plain else choice["message"]
            text, refusal = message["text" if prompt.plain else "content"], message.get("refusal")
            end = choice.get("finish_reason")
        except (KeyError, TypeError, ValueError, AttributeError):
            return Failure("the judge's server sent a reply without a choice, or with several")
        raw = text if isinstance(text, str) else ""
        if refusal:
            return Failure("the judge refuses", str(refusal))
        if end not in ("stop", "length"):
            return Failure(f"the judge's reply was cut ({one_line(str(end))}){told(choice)}", raw)
        ruling = read_reply(prompt, raw, self.reasoning_tags, end)
        return Failure(ruling.reason, ruling.raw) if ruling.label == "unscored" else ruling
