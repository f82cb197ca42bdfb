"""Reading a checkpoint's weights and template: devices, number formats, quantization."""

from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.utils import cached_file

from davsp.errors import DavspError
from davsp.runtime.files import read_json


def load_weights(
    model_id: str, revision: str | None, device_map: Any, dtype: torch.dtype, quantization: str | None = None
) -> Any:
    """The transformers model on its device.

    Raises:
        DavspError: weights are missing, or the quantization is not possible here.
    """
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    single = str(device_map).split(":")[0] in ("cpu", "cuda", "mps")  # a single device needs no accelerate
    if quantization:
        options["quantization_config"] = quantized(quantization, dtype)
        options["device_map"] = {"": device_map} if single else device_map
    elif not single:
        options["device_map"] = device_map
    weights_and_report: Any = AutoModelForImageTextToText.from_pretrained(
        model_id, revision=revision or "main", **options
    )
    model, report = weights_and_report
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random numbers
        raise DavspError(f"cannot load model {model_id}: it lacks the weights of {missing[0]}; restore its files")
    return model.to(device_map) if single and not quantization else model


def quantized(kind: str, dtype: torch.dtype) -> Any:
    """The settings of a quantized decoder; tower, projector and head keep `dtype`, as the picture's gradient needs them.

    Raises:
        DavspError: an unknown kind, or no bitsandbytes.
    """
    if kind not in ("4bit", "8bit"):
        raise DavspError(f"quantization '{kind}' is not known: choose 4bit or 8bit")
    if find_spec("bitsandbytes") is None:
        raise DavspError("quantization needs bitsandbytes and a GPU: pip install 'davsp[quantization]'")
    keep = ["lm_head", "vision_tower", "multi_modal_projector", "visual", "vision_model", "aligner"]
    keep += ["high_res_vision_model", "high_res_vision_neck", "high_res_vision_proj"]
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=keep
    )


def processor_template(model_id: str, revision: str | None) -> str:
    """The chat template of older checkpoints, which keep it beside the tokenizer."""
    path = cached_file(model_id, "chat_template.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if path is None:
        raise DavspError(f"{model_id} has no chat template; choose a chat checkpoint or add chat_template.jinja to it")
    return read_json(path)["chat_template"]
