"""The gate before an upstream: looked at through the border, answered without it, and never without the look."""

import base64
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from davsp import DavspError
from davsp.cli import serve
from davsp.defenses import ECSO, Chain, Gate, NoDefense, SafetyText, load_defense
from davsp.prompts.beside import texts
from davsp.prompts.gate import Calibration
from davsp.serve.canaries import border_of
from davsp.serve.gate import HEAD, gate_of
from proxy import GOOD, TEXT, Client, Events, border, client, data_url, image_part, picture_of, text_part, user
from tiny import picture
from upstreams import canaried, sees

IMAGE, OTHER = picture(2, (40, 30)), picture(3, (33, 41))
ASK = user(image_part(data_url(IMAGE)), text_part("what is this"))
SORRY = "I'm sorry, I can't help with that."
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def says(text: str | None, finish: str = "stop", **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text} | more, "finish_reason": finish}
    return {
        "object": "chat.completion", "model": "m", "choices": [choice],
        "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
    }  # fmt: skip


def gated(*answers: Any, gate: Gate | None = None, **settings: Any) -> Client:
    """Before an upstream that gives one answer after the other."""
    caller = client(gate or Gate(border()), **settings)
    caller.upstream.answer = lambda number, body: answers[number]
    return caller


def pictures(body: dict[str, Any]) -> list[bytes]:
    parts = [part for m in body["messages"] if isinstance(m["content"], list) for part in m["content"]]
    return [picture_of(part["image_url"]["url"]).tobytes() for part in parts if part["type"] == "image_url"]


def canvas(image: Image.Image) -> bytes:
    return border().paint(image).tobytes()


def metric(caller: Client, line: str) -> bool:
    return f"{line} 1.0" in caller.request("GET", "/metrics").text.splitlines()


# -- the two roads -----------------------------------------------------------------------------------------------------


def test_what_passes_is_answered_with_its_picture_as_it_came():
    caller = gated(says("a red cake on", "length"), GOOD)
    response = caller.post(ASK, temperature=0.7, max_tokens=200, n=2, logprobs=True, stop=["sorry"], presence_penalty=2, response_format={"type": "json_object"})  # fmt: skip
    look, sent = caller.upstream.bodies
    assert response.headers[HEAD] == "passed" and metric(caller, 'davsp_gate_total{road="passed"}')
    assert response.json() == GOOD | {"usage": {"prompt_tokens": 13, "completion_tokens": 4, "total_tokens": 17}}
    assert pictures(look) == [canvas(IMAGE)] and look["messages"][0]["content"][1] == text_part(f"{TEXT} what is this")
    assert {name: value for name, value in look.items() if name != "messages"} == {
        "model": "m", "max_tokens": 16, "temperature": 0, "top_p": 1, "repetition_penalty": 1,
    }  # fmt: skip
    assert pictures(sent) == [IMAGE.tobytes()] and sent["messages"][0]["content"][1] == text_part("what is this")
    assert (sent["temperature"], sent["max_tokens"], sent["n"], sent["stop"], sent["model"]) == (
        0.7,
        200,
        2,
        ["sorry"],
        "m",
    )
    assert metric(caller, "davsp_pictures_total")


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_is_the_borders_own(stream):
    caller = gated(says(SORRY))
    response = caller.post(ASK, stream=stream, stream_options={"include_usage": True})
    assert response.headers[HEAD] == "refused" and len(caller.upstream.bodies) == 1
    assert metric(caller, 'davsp_gate_total{road="refused"}')
    if not stream:
        assert response.json() == says(SORRY)
        return
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    chunks = [json.loads(event) for event in events[:-1]]
    assert events[-1] == "[DONE]" and chunks[-1]["usage"]["total_tokens"] == 12
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]) == SORRY


