"""Tiny checkpoints of the families that came later: their marks, templates, models and image processors."""

from typing import Any

from transformers import (
    LlamaConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessorPil,
    PixtralVisionConfig,
)

COMMON = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
STYLES: dict[str, str] = {}  # where the family's marks and template are another's
MARKS = {
    "mistral": {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
}
TEMPLATES = {
    "mistral": (
        "{{ bos_token }}{% for message in messages %}[INST]{% for content in message['content'] %}"
        "{% if content['type'] == 'image' %}[IMG]{% else %}{{ content['text'] }}{% endif %}{% endfor %}[/INST]{% endfor %}"
    ),
}


def mistral3(llama: LlamaConfig, image: int, words: Any) -> tuple[Any, Any]:
    vision = PixtralVisionConfig(**COMMON, num_hidden_layers=2, head_dim=8, patch_size=14, image_size=224)
    config = Mistral3Config(vision_config=vision, text_config=llama, image_token_index=image, spatial_merge_size=2)
    config.tie_word_embeddings = False
    processor = PixtralImageProcessorPil(size={"longest_edge": 224}, patch_size={"height": 14, "width": 14})
    return Mistral3ForConditionalGeneration(config), processor


BUILD = {"mistral3": mistral3}
