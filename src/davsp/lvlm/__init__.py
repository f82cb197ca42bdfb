"""Frozen vision-language models behind one small interface, a file a family."""

from davsp.lvlm.answering import Answer, AnsweringLVLM, Token, answer_length
from davsp.lvlm.aya_vision import AyaVisionLVLM
from davsp.lvlm.base import LVLM, Canvas, StepOutput, Tokens, loaded
from davsp.lvlm.deepseek_vl import DeepseekVLHybridLVLM, DeepseekVLLVLM
from davsp.lvlm.device import check_device
from davsp.lvlm.gemma3 import Gemma3LVLM
from davsp.lvlm.gemma4 import Gemma4LVLM
from davsp.lvlm.glm4v import Glm4vLVLM
from davsp.lvlm.hooks import Steer
from davsp.lvlm.idefics3 import Idefics3LVLM
from davsp.lvlm.identity import fingerprint, model_facts, model_name, short_name, template_of, template_record
from davsp.lvlm.internvl import InternVLLVLM
from davsp.lvlm.llava import LlavaLVLM
from davsp.lvlm.llava_next import LlavaNextLVLM, LlavaOnevisionLVLM
from davsp.lvlm.mistral3 import Mistral3LVLM
from davsp.lvlm.qwen2_5_vl import Qwen25VLLVLM
from davsp.lvlm.qwen2_vl import Qwen2VLLVLM
from davsp.lvlm.qwen3_5 import Qwen35LVLM
from davsp.lvlm.qwen3_vl import Qwen3VLLVLM

FAMILIES: dict[
    str, type[LVLM]
] = {  # by the checkpoint's `config.model_type`; a new one is a file and a line (docs/families.md)
    "llava": LlavaLVLM,
    "qwen2_vl": Qwen2VLLVLM,
    "qwen2_5_vl": Qwen25VLLVLM,
    "qwen3_vl": Qwen3VLLVLM,
    "qwen3_vl_moe": Qwen3VLLVLM,
    "qwen3_5": Qwen35LVLM,
    "gemma3": Gemma3LVLM,
    "gemma4": Gemma4LVLM,
    "internvl": InternVLLVLM,
    "glm4v": Glm4vLVLM,
    "glm4v_moe": Glm4vLVLM,
    "glm46v": Glm4vLVLM,
    "mistral3": Mistral3LVLM,
    "llava_next": LlavaNextLVLM,
    "llava_onevision": LlavaOnevisionLVLM,
    "idefics3": Idefics3LVLM,
    "smolvlm": Idefics3LVLM,
    "aya_vision": AyaVisionLVLM,
    "deepseek_vl": DeepseekVLLVLM,
    "deepseek_vl_hybrid": DeepseekVLHybridLVLM,
}

__all__ = [
    "FAMILIES",
    "LVLM",
    "Answer",
    "AnsweringLVLM",
    "AyaVisionLVLM",
    "Canvas",
    "DeepseekVLHybridLVLM",
    "DeepseekVLLVLM",
    "Gemma3LVLM",
    "Gemma4LVLM",
    "Glm4vLVLM",
    "Idefics3LVLM",
    "InternVLLVLM",
    "LlavaLVLM",
    "LlavaNextLVLM",
    "LlavaOnevisionLVLM",
    "Mistral3LVLM",
    "Qwen2VLLVLM",
    "Qwen3VLLVLM",
    "Qwen25VLLVLM",
    "Qwen35LVLM",
    "Steer",
    "StepOutput",
    "Token",
    "Tokens",
    "answer_length",
    "check_device",
    "fingerprint",
    "loaded",
    "model_facts",
    "model_name",
    "short_name",
    "template_of",
    "template_record",
]