@pytest.mark.parametrize(
    ("asked", "finish"), [({"max_tokens": 300}, "length"), ({"max_completion_tokens": 5}, "stop"), ({}, "length")]
)
def test_a_refusal_that_is_cut_or_too_long_is_asked_for_under_the_border(asked, finish):
    caller = gated(says(SORRY, finish), says("whole"))
    response = caller.post(ASK, temperature=1.0, tools=TOOLS, tool_choice="auto", stop=["x"], **asked)
    look, whole = caller.upstream.bodies
    assert response.headers[HEAD] == "refused" and response.json()["choices"][0]["message"]["content"] == "whole"
    assert response.json()["usage"]["total_tokens"] == 24
    assert pictures(look) == pictures(whole) == [canvas(IMAGE)] and whole["temperature"] == 0 and "stop" not in whole
    assert look["tool_choice"] == whole["tool_choice"] == "none" and whole["tools"] == TOOLS
    assert {name: whole[name] for name in ("max_tokens", "max_completion_tokens") if name in whole} == asked
    assert {name: look[name] for name in ("max_tokens", "max_completion_tokens") if name in look} == dict.fromkeys(asked or ["max_tokens"], 16)  # fmt: skip


def test_a_stream_starts_once_the_gate_has_passed():
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}
    odd = b'data: {"choices":[{"delta":{"content":"say \\"usage\\""}}]}\n\n'
    last = b"data: " + json.dumps(usage).encode() + b"\r\n\r\ndata: [DONE]"
    stream = Events(odd, last[:30], last[30:])
    caller = gated(says("a red cake"), stream.response())
    response = caller.post(ASK, stream=True, stream_options={"include_usage": True})
    look, sent = caller.upstream.bodies
    assert response.headers[HEAD] == "passed" and response.headers["content-type"].startswith("text/event-stream")
    first, second, done = response.text.split("data: ")[1:]
    assert first == odd.decode()[6:] and done == "[DONE]" and json.loads(second)["usage"] == {
        "prompt_tokens": 13, "completion_tokens": 4, "total_tokens": 17,
    }  # fmt: skip
    assert "stream" not in look and "stream_options" not in look and sent["stream"] is True
    assert stream.closed.is_set()


def test_a_conversation_is_looked_at_whole_and_answered_as_it_came():
    conversation = [
        {"role": "system", "content": "be brief"}, ASK,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c", "content": [text_part("seen"), image_part(data_url(OTHER))]},
        {"role": "assistant", "content": "a cake"}, user("and now"),
    ]  # fmt: skip
    caller = gated(says("another cake"), GOOD)
    assert caller.post(*conversation, tools=TOOLS, parallel_tool_calls=False).headers[HEAD] == "passed"
    look, sent = caller.upstream.bodies
    assert pictures(look) == [canvas(IMAGE), canvas(OTHER)] and pictures(sent) == [IMAGE.tobytes(), OTHER.tobytes()]
    assert look["messages"][5] == user(f"{TEXT} and now") and sent["messages"][5] == user("and now")
    assert [sent["messages"][i] for i in (0, 2, 4)] == [conversation[i] for i in (0, 2, 4)]
    assert look["tools"] == sent["tools"] == TOOLS and look["tool_choice"] == "none" and "tool_choice" not in sent


def test_two_pictures_of_one_message():
    caller = gated(says("two things"), GOOD)
    both = user(
        text_part("what"), image_part(data_url(IMAGE)), image_part(data_url(OTHER), detail="low"), text_part("is this")
    )
    assert caller.post(both).headers[HEAD] == "passed"
    look, sent = caller.upstream.bodies
    assert pictures(look) == [canvas(IMAGE), canvas(OTHER)] and pictures(sent) == [IMAGE.tobytes(), OTHER.tobytes()]
    assert [part.get("text") for part in sent["messages"][0]["content"]] == ["what", None, None, "is this"]
    assert sent["messages"][0]["content"][2]["image_url"]["detail"] == "low"


def test_without_a_picture():
    caller = gated(says(SORRY))
    assert caller.post(user("q")).headers[HEAD] == "refused" and caller.sent() == [user(f"{TEXT} q")]
    passing = gated(GOOD, image_free="pass")
    response = passing.post(user("q"), temperature=0.7)
    assert response.json() == GOOD and HEAD not in response.headers and passing.sent() == [user("q")]


def test_what_answers_may_be_another_defense():
    caller = gated(says("a cake"), GOOD, gate=Gate(border(), else_=SafetyText("S")))
    caller.post(ASK)
    assert pictures(caller.upstream.bodies[1]) == [IMAGE.tobytes()]
    assert caller.sent()[0]["content"][1] == text_part("S what is this")


