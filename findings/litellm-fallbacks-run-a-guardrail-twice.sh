#!/usr/bin/env bash
# LiteLLM 1.110.2, acompletion(fallbacks=[...]) with a guardrail that changes messages (async_pre_call_deployment_hook).
# Expected: the model is sent what the guardrail made of the question, once: "safe q".
# Seen: with `fallbacks` the hook runs again on the messages that it has changed, although nothing failed: "safe safe q".
# So a guardrail has to know its own work again (docs/plugins.md). The model is mocked, nothing is sent anywhere.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check litellm==1.110.2
cd "$folder"
LITELLM_LOCAL_MODEL_COST_MAP=True venv/bin/python - 2>/dev/null <<'P'
import asyncio
import litellm
from litellm.integrations.custom_guardrail import CustomGuardrail

sent = []

class Guard(CustomGuardrail):
    async def async_pre_call_deployment_hook(self, kwargs, call_type):
        question = kwargs["messages"][0]["content"]
        return kwargs | {"messages": [{"role": "user", "content": "safe " + question}]}

class Model(litellm.CustomLLM):
    async def acompletion(self, model, messages, model_response, **_):
        sent.append(messages[0]["content"])
        model_response.choices[0].message.content = "ok"
        return model_response

litellm.custom_provider_map = [{"provider": "mine", "custom_handler": Model()}]
litellm.callbacks = [Guard(guardrail_name="g", default_on=True)]
litellm.utils.custom_llm_setup()
ask = [{"role": "user", "content": "q"}]
asyncio.run(litellm.acompletion(model="mine/up", messages=ask))
asyncio.run(litellm.acompletion(model="mine/up", messages=ask, fallbacks=["mine/other"]))
print("without fallbacks:", sent[0], "| with fallbacks:", sent[1])
assert sent == ["safe q", "safe safe q"], "the behaviour has changed"
P
