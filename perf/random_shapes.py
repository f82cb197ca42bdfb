"""Three models of today in their published shapes, with random weights, made where they are to run: nothing is downloaded.

Shapes: config.json of llava-hf/llava-1.5-13b-hf, Qwen/Qwen2.5-VL-7B-Instruct and OpenGVLab/InternVL3-8B-hf, from memory of their
architectures and checked by the number of parameters alone (INFERRED: no hub could be reached).
"""

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLImageProcessorPil,
)

from davsp import LVLM
from davsp.lvlm import FAMILIES

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>", "<start>", "<end>"]
IMAGE, VIDEO, START, END = 4, 5, 6, 7
TEMPLATE = "w0 w1 w2 {% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}PICTURE {% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
QWEN_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "vocab_size": 152064, "max_position_embeddings": 32768,
}  # fmt: skip
SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "vocab_size": 200, "max_position_embeddings": 2048,
}  # fmt: skip
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llava(small: bool) -> tuple[Any, Any, str]:
    """LLaVA-1.5-13B: CLIP ViT-L at 336 pixels, Llama of 40 blocks."""
    decoder = SMALL if small else {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40, "vocab_size": 32064,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    side = 56 if small else 336
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2} if small else {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24, "projection_dim": 768,
    }  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower, image_size=side, patch_size=14), text_config=LlamaConfig(**decoder, **ENDS),
        image_token_index=IMAGE,
    )  # fmt: skip
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return LlavaForConditionalGeneration(config), processor, "<image>"


def qwen(small: bool) -> tuple[Any, Any, str]:
    """Qwen2.5-VL-7B at 448 pixels."""
    text = {**(SMALL if small else QWEN_7B), **ENDS}
    section = [1, 1, 2] if small else [16, 24, 24]
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": section, "rope_theta": 1e6}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "fullatt_block_indexes": [1]} if small else {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    vision |= {"out_hidden_size": text["hidden_size"], "patch_size": 14, "window_size": 112}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START,
        vision_end_token_id=END,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config), Qwen2VLImageProcessorPil(), "<start> <image> <end>"


def internvl(small: bool) -> tuple[Any, Any, str]:
    """InternVL3-8B on one tile of 448 pixels."""
    side, tokens = (56, 4) if small else (448, 256)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2} if small else {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
    }  # fmt: skip
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**tower, image_size=[side, side], patch_size=[14, 14]),
        text_config=Qwen2Config(**{**(SMALL if small else QWEN_7B), **ENDS}), image_token_id=IMAGE, image_seq_length=tokens,
        tie_word_embeddings=False,
    )  # fmt: skip
    return (
        InternVLForConditionalGeneration(config),
        GotOcr2ImageProcessorPil(size={"height": side, "width": side}),
        "<image>",
    )


SHAPES: dict[str, tuple[Callable[[bool], tuple[Any, Any, str]], str]] = {
    "LLaVA-1.5-13B": (llava, "llava"),
    "Qwen2.5-VL-7B": (qwen, "qwen2_5_vl"),
    "InternVL3-8B": (internvl, "internvl"),
}


def build(name: str, small: bool, device: str, dtype: torch.dtype) -> LVLM:
    """The model on its device, in davsp's interface; weights of seed 0, each matrix N(0, 1 / inputs)."""
    make, family = SHAPES[name]
    usual = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model, processor, picture = make(small)
            for weight in model.parameters():
                if weight.dim() > 1:
                    torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    finally:
        torch.set_default_dtype(usual)
    model.generation_config.eos_token_id = None  # answers of random weights: as long as they are asked for
    words = {
        word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(SMALL["vocab_size"] - len(SPECIAL)))])
    }
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    marks = {"context_image_token": "<image>", "start_image_token": "<start>", "end_image_token": "<end>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template=TEMPLATE.replace("PICTURE", picture), extra_special_tokens=marks,
    )  # fmt: skip
    canvas = 112 if small and family.startswith("qwen") else None
    return FAMILIES[family](model, tokenizer, processor, f"random {name}", None, canvas)
