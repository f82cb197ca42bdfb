"""`/v1/responses` end to end: the `openai` client, `davsp serve`, `davsp serve-model`, and the answers of `davsp eval`."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from davsp import LVLM, Query, VisualSafetyPrompt, embedded
from davsp.defenses import ECSO, NoDefense, VisualPrompt
from davsp.embedded.data import Protocol
from davsp.embedded.ecso_templates import TEMPLATES
from davsp.serve.app import HASH, Proxy
from davsp.serve.model import PIXELS, model_app, pixels_hash
from davsp.serve.settings import ServeSettings
from proxy import data_url, image_part, listening, text_part, user
from response_items import image, message, text

TOKENS = 12


@pytest.fixture(scope="module")
def prompt(mini: LVLM) -> VisualSafetyPrompt:
    return VisualSafetyPrompt.create(mini.canvas, embedded.PADDING, "random", text=embedded.SAFETY_TEXT).quantised()


@pytest.fixture(scope="module")
def eval_queries(protocol: Protocol) -> list[Query]:
    return [*protocol.test[::160], Query("w", "what colour is the car ?", "benign", "utility")]


@pytest.fixture(scope="module")
def want(mini: LVLM, prompt: VisualSafetyPrompt, eval_queries: list[Query]) -> list[str]:
    """The defended answers, as `davsp eval` has them."""
    defense = VisualPrompt(prompt)
    return [response.text for response in defense.respond(mini, eval_queries, max_new_tokens=TOKENS)]


@pytest.fixture(scope="module")
def served(mini: LVLM, prompt: VisualSafetyPrompt) -> Iterator[tuple[str, str, str]]:
    """Addresses of model and proxy, and the model's name at the proxy."""
    with listening(model_app(mini, "davsp-mini", ServeSettings.of(upstream="http://u/v1"))) as model:
        proxy = Proxy(VisualPrompt(prompt), ServeSettings.of(upstream=model, canvas=mini.canvas))
        with listening(proxy.app) as url:
            yield model, url, "davsp-mini" + proxy.suffix


def question_of(query: Query) -> Any:
    shown = query.picture()
    return query.question if shown is None else [message(image(data_url(shown)), text(query.question))]


def options(name: str, query: Query) -> dict[str, Any]:
    return {"model": name, "input": question_of(query), "max_output_tokens": TOKENS, "temperature": 0}


def test_openai_client_gets_the_answers_of_eval(served, mini, prompt, eval_queries, want):
    _, url, name = served
    undefended = NoDefense().respond(mini, eval_queries, max_new_tokens=TOKENS)
    assert len(set(want)) > 2 and want != [response.text for response in undefended]
    with openai.OpenAI(base_url=url, api_key="none") as one:
        raw = [one.responses.with_raw_response.create(**options(name, query)) for query in eval_queries]
        answers = [reply.parse() for reply in raw]
        assert [answer.output_text for answer in answers] == want
        canvas = VisualPrompt(prompt).prepare(eval_queries[:1])[0].image
        assert raw[0].headers[PIXELS] == pixels_hash(canvas) and raw[0].headers[HASH] == VisualPrompt(prompt).sha256()
        assert answers[0].status == "completed" and answers[0].usage.input_tokens > 144
        chat = one.chat.completions.create(
            model=name, messages=[user(image_part(data_url(eval_queries[0].picture())), text_part(eval_queries[0].question))], max_tokens=TOKENS
        )  # fmt: skip
        assert chat.choices[0].message.content == want[0] and chat.usage.prompt_tokens == answers[0].usage.input_tokens
        with pytest.raises(openai.BadRequestError, match="one message of role user"):  # the upstream's own words
            one.responses.create(
                model=name,
                input=[*question_of(eval_queries[0]), *answers[0].output, {"role": "user", "content": "why"}],
            )
        with pytest.raises(openai.BadRequestError, match="previous_response_id stands for messages"):
            one.responses.create(model=name, input="why", previous_response_id=answers[0].id)
        with pytest.raises(openai.NotFoundError, match="is not served"):
            one.responses.retrieve(answers[0].id)


def test_a_stream_has_the_events_of_the_protocol(served, eval_queries, want):
    _, url, name = served
    with openai.OpenAI(base_url=url, api_key="none") as one:
        events = list(one.responses.create(**options(name, eval_queries[0]), stream=True))
        with one.responses.stream(**options(name, eval_queries[0])) as stream:
            assert stream.get_final_response().output_text == want[0]
    deltas = len(want[0].split(" "))
    assert [event.type.removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * deltas, "output_text.done",
        "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == want[0]
    assert events[0].response.status == "in_progress" and not events[0].response.output
    done = events[-1].response
    assert done.status == "completed" and done.output_text == want[0] and done.usage.output_tokens > 0
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {done.output[0].id}


def test_an_answer_that_is_cut_says_so(served, eval_queries):
    _, url, name = served
    with openai.OpenAI(base_url=url, api_key="none") as one:
        short = options(name, eval_queries[0]) | {"max_output_tokens": 1}
        answer = one.responses.create(**short)
        (*_, last) = one.responses.create(**short, stream=True)
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert last.type == "response.incomplete" and last.response.output[0].status == "incomplete"


def test_async_client(served, eval_queries, want):
    _, url, name = served

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none") as one:
            answers = await asyncio.gather(*(one.responses.create(**options(name, q)) for q in eval_queries[-2:]))
            stream = await one.responses.create(**options(name, eval_queries[0]), stream=True)
            events = [event async for event in stream]
            return [*(answer.output_text for answer in answers), events[-1].response.output_text]

    assert asyncio.run(ask()) == [*want[-2:], want[0]]


def test_ecso_before_a_served_model_points_to_chat_completions(served, mini):
    proxy = Proxy(ECSO(templates=TEMPLATES), ServeSettings.of(upstream=served[0], canvas=mini.canvas))
    with (
        listening(proxy.app) as url,
        openai.OpenAI(base_url=url, api_key="none", max_retries=0) as one,
        pytest.raises(openai.InternalServerError, match="asks the model more than once"),
    ):
        one.responses.create(model="davsp-mini" + proxy.suffix, input="q")
