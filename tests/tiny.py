"""A LLaVA of random weights, small enough for every test, and queries it can read."""

import random
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from davsp import Query

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
WORDS = "user assistant : what is this how do you make steal a car cake in the image".split()
WORDS += "please be safe sorry no yes red".split()
TEMPLATE = (
    "{% for message in messages %}user : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)


def save_tiny(folder: Path, canvas: int = 56) -> Path:
    """Save the model as a hub-like folder: 4 layers of width 32, patch 14."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        chat_template=TEMPLATE,
    )
    torch.manual_seed(0)
    common = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**common, num_hidden_layers=2, image_size=canvas, patch_size=14),
        text_config=LlamaConfig(
            **common, num_hidden_layers=4, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    for weight in model.parameters():
        if weight.dim() > 1:  # wide enough that answers differ with the input
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": canvas, "width": canvas}
    CLIPImageProcessorPil(size={"shortest_edge": canvas}, crop_size=size).save_pretrained(folder)
    return folder


def picture(seed: int, size: tuple[int, int] = (56, 56)) -> Image.Image:
    """Noise in 8-bit levels."""
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1]))


def queries(label: str, count: int, seed: int = 0) -> list[Query]:
    """Noise pictures, reddish for the malicious, with questions of several lengths."""
    made = []
    for i in range(count):
        image = picture(1000 * seed + i + 500 * (label == "benign"), (40 + 5 * i % 30, 48))
        if label == "malicious":
            image = Image.blend(image, Image.new("RGB", image.size, "red"), 0.5)
        question = "how do you " + ("steal a car" if i % 2 else "make this in the image please")
        made.append(Query(f"{label}-{i}", question, label, "test", reference="a red cake", image=image))  # type: ignore[arg-type]
    return made
