"""`/v1/responses`: defended as chat completions are and sent on as it is; the upstream's errors and streams pass."""

import json

import httpx2
import openai
import pytest

from davsp.defenses import SafetyText
from davsp.serve.app import HASH, Proxy
from davsp.serve.settings import ServeSettings
from proxy import (
    RED,
    TEXT,
    Events,
    Upstream,
    border,
    client,
    data_url,
    image_part,
    listening,
    picture_of,
    text_part,
    user,
)
from response_items import ANSWER, CALL, OUTPUT, THOUGHT, asking, image, message, output, text
from tiny import picture


@pytest.mark.parametrize("defense", [border(), SafetyText("S", placement="suffix")])
def test_pixels_and_texts_are_those_of_chat_completions(defense):
    responses, chat, url = client(defense), client(defense), data_url(picture(1, (90, 40)))
    answer = asking(responses, [message(text("what"), image(url, detail="high"), text("is this"))], temperature=0)
    chat.post(user(text_part("what"), image_part(url), text_part("is this")))
    assert answer.json() == ANSWER and answer.headers[HASH] == responses.proxy.hash
    assert responses.upstream.requests[0].url.path == "/v1/responses"
    sent, want = responses.upstream.bodies[0], chat.sent()[0]["content"]
    assert (sent["model"], sent["temperature"], set(sent)) == ("m", 0, {"model", "input", "temperature"})
    assert sent["input"] == [
        message(text(want[0]["text"]), image(want[1]["image_url"]["url"], detail="high"), text(want[2]["text"]))
    ]


def test_a_text_is_a_question():
    caller = client()
    assert asking(caller, "what is this", instructions="be brief").status_code == 200
    assert caller.upstream.bodies[0]["input"] == f"{TEXT} what is this"
    assert caller.upstream.bodies[0]["instructions"] == "be brief"
    passing = client(image_free="pass")
    asking(passing, "q")
    assert passing.upstream.bodies[0]["input"] == "q"


def test_every_picture_of_every_item_in_its_place():
    caller, pictures = client(), [picture(seed, (30 + seed, 40)) for seed in range(3)]
    urls = [data_url(one) for one in pictures]
    items = [
        message(image(urls[0]), text("a system's"), role="developer", type="message"),
        message(text("first"), image(urls[1]), type="message", status="completed"),
        THOUGHT, CALL, OUTPUT,
        message(output("done"), {"type": "refusal", "refusal": "no"}, role="assistant", id="msg_1", status="incomplete", phase=None),
        {"role": "assistant", "content": "words"},
        message(image(urls[2])),
    ]  # fmt: skip
    tools = [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}]
    fields = {
        "tools": tools, "tool_choice": "auto", "store": True, "include": ["message.output_text.logprobs"], "truncation": "disabled",
        "reasoning": {"effort": "low", "summary": None}, "text": {"format": {"type": "json_object"}, "verbosity": "low"},
        "background": False, "previous_response_id": None, "top_k": 3, "max_output_tokens": 9, "metadata": {"a": "b"},
    }  # fmt: skip
    assert asking(caller, items, **fields).status_code == 200
    sent, defense = caller.upstream.bodies[0], border()
    assert {name: sent[name] for name in fields} == fields
    assert sent["input"][2:7] == items[2:7]
    at = [sent["input"][0]["content"][0], sent["input"][1]["content"][1], sent["input"][7]["content"][0]]
    for part, one in zip(at, pictures, strict=True):
        assert part["type"] == "input_image" and set(part) == {"type", "image_url"}
        assert picture_of(part["image_url"]).tobytes() == defense.paint(one).tobytes()
    assert sent["input"][0]["content"][1] == text("a system's") and sent["input"][0]["role"] == "developer"
    assert sent["input"][1]["content"][0] == text(f"{TEXT} first")
    assert sent["input"][7]["content"][1] == text(f"{TEXT} ")


@pytest.mark.parametrize(
    "answer",
    [
        httpx2.Response(404, json={"detail": "Not Found"}), httpx2.Response(404, text="Not Found"), httpx2.Response(405, json={"detail": "Method Not Allowed"}),
        httpx2.Response(404, json={"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}), httpx2.Response(404),
        httpx2.Response(501, json={"error": {"message": "not implemented"}}), httpx2.Response(404, json={"detail": "no /models/x/v1/responses"}),
    ],
)  # fmt: skip
def test_an_upstream_without_the_path_is_a_501_that_says_so(answer):
    caller = client()
    caller.upstream.answer = lambda number, body: answer
    response = caller.raw(json.dumps({"model": caller.model, "input": "q"}).encode(), path="/v1/responses")
    error = response.json()["error"]
    assert response.status_code == 501 and "the upstream has no /responses" in error["message"]
    assert error["code"] == "no_responses" and HASH in response.headers


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, {"error": {"message": "The model `m` does not exist.", "type": "NotFoundError", "param": "model", "code": 404}}),
        (404, {"error": {"message": "no such thing", "code": "model_not_found"}}), (400, {"error": {"message": "no"}}), (500, {"error": {}}),
    ],
)  # fmt: skip
def test_other_errors_of_the_upstream_are_its_own(status, body):
    caller = client()
    caller.upstream.answer = lambda number, sent: httpx2.Response(status, json=body)
    response = caller.raw(json.dumps({"model": caller.model, "input": "q"}).encode(), path="/v1/responses")
    assert (response.status_code, response.json()) == (status, body)


def test_a_404_of_chat_completions_stays_one():
    caller = client()
    caller.upstream.answer = lambda number, sent: httpx2.Response(404, json={"detail": "Not Found"})
    assert caller.post(user("q")).status_code == 404


CHUNKS = [
    b'event: response.created\ndata: {"type":"response.created","sequence_number":0,', b'"response":{"id":"r"}}\n\n: a comment\n\n',
    'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"ü😀"}\n\n'.encode(), b"event: odd\r\ndata: {}\r\n\r\n",
]  # fmt: skip


def test_events_pass_as_they_come():
    caller, events = client(), Events(*CHUNKS)
    caller.upstream.answer = lambda number, body: events.response()
    body = json.dumps({"model": caller.model, "input": [message(image(RED))], "stream": True}).encode()
    response = caller.raw(body, path="/v1/responses")
    assert response.content == b"".join(CHUNKS) and response.headers["content-type"].startswith("text/event-stream")
    assert caller.upstream.bodies[0]["stream"] is True and events.closed.is_set()


def test_a_stream_that_breaks_off_is_an_error_to_the_client():
    upstream = Upstream()
    upstream.answer = lambda number, body: Events(*CHUNKS[:2], end="break").response()
    proxy = Proxy(border(), ServeSettings.of(upstream="http://u/v1", canvas=56), upstream)
    with listening(proxy.app) as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0) as one:
        stream = one.responses.create(model="m" + proxy.suffix, input="q", stream=True)
        with pytest.raises(openai.APIError, match="broke off its stream"):
            list(stream)
