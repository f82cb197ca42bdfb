"""The guardrail under litellm itself: its hook's signature, its SDK with a mocked model, and what is refused.

`pip install -c requirements.lock -e '.[litellm]'`, then `python -m pytest tests/test_litellm.py`.
"""

import asyncio
import inspect
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("litellm", reason="needs the extra: pip install -c requirements.lock -e '.[litellm]'")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:davsp")]  # theirs to mend

import litellm  # noqa: E402
from litellm.integrations.custom_logger import CustomLogger  # noqa: E402

from davsp import DavspError, VisualSafetyPrompt  # noqa: E402
from davsp.plugins.litellm import DavspGuardrail  # noqa: E402
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


REFUSED = {
    "a remote picture": (request(shown("https://example.org/a.png"), TEXT), "data:image/png"),
    "a broken picture": (request(shown("data:image/png;base64,aGVsbG8="), TEXT), "cannot be read"),
    "an unknown part": (request({"type": "input_audio", "input_audio": {}}, TEXT), "no other can be defended"),
    "a picture in a tool's field": (request(TEXT, images=["x"]), "images would change"),
    "markdown": (request({"type": "text", "text": "![](data:image/png;base64,xx)"}), "as image_url"),
    "too many": (request(*[shown(picture(1, (9, 9)))] * 9, TEXT), "hold 9 pictures, at most 8"),
    "no messages": ({"model": "m"}, "messages must be a list"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_defended_raises_and_is_left_as_it_is(case: str, folder: Path):
    data, says = REFUSED[case]
    with pytest.raises(litellm.BadRequestError, match=says):
        hooked(DavspGuardrail(str(folder), 56), dict(data))


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
        async def acompletion(self, messages: Any, model_response: Any, **_: Any) -> Any:
            seen.append(messages)
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
    remote = request(shown("https://example.org/a.png"), TEXT)
    for data in (remote | {"model": "mine/vlm"}, remote | {"mock_response": "no"}):
        with pytest.raises(litellm.BadRequestError, match="data:image/png"):
            asked(data)
    assert not seen
    assert asked(request(shown(picture(1)), TEXT, mock_response="mocked")) == "mocked"
