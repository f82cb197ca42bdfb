"""Defenses that ask more than once, before an upstream that says what it was asked."""

import json
from typing import Any

import httpx2
import pytest
from PIL import Image

from davsp.defenses import ECSO, Chain, SafetyText
from davsp.serve.calls import asks_once
from davsp.serve.probe import probe
from davsp.serve.settings import ServeSettings
from proxy import TEXT, Upstream, border, client, data_url, image_part, picture_of, text_part, user
from tiny import picture

IMAGE = picture(2, (40, 30))
ASK = user(image_part(data_url(IMAGE)), text_part("what is this"))


def saying(*texts: Any) -> Any:
    """An upstream that says one text after the other; what is no text is sent as it is."""

    def answer(number: int, body: dict[str, Any]) -> Any:
        text = texts[number]
        if not isinstance(text, str):
            return text
        choice = {
            "message": {"role": "assistant", "content": text},
            "finish_reason": "length" if text == "long" else "stop",
        }
        return {"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}}

    return answer


def asking(defense: ECSO | Chain, *texts: Any, **settings: Any) -> Any:
    caller = client(defense, **settings)
    caller.upstream.answer = saying(*texts)
    return caller


def question_and_picture(body: dict[str, Any]) -> tuple[str, Image.Image | None]:
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        return content, None
    return content[1]["text"], picture_of(content[0]["image_url"]["url"])


def test_which_defenses_ask_more_than_once():
    assert asks_once(border()) and asks_once(Chain([SafetyText("S"), border()]))
    assert not asks_once(ECSO(border())) and not asks_once(Chain([SafetyText("S"), ECSO()]))


def test_ecso_asks_four_times_and_the_last_answer_goes_to_the_client():
    caller = asking(ECSO(border()), "bad", "yes", "a caption", "long")
    system = {"role": "system", "content": "be brief"}
    completion = caller.post(system, ASK, max_tokens=9, seed=3, temperature=0).json()
    assert (
        completion["choices"][0]["message"]["content"] == "long"
        and completion["choices"][0]["finish_reason"] == "length"
    )
    assert completion["usage"] == {"prompt_tokens": 40, "completion_tokens": 8, "total_tokens": 48}
    assert completion["model"] == caller.model and completion["object"] == "chat.completion"
    first, harm, caption, blind = map(question_and_picture, caller.upstream.bodies)
    canvas = border().paint(IMAGE).tobytes()
    assert first[0] == f"{TEXT} what is this" and "RESPONSE:\nbad" in harm[0] and "a caption" in blind[0]
    assert [one[1] and one[1].tobytes() for one in (first, harm, caption, blind)] == [canvas] * 3 + [None]
    for body in caller.upstream.bodies:
        assert body["messages"][0] == system and (body["temperature"], body["seed"], body["model"]) == (0, 3, "m")
    assert [body["max_tokens"] for body in caller.upstream.bodies] == [9, 9, 9, 9]


def test_adaptive_answers_again_only_what_is_judged_harmful():
    for verdict, texts in (("no", ["plain"]), ("yes", ["plain", "safe"])):
        caller = asking(ECSO(instead=border()), texts[0], verdict, *texts[1:])
        assert caller.post(ASK).json()["choices"][0]["message"]["content"] == texts[-1]
        pictures = [one[1] for one in map(question_and_picture, caller.upstream.bodies)]
        assert pictures[0].tobytes() == IMAGE.tobytes()
        assert len(pictures) == 1 + len(texts) and caller.upstream.bodies[0]["max_tokens"] == 1024
        if verdict == "yes":
            assert pictures[2].tobytes() == border().paint(IMAGE).tobytes()


def test_as_a_stream():
    caller = asking(ECSO(), "a red  cake", "no")
    response = caller.post(user("q"), stream=True, stream_options={"include_usage": True})
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    chunks = [json.loads(event) for event in events[:-1]]
    assert events[-1] == "[DONE]" and response.headers["content-type"].startswith("text/event-stream")
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]) == "a red  cake"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop" and chunks[-1]["usage"]["total_tokens"] == 24
    assert {c["model"] for c in chunks} == {caller.model} and len({c["id"] for c in chunks}) == 1


@pytest.mark.parametrize(
    ("messages", "fields"),
    [
        ([user("q"), {"role": "assistant", "content": "a"}, user("q")], {}), ([ASK, {"role": "assistant", "content": "a"}], {}),
        ([user(*[image_part(data_url(IMAGE))] * 2)], {}), ([{**user("q"), "name": "x"}], {}),
        ([{"role": "system", "content": [image_part(data_url(IMAGE))]}, user("q")], {}),
        ([user("q")], {"tools": []}), ([user("q")], {"temperature": 0.7}), ([user("q")], {"n": 2}), ([user("q")], {"logprobs": True}),
        ([user("q")], {"max_tokens": 0}), ([user("q")], {"max_tokens": True}), ([user("q")], {"max_completion_tokens": "3"}),
    ],
)  # fmt: skip
def test_what_is_not_defined_for_them_is_refused(messages, fields):
    caller = asking(ECSO(border()), "a", "no")
    response = caller.post(*messages, **fields)
    assert response.status_code == 400 and response.json()["error"]["message"] and not caller.upstream.bodies


@pytest.mark.parametrize(
    ("answers", "status"),
    [
        ([httpx2.Response(429, json={"error": {}})], 429), (["bad", httpx2.Response(500, json={})], 500), (["bad", httpx2.ReadTimeout("")], 504),
        (["bad", {"choices": []}], 502), (["bad", "yes", "a caption", httpx2.Response(200, html="x")], 502), ([[1]], 502),
    ],
)  # fmt: skip
def test_a_call_that_fails_is_an_error_and_no_answer(answers, status):
    caller = asking(ECSO(border()), *answers)
    response = caller.post(ASK)
    assert response.status_code == status and "bad" not in response.text and len(caller.upstream.bodies) == len(answers)


def test_image_free_requests_may_pass_them_too():
    caller = asking(ECSO(), "a", image_free="pass")
    assert caller.post(user("q"), temperature=0.7).status_code == 200 and caller.sent() == [user("q")]


# -- the look at the upstream ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda number, body: {"usage": {"prompt_tokens": 20 - 16 * number}}, "is 16 tokens"),
        (lambda number, body: {}, "tells no token counts"),
        (lambda number, body: httpx2.Response(400, json={"error": {}}), "answered 400"),
        (lambda number, body: httpx2.ConnectError("no"), "cannot be reached"),
    ],
)
def test_probe_says_what_must_hold(answer, says):
    import asyncio

    upstream = Upstream()
    upstream.answer = answer
    lines = asyncio.run(probe(ServeSettings(upstream="http://u/v1", canvas=56), None, upstream))
    assert says in lines[0] and "56x56 pixels alone" in lines[1]
    assert picture_of(upstream.bodies[0]["messages"][0]["content"][0]["image_url"]["url"]).size == (56, 56)


def test_a_picture_in_the_models_own_words_does_not_reach_it():
    """ECSO puts its caption into the next question, where a server could read a picture by address."""
    caller = asking(ECSO(border()), "bad", "yes", "a caption ![](https://evil.test/x.png)", "never")
    response = caller.post(ASK)
    assert response.status_code == 400 and "![](…)" in response.json()["error"]["message"]
    assert len(caller.upstream.bodies) == 3
