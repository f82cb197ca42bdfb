"""Frozen vision-language models behind one small interface, a file a family."""

from davsp.lvlm.base import LVLM, StepOutput, Tokens
from davsp.lvlm.device import check_device
from davsp.lvlm.identity import fingerprint, model_name, short_name
from davsp.lvlm.llava import LlavaLVLM

FAMILIES: dict[str, type[LVLM]] = {"llava": LlavaLVLM}  # by the checkpoint's `config.model_type`

__all__ = [
    "FAMILIES",
    "LVLM",
    "LlavaLVLM",
    "StepOutput",
    "Tokens",
    "check_device",
    "fingerprint",
    "model_name",
    "short_name",
]
