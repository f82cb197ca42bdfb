"""LiteLLM (`pip install 'davsp[litellm]'`): the defense as a guardrail of a proxy that is already there.

    guardrails:                                  # config.yaml of the LiteLLM proxy
      - guardrail_name: davsp
        litellm_params:
          guardrail: davsp.plugins.litellm.DavspGuardrail
          mode: pre_call
          default_on: true
          prompt: out/demo/prompt                # folder or hub id
          canvas: 336                            # at which the model sees pictures without resampling

What it takes and refuses is what `davsp serve` does: the same code reads the request, its fields too (`allow_fields` is its
--allow-field). LiteLLM's own fields pass, but for those by which a client could bring messages that come after the defense. A request
that it cannot defend is an error, and nothing of it goes on. Outside the proxy `litellm.callbacks = [DavspGuardrail(...)]` defends `litellm.acompletion`; LiteLLM calls no hook
that may change a request in `litellm.completion`, so don't use that one.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from litellm.exceptions import BadRequestError
from litellm.integrations.custom_guardrail import CustomGuardrail
from litellm.types.guardrails import GuardrailEventHooks
from litellm.types.utils import all_litellm_params
from PIL import Image

from davsp.defenses import load_defense
from davsp.errors import DavspError
from davsp.serve import fields, messages
from davsp.serve.calls import asks_once
from davsp.serve.pictures import decode, from_data_url, to_data_url
from davsp.serve.refusals import Refusal
from davsp.serve.settings import ServeSettings
from davsp.serve.sweep import sweep

CHATS = {"completion", "acompletion"}  # LiteLLM's names of chat completions, the one kind whose messages are known
SILENT = {
    "embedding",
    "aembedding",
    "moderation",
    "amoderation",
    "rerank",
    "arerank",
}  # kinds that get no answer in words


WRITERS = {  # LiteLLM's own fields that write messages, templates or other requests once the hook has run
    "litellm_system_prompt", "user_continue_message", "assistant_continue_message", "fallbacks", "context_window_fallback_dict",
    "prompt_id", "prompt_variables", "prompt_label", "prompt_version", "prompt_environment", "custom_prompt_dict", "roles", "bos_token",
    "eos_token", "initial_prompt_value", "final_prompt_value", "hf_model_name", "model_list", "model_config", "supports_system_message",
}  # fmt: skip
KEPT = set(all_litellm_params) - WRITERS | {"timeout", "drop_params", "extra_headers", "disable_global_guardrails"}
"""What LiteLLM keeps for itself, so that no model sees it."""


class DavspGuardrail(CustomGuardrail):
    """Puts a prompt's border around every picture of a chat request, and its text at every question, before the model is called.

    Args:
        prompt: folder or hub id of what only changes the input (a border, noise, a text); USER/NAME@REVISION names a revision.
        canvas: side in pixels at which the model sees pictures without resampling.
        max_images, max_picture_bytes, max_pixels, max_aspect, allow_fields (a list): as in `davsp serve`.
        options: of LiteLLM's guardrails; the event is pre_call, and it is on by default.

    Raises:
        DavspError: a defense that wraps the call, a canvas that is not the prompt's, or limits that are none.
    """

    def __init__(self, prompt: str, canvas: int, **options: Any) -> None:
        limits = {name: options.pop(name) for name in _LIMITS if options.get(name) is not None}
        self.settings = ServeSettings.of(
            upstream="http://127.0.0.1/v1", canvas=canvas, **limits
        )  # the upstream is LiteLLM's
        self.defense = load_defense(prompt)
        if not asks_once(self.defense):
            raise DavspError(
                f"{self.defense.name} asks the model more than once, which no guardrail can; use davsp serve."
            )
        if (prompt_canvas := getattr(getattr(self.defense, "prompt", None), "canvas", canvas)) != canvas:
            raise DavspError(
                f"the prompt's canvas is {prompt_canvas}x{prompt_canvas} pixels and the model takes {canvas}x{canvas}; use another."
            )
        defaults: dict[str, Any] = {
            "guardrail_name": "davsp",
            "default_on": True,
            "event_hook": GuardrailEventHooks.pre_call,
        }
        super().__init__(supported_event_hooks=[GuardrailEventHooks.pre_call], **defaults | options)

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """The request as the model is to see it; LiteLLM's proxy calls this before it picks a deployment.

        Raises:
            BadRequestError: whatever cannot be defended: another kind of call that gets an answer, parts that are no text or
                picture, a picture that is not in the request itself or cannot be read, ...
        """
        return await self._defend(data, call_type, from_client=True)

    async def async_pre_call_deployment_hook(self, kwargs: dict[str, Any], call_type: Any) -> dict[str, Any]:
        """What the proxy's hook has not seen: calls of the SDK. LiteLLM's own version passes those that name no guardrail.

        Raises:
            BadRequestError: as `async_pre_call_hook`.
        """
        by_name = self.guardrail_name in (kwargs.get("guardrails") or [])
        if self._pre_call_hook_already_ran(kwargs) or not (self.default_on or by_name):
            return kwargs
        sent = await self._defend(kwargs, getattr(call_type, "value", f"{call_type}"), from_client=False)
        # fallbacks of the SDK ask again with what is given here; a router asks again with what it had, so its own is not marked
        sent |= {
            name: dict(sent[name]) for name in ("metadata", "litellm_metadata") if isinstance(sent.get(name), dict)
        }
        self.mark_pre_call_hook_ran(sent)
        return sent

    async def _defend(self, data: dict[str, Any], call_type: str, from_client: bool) -> dict[str, Any]:
        if call_type in SILENT:
            return data
        try:
            if call_type not in CHATS:
                raise DavspError(
                    f"a call of type {call_type} is not known, so it cannot be defended; use chat completions."
                )
            return data | {"messages": await asyncio.to_thread(self._defended, data, from_client)}
        except (DavspError, Refusal) as error:
            why = error.message if isinstance(error, Refusal) else f"{error}"
            raise BadRequestError(f"davsp: {why}", model=str(data.get("model")), llm_provider="davsp") from error

    def _defended(self, data: dict[str, Any], from_client: bool) -> list[dict[str, Any]]:
        conversation = messages.check(data)
        _check_fallbacks(data.get("fallbacks"), from_client)
        leaving = {name: value for name, value in data.items() if name not in KEPT and name != "fallbacks"}
        if from_client:
            fields.check(leaving, self.settings.allow_fields)
        else:  # the program's own; extra_body is what it, or the router's configuration, adds to the request
            fields.refuse(leaving := _flat(leaving))
        urls = messages.picture_urls(conversation)
        if len(urls) > self.settings.max_images:
            raise DavspError(f"messages hold {len(urls)} pictures, at most {self.settings.max_images}.")
        files = [from_data_url(url, self.settings.max_picture_bytes) for url in urls]
        pictures = [decode(file, self.settings) for file in files]
        canvases: set[str] = set()

        def send(picture: Image.Image) -> str:
            canvases.add(url := to_data_url(picture))
            return url

        defended = messages.defended(self.defense, conversation, pictures, send)
        sweep(leaving | {"messages": defended}, canvases)
        return defended


def _check_fallbacks(fallbacks: Any, from_client: bool) -> None:
    """Fallbacks may name models; LiteLLM lets them bring messages and fields of their own, which no hook would see again."""
    for fallback in fallbacks or ():
        named = isinstance(fallback, str)
        if not named and (from_client or "messages" in fallback):
            raise DavspError("fallbacks must be names of models, as what else they hold could not be defended.")
        if not named:
            fields.refuse(_flat(fallback))


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with those of `extra_body` among them, as they are sent."""
    extra = data.get("extra_body") or {}
    if not isinstance(extra, Mapping) or "messages" in extra:
        raise DavspError("extra_body must be an object without messages, as those could not be defended.")
    return {name: value for name, value in data.items() if name != "extra_body"} | dict(extra)


_LIMITS = ("max_images", "max_picture_bytes", "max_pixels", "max_aspect", "allow_fields")
