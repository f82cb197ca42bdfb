"""Tiny checkpoints of the families that came later: their marks, templates, models and image processors."""

from typing import Any

from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    CLIPVisionConfig,
    Cohere2Config,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessorPil,
    Gemma4TextConfig,
    Gemma4VisionConfig,
    Glm4vImageProcessorPil,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm4vMoeTextConfig,
    Glm4vMoeVisionConfig,
    Glm4vTextConfig,
    Glm4vVisionConfig,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    Glm46VImageProcessorPil,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessorPil,
    PixtralVisionConfig,
    Qwen2VLImageProcessorPil,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)

COMMON = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
STYLES = {"idefics3": "smolvlm", "glm46v": "glm4v"}  # where the family's marks and template are another's
MARKS = {
    "aya": {
        "img_patch_token": "<|IMG_PATCH|>",
        "image_token": "<image>",
        "start_of_img_token": "<|START_OF_IMG|>",
        "end_of_img_token": "<|END_OF_IMG|>",
        "global": "TILE_GLOBAL",
    }
    | {f"tile_{i}": f"TILE_{i}" for i in range(1, 13)},
    "gemma4": {
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "sot_token": "<|turn>",
        "eot_token": "<turn|>",
        "video_token": "<|video|>",
        "audio_token": "<|audio|>",
    },
    "smolvlm": {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    | {f"row_{r}_col_{c}": f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)},
    "mistral": {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
}
TEMPLATES = {
    "aya": (
        "{{ bos_token }}{% for message in messages %}<|im_start|>{% for content in message['content'] %}"
        "{% if content['type'] == 'image' %}<image>{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    ),
    "gemma4": (
        "{{ bos_token }}{% for message in messages %}<|turn>{{ message['role'] }}\n{% for content in message['content'] %}"
        "{% if content['type'] == 'image' %}<|image|>{% else %}{{ content['text'] | trim }}{% endif %}{% endfor %}<turn|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}[INST]{% for content in message['content'] %}"
        "{% if content['type'] == 'image' %}[IMG]{% else %}{{ content['text'] }}{% endif %}{% endfor %}[/INST]{% endfor %}"
    ),
    "smolvlm": (
        "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:{% for content in message['content'] %}"
        "{% if content['type'] == 'image' %}<image>{% else %} {{ content['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n"
        "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
}


def mistral3(llama: LlamaConfig, image: int, words: Any) -> tuple[Any, Any]:
    vision = PixtralVisionConfig(**COMMON, num_hidden_layers=2, head_dim=8, patch_size=14, image_size=224)
    config = Mistral3Config(vision_config=vision, text_config=llama, image_token_index=image, spatial_merge_size=2)
    config.tie_word_embeddings = False
    processor = PixtralImageProcessorPil(size={"longest_edge": 224}, patch_size={"height": 14, "width": 14})
    return Mistral3ForConditionalGeneration(config), processor


def llava_next(llama: LlamaConfig, image: int, words: Any) -> tuple[Any, Any]:
    """Grids as LLaVA-NeXT has them, so a canvas of one tile lies in a grid of two."""
    grids = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    vision = CLIPVisionConfig(**COMMON, num_hidden_layers=3, image_size=28, patch_size=7)
    config = LlavaNextConfig(
        vision_config=vision, text_config=llama, image_token_index=image, image_grid_pinpoints=grids,
        vision_feature_layer=-2, image_seq_length=16,
    )  # fmt: skip
    size = {"height": 28, "width": 28}
    processor = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size=size, image_grid_pinpoints=grids)
    return LlavaNextForConditionalGeneration(config), processor


def llava_onevision(llama: LlamaConfig, image: int, words: Any) -> tuple[Any, Any]:
    grids = [[28 * rows, 28 * columns] for rows in range(1, 5) for columns in range(1, 5)]
    vision = SiglipVisionConfig(**COMMON, num_hidden_layers=3, image_size=28, patch_size=7, vision_use_head=False)
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=llama, image_token_index=image, image_grid_pinpoints=grids,
        vision_feature_layer=-1, vision_aspect_ratio="anyres_max_4",
    )  # fmt: skip
    processor = LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, image_grid_pinpoints=grids)
    return LlavaOnevisionForConditionalGeneration(config), processor


def idefics3(llama: LlamaConfig, image: int, words: Any) -> tuple[Any, Any]:
    vision = {**COMMON, "num_hidden_layers": 2, "image_size": 28, "patch_size": 7}
    config = Idefics3Config(vision_config=vision, text_config=llama, image_token_id=image, scale_factor=2)
    sizes = {"size": {"longest_edge": 28}, "max_image_size": {"longest_edge": 28}}
    return Idefics3ForConditionalGeneration(config), Idefics3ImageProcessorPil(**sizes)


def smolvlm(llama: LlamaConfig, image: int, words: Any) -> tuple[Any, Any]:
    """Two by two tiles and the whole, as its checkpoints have four by four."""
    vision = {**COMMON, "num_hidden_layers": 2, "image_size": 28, "patch_size": 7}
    config = SmolVLMConfig(vision_config=vision, text_config=llama, image_token_id=image, scale_factor=2)
    sizes = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
    return SmolVLMForConditionalGeneration(config), SmolVLMImageProcessorPil(**sizes)


