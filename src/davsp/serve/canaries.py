"""Canaries at the upstream: whether the border still has its effect on the model that runs there."""

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from davsp.defenses import Defense, Gate, VisualPrompt
from davsp.defenses.effect import Effect, arms, effect, is_refused
from davsp.errors import DavspError
from davsp.judges.keyword import keyword
from davsp.judges.verdicts import judge_name
from davsp.lvlm.remote import read_answer
from davsp.lvlm.templates import kwargs_of
from davsp.prompts import VisualSafetyPrompt
from davsp.query import Query, Response
from davsp.runtime.client import Failure
from davsp.runtime.thought import split_thought
from davsp.serve.pictures import to_data_url
from davsp.serve.probe import first_model
from davsp.serve.refusals import Refusal
from davsp.serve.settings import ServeSettings
from davsp.serve.upstream import Upstream

AT_ONCE = 4
SECONDS = 120.0
"""For all canaries at the start or at /ready; those without an answer by then are left out."""

AGAIN = (429, 500, 502, 503, 504)
"""Status of an upstream that is asked again for one answer."""

WAITS = (0.5, 2.0)
SILENT = 5.0
"""Seconds after which an upstream that did not answer is asked again."""

NONE = "the prompt has no canaries, so nobody sees whether its border has its effect there; davsp card makes some."
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Report:
    """What was seen.

    Attributes:
        state: whether the border has its effect; unknown also where there is no border, no canary or no key.
        line: the same in words, without any of a query or an answer.
        answers: whether the upstream answers the proxy's clients, as far as that can be seen.
        model: that was asked.
        effect: the counts, if there are some.
    """

    state: Literal["holds", "lost", "unknown"]
    line: str
    answers: bool = True
    model: str | None = None
    effect: Effect | None = None

    def figures(self) -> dict[str, Any]:
        """For /ready."""
        counts = {} if self.effect is None else self.effect.figures()
        return {"effect": self.state, "why": self.line, "model": self.model} | counts


def border_of(defense: Defense) -> VisualSafetyPrompt | None:
    """The border that is all of a defense or of what a gate looks through; a chain shows a model another text than its canaries had."""
    if isinstance(defense, Gate):
        return border_of(defense.inner)
    prompt = defense.prompt if isinstance(defense, VisualPrompt) else None
    return prompt if isinstance(prompt, VisualSafetyPrompt) else None