# -- it fails closed ---------------------------------------------------------------------------------------------------

NEVER_ENDS = Events(b"data: {}\n\n").response()


@pytest.mark.parametrize(
    ("look", "status", "why"),
    [
        (httpx2.Response(429, json={"error": {"message": "crowded"}}), 429, "crowded"), (httpx2.Response(500, json={}), 500, ""),
        (httpx2.Response(204, json={}), 502, "204"), (httpx2.Response(200, html="x"), 502, "without JSON"), (NEVER_ENDS, 502, "no single message"),
        (httpx2.ReadTimeout(""), 504, "in time"), (httpx2.ConnectError(""), 502, "cannot be reached"), (says(""), 502, "no words"),
        (says(None), 502, "no text"), (says(" ...", "length"), 502, "no words within 16 tokens"), ({"choices": []}, 502, "no answer"), ([], 502, "no answer"),
        (says("a cake", "tool_calls"), 502, "tool_calls"), (says("a cake", "content_filter"), 502, "filter"),
        (says("<think>hm, a", "length"), 502, "--gate-tokens"), (says(None, "length", reasoning_content="hm"), 502, "--gate-tokens"),
        (says("<think>hm</think> I am", "length"), 502, "too little follows the thought"),
        (says("I am", "length", reasoning="hm"), 502, "too little follows the thought"), (says("<think>a cake</think>"), 502, "no words"),
    ],
)  # fmt: skip
def test_without_an_answer_to_look_at_nothing_goes_on(look, status, why):
    caller = gated(look, GOOD)
    response = caller.post(ASK)
    assert response.status_code == status and HEAD not in response.headers and "cake" not in response.text
    assert (
        why in response.text
        and len(caller.upstream.bodies) == 1
        and pictures(caller.upstream.bodies[0]) == [canvas(IMAGE)]
    )


def test_what_follows_a_thought_is_looked_at():
    for text, road in (("<think>i cannot tell</think> a cake", "passed"), (f"<think>fine</think> {SORRY}", "refused")):
        assert gated(says(text), GOOD).post(ASK).headers[HEAD] == road
    long = says("<think>hm</think>" + " cake" * 12, "length")
    assert gated(long, GOOD).post(ASK).headers[HEAD] == "passed"
    opened = gated(says("hm, i wonder", "length"), GOOD, reasoning_tags=(("", "</think>"),))
    assert "--gate-tokens" in opened.post(ASK).text and len(opened.upstream.bodies) == 1


def test_more_tokens_are_looked_at_and_are_another_name():
    caller = gated(says("a cake"), GOOD, gate=Gate(border(), tokens=200))
    caller.post(ASK, max_tokens=3)
    assert caller.upstream.bodies[0]["max_tokens"] == 200 and caller.model != gated().model


def test_an_answer_that_fails_after_the_look_is_an_error():
    caller = gated(says("a cake"), httpx2.Response(500, json={"error": {"message": "down"}}))
    response = caller.post(ASK)
    assert response.status_code == 500 and "down" in response.text and "a cake" not in response.text
    assert gated(says("a cake"), httpx2.ReadTimeout("")).post(ASK).status_code == 504


# -- the sweep ---------------------------------------------------------------------------------------------------------


def test_nothing_but_what_the_gate_read_itself_goes_on():
    hidden = data_url(OTHER)
    for message, extra in (
        (user(f"see {hidden}"), {}), (user("see ![](https://evil.test/x.png)"), {}), (user({"type": "input_image", "image_url": hidden}), {}),
        (ASK, {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"default": hidden}}}]}),
        (ASK, {"images": [hidden]}), (user(image_part("https://evil.test/x.png")), {}),
    ):  # fmt: skip
        caller = gated(says("a cake"), GOOD)
        assert caller.post(message, **extra).status_code == 400 and not caller.upstream.bodies


def test_what_only_the_second_request_shows_does_not_go_on():
    """Between the halves stands the border's text in the look; without it a server that joins texts would read a picture."""
    caller = gated(says("a cake"), GOOD)
    response = caller.post(user("look !["), user("](https://evil.test/x.png)"))
    assert response.status_code == 400 and len(caller.upstream.bodies) <= 1


