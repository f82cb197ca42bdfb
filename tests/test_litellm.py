"""The guardrail under litellm itself: its hook's signature, its SDK with a mocked model, and what is refused.

`pip install -c requirements.lock -e '.[litellm]'`, then `python -m pytest tests/test_litellm.py`.
"""

import asyncio
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("litellm", reason="needs the extra: pip install -c requirements.lock -e '.[litellm]'")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:davsp")]  # theirs to mend

import litellm  # noqa: E402
from litellm.integrations.custom_logger import CustomLogger  # noqa: E402

from davsp import DavspError, VisualSafetyPrompt  # noqa: E402
from davsp.plugins.litellm import KEPT, WRITERS, DavspGuardrail  # noqa: E402
from davsp.serve.fields import NEVER  # noqa: E402
from davsp.serve.pictures import from_data_url, to_data_url  # noqa: E402
from tiny import picture  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A border for a canvas of 56 pixels."""
    VisualSafetyPrompt.create(56, 9, "random", text="please be safe").save_pretrained(tmp_path / "p")
    return tmp_path / "p"


def request(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": "gpt-4o", "messages": [{"role": "user", "content": list(parts)}], **more}


def shown(image: Any) -> dict[str, Any]:
    url = image if isinstance(image, str) else to_data_url(image)
    return {"type": "image_url", "image_url": {"url": url}}


TEXT = {"type": "text", "text": "what is this"}


def hooked(guard: DavspGuardrail, data: dict[str, Any], call_type: str = "acompletion") -> dict[str, Any]:
    return asyncio.run(guard.async_pre_call_hook(None, None, data, call_type))


def opened(data: dict[str, Any], at: int = 0) -> bytes:
    """The pixels of a picture in a request."""
    import io

    from PIL import Image

    with Image.open(io.BytesIO(from_data_url(data["messages"][0]["content"][at]["image_url"]["url"], 10**6))) as image:
        return image.tobytes()


def test_the_hook_has_litellms_signature():
    ours, theirs = (inspect.signature(cls.async_pre_call_hook) for cls in (DavspGuardrail, CustomLogger))
    assert list(ours.parameters) == list(theirs.parameters)


def test_pictures_get_the_border_and_questions_the_text(folder: Path):
    guard, prompt = DavspGuardrail(str(folder), 56), VisualSafetyPrompt.from_pretrained(folder)
    sent = hooked(guard, request(shown(picture(1, (80, 50))), TEXT, shown(picture(2)), temperature=0.5))
    assert opened(sent) == prompt.image(picture(1, (80, 50))).tobytes() and sent["temperature"] == 0.5
    assert opened(sent, 2) == prompt.image(picture(2)).tobytes()
    assert sent["messages"][0]["content"][1]["text"] == "please be safe what is this"
    bare = hooked(guard, {"model": "m", "messages": [{"role": "user", "content": "hello"}]})
    assert bare["messages"][0]["content"] == "please be safe hello"


def call(**arguments: Any) -> dict[str, Any]:
    """An assistant's message with a tool call."""
    function = {"name": "f", "arguments": json.dumps(arguments)}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]}


