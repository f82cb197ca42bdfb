"""The fields of a request that pass: those that are known to leave picture, question and refusal alone.

Everything else is refused by its name, so that what a server learns next year cannot pass unseen. Three kinds stay out:

- what holds a picture or changes what the model sees (`NEVER`; no option lets these in);
- what forces words or forbids a refusal: `logit_bias`, `prediction`, grammars (`structured_outputs`, `guided_*`, `regex`), `bad_words`,
  `min_tokens` and `ignore_eos` (which go on past "I am sorry"), a schema as `response_format`, a tool call that must be made, the
  beginning of an answer as the last message.
  A model that has to begin with "Sure" is not asked any more, and no border can help;
- what nobody here has heard of.

`--allow-field NAME` lets in a field of the last two kinds.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from davsp.serve.refusals import bad

NEVER = {  # each could change how the server reads the pictures or the question, or hold a picture
    "chat_template", "mm_processor_kwargs", "mm_kwargs", "media_io_kwargs", "multi_modal_data", "multi_modal_uuids", "images", "image",
    "image_data", "image_url", "image_embeds", "video_url", "video_data", "audio_url", "audio_data", "prompt", "prompt_embeds",
    "input_ids", "prompt_token_ids", "input_embeds", "continue_final_message", "add_generation_prompt", "extra_body",
}  # fmt: skip

ELSEWHERE = {  # of a Responses request: what the proxy does not see; no option lets these in
    "previous_response_id": "stands for messages that the proxy does not see; send the whole conversation as input",
    "previous_response": "holds messages that the proxy does not read; send the whole conversation as input",
    "previous_input_messages": "holds messages that the proxy does not read; send the whole conversation as input",
    "conversation": "stands for messages that the proxy does not see; send the whole conversation as input",
    "prompt": "stands for a template that the proxy does not see; write it out as instructions and input",
    "background": "asks for an answer that is fetched later, by a path that the proxy does not serve; leave it out",
}  # fmt: skip

TEMPLATE = ("enable_thinking", "thinking", "thinking_budget", "reasoning_effort")
"""Keys of `chat_template_kwargs` that pass: whether and how long a model thinks."""


def _anything(value: Any) -> bool:
    return True


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _scalars(value: Any) -> bool:
    return isinstance(value, dict) and all(_text(v) or _flag(v) or _number(v) for v in value.values())


def _list(value: Any) -> bool:
    return isinstance(value, list)


def _tools(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, dict) and v.get("type") == "function" for v in value)


def _object(value: Any) -> bool:
    return isinstance(value, dict)


def _wholes(value: Any) -> bool:
    return isinstance(value, list) and all(map(_whole, value))


def _stop(value: Any) -> bool:
    return _text(value) or _texts(value)


def _free_choice(value: Any) -> bool:
    return value in ("auto", "none")


def _free_format(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") in ("text", "json_object") and len(value) == 1


def _free_text(value: Any) -> bool:
    """`text` of a Responses request, which holds the format."""
    if not isinstance(value, dict) or value.keys() - {"format", "verbosity"}:
        return False
    return _free_format(value.get("format") or {"type": "text"}) and _text(value.get("verbosity") or "")


def _whole_input(value: Any) -> bool:
    return value == "disabled"


def _inclusions(value: Any) -> bool:
    return isinstance(value, list) and all(part == "message.output_text.logprobs" for part in value)


def _texts_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(v is None or _text(v) for v in value.values())


_FREE = (
    _free_choice,
    _free_format,
    _free_text,
    _whole_input,
    _inclusions,
    _tools,
)  # narrow for a reason; --allow-field widens them
_KINDS: dict[Callable[[Any], bool], tuple[str, str]] = {
    _text: ("a text", "model user service_tier safety_identifier prompt_cache_key prompt_cache_retention reasoning_effort verbosity request_id cache_salt"),
    _flag: (
        "true or false",
        "stream logprobs store parallel_tool_calls skip_special_tokens spaces_between_special_tokens include_stop_str_in_output "
        "use_beam_search early_stopping include_reasoning separate_reasoning stream_reasoning no_stop_trim cache_prompt "
        "return_tokens_as_token_ids return_token_ids return_progress timings_per_token",
    ),
    _number: (
        "a number",
        "temperature top_p frequency_penalty presence_penalty min_p top_a tfs typical_p repetition_penalty repeat_penalty length_penalty "
        "dynatemp_range dynatemp_exponent dry_multiplier dry_base xtc_probability xtc_threshold mirostat_tau mirostat_eta",
    ),
    _whole: (
        "a whole number",
        "max_tokens max_completion_tokens n seed top_logprobs top_k best_of repeat_last_n dry_allowed_length dry_penalty_last_n mirostat "
        "n_probs min_keep priority prompt_logprobs thinking_token_budget",
    ),
    _texts: ("a list of texts", "modalities"),
    _stop: ("a text or a list of texts", "stop"),
    _wholes: ("a list of whole numbers", "stop_token_ids"),
    _scalars: ("an object of texts, numbers and flags", "metadata stream_options audio prompt_cache_options"),
    _list: ("a list", "messages functions"),
    _tools: ("a list of tools of type function, as the server would read what another one brings undefended", "tools"),
    _object: ("an object", "web_search_options moderation"),
    _free_choice: ("auto or none, as a call that must be made cannot refuse", "tool_choice function_call"),
    _free_format: ("of type text or json_object, as a schema can force words", "response_format"),
}  # fmt: skip
KNOWN = {name: (fits, words) for fits, (words, names) in _KINDS.items() for name in names.split()}
"""Field -> whether a value is of its kind, and the kind in words. OpenAI's own but two, and the usual ones of the servers in docs/serve.md."""