async def look(
    upstream: Upstream,
    model: str | None,
    border: VisualSafetyPrompt | None,
    seconds: float | None = SECONDS,
    whole: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Ask the canaries of a border, or, without any, whether the upstream is there.

    Args:
        upstream: asked with its own key alone.
        model: as it is called there; None: the first that is listed.
        border: None: the defense is another one.
        seconds: for all; None: no bound.
        whole: the arm without text, too, which tells nothing of the border but stands in `davsp check`'s table.
        progress: called with the number of answers since the last call.
    """
    try:
        if border is None or border.canaries is None:
            await _is_there(upstream)
            return Report(
                "unknown", NONE if border else "the defense is no border alone, so there are no canaries to ask."
            )
        model = model or await first_model(upstream)
        seen = await _seen(upstream, model, border, seconds, whole, progress)
    except Refusal as refusal:
        return _not_asked(refusal, model, upstream.key is not None)
    where = f"the upstream's {model}"
    return Report(
        "holds" if seen.holds else "lost" if seen.known else "unknown", seen.sentence(where), seen.known, model, seen
    )


def _not_asked(refusal: Refusal, model: str | None, has_key: bool) -> Report:
    no_key = refusal.status in (401, 403) and not has_key
    mend = " It wants a key, and the proxy has none of its own (--api-key-env)." if no_key else ""
    return Report("unknown", f"the upstream's canaries could not be asked: {refusal.message}{mend}", no_key, model)


async def _is_there(upstream: Upstream) -> None:
    """Raises Refusal if it does not answer; a server without a list of models, or one that wants a key, is there."""
    status, _, _ = await upstream.ask("GET", "/models", {})
    if status >= 500:
        raise Refusal(502, f"it answered {status}.", "upstream_error")


async def _seen(
    upstream: Upstream,
    model: str,
    border: VisualSafetyPrompt,
    seconds: float | None,
    whole: bool,
    progress: Progress | None,
) -> Effect:
    canaries = border.canaries
    assert canaries is not None
    if canaries.judge != judge_name(keyword):
        raise Refusal(
            500, f"they were chosen by {canaries.judge}, and this davsp judges by {judge_name(keyword)}.", "canaries"
        )
    defenses = arms(border)
    if not whole:
        defenses = {name: defenses[name] for name in list(defenses)[-2:]}
    queries = await asyncio.to_thread(canaries.queries)
    refused: list[dict[str, bool | None]] = [dict.fromkeys(defenses) for _ in queries]
    gate = asyncio.Semaphore(AT_ONCE)

    async def fill(number: int, name: str) -> None:
        async with gate:
            refused[number][name] = await _refused(
                upstream, model, queries[number], defenses[name], canaries.max_new_tokens
            )
        if progress is not None:
            progress(1)

    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await _all([(number, name) for number in range(len(queries)) for name in defenses], fill)
    return effect(queries, refused)


async def _all(places: list[tuple[int, str]], fill: Callable[[int, str], Any]) -> None:
    """All of them, in their order as the gate opens; the first refusal ends the others."""
    tasks = [asyncio.ensure_future(fill(*place)) for place in places]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _refused(upstream: Upstream, model: str, query: Query, defense: VisualPrompt, longest: int) -> bool | None:
    """Whether the upstream refuses one query in one arm; None if it gives no answer.

    Raises:
        Refusal: it cannot be asked.
    """
    body = await asyncio.to_thread(_body, query, defense)
    body |= {"model": model, "max_tokens": longest, "temperature": 0}
    if told := kwargs_of(defense.prompt.template):
        body["chat_template_kwargs"] = told  # as the canaries were chosen
    for wait in (*WAITS, None):
        status, reply, headers = await upstream.ask("POST", "/chat/completions", {}, body)
        if "x-davsp-prompt" in headers:
            raise Refusal(
                502,
                "it is a davsp proxy, which puts its defense before the canaries; name the server behind it.",
                "canaries",
            )
        if status not in AGAIN or wait is None:
            break
        await asyncio.sleep(wait)
    if status != 200:
        if status in AGAIN:
            return None
        raise Refusal(status, f"it answered {status}.", "upstream_error")
    answer = read_answer(reply)
    if isinstance(answer, Failure):
        return None
    split = split_thought(answer.text)
    return is_refused(query, Response(query.id, defense.name, split.answer, cut=answer.cut or split.cut))


def _body(query: Query, defense: VisualPrompt) -> dict[str, Any]:
    (prepared,) = defense.prepare([query])
    picture = prepared.picture()
    assert picture is not None
    parts = [
        {"type": "image_url", "image_url": {"url": to_data_url(picture)}},
        {"type": "text", "text": prepared.question},
    ]
    return {"messages": [{"role": "user", "content": parts}]}


async def at_start(
    settings: ServeSettings, border: VisualSafetyPrompt, progress: Progress | None = None, **options: Any
) -> Report:
    """As `look`, by a connection of its own."""
    upstream = Upstream(settings, options.pop("transport", None))
    try:
        return await look(upstream, settings.model, border, progress=progress, **options)
    finally:
        await upstream.http.aclose()


class Readiness:
    """What `GET /ready` says: asked of the upstream now and then, once for all who ask meanwhile.

    Args:
        upstream, settings: the proxy's.
        border: as for `look`.
        report: of the start, if canaries were asked there.
    """

    def __init__(
        self,
        upstream: Upstream,
        settings: ServeSettings,
        border: VisualSafetyPrompt | None,
        report: Report | None = None,
    ) -> None:
        self.upstream, self.settings, self.border, self.report = upstream, settings, border, report
        self.task: asyncio.Task[Report] | None = None
        self.at = time.monotonic()

    async def __call__(self) -> tuple[bool, Mapping[str, Any]]:
        """Whether the proxy is ready, and the JSON that says why."""
        if self.task is None and (self.report is None or time.monotonic() >= self.at + self._wait(self.report)):
            self.task = asyncio.create_task(self._look())
        task = self.task
        report = await asyncio.shield(task) if task else self.report  # who hangs up does not stop it for the others
        assert report is not None
        ready = report.state == "holds" or (
            report.state == "unknown" and report.answers and not self.settings.require_effect
        )
        age = round(time.monotonic() - self.at, 1)
        return ready, {"ready": ready} | report.figures() | {"seconds_ago": age}

    def _wait(self, report: Report) -> float:
        return self.settings.ready_seconds if report.answers else min(SILENT, self.settings.ready_seconds)

    async def _look(self) -> Report:
        try:
            self.report = await look(self.upstream, self.settings.model, self.border)
            return self.report
        finally:
            self.at, self.task = time.monotonic(), None

    def stop(self) -> None:
        """End what is under way."""
        if self.task is not None:
            self.task.cancel()


def check_required(report: Report | None) -> None:
    """Raises DavspError unless an effect was seen."""
    if report is None or report.state != "holds":
        raise DavspError(f"--require-effect: {report.line if report else NONE}")