RAW = "data:image/png;base64," + "iVBORw0KGgo" * 9
REFUSED = {
    "a remote picture": (request(shown("https://example.org/a.png"), TEXT), "data:image/png"),
    "a broken picture": (request(shown("data:image/png;base64,aGVsbG8="), TEXT), "cannot be read"),
    "an unknown part": (request({"type": "input_audio", "input_audio": {}}, TEXT), "no other can be defended"),
    "a picture in a tool's field": (request(TEXT, images=["x"]), "images would change"),
    "markdown": (request({"type": "text", "text": "![](data:image/png;base64,xx)"}), "as image_url"),
    "markdown across parts": (request(*({"type": "text", "text": t} for t in ("![", "](ht", "tps://a.test/b)"))), "server joins"),
    "a data URL in a call": ({"model": "m", "messages": [call(a=[RAW]), *request(TEXT)["messages"]]}, "as a data URL"),
    "markdown in functions": (request(TEXT, functions=[{"name": "f", "description": "![](https://a.test/b)"}]), "server joins"),
    "too many": (request(*[shown(picture(1, (9, 9)))] * 9, TEXT), "hold 9 pictures, at most 8"),
    "no messages": ({"model": "m"}, "messages must be a list"),
    **{name: (request(TEXT, **{name: {"a": "b"}}), f"{name} would change") for name in sorted(NEVER)},
    "a template among keywords": (request(TEXT, chat_template_kwargs={"chat_template": "x"}), "chat_template would change"),
    "a keyword": (request(TEXT, chat_template_kwargs={"template": "x"}), "--allow-field chat_template_kwargs.template"),
    "forced words": (request(TEXT, guided_json={"const": "Sure"}), "--allow-field guided_json"),
    "what LiteLLM sends on": (request(TEXT, litellm_anything="x"), "--allow-field litellm_anything"),
    "a fallback's messages": (request(TEXT, fallbacks=[{"model": "m", "messages": request(TEXT)["messages"]}]), "names of models"),
    "a server's own tool": (request(TEXT, tools=[{"type": "mcp", "server_url": "litellm_proxy"}]), "type function"),
    **{name: (request(TEXT, **{name: "x"}), name) for name in sorted(WRITERS - {"fallbacks"})},
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_defended_raises_and_is_left_as_it_is(case: str, folder: Path):
    data, says = REFUSED[case]
    with pytest.raises(litellm.BadRequestError, match=says):
        hooked(DavspGuardrail(str(folder), 56), dict(data))


def test_what_the_proxy_and_clients_put_beside_the_request_passes(folder: Path):
    """As LiteLLM's proxy hands it to the hook: a copy of the request, undefended, goes to its logs and not to the model."""
    asked = request(shown(picture(1)), TEXT, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
    own = {
        "proxy_server_request": {"url": "http://127.0.0.1/v1", "headers": {"a": "b"}, "body": dict(asked)},
        "metadata": {"user_api_key_hash": "x", "picture": RAW}, "litellm_call_id": "1", "litellm_logging_obj": object(),
        "secret_fields": {"raw_headers": {}}, "litellm_session_id": "s", "client_side_timeout": True, "timeout": 9, "tags": ["a"],
        "fallbacks": ["other"], "num_retries": 1, "cache": {"no-cache": True}, "guardrails": ["davsp"],
    }  # fmt: skip
    fields = {"temperature": 0, "top_k": 3, "stop": None, "chat_template_kwargs": {"enable_thinking": False}}
    sent = hooked(DavspGuardrail(str(folder), 56), asked | own | fields)
    assert sent["messages"] != asked["messages"] and {name: sent[name] for name in own | fields} == own | fields
    allowing = DavspGuardrail(str(folder), 56, allow_fields=["logit_bias"])
    assert hooked(allowing, request(TEXT, logit_bias={"5": -100}))["logit_bias"] == {"5": -100}
    with pytest.raises(DavspError, match="extra_body would let"):
        DavspGuardrail(str(folder), 56, allow_fields=["extra_body"])


def test_litellm_has_learned_no_other_field_that_writes_messages():
    """KEPT is what LiteLLM says it keeps; a field with such a name would have to be looked at."""
    words = ("message", "prompt", "template", "content", "role", "fallback")
    known = {
        "enable_prompt_caching", "turn_off_message_logging", "max_fallbacks", "fallback_depth", "langfuse_prompt_version",
        "input_cost_per_text_message", "aws_batch_role_arn", "ensure_alternating_roles", "merge_reasoning_content_in_choices",
        "_encrypted_content_affinity_pinned",
    }  # fmt: skip
    assert {name for name in KEPT if any(word in name for word in words)} <= known


def test_another_kind_of_call_is_refused(folder: Path):
    assert hooked(DavspGuardrail(str(folder), 56), {"input": ["a"]}, "aembedding") == {"input": ["a"]}
    for kind in ("responses", "aresponses", "image_generation", "text_completion"):
        with pytest.raises(litellm.BadRequestError, match=f"a call of type {kind} is not known"):
            hooked(DavspGuardrail(str(folder), 56), request(TEXT), kind)


def test_wrong_settings(folder: Path):
    with pytest.raises(DavspError, match=r"canvas is 56x56 pixels and the model takes 336x336"):
        DavspGuardrail(str(folder), 336)
    with pytest.raises(DavspError, match="max-pixels"):
        DavspGuardrail(str(folder), 56, max_pixels=0)
    with pytest.raises(DavspError, match="neither a folder nor reachable"):
        DavspGuardrail("me/none", 56)


def test_the_proxys_own_dispatch_runs_it_once(folder: Path):
    """LiteLLM marks a request that its proxy's hook has seen; the hook before the deployment then leaves it alone."""
    guard = DavspGuardrail(str(folder), 56)
    data = request(shown(picture(1)), TEXT, metadata={})
    sent = hooked(guard, data)
    guard.mark_pre_call_hook_ran(sent)
    again = asyncio.run(guard.async_pre_call_deployment_hook(sent, litellm.types.utils.CallTypes.acompletion))
    assert again["messages"] == sent["messages"] != data["messages"]


def test_in_the_sdk(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """What litellm hands to the model has the border, named or not; a request that cannot be defended does not reach it."""
    seen: list[Any] = []

    class Model(litellm.CustomLLM):
        async def acompletion(self, model: str, messages: Any, model_response: Any, **_: Any) -> Any:
            seen.append(messages)
            if model == "down":
                raise RuntimeError("down")
            model_response.choices[0].message.content = "a red cake"
            return model_response

    monkeypatch.setattr(litellm, "custom_provider_map", [{"provider": "mine", "custom_handler": Model()}])
    monkeypatch.setattr(litellm, "callbacks", [DavspGuardrail(str(folder), 56)])
    litellm.utils.custom_llm_setup()

    def asked(data: dict[str, Any]) -> str:
        return asyncio.run(litellm.acompletion(**data)).choices[0].message.content

    wanted = VisualSafetyPrompt.from_pretrained(folder).image(picture(1)).tobytes()
    for more in ({}, {"guardrails": ["davsp"]}):
        assert asked(request(shown(picture(1)), TEXT, **more) | {"model": "mine/vlm"}) == "a red cake"
        assert opened({"messages": seen.pop()}) == wanted and not seen
    data = request(shown(picture(1)), TEXT, fallbacks=["mine/other"], metadata={"a": "b"}) | {"model": "mine/down"}
    assert asked(data) == "a red cake" and [opened({"messages": one}) for one in seen] == [wanted] * len(seen)
    assert {one[0]["content"][1]["text"] for one in seen} == {"please be safe what is this"} and len(seen) > 1
    seen.clear()
    names = [
        {"model_name": n, "litellm_params": {"model": f"mine/{n}", "extra_body": {"top_k": 1}}} for n in ("down", "vlm")
    ]
    router = litellm.Router(model_list=names, fallbacks=[{"down": ["vlm"]}], num_retries=1)
    asyncio.run(router.acompletion("down", request(shown(picture(1)), TEXT)["messages"]))
    assert [opened({"messages": one}) for one in seen] == [wanted] * len(seen) and len(seen) > 1
    seen.clear()
    for more in ({"messages": []}, {"chat_template": "x"}):
        with pytest.raises(litellm.BadRequestError, match="davsp: "):
            asked(request(TEXT, extra_body=more) | {"model": "mine/vlm"})
        with pytest.raises(litellm.BadRequestError, match="davsp: "):
            asked(request(TEXT, fallbacks=[{"model": "mine/vlm", **more}]) | {"model": "mine/vlm"})
    remote = request(shown("https://example.org/a.png"), TEXT)
    for data in (remote | {"model": "mine/vlm"}, remote | {"mock_response": "no"}):
        with pytest.raises(litellm.BadRequestError, match="data:image/png"):
            asked(data)
    assert not seen
    assert asked(request(shown(picture(1)), TEXT, mock_response="mocked")) == "mocked"