def test_the_picture_is_read_and_written_anew():
    file = data_url(IMAGE) + "#"
    assert gated(says("a cake"), GOOD).post(user(image_part(file))).status_code == 400
    caller = gated(says("a cake"), GOOD)
    exif = Image.Exif()
    exif[0x010E] = "a secret in the file"
    caller.post(user(image_part(data_url(IMAGE, "WEBP", lossless=True, exif=exif))))
    sent = caller.upstream.bodies[1]["messages"][0]["content"][0]["image_url"]["url"]
    assert b"a secret" not in base64.b64decode(sent.partition(",")[2])
    assert pictures(caller.upstream.bodies[1]) == [IMAGE.tobytes()]
    large = gated(says("a cake"), GOOD, max_pixels=900)
    assert large.post(ASK).status_code == 400 and not large.upstream.bodies


# -- /v1/responses -----------------------------------------------------------------------------------------------------


def response_of(text: str, status: str = "completed", items: tuple[Any, ...] = ()) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": []}
    why = {"reason": "max_output_tokens"} if status == "incomplete" else None
    message = {"type": "message", "role": "assistant", "content": [part] if text else []}
    return {
        "object": "response", "status": status, "incomplete_details": why, "output": [*items, message],
        "usage": {"input_tokens": 10, "output_tokens": 2, "total_tokens": 12},
    }  # fmt: skip


def responding(caller: Client, **more: Any) -> httpx2.Response:
    parts = [{"type": "input_text", "text": "what is this"}, {"type": "input_image", "image_url": data_url(IMAGE)}]
    return caller.raw(
        json.dumps({"model": caller.model, "input": [{"role": "user", "content": parts}]} | more).encode(),
        path="/v1/responses",
    )


def test_responses_pass_the_same_gate():
    caller = gated(response_of("a red", "incomplete"), response_of("a red cake"))
    tools = [{"type": "function", "name": "f", "parameters": {}}]
    response = responding(
        caller,
        max_output_tokens=9,
        tools=tools,
        instructions="be brief",
        store=True,
        temperature=1,
        text={"verbosity": "low"},
    )
    look, sent = caller.upstream.bodies
    assert (
        response.headers[HEAD] == "passed" and [r.url.path for r in caller.upstream.requests] == ["/v1/responses"] * 2
    )
    assert response.json()["usage"] == {"input_tokens": 20, "output_tokens": 4, "total_tokens": 24}
    assert {name: value for name, value in look.items() if name != "input"} == {
        "model": "m", "max_output_tokens": 16, "temperature": 0, "top_p": 1, "store": False, "tools": tools, "tool_choice": "none",
        "instructions": "be brief",
    }  # fmt: skip
    both = [body["input"][0]["content"] for body in (look, sent)]
    assert [picture_of(parts[1]["image_url"]).tobytes() for parts in both] == [canvas(IMAGE), IMAGE.tobytes()]
    assert [parts[0]["text"] for parts in both] == [f"{TEXT} what is this", "what is this"]
    assert (sent["max_output_tokens"], sent["store"], sent["temperature"]) == (9, True, 1)


def test_a_refused_response():
    assert responding(gated(response_of(SORRY))).json() == response_of(SORRY)
    caller = gated(response_of(SORRY, "incomplete"), response_of("whole"))
    response = responding(caller)
    assert response.headers[HEAD] == "refused" and response.json()["output"][0]["content"][0]["text"] == "whole"
    assert "max_output_tokens" not in caller.upstream.bodies[1] and caller.upstream.bodies[1]["temperature"] == 0
    streamed = responding(gated(response_of(SORRY)), stream=True)
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta") == SORRY
    assert events[-1]["type"] == "response.completed" and events[-1]["response"]["usage"]["total_tokens"] == 12


def test_a_response_as_a_stream_counts_both_calls():
    done = {"type": "response.completed", "response": response_of("a cake")}
    caller = gated(
        response_of("a cake"), Events(f"event: response.completed\ndata: {json.dumps(done)}\n\n".encode()).response()
    )
    lines = responding(caller, stream=True).text.splitlines()
    assert (
        lines[0] == "event: response.completed" and json.loads(lines[1][6:])["response"]["usage"]["total_tokens"] == 24
    )


