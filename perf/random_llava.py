"""A LLaVA of random weights, and queries for it: what the step is measured on."""

import random
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Size:
    """What is built: blocks and widths, canvas and border in pixels, lengths in tokens."""

    tower_layers: int = 24
    tower_hidden: int = 64
    layers: int = 40
    hidden: int = 256
    heads: int = 8  # of the decoder
    vocabulary: int = 4000
    canvas: int = 336
    padding: int = 30
    layer: int = 20
    before: int = 35
    questions: tuple[int, int] = (118, 131)
    answers: tuple[int, int] = (96, 120)
    text: int = 1024  # what the published way pads prompt and answer to, image tokens apart


MEDIUM = Size()
SMALL = Size(2, 32, 4, 32, 4, 60, 56, 9, 2, 5, (9, 12), (6, 8), 64)


def build(folder: Path, size: Size) -> None:
    """Save the model as a hub-like folder; weights of seed 0, each matrix N(0, 1 / inputs)."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *(f"w{i}" for i in range(size.vocabulary - 5))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    before = " ".join(words[5 : 5 + size.before])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
        chat_template=before + " <image> {{ messages[0]['content'][-1]['text'] }}",
    )  # fmt: skip
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=size.tower_hidden, intermediate_size=4 * size.tower_hidden, num_attention_heads=4,
        num_hidden_layers=size.tower_layers, image_size=size.canvas, patch_size=14,
    )  # fmt: skip
    decoder = LlamaConfig(
        hidden_size=size.hidden, intermediate_size=11 * size.hidden // 4, num_attention_heads=size.heads,
        num_hidden_layers=size.layers, vocab_size=size.vocabulary, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=tower, text_config=decoder, image_token_index=4))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    square = {"height": size.canvas, "width": size.canvas}
    CLIPImageProcessorPil(size={"shortest_edge": size.canvas}, crop_size=square).save_pretrained(folder)


def queries(label: str, size: Size) -> list[Query]:
    """Two of a class: noise pictures, questions and answers of random words."""
    rng, queries_of_class = random.Random(label), []

    def words(between: tuple[int, int]) -> str:
        return " ".join(f"w{rng.randrange(size.vocabulary - 5)}" for _ in range(rng.randint(*between)))

    for i in range(2):
        image = Image.frombytes("RGB", (size.canvas,) * 2, rng.randbytes(3 * size.canvas**2))
        question, answer = words(size.questions), words(size.answers)
        queries_of_class.append(Query(f"{label}-{i}", question, label, "perf", reference=answer, image=image))
    return queries_of_class
