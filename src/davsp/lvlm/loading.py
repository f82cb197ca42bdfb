"""Reading a checkpoint's weights and template: devices, number formats, quantization."""

import json
from importlib.util import find_spec
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    GenerationConfig,
)
from transformers.utils import cached_file

from davsp.errors import DavspError
from davsp.runtime.files import read_json

ALREADY = {
    "fp8": (),
    "compressed-tensors": ("compressed_tensors",),
    "bitsandbytes": ("bitsandbytes",),
    "awq": ("gptqmodel",),
    "gptq": ("gptqmodel", "optimum"),
}
"""How a checkpoint may be quantized as it comes -> the packages that transformers needs for it."""
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def load_weights(
    model_id: str,
    revision: str | None,
    device_map: Any,
    dtype: torch.dtype,
    quantization: str | None = None,
    attn_implementation: str | None = None,
    already: dict[str, Any] | None = None,
) -> Any:
    """The transformers model on its device.

    Args:
        already: the checkpoint's own `quantization_config`, if it is quantized as it comes. FP8 is taken apart to `dtype`: its
            kernels have no backward pass, and the border needs the picture's gradient.

    Raises:
        DavspError: weights are missing, or the quantization is not possible here.
    """
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if attn_implementation:
        if attn_implementation not in ATTENTION:
            raise DavspError(
                f"--attn-implementation {attn_implementation!r} is not known: choose {', '.join(ATTENTION)}"
            )
        options["attn_implementation"] = attn_implementation
    if already:
        taken_apart = check_quantized(model_id, already, quantization)
        if taken_apart is not None:
            options["quantization_config"] = taken_apart
    single = str(device_map).split(":")[0] in ("cpu", "cuda", "mps")  # a single device needs no accelerate
    if quantization:
        options["quantization_config"] = quantized(quantization, dtype, model_id, revision)
        options["device_map"] = {"": device_map} if single else device_map
    elif not single:
        options["device_map"] = device_map
    weights_and_report: Any = AutoModelForImageTextToText.from_pretrained(
        model_id, revision=revision or "main", **options
    )
    model, report = weights_and_report
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random numbers
        raise DavspError(f"cannot load model {model_id}: it lacks the weights of {missing[0]}; restore its files")
    if already and already.get("quant_method") in APART:
        model = model.to(dtype)  # transformers takes them apart to bfloat16 where the scales are such
    return model.to(device_map) if single and not quantization else model


APART = ("fp8",)  # quantized as they come, and loaded as plain numbers


def check_quantized(model_id: str, config: dict[str, Any], quantization: str | None) -> Any:
    """How a checkpoint that is quantized as it comes is loaded; None: as transformers does by itself.

    Raises:
        DavspError: --quantization beside it, a method that davsp does not know, or packages that it needs and that are not here.
    """
    method = str(config.get("quant_method"))
    if quantization:
        raise DavspError(f"{model_id} is quantized already ({method}); leave --quantization out")
    if method not in ALREADY:
        known = ", ".join(ALREADY)
        raise DavspError(
            f"{model_id} is quantized by {method}, through which nobody has seen that the picture's gradient passes; take a "
            f"checkpoint that is not quantized, or by one of {known}"
        )
    if lacking := [name for name in ALREADY[method] if find_spec(name) is None]:
        raise DavspError(
            f"{model_id} is quantized by {method}, for which transformers needs {' and '.join(lacking)}: pip install "
            f"{' '.join(lacking)}, or take the checkpoint that is not quantized"
        )
    if method not in APART:
        return None
    settings = {name: value for name, value in config.items() if name not in ("quant_method", "dequantize")}
    return FineGrainedFP8Config(**settings, dequantize=True)


def make_greedy(model: Any) -> dict[str, Any]:
    """Take everything but the special tokens out of a checkpoint's generation settings, so that greedy is greedy.

    `generate` fills what it is not told from them: penalties, forbidden tokens, stop strings.

    Returns:
        What is gone and would have changed answers, as JSON; of no model that ships anything.
    """
    settings = model.generation_config
    tokens = {name: getattr(settings, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    ours = {*tokens, "max_length", "max_new_tokens", "use_cache", "transformers_version", "_from_model_config"}
    said = json.loads(settings.to_json_string(use_diff=True))
    return {name: value for name, value in said.items() if name not in ours and value not in (None, False)}


def quantized(kind: str, dtype: torch.dtype, model_id: str, revision: str | None) -> Any:
    """The settings of a quantized decoder; tower, projector and head keep `dtype`, as the picture's gradient needs them.

    Raises:
        DavspError: an unknown kind, or no bitsandbytes.
    """
    if kind not in ("4bit", "8bit"):
        raise DavspError(f"quantization '{kind}' is not known: choose 4bit or 8bit")
    if find_spec("bitsandbytes") is None:
        raise DavspError("quantization needs bitsandbytes and a GPU: pip install 'davsp[quantization]'")
    keep = beside_decoder(AutoConfig.from_pretrained(model_id, revision=revision))
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=keep
    )


def beside_decoder(config: Any) -> list[str]:
    """Names of all modules of a model that are not its decoder: towers, connectors, the head. Read from the model itself, without its
    weights, as every family has names of its own.
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    decoder = model.get_decoder()
    path = next(name for name, module in model.named_modules() if module is decoder)
    names = [name for name, _ in model.named_modules() if name and not f"{path}.".startswith(f"{name}.")]
    names = [name for name in names if not name.startswith(f"{path}.")]
    return [name for name in names if not any(name.startswith(f"{above}.") for above in names)]


def check_format(model_id: str, revision: str | None) -> None:
    """Raises DavspError for what people take for a checkpoint: a LoRA adapter alone, or LLaVA's own format."""

    def read(name: str) -> Any:
        path = cached_file(model_id, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return {} if path is None else read_json(path)

    config = read("config.json")
    if not config and (adapter := read("adapter_config.json")):
        raise DavspError(
            f"{model_id} is an adapter (LoRA) for {adapter.get('base_model_name_or_path')} and no model; merge it with peft's "
            "merge_and_unload, and save the model, the tokenizer and the processor of that one to a folder"
        )
    if "mm_vision_tower" in config:
        raise DavspError(
            f"{model_id} is in LLaVA's own format, which transformers does not read; take its conversion, such as "
            "llava-hf/llava-1.5-7b-hf or llava-hf/llava-1.5-13b-hf"
        )


def processor_file(model_id: str, revision: str | None) -> str:
    """The file that transformers reads the image processor from: processor_config.json, if it holds one, before the other."""
    name = "processor_config.json"
    path = cached_file(model_id, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return name if path is not None and "image_processor" in read_json(path) else "preprocessor_config.json"


def chat_template(model_id: str, revision: str | None, tokenizer: Any) -> Any:
    """The template that the checkpoint's processor takes; where it has none of its own, the tokenizer's.

    The tokenizer's is often that of the base model, which knows no pictures. Files are looked at in the order of transformers'
    processors; chat_template.jinja, the last of them, is read by the tokenizer as well.

    Raises:
        DavspError: there is none.
    """
    for name in ("processor_config.json", "chat_template.json"):
        path = cached_file(model_id, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if path is not None and (template := read_json(path).get("chat_template")) is not None:
            return template
    if tokenizer.chat_template is None:
        raise DavspError(f"{model_id} has no chat template; choose a chat checkpoint or add chat_template.jinja to it")
    return tokenizer.chat_template
