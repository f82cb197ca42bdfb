"""An LVLM that runs elsewhere: behind a vLLM or SGLang server, asked by OpenAI's protocol.

It answers, and no more: a server gives no gradients, and hidden states only where it writes them (`davsp.lvlm.states_served`). Pictures go as lossless PNG in the request; the
server resizes them as its model's processor does.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from davsp.errors import DavspError
from davsp.lvlm.answering import NO_STATES, Answer, Token, answer_length, check_square
from davsp.lvlm.hooks import Steer
from davsp.lvlm.templates import named
from davsp.query import Question, as_text, flatten, turns_of
from davsp.runtime.client import Client, Failure
from davsp.runtime.pictures import part, png
from davsp.runtime.replies import one_line, told, writable
from davsp.runtime.thought import TAGS, Tags

if TYPE_CHECKING:
    from davsp.lvlm.states_served import ServedStates

OWN = frozenset(
    "model messages max_tokens max_completion_tokens temperature top_p repetition_penalty chat_template_kwargs logprobs top_logprobs n "
    "stream stream_options".split()
)
"""Fields of a request that decide what is asked and how an answer is read."""


class RemoteLVLM:
    """A served model, an `AnsweringLVLM`. What only a loaded one has (weights, tokenizer, layers, gradients) is not there.

    Args:
        model: as the server calls it.
        base_url: up to and with `/v1`; of several servers of the same model each gets as many of the questions.
        api_key_env: the environment variable with the key; None sends none.
        canvas: side in pixels at which the model sees a picture without resampling (336 for LLaVA-1.5); only visual
            prompts need it, and without it they are refused.
        template_kwargs: what the server's template is told, as `chat_template_kwargs` (vLLM, SGLang); nobody sees here whether it reads them.
        extra_body: fields that every request has besides, as the server takes them; another model in all records.
        concurrency: requests under way at most, at each server; fewer where the server is crowded (`davsp.runtime.limit`).
        attempts: requests for one answer at most.
        timeout: of a request as a whole, in seconds.
        backoff: the first wait before asking again, in seconds; it doubles.
        trust_env: through the proxies that the environment names; otherwise directly.
        served: where it writes hidden states of every prompt; None: it does not.

    Raises:
        DavspError: an address that is none, holds a password or is there twice; an empty variable; a field of `extra_body` that is
            davsp's own.
    """

    def __init__(
        self,
        model: str,
        base_url: str | Sequence[str],
        api_key_env: str | None = None,
        *,
        canvas: int | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        concurrency: int = 16,
        attempts: int = 6,
        timeout: float = 600.0,
        backoff: float = 1.0,
        trust_env: bool = False,
        served: "ServedStates | None" = None,
    ) -> None:
        addresses = [base_url] if isinstance(base_url, str) else list(base_url)
        self.clients = [
            Client(
                "model", address, api_key_env, model,
                concurrency=concurrency, attempts=attempts, timeout=timeout, backoff=backoff, trust_env=trust_env,
            )
            for address in addresses
        ]  # fmt: skip
        where = sorted(client.where for client in self.clients)
        if twice := next((one for one in where if where.count(one) > 1), None):
            raise DavspError(f"the model's server {twice} is named twice (--base-url); name each once.")
        self.extra_body = dict(extra_body or {})
        if own := sorted(OWN & set(self.extra_body)):
            raise DavspError(
                f"--extra-body {own[0]} is a field that davsp sets itself; leave it out, or see whether an option is meant for it."
            )
        self.model_id, self.canvas, self.served = model, canvas or 0, served
        self.revision: str | None = None
        self.template_kwargs = dict(template_kwargs or {})
        self.template = named(self.template_kwargs)
        self.server: str | None = ", ".join(where)
        self.reasoning_tags: Tags = TAGS
        self.longest = answer_length(shipped=False)  # if one of ours runs there, the caller may say so

    def check_canvas(self, height: int, width: int) -> None:
        """Raises DavspError unless `canvas` was given and is this size: a server's own resampling would blur a border."""
        if not self.canvas:
            raise DavspError(
                f"the server does not say at what size {self.model_id} sees pictures; give its canvas (--canvas), so "
                "that no visual prompt is resampled in silence."
            )
        check_square(self, height, width)

    def preprocess(self, images: list[Image.Image]) -> list[bytes]:
        """Each picture as a PNG of its own size, no pixel changed."""
        return [png(flatten(image)) for image in images]

    def generate(
        self,
        canvas: list[bytes] | None,
        questions: Sequence[Question],
        max_new_tokens: int | None = None,
        steer: tuple[int, Tensor] | Steer | None = None,
    ) -> list[str]:
        """Greedy answers, in the order of the questions; as here, an answer is cut at `max_new_tokens` (None: `longest`).

        Raises:
            DavspError: no answer came after all attempts, or it was filtered; none is made up.
        """
        if steer is not None:
            raise DavspError(NO_STATES)
        return [answer.text for answer in self.ask(canvas, questions, max_new_tokens)]

    def ask(
        self, canvas: list[bytes] | None, questions: Sequence[Question], max_new_tokens: int | None = None
    ) -> list[Answer]:
        """As `generate`, with the prompt tokens that the server counted; it does not tell which of them are a picture's."""
        return self._asked(canvas, questions, max_new_tokens or self.longest, {})

    def likely(
        self, canvas: list[bytes] | None, questions: Sequence[Question], max_new_tokens: int, top: int
    ) -> list[Answer]:
        """As `ask`, with the tokens as far as the server tells them; there are none of an answer where it does not."""
        return self._asked(canvas, questions, max_new_tokens, {"logprobs": True, "top_logprobs": top})

    def _asked(
        self, canvas: list[bytes] | None, questions: Sequence[Question], max_new_tokens: int, more: dict[str, Any]
    ) -> list[Answer]:
        if canvas is not None and len(canvas) != len(questions):
            raise ValueError(f"{len(canvas)} pictures for {len(questions)} questions")
        bodies = {
            str(i): self._body(question, None if canvas is None else canvas[i], max_new_tokens) | more
            for i, question in enumerate(questions)
        }
        answers: dict[str, Answer] = {}
        written: dict[str, Any] = {}
        served = self.served

        def keep(key: str, read: tuple[Answer, Any] | Failure) -> None:
            if isinstance(read, Failure):
                raise DavspError(
                    f"the model's server gave no answer to {as_text(questions[int(key)])[:60]!r} ({read.reason}); "
                    "mend the server and run again to go on."
                )
            answers[key], written[key] = read

        def body(key: str, unread: int) -> dict[str, Any]:
            return bodies[key]

        requests = {key: partial(body, key) for key in bodies}
        try:
            Client.ask_several(self.clients, "chat/completions", requests, _answer_and_written, keep)
            if served is not None:
                for key, answer in answers.items():
                    states = served.read(written.pop(key), answer.prompt_tokens)
                    answers[key] = answer._replace(states=dict(zip(served.layers, states, strict=True)))
        finally:
            if served is not None:
                for named in written.values():  # after an error
                    served.drop(named)
        return [answers[key] for key in bodies]

    @property
    def readable(self) -> Sequence[int]:
        """The layers whose states the server writes."""
        return () if self.served is None else self.served.layers

    def states(
        self, canvas: list[bytes] | None, questions: Sequence[str], layers: Sequence[int]
    ) -> Float[Tensor, "b l d"]:
        """Hidden state of the last prompt token at each of `layers`, float32, as the server has written it.

        Raises:
            DavspError: it writes none, or not those; as `ServedStates.read`.
        """
        if self.served is None:
            raise DavspError(NO_STATES)
        if missing := set(layers) - set(self.readable):
            raise DavspError(
                f"the server does not write layer {min(missing)}; start it with that one, too, and name it (--states-layers)."
            )
        found = [answer.states or {} for answer in self.ask(canvas, questions, 1)]
        return torch.stack([torch.stack([of_one[layer] for layer in layers]) for of_one in found])

    def step(self, *_: Any, **__: Any) -> NoReturn:
        """Raises DavspError: a server gives no gradient."""
        raise DavspError(NO_STATES)

    def steered(self, steer: Steer) -> NoReturn:
        """Raises DavspError: what a server does not give cannot be changed."""
        raise DavspError(NO_STATES)

    def _body(self, question: Question, picture: bytes | None, max_new_tokens: int) -> dict[str, Any]:
        """Greedy, as `LVLM.generate`: a server would else take sampling and penalties from the checkpoint's settings."""
        messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in turns_of(question)]
        if picture is not None:
            messages[0]["content"] = [part(picture), {"type": "text", "text": messages[0]["content"]}]
        told = {"chat_template_kwargs": self.template_kwargs} if self.template_kwargs else {}
        body = {"model": self.model_id, "messages": messages, "max_tokens": max_new_tokens}
        return body | {"temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0} | told | self.extra_body


def _answer_and_written(body: Any) -> tuple[Answer, Any] | Failure:
    """The answer, and what the reply says of the hidden states that it has written."""
    answer = read_answer(body)
    return answer if isinstance(answer, Failure) else (answer, body.get("kv_transfer_params"))


def read_answer(body: Any) -> Answer | Failure:
    """The answer in a reply: ended by the model, or cut at the length that was asked for.

    What the server tells apart as reasoning is no part of it. A reply that was cut before it held any text is an answer that is
    cut: a server that hides the reasoning spends tokens on it, too.
    """
    try:
        choice = body["choices"][0]
        message, end = choice["message"], choice["finish_reason"]
        text, thought = message["content"], message.get("reasoning_content") or message.get("reasoning")
    except (KeyError, IndexError, TypeError, AttributeError):
        return Failure("its reply holds no answer")
    if end == "content_filter":
        return Failure("its content filter cut the answer")
    if end not in ("stop", "length"):
        return Failure(f"its answer ended by {one_line(repr(end))}{told(choice)}")
    thought = writable(thought) if isinstance(thought, str) else ""
    if text is None and (thought or end == "length"):
        text = ""
    if not isinstance(text, str):
        return Failure(f"its reply holds no text, finish_reason {end!r}")
    usage = body.get("usage")
    counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    cut = end == "length" and not text.strip()
    counted = counted if isinstance(counted, int) else None
    return Answer(writable(text), counted, None, thought, cut, finish=end, tokens=_tokens(choice.get("logprobs")))


def _tokens(logprobs: Any) -> tuple[Token, ...]:
    """The tokens that a reply tells, as OpenAI has them; () if it tells none."""
    try:
        return tuple(Token(*_pair(one), tuple(map(_pair, one["top_logprobs"]))) for one in logprobs["content"])
    except (KeyError, TypeError, ValueError):
        return ()


def _pair(one: Any) -> tuple[str, float]:
    text, logprob = one["token"], float(one["logprob"])
    if not isinstance(text, str) or not logprob <= 1e-3:  # above 0 by rounding
        raise ValueError
    return text, min(logprob, 0.0)