def aya_vision(llama: LlamaConfig, image: int, words: Any) -> tuple[Any, Any]:
    vision = SiglipVisionConfig(**COMMON, num_hidden_layers=2, image_size=28, patch_size=7, vision_use_head=False)
    text = Cohere2Config(
        **COMMON, num_hidden_layers=4, num_key_value_heads=2, vocab_size=len(words), sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2, pad_token_id=0, bos_token_id=1, eos_token_id=2, logit_scale=1.0,
    )  # fmt: skip
    config = AyaVisionConfig(vision_config=vision, text_config=text, image_token_index=image, downsample_factor=2)
    return AyaVisionForConditionalGeneration(config), GotOcr2ImageProcessorPil(size={"height": 28, "width": 28})


def gemma4(llama: LlamaConfig, image: int, words: Any) -> tuple[Any, Any]:
    text = Gemma4TextConfig(
        **COMMON, num_hidden_layers=4, num_key_value_heads=2, head_dim=8, global_head_dim=8, vocab_size=len(words),
        vocab_size_per_layer_input=len(words), hidden_size_per_layer_input=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=1,
        use_bidirectional_attention="vision",
    )  # fmt: skip
    vision = Gemma4VisionConfig(
        **COMMON, num_hidden_layers=2, num_key_value_heads=4, head_dim=8, patch_size=4, pooling_kernel_size=3,
        position_embedding_size=256,
    )  # fmt: skip
    marks = MARKS["gemma4"]
    begin, end, turn, video, audio = words.convert_tokens_to_ids(
        [marks[name] for name in ("boi_token", "eoi_token", "eot_token", "video_token", "audio_token")]
    )
    config = Gemma4Config(
        text_config=text, vision_config=vision, audio_config=None, image_token_id=image, boi_token_id=begin,
        eoi_token_id=end, video_token_id=video, audio_token_id=audio,
    )  # fmt: skip
    model = Gemma4ForConditionalGeneration(config)
    model.generation_config.eos_token_id = [2, turn]
    return model, Gemma4ImageProcessorPil(max_soft_tokens=70, patch_size=4)


GLM_IDS = ("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")


def _glm(words: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    """Settings of the decoder, of the tower, and the marks' ids."""
    text = {**COMMON, "num_hidden_layers": 4, "num_key_value_heads": 2, "vocab_size": len(words), "max_position_embeddings": 512,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0,
                                "partial_rotary_factor": 1.0}}  # fmt: skip
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_heads": 4,
              "patch_size": 14, "image_size": 112}  # fmt: skip
    names = ["image_token_id", "video_token_id", "image_start_token_id", "image_end_token_id"]
    names += ["video_start_token_id", "video_end_token_id"]
    return text, vision, dict(zip(names, words.convert_tokens_to_ids(list(GLM_IDS)), strict=True))


GLM_SIZE = {"shortest_edge": 56 * 56 * 2, "longest_edge": 28 * 28 * 128}


def glm4v_moe(llama: LlamaConfig, image: int, words: Any) -> tuple[Any, Any]:
    text, vision, ids = _glm(words)
    # all experts speak: which ones do is no function with a gradient
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
    config = Glm4vMoeConfig(
        text_config=Glm4vMoeTextConfig(**text, **experts), vision_config=Glm4vMoeVisionConfig(**vision), **ids
    )
    return Glm4vMoeForConditionalGeneration(config), Glm4vImageProcessorPil(size=GLM_SIZE)


def glm46v(llama: LlamaConfig, image: int, words: Any) -> tuple[Any, Any]:
    text, vision, ids = _glm(words)
    config = Glm46VConfig(text_config=Glm4vTextConfig(**text), vision_config=Glm4vVisionConfig(**vision), **ids)
    return Glm46VForConditionalGeneration(config), Glm46VImageProcessorPil(size=GLM_SIZE)


def qwen3_vl_moe(llama: LlamaConfig, image: int, words: Any) -> tuple[Any, Any]:
    text = {**COMMON, "num_hidden_layers": 4, "num_key_value_heads": 2, "vocab_size": len(words), "head_dim": 8,
            "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 5, "num_experts": 4,
            "num_experts_per_tok": 4, "moe_intermediate_size": 32,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}  # fmt: skip
    vision = {"depth": 3, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 16,
              "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}  # fmt: skip
    video, begin, end = words.convert_tokens_to_ids(["<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
    config = Qwen3VLMoeConfig(
        text_config=text, vision_config=vision, image_token_id=image, video_token_id=video, vision_start_token_id=begin,
        vision_end_token_id=end,
    )  # fmt: skip
    processor = Qwen2VLImageProcessorPil(
        min_pixels=64 * 64, max_pixels=32 * 32 * 64, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return Qwen3VLMoeForConditionalGeneration(config), processor


BUILD = {
    "aya_vision": aya_vision,
    "gemma4": gemma4,
    "glm4v_moe": glm4v_moe,
    "glm46v": glm46v,
    "qwen3_vl_moe": qwen3_vl_moe,
    "mistral3": mistral3,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
}
