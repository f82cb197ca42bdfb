"""Defenses that ask the model more than once (ECSO, adaptive): their calls go to the upstream, and the last answer to the client.

They are defined for one question with at most one picture, answered greedily; a system message stands before each of their
calls (INFERRED). Whatever else a request holds is refused, as no paper says what they would make of it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

from PIL import Image

from davsp.defenses import Chain, Defense
from davsp.lvlm import Answer
from davsp.lvlm.remote import RemoteLVLM, read_answer
from davsp.query import Query, Question
from davsp.runtime.client import Failure
from davsp.serve.messages import without_pictures
from davsp.serve.refusals import Refusal, bad
from davsp.serve.replies import Completion
from davsp.serve.sweep import sweep

Post = Callable[[dict[str, Any]], Awaitable[tuple[int, Any]]]
FIELDS = {
    "model", "messages", "max_tokens", "max_completion_tokens", "stream", "stream_options", "temperature", "top_p", "n",
    "seed", "user", "metadata", "store",
}  # fmt: skip
GREEDY = {"temperature": (0,), "n": (1,), "stream": (True, False)}


def asks_once(defense: Defense) -> bool:
    """Whether it only changes the input, so that any request can pass."""
    if isinstance(defense, Chain):
        return all(map(asks_once, defense.defenses))
    return type(defense).respond is Defense.respond


class UpstreamLVLM(RemoteLVLM):
    """The upstream's model as one request asks it; each call goes through `post` on the proxy's loop.

    Args:
        body: the request.
        before: system messages that stand before every question.
        url: the upstream.
        canvas: as in `RemoteLVLM`.
        post: sends a body, gives status and JSON.
    """

    def __init__(
        self, body: dict[str, Any], before: list[dict[str, Any]], url: str, canvas: int | None, post: Post
    ) -> None:
        super().__init__(body["model"], url, canvas=canvas)
        self.more = {name: body[name] for name in ("seed", "user") if name in body}
        self.before, self.post, self.loop = before, post, asyncio.get_running_loop()
        self.reasoning_tags = ()  # what the model says is the client's
        self.usage: dict[str, int] | None = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        self.stopped = False
        self.asked: Future[tuple[int, Any]] | None = None

    def stop(self) -> None:
        """Ask no more, and let go of what is asked."""
        self.stopped = True
        if self.asked is not None:
            self.asked.cancel()

    def ask(
        self, canvas: list[bytes] | None, questions: Sequence[Question], max_new_tokens: int | None = None
    ) -> list[Answer]:
        """One after the other: it is one request's questions.

        Raises:
            Refusal: the upstream gives no answer.
        """
        pictures: Sequence[bytes | None] = canvas or [None] * len(questions)
        return [
            self._ask(question, picture, max_new_tokens or self.longest)
            for question, picture in zip(questions, pictures, strict=True)
        ]

    def _ask(self, question: Question, picture: bytes | None, max_new_tokens: int) -> Answer:
        body = self._body(question, picture, max_new_tokens) | self.more
        body["messages"] = [*self.before, *body["messages"]]
        sweep(body | {"messages": without_pictures(body["messages"])})  # the model's own words stand in it, too
        if self.stopped:
            raise CancelledError
        self.asked = asyncio.run_coroutine_threadsafe(_await(self.post(body)), self.loop)
        if self.stopped:  # meanwhile
            self.asked.cancel()
        status, reply = self.asked.result()
        if status != 200:
            raise Refusal(status if 400 <= status < 600 else 502, f"the upstream answered {status}.", "upstream_error")
        answer = read_answer(reply)
        if isinstance(answer, Answer) and answer.cut:
            answer = Failure("it was cut before there was any; a model that thinks needs a higher max_tokens")
        if isinstance(answer, Failure):
            raise Refusal(502, f"the upstream gave no answer: {answer.reason}.", "upstream_error")
        self._count(reply.get("usage"))
        return answer

    def _count(self, usage: Any) -> None:
        counts = usage if isinstance(usage, dict) else {}
        if self.usage is not None and all(isinstance(counts.get(name), int) for name in self.usage):
            self.usage = {name: was + counts[name] for name, was in self.usage.items()}
        else:
            self.usage = None


async def _await(work: Awaitable[tuple[int, Any]]) -> tuple[int, Any]:
    return await work


def split(body: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """System messages and the question of a request.

    Raises:
        Refusal: it holds more than one question, more than one picture, or a field that these defenses do not know.
    """
    for field in sorted(body.keys() - FIELDS):
        raise bad(f"{field} is not defined for a defense that asks more than once; leave it out.", "field", field)
    for field, known in GREEDY.items():
        if body.get(field) is not None and body[field] not in known:
            raise bad(f"{field} must be {known[0]} or left out: this defense's answers are greedy.", "field", field)
    *before, last = body["messages"]
    instructions = [
        message
        for message in before
        if message["role"] in ("system", "developer") and isinstance(message["content"], str)
    ]
    if last["role"] != "user" or len(instructions) != len(before) or last.keys() - {"role", "content"}:
        raise bad(
            "this defense takes one question of a user, and texts of role system before it.", "messages", "messages"
        )
    content = last["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if sum(part["type"] == "image_url" for part in parts) > 1:
        raise bad("this defense takes one picture.", "several_pictures", "messages")
    return before, "\n".join(part["text"] for part in parts if part["type"] == "text")


def longest(body: dict[str, Any], otherwise: int) -> int:
    """The most tokens that a request lets an answer have.

    Raises:
        Refusal: no whole number above 0.
    """
    for field in ("max_output_tokens", "max_completion_tokens", "max_tokens"):
        value = body.get(field)
        if value is not None:
            if type(value) is not int or value < 1:
                raise bad(f"{field} must be a whole number above 0.", param=field)
            return value
    return otherwise


def answer(
    defense: Defense, lvlm: UpstreamLVLM, question: str, picture: Image.Image | None, max_new_tokens: int
) -> Completion:
    """Ask as often as the defense does. Runs in a thread, while the loop of `lvlm` goes on.

    Raises:
        Refusal, DavspError: there is no answer; none is made up.
    """
    query = Query("", question, "benign", "", image=picture)
    (response,) = defense.respond(lvlm, [query], max_new_tokens=max_new_tokens)
    return Completion(response.text, response.finish or "stop", lvlm.usage)
