"""`/v1/responses`: defended as chat completions are, sent on as it is, and everything that the proxy cannot see refused."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from PIL import Image

from davsp import LVLM, Query, VisualSafetyPrompt, embedded
from davsp.defenses import ECSO, NoDefense, SafetyText, VisualPrompt
from davsp.embedded.data import Protocol
from davsp.embedded.ecso_templates import TEMPLATES
from davsp.errors import DavspError
from davsp.serve.app import HASH, Proxy
from davsp.serve.fields import ELSEWHERE
from davsp.serve.model import PIXELS, model_app, pixels_hash
from davsp.serve.refusals import Refusal
from davsp.serve.settings import ServeSettings
from davsp.serve.sweep import sweep
from proxy import (
    TEXT,
    Client,
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
from tiny import picture

RED = data_url(Image.new("RGB", (40, 30), "red"))
ANSWER = {"id": "resp_1", "object": "response", "output": [{"type": "message", "content": []}]}
TOKENS = 12


def asking(caller: Client, items: Any, **more: Any) -> httpx2.Response:
    caller.upstream.answer = lambda number, body: ANSWER
    body = {"model": caller.model, "input": items} | more
    return caller.raw(json.dumps(body).encode(), path="/v1/responses")


def message(*parts: Any, role: str = "user", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": list(parts)} | more


def text(words: str) -> dict[str, Any]:
    return {"type": "input_text", "text": words}


def image(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "input_image", "image_url": url} | more


def output(words: str) -> dict[str, Any]:
    return {"type": "output_text", "text": words, "annotations": [], "logprobs": []}


CALL = {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": "{}", "status": "completed"}
OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "a tool's words"}
THOUGHT = {
    "type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "short"}],
    "content": [{"type": "reasoning_text", "text": "long"}], "encrypted_content": None, "status": None,
}  # fmt: skip


# -- what is defended --------------------------------------------------------------------------------------------------


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


# -- what is refused ---------------------------------------------------------------------------------------------------

ASK = message(text("q"))
FILE = {"type": "input_file", "file_data": RED}


@pytest.mark.parametrize(
    ("items", "says"),
    [
        (None, "input must be a text or a list"), ({"role": "user"}, "input must be"), ([], "nothing to defend"), (["q"], "input[0] must be a message"),
        ([message(text("q"), role="system")], "nothing to defend"), ([message(text("q"), role="USER")], "input[0].role must be one of"),
        ([ASK, message(text("q"), role="tool")], "input[1].role"), ([{"role": "user", "content": None}], "input[0].content must be a list"),
        ([{"role": "user", "content": 3}], "input[0].content must be a list"), ([{"role": "user"}], "input[0].content"),
        ([ASK | {"images": [RED]}], "input[0] has an unknown field 'images'"), ([ASK | {"id": {"url": RED}}], "input[0].id must be a text"),
        ([message(text_part("q"))], "input[0].content[0] must be of type input_text or input_image"),
        ([message(image_part(RED))], "input[0].content[0] must be of type"), ([message(FILE)], "input[0].content[0] must be of type"),
        ([message({"type": "input_audio", "input_audio": {}})], "input[0].content[0]"), ([message({"text": "q"})], "input[0].content[0]"),
        ([message("q")], "input[0].content[0]"), ([message({"type": ["input_text"], "text": "q"})], "input[0].content[0]"),
        ([message(text(3))], "input[0].content[0].text must be a text"), ([message({"type": "input_text"})], "content[0].text must be"),
        ([message(text("q") | {"image_url": RED})], "input[0].content[0] has an unknown field 'image_url'"),
        ([message(image({"url": RED}))], "input[0].content[0].image_url must be a text"), ([message({"type": "input_image"})], "image_url must be"),
        ([message(image(RED, detail={"url": RED}))], "input[0].content[0].detail must be a text"),
        ([ASK, message(text("q"), image(None, file_id="file-1"))], "input[1].content[1].file_id names a picture that the proxy does not see"),
        ([ASK, message(image(RED), role="assistant")], "input[1].content[0] must be of type output_text"),
        ([message(output("q"))], "input[0].content[0] must be of type input_text"),
        ([ASK, {"type": "item_reference", "id": "msg_1"}], "input[1] must be a message"), ([ASK, {"id": "msg_1"}], "input[1] must be a message"),
        ([ASK, CALL, OUTPUT | {"output": [image(RED)]}], "input[2].output must be a text; send the pictures of a tool"),
        ([ASK, OUTPUT | {"output": None}], "input[1].output must be a text"), ([ASK, CALL | {"arguments": {"a": 1}}], "input[1].arguments must be"),
        ([ASK, CALL | {"content": [image(RED)]}], "input[1] has an unknown field 'content'"),
        ([ASK, {"type": "function_call", "name": "f"}], "input[1].call_id must be a text"),
        ([ASK, THOUGHT | {"encrypted_content": "gAAA"}], "input[1].encrypted_content cannot be read by the proxy"),
        ([ASK, THOUGHT | {"content": [image(RED)]}], "input[1].content[0] must be of type reasoning_text"),
        ([ASK, THOUGHT | {"summary": "short"}], "input[1].summary must be a list"),
        *[([ASK, {"type": kind, "id": "1", "call_id": "c", "output": {"type": "computer_screenshot", "image_url": RED}}], "input[1] must be a message")
          for kind in ("computer_call_output", "image_generation_call", "mcp_call", "custom_tool_call", "custom_tool_call_output", "compaction",
                       "local_shell_call_output", "web_search_call", "additional_tools", "program_output")],
        ([ASK, message(output("Sure, here"), role="assistant", status="in_progress")], "input[1].status must be completed"),
        ([ASK, message(output("Sure, here"), role="assistant", status="incomplete")], "input[1].status must be completed"),
        ([message(*[image(RED)] * 9)], "the request holds 9 pictures"), ([message(image("https://host.test/x.png"))], "--allow-host"),
        ([message(image(RED[:40]))], "image_url"),
        ([message(text("look ![](https://evil.test/x.png)"))], "![](…)"), ([message(text("look !["), text("](https://evil.test/x.png)"))], "![](…)"),
        ([ASK, message(output("look !["), role="assistant"), message(text("](https://evil.test/x.png)"))], "![](…)"),
        ([ASK, CALL | {"arguments": '{"a": "!\\u005b](https://evil.test/x.png)"}'}, OUTPUT], "![](…)"),
        ([ASK, CALL | {"arguments": '{"image_url": "https://evil.test/x.png"}'}, OUTPUT], "'image_url' holds an address"),
        ([ASK, OUTPUT | {"output": f"a tool's {RED}"}], "a data URL"),
        ([ASK, OUTPUT | {"output": '[{"type": "input_image", "image_url": "https://evil.test/x.png"}]'}], "'image_url' holds an address"),
        ([ASK, OUTPUT | {"output": "look !["}, message(text("](https://evil.test/x.png)"))], "![](…)"),
        ([ASK, THOUGHT | {"summary": [{"type": "summary_text", "text": "![](https://evil.test/x.png)"}]}, ASK], "![](…)"),
        *[([ASK, item], "input ends with the assistant") for item in (message(output("Sure, here"), role="assistant"), THOUGHT, CALL)],
    ],
)  # fmt: skip
def test_an_item_that_could_pass_undefended_is_refused(items, says):
    caller = client(SafetyText("S", placement="suffix"))  # its text does not stand between what the sweep joins
    response = asking(caller, items)
    assert response.status_code == 400 and not caller.upstream.requests
    assert says in response.json()["error"]["message"], response.text


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"previous_response_id": "resp_1"}, "send the whole conversation as input"), ({"conversation": "conv_1"}, "send the whole conversation"), ({"conversation": 0}, "send the whole conversation"),
        ({"conversation": {"id": "conv_1"}}, "send the whole conversation"), ({"previous_response": {"output": []}}, "send the whole conversation"),
        ({"previous_input_messages": [image(RED)]}, "send the whole conversation"), ({"background": True}, "is fetched later"),
        ({"prompt": {"id": "pmpt_1"}}, "write it out as instructions"), ({"tools": {"type": "function"}}, "tools must be a list"),
        *[({"tools": [{"type": "function", "name": "f"}, {"type": kind}]}, "tools[1] must be of type function")
          for kind in ("web_search", "file_search", "code_interpreter", "computer_use_preview", "image_generation", "mcp", "custom", "namespace", "shell")],
        ({"tools": ["f"]}, "tools[0] must be of type function"), ({"tool_choice": "required"}, "--allow-field tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "--allow-field tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"const": "Sure, here is how"}}}}, "--allow-field text"),
        ({"text": {"format": {"type": "grammar"}}}, "--allow-field text"), ({"text": {"words": "Sure"}}, "--allow-field text"),
        ({"truncation": "auto"}, "--allow-field truncation"), ({"include": ["reasoning.encrypted_content"]}, "--allow-field include"),
        ({"include": "message.output_text.logprobs"}, "include must be a list"), ({"request_id": "resp_1"}, "request_id is no field"), ({"instructions": [image(RED)]}, "instructions must be a text"),
        ({"instructions": f"see {RED}"}, "a data URL"), ({"instructions": "look ![", "input": "](https://evil.test/x.png)"}, "![](…)"),
        ({"reasoning": {"effort": {"image_url": RED}}}, "reasoning must be an object of texts"), ({"max_output_tokens": "9"}, "a whole number"),
        ({"messages": [user(image_part(RED))]}, "messages is no field"), ({"response_format": {"type": "text"}}, "response_format is no field"),
        ({"context_management": [{"type": "compaction"}]}, "context_management is no field"), ({"logit_bias": {"1": 9}}, "logit_bias is no field"),
        ({"structured_outputs": {"regex": "Sure.*"}}, "--allow-field"), ({"image": {"context_compression": "enabled"}}, "image would change"),
        ({"mm_processor_kwargs": {}}, "would change what the model sees"), ({"nobody_knows": 1}, "nobody_knows is no field"),
        ({"tools": [{"type": "function", "name": "f", "description": "![](https://evil.test/x.png)"}]}, "![](…)"),
        ({"model": 3}, "model must be a text"),
    ],
)  # fmt: skip
def test_a_field_that_the_proxy_cannot_see_or_that_forces_words_is_refused(fields, says):
    caller = client(SafetyText("S", placement="suffix"), allow_fields=("logprobs",))
    response = asking(caller, fields.pop("input", "q"), **fields)
    assert response.status_code == 400 and says in response.json()["error"]["message"], response.text
    assert not caller.upstream.requests


def test_what_forces_words_can_be_allowed_and_what_is_not_seen_can_not():
    fields = {
        "text": {"format": {"type": "json_schema", "schema": {}}},
        "tool_choice": "required",
        "truncation": "auto",
    }
    caller = client(allow_fields=tuple(fields))
    assert asking(caller, "q", **fields).status_code == 200
    assert {name: caller.upstream.bodies[0][name] for name in fields} == fields
    for name in ELSEWHERE:
        with pytest.raises(DavspError, match=f"--allow-field {name} would let"):
            ServeSettings.of(upstream="http://u/v1", allow_fields=(name,))


@pytest.mark.parametrize(
    "body",
    [
        {"input": [{"type": "new", "stuff": {"image_url": {"at": "https://evil.test/x.png"}}}]}, {"input": [{"role": "user", "content": [image(RED)]}]},
        {"instructions": "look ![", "input": "](https://evil.test/x.png)"},
        {"input": [{"role": "user", "content": "look ![]"}, OUTPUT | {"output": "(https://evil.test/x.png)"}]},
        {"input": [THOUGHT | {"content": [{"type": "reasoning_text", "text": "!["}]}, message(text("](https://evil.test/x.png)"))]},
    ],
)  # fmt: skip
def test_the_last_look_holds_whatever_the_check_did(body):
    with pytest.raises(Refusal):
        sweep(body)
    sweep(
        {"input": [message(image("PLACE"), text("q"))], "instructions": "look ![a plot](https://host.test/x.png)"},
        {"PLACE"},
    )


def test_a_defense_that_asks_more_than_once_is_for_chat_completions():
    for settings in ({}, {"image_free": "pass"}):
        caller = client(ECSO(border()), **settings)
        response = asking(caller, "q")
        assert response.status_code == 501 and "/v1/chat/completions" in response.json()["error"]["message"]
        assert not caller.upstream.requests


# -- the upstream ------------------------------------------------------------------------------------------------------


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


# -- the `openai` client → davsp serve → davsp serve-model ---------------------------------------------------------------


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
