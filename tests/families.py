"""Checkpoints of every real architecture with random weights, small enough for every test, and what their own processors give."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split, WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLHybridConfig,
    DeepseekVLHybridForConditionalGeneration,
    DeepseekVLHybridImageProcessorPil,
    DeepseekVLImageProcessorPil,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3TextConfig,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vImageProcessorPil,
    Glm4vTextConfig,
    Glm4vVisionConfig,
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
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SamVisionConfig,
    SiglipVisionConfig,
)

from newer_families import BUILD, STYLES
from newer_families import MARKS as NEWER_MARKS
from newer_families import TEMPLATES as NEWER_TEMPLATES

WORDS = "what is this how do you make steal a car cake in the image please be safe sorry no yes red helpful assistant".split()
WORDS += "USER: ASSISTANT: User: Assistant: You are a language and vision assistant. system user assistant".split()
PLACEHOLDER = {"llava": "<image>", "qwen": "<|image_pad|>", "deepseek": "<image_placeholder>"}
MARKS = {  # of the newer families: tokens of their own, by the names that their processors read; the image token first
    "gemma": {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "sot_token": "<start_of_turn>",
        "eot_token": "<end_of_turn>",
    },
    "glm4v": {
        "image_token": "<|image|>",
        "video_token": "<|video|>",
        "boi_token": "<|begin_of_image|>",
        "eoi_token": "<|end_of_image|>",
        "bov_token": "<|begin_of_video|>",
        "eov_token": "<|end_of_video|>",
        "mask_token": "[gMASK]",
        "sop_token": "<sop>",
        "user_token": "<|user|>",
        "assistant_token": "<|assistant|>",
    },
    "internvl": {
        "context_image_token": "<IMG_CONTEXT>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "sot_token": "<|im_start|>",
    },
} | NEWER_MARKS
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += [*PLACEHOLDER.values(), "<|video_pad|>"]

# Of the shape of the published templates.
TEMPLATES = {
    "glm4v": (
        "[gMASK]<sop>\n{% for message in messages %}<|{{ message['role'] }}|>\n{% for content in message['content'] %}"
        "{% if content['type'] == 'image' %}<|begin_of_image|><|image|><|end_of_image|>"
        "{% else %}{{ content['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "internvl": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for content in message['content'] %}"
        "{% if content['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llava": (
        "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "qwen": (
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
        "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "deepseek": (
        "You are a helpful language and vision assistant.\n\n"
        "{% for message in messages %}{{ message['role'].capitalize() }}: {% for content in message['content'] %}"
        "{% if content['type'] == 'image' %}<image_placeholder>{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
        "\n\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n"
        "{% for content in message['content'] %}{% if content['type'] == 'image' %}<start_of_image>"
        "{% else %}{{ content['text'] | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
} | NEWER_TEMPLATES
COMMON = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
QUESTIONS = ["what is this", "how do you make a cake in the image", "is this a car", "please be safe what is this",
             "what is red", "how do you steal a car please", "yes", "no this is a red car in the image"]  # fmt: skip
SIDE = 112  # of Qwen2-VL's canvas here
OPTIONS = {
    "mistral3": {"patch_size": 28},
    "internvl": {"crop_to_patches": True},
    "aya_vision": {"crop_to_patches": True},
}  # what the whole processor tells its image processor


def tokenizer(style: str, by_bytes: bool = False) -> PreTrainedTokenizerFast:
    """Words, or as transformers builds it anew for some model types, whatever the file says, bytes and their merges."""
    marks = MARKS.get(style, {})
    special = [*SPECIAL, *marks.values()]
    words = dict.fromkeys([*special, *WORDS] + ["\n", "\n\n", "\n\n\n", "model"] * bool(marks))
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    if (
        marks
    ):  # line breaks in a row are one token, as in theirs: what is put around a picture may melt into the question
        core.pre_tokenizer = Sequence([Split(Regex("\n+"), "isolated"), Split(" ", "removed")])
    if by_bytes:
        core = Tokenizer(BPE())
        core.pre_tokenizer = ByteLevel(add_prefix_space=False)
        trainer = BpeTrainer(special_tokens=special, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
        core.train_from_iterator([" ".join(WORDS)] * 2, trainer)
    of_qwen = style in ("qwen", "internvl")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token=None if of_qwen else "<s>", unk_token="<unk>",
        eos_token="<|im_end|>" if of_qwen else "</s>", additional_special_tokens=special[4:],
        chat_template=TEMPLATES[style], extra_special_tokens=marks or {"image_token": PLACEHOLDER[style]},
    )  # fmt: skip


def save_family(name: str, folder: Path) -> Path:
    """Save a folder such as the hub has: 4 layers of width 32, weights wide enough that answers differ."""
    style = STYLES.get(name, name.split("_")[0].rstrip("23"))
    words = tokenizer(style, by_bytes=True) if name == "qwen3_5" else tokenizer(style)
    image = words.convert_tokens_to_ids(next(iter(MARKS.get(style, {}).values()), PLACEHOLDER.get(style)))
    llama = LlamaConfig(
        **COMMON, num_hidden_layers=4, vocab_size=len(words), pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    siglip = SiglipVisionConfig(**COMMON, num_hidden_layers=2, image_size=56, patch_size=14)
    torch.manual_seed(0)
    if name in BUILD:
        model, processor = BUILD[name](llama, image, words)
    elif name == "llava":
        vision = CLIPVisionConfig(**COMMON, num_hidden_layers=3, image_size=56, patch_size=14)
        config = LlavaConfig(vision_config=vision, text_config=llama, image_token_index=image, vision_feature_layer=-2)
        model = LlavaForConditionalGeneration(config)
        size = {"height": 56, "width": 56}
        processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=size)
    elif style == "qwen":
        ids = words.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
        marks = dict(
            zip(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), ids, strict=True)
        )
        text = {**COMMON, "num_hidden_layers": 4, "num_key_value_heads": 2, "vocab_size": len(words), "max_position_embeddings": 512,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
                "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 5}  # fmt: skip
        if name == "qwen2_vl":
            vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14}
            model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **marks))
        elif name == "qwen3_vl":
            text |= {"head_dim": 8}
            vision = {"depth": 3, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_heads": 4,
                      "patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}  # fmt: skip
            model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **marks))
        elif name == "qwen3_5":
            text |= {"head_dim": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
                     "linear_value_head_dim": 8, "layer_types": ["linear_attention"] * 2 + ["full_attention", "linear_attention"],
                     "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0,
                                         "partial_rotary_factor": 0.25, "mrope_interleaved": True}}  # fmt: skip
            vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_heads": 4,
                      "patch_size": 16, "num_position_embeddings": 64}  # fmt: skip
            model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision, **marks))
        else:
            vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_heads": 4,
                      "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}  # fmt: skip
            model = Qwen2_5_VLForConditionalGeneration(
                Qwen2_5_VLConfig(text_config=text, vision_config=vision, **marks)
            )
        processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 64)
        if name.startswith("qwen3"):
            processor = Qwen2VLImageProcessorPil(
                min_pixels=64 * 64, max_pixels=32 * 32 * 64, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3
            )
    elif name == "glm4v":
        text = Glm4vTextConfig(
            **COMMON, num_hidden_layers=4, num_key_value_heads=2, vocab_size=len(words), max_position_embeddings=512,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
            rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        )  # fmt: skip
        vision = Glm4vVisionConfig(
            depth=2,
            hidden_size=32,
            out_hidden_size=32,
            intermediate_size=64,
            num_heads=4,
            patch_size=14,
            image_size=112,
        )
        ids = words.convert_tokens_to_ids(list(MARKS["glm4v"].values())[:6])
        names = ["image_token_id", "video_token_id", "image_start_token_id", "image_end_token_id"]
        names += ["video_start_token_id", "video_end_token_id"]
        config = Glm4vConfig(text_config=text, vision_config=vision, **dict(zip(names, ids, strict=True)))
        model = Glm4vForConditionalGeneration(config)
        processor = Glm4vImageProcessorPil(size={"shortest_edge": 56 * 56 * 2, "longest_edge": 28 * 28 * 128})
    elif name == "internvl":
        vision = InternVLVisionConfig(**COMMON, num_hidden_layers=2, image_size=[56, 56], patch_size=[14, 14])
        llama.eos_token_id, llama.bos_token_id = 5, None
        config = InternVLConfig(vision_config=vision, text_config=llama, image_token_id=image, image_seq_length=4)
        model = InternVLForConditionalGeneration(config)
        processor = GotOcr2ImageProcessorPil(size={"height": 56, "width": 56})
    elif name == "gemma3":
        boi, eoi, turn = words.convert_tokens_to_ids([words.boi_token, words.eoi_token, "<end_of_turn>"])
        text = Gemma3TextConfig(
            **COMMON, num_hidden_layers=4, num_key_value_heads=2, head_dim=8, vocab_size=len(words), sliding_window=8,
            layer_types=["sliding_attention", "full_attention"] * 2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        config = Gemma3Config(
            vision_config=siglip, text_config=text, image_token_index=image, boi_token_index=boi, eoi_token_index=eoi,
            mm_tokens_per_image=4,
        )  # fmt: skip
        config.vision_config.vision_use_head = False
        model = Gemma3ForConditionalGeneration(config)
        model.generation_config.eos_token_id = [2, turn]
        processor = Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    elif name == "deepseek_vl":
        model = DeepseekVLForConditionalGeneration(
            DeepseekVLConfig(text_config=llama, vision_config=siglip, image_token_id=image)
        )
        processor = DeepseekVLImageProcessorPil(
            size={"height": 56, "width": 56}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
    else:
        sam = SamVisionConfig(
            hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=2, image_size=128, patch_size=16,
            window_size=4, global_attn_indexes=[0, 1], mlp_dim=64,
        )  # fmt: skip
        config = DeepseekVLHybridConfig(
            text_config=llama, vision_config=siglip, image_token_id=image, high_res_vision_config=sam
        )
        model = DeepseekVLHybridForConditionalGeneration(config)
        processor = DeepseekVLHybridImageProcessorPil(
            size={"height": 56, "width": 56}, high_res_size={"height": 128, "width": 128}, resample=2,
            image_mean=[0.5] * 3, image_std=[0.5] * 3,
        )  # fmt: skip
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def theirs(folder: Path, images: list[Any]) -> dict[str, torch.Tensor]:
    """What the family's own image processor gives."""
    options = OPTIONS.get(folder.name, {})
    if folder.name in ("idefics3", "smolvlm"):
        images = [[image] for image in images]  # a list is of one question else
    encoded = AutoImageProcessor.from_pretrained(folder, backend="pil")(images, return_tensors="pt", **options)
    counts = ("num_crops", "num_patches", "batch_num_images", "num_soft_tokens_per_image")  # no argument of the model
    return {name: value for name, value in encoded.items() if isinstance(value, torch.Tensor) and name not in counts}