_RESPONSES: dict[Callable[[Any], bool], tuple[str, str]] = {
    _anything: ("", "input previous_response_id conversation"),  # `davsp.serve.responses` looks at them
    _list: ("a list", "tools"),  # and at these
    _text: ("a text", "instructions"),
    _flag: ("true or false", "background"),
    _whole: ("a whole number", "max_output_tokens max_tool_calls"),
    _texts_by_name: ("an object of texts", "reasoning"),
    _free_text: (
        "an object of format (of type text or json_object, as a schema can force words) and verbosity",
        "text",
    ),
    _whole_input: ("disabled, as the server would drop what stands first, the defense's text with it", "truncation"),
    _inclusions: (
        "a list of message.output_text.logprobs, as the rest cannot be sent back through the proxy",
        "include",
    ),
}
_SHARED = (
    "model stream stream_options store metadata user service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "prompt_cache_options moderation priority tools tool_choice parallel_tool_calls top_logprobs temperature top_p top_k min_p typical_p seed stop frequency_penalty "
    "presence_penalty repetition_penalty repeat_penalty skip_special_tokens spaces_between_special_tokens include_stop_str_in_output "
    "cache_prompt"
)
RESPONSES = {name: KNOWN[name] for name in _SHARED.split()} | {
    name: (fits, words) for fits, (words, names) in _RESPONSES.items() for name in names.split()
}
"""The same of a Responses request."""


def check(
    body: Mapping[str, Any],
    allowed: Collection[str] = (),
    known: Mapping[str, tuple[Callable[[Any], bool], str]] = KNOWN,
) -> None:
    """Look at the fields of a request.

    Args:
        body: the request.
        known: of its protocol.
        allowed: fields of --allow-field; of `chat_template_kwargs` as "chat_template_kwargs.KEY".

    Raises:
        Refusal: a field that is not known or not of its kind; it names the field and the option.
    """
    refuse(body)
    _check_end(body, allowed)
    for name, value in body.items():
        if name == "chat_template_kwargs":
            _check_template(value, allowed)
        elif name in allowed or (value is None and name in known):
            continue
        elif name not in known:
            raise _unknown(name)
        elif not known[name][0](value):
            fits, words = known[name]
            mend = f" (--allow-field {name} lets it pass)" if fits in _FREE else ""
            raise bad(f"{name} must be {words}{mend}.", "field", name)


def refuse(body: Mapping[str, Any]) -> None:
    """Raises Refusal if a field is there that no option lets in, a key of `chat_template_kwargs` among them."""
    template = body.get("chat_template_kwargs")
    keys = {f"chat_template_kwargs.{key}" for key in template} if isinstance(template, Mapping) else set()
    for name in filter(never, sorted(body.keys() | keys)):
        raise bad(f"{name} would change what the model sees of picture or question; leave it out.", "field", name)


def never(name: str) -> bool:
    """Whether no option lets a field in; of `chat_template_kwargs` as "chat_template_kwargs.KEY"."""
    return name.removeprefix("chat_template_kwargs.") in NEVER


def _check_end(body: Mapping[str, Any], allowed: Collection[str]) -> None:
    """TGI and llama.cpp go on with a last message of the assistant, which so could begin with "Sure"."""
    name = "messages" if "messages" in body else "input"
    conversation = body.get(name)
    if name in allowed or not isinstance(conversation, list) or not conversation:
        return
    if conversation[-1].get("role") == "assistant" or conversation[-1].get("type") in ("reasoning", "function_call"):
        raise bad(
            f"{name} ends with the assistant, and some servers go on with that, so that words could be forced; end with a question "
            f"or a tool's output (--allow-field {name} lets it pass).",
            "field",
            name,
        )


def _check_template(value: Any, allowed: Collection[str]) -> None:
    if value is None:
        return
    if not _scalars(value):
        raise bad(
            "chat_template_kwargs must be an object of texts, numbers and flags.", "field", "chat_template_kwargs"
        )
    for key in value:
        if key not in TEMPLATE and f"chat_template_kwargs.{key}" not in allowed:
            raise _unknown(f"chat_template_kwargs.{key}")


def _unknown(name: str) -> Exception:
    return bad(
        f"{name[:80]} is no field that is known to leave picture, question and refusal alone; leave it out, or allow it "
        f"(--allow-field {name[:80]}).",
        "field",
        name[:80],
    )