@pytest.mark.parametrize(
    "look",
    [
        response_of(""), response_of("", "incomplete"), response_of("a cake", "failed"), {"output": []}, {}, [],
        response_of("a cake", items=({"type": "function_call", "name": "f", "arguments": "{}"},)),
        response_of("I am", "incomplete", ({"type": "reasoning", "summary": []},)),
    ],
)  # fmt: skip
def test_a_response_without_an_answer_goes_no_further(look):
    caller = gated(look, response_of("a cake"))
    assert responding(caller).status_code == 502 and len(caller.upstream.bodies) == 1


# -- what is served ----------------------------------------------------------------------------------------------------


def test_gates_that_are_not_served_are_refused_at_the_start():
    prompt: Any = border().prompt
    first = Calibration.model_construct(pixels=prompt.pixels_sha256(), texts=texts(prompt))
    for defense, why in (
        (Gate(border(), "first", first), "gate:first has no threshold for a server"), (Gate(border(), "states", first), "gate:states looks"),
        (Gate(ECSO()), "asks the model more than once"), (Gate(border(), else_=ECSO()), "asks the model more than once"),
        (Gate(NoDefense()), "looks through nothing"), (Chain([SafetyText("S"), Gate(border())]), "put the gate first"),
        (ECSO(Gate(border())), "put the gate first"), (ECSO(instead=Gate(border())), "put the gate first"),
    ):  # fmt: skip
        with pytest.raises(DavspError, match=why):
            client(defense)
    assert gate_of(border()) is None and gate_of(ECSO(border())) is None


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from command import run

    canaried(border().prompt).save_pretrained(tmp_path)  # type: ignore[arg-type]
    served: list[Any] = []
    monkeypatch.setattr(serve, "_run", lambda *args: served.append(args))
    command = ["serve", "--upstream", "http://127.0.0.1:9/v1", "--canvas", "56", "--no-probe"]
    assert run(*command, "--defense", f"gate+davsp={tmp_path}", "--gate-tokens", "64", "--reasoning-tags", "none") == 0
    said = capsys.readouterr().err
    assert "pictures undefended, by design" in said and "gate+davsp," in said and len(served) == 1
    for options, why in (
        (["--defense", f"gate:first+davsp={tmp_path}"], "no threshold yet"), (["--defense", f"davsp={tmp_path}", "--gate-tokens", "9"], "belong to a gate"),
        (["--defense", f"gate+davsp={tmp_path}", "--reasoning-tags", "x"], "give pairs as JSON"), (["--defense", f"gate+ecso+davsp={tmp_path}"], "more than once"),
    ):  # fmt: skip
        assert run(*command, *options) == 2 and why in capsys.readouterr().err
    gate = serve._defense(None, f"gate+davsp={tmp_path}", None, None, 64)
    assert isinstance(gate, Gate) and gate.tokens == 64 and border_of(gate) is not None


def test_canaries_see_the_border_inside_the_gate():
    prompt = canaried(border().prompt)  # type: ignore[arg-type]
    for most, ready in ((1000, 200), (0, 503)):
        caller = client(Gate(type(border())(prompt)), require_effect=True)
        caller.upstream.answer = sees(prompt, most)
        response = caller.request("GET", "/ready")
        assert response.status_code == ready and response.json()["effect"] == ("holds" if most else "lost")


def test_a_gate_by_its_name_where_a_folder_is_taken(tmp_path: Path):
    border().prompt.save_pretrained(tmp_path)
    for spec, name in (
        (f"gate+davsp={tmp_path}", "gate+davsp"),
        (f"gate:answer+b={tmp_path}", "gate:answer+b"),
        (f"gate+{tmp_path}", "gate+davsp"),
    ):
        gate = load_defense(spec)
        assert isinstance(gate, Gate) and (gate.name, gate.kind, gate.tokens) == (name, "answer", 16)
        assert gate.inner.sha256() == load_defense(tmp_path).sha256()
    for spec, why in (("gate:first+{}", "no threshold yet"), ("gate:both+{}", "states, first, answer")):
        with pytest.raises(DavspError, match=why):
            load_defense(spec.format(tmp_path))
