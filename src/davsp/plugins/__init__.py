"""davsp inside other people's tools: Inspect and LiteLLM. Each module needs its extra; nothing of davsp imports them."""
