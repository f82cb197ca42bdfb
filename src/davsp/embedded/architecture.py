"""davsp-mini before it has learnt anything, and the parts that are thrown away after training."""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from davsp.embedded import draw, words

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, as LLaVA has them
PATCHES = (draw.SIDE // draw.PATCH) ** 2
WIDTH = 192  # of tower and decoder
MOST = 5  # of one thing in a picture


def new_model(seed: int = 0) -> Any:
    """davsp-mini before training: 4.3 M parameters, 168 px canvas, 144 image tokens, 6 decoder layers."""
    torch.manual_seed(seed)
    vocabulary = words.vocabulary()
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6, image_size=draw.SIDE,
        patch_size=draw.PATCH, projection_dim=WIDTH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=WIDTH, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=vocabulary.index("<image>"), vision_feature_layer=-1,
        vision_feature_select_strategy="default", image_seq_length=PATCHES, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    # CLIP starts positions near zero, and then a patch cannot find its neighbours for a long time.
    positions = model.model.vision_tower.get_parameter(_position_name(model))
    with torch.no_grad():
        positions[1:] = 0.35 * sincos(draw.SIDE // draw.PATCH, vision.hidden_size)
    return model


def match_heads(model: Any, heads: int = 3, seed: int = 0) -> None:
    """Let some heads of the decoder's first block look, from a word, for patches of the same meaning.

    Query and key become one random projection of the slow rotary dimensions (the fast ones tell distance, not content),
    so that what is alike attracts. Without this start a word is not bound to its thing: with two things in the
    picture, "what colour is the car" was a coin flip after thousands of steps (docs/log.md).
    """
    attention = model.get_decoder().layers[0].self_attn
    size, half = attention.head_dim, attention.head_dim // 2
    slow = [*range(half * 5 // 8, half), *range(half + half * 5 // 8, size)]
    draw_ = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for head in range(heads):
            rows = torch.randn(len(slow), WIDTH, generator=draw_)
            rows = 1.95 * rows / rows.norm(dim=1, keepdim=True)  # alike: a logit of 3 to 8; unlike: near 0
            for projection in (attention.q_proj, attention.k_proj):
                projection.weight[head * size : (head + 1) * size] = 0
                projection.weight[[head * size + i for i in slow]] = rows.to(projection.weight)


def _position_name(model: Any) -> str:
    names = [n for n, _ in model.model.vision_tower.named_parameters() if n.endswith("position_embedding.weight")]
    return names[0]


def sincos(n: int, d: int) -> Float[Tensor, "n2 d"]:
    """2-D sine/cosine positions of an n x n grid, half of the width for rows and half for columns."""
    freq = torch.exp(torch.arange(d // 4) * (-math.log(100.0) / (d // 4)))
    angle = torch.arange(n)[:, None] * freq
    line = torch.cat([angle.sin(), angle.cos()], 1)  # (n, d/2)
    return torch.cat([line[:, None].expand(n, n, -1), line[None].expand(n, n, -1)], 2).reshape(n * n, d)


def pixel_values(pictures: list[draw.Picture], device: str | torch.device = "cpu") -> Float[Tensor, "b 3 h w"]:
    """Normalised pixels, as the image processor that ships makes them."""
    x = torch.from_numpy(np.stack([p.pixels for p in pictures])).to(device).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN, device=device)[:, None, None]) / torch.tensor(STD, device=device)[:, None, None]


def image_features(model: Any, pictures: list[draw.Picture]) -> Float[Tensor, "b n d"]:
    states = model.model.vision_tower(pixel_values(pictures, next(model.parameters()).device)).last_hidden_state
    return model.model.multi_modal_projector(states[:, 1:])


class Heads(nn.Module):
    """Throw-away classifiers of a patch: its class and a thing's colour from the last layer, its letter from layer 2.

    From the projected patch, whether a thing's centre is in it. And of a thing's name in a question, from the decoder's
    second block: colour and place of that thing; from the third: how many there are.
    """

    def __init__(self, width: int):
        super().__init__()
        self.label = nn.Linear(width, len(draw.CLASSES))
        self.colour = nn.Linear(width, len(words.COLOURS))
        self.letter = nn.Linear(width, len(draw.LETTERS))
        self.centre = nn.Linear(width, 2)
        self.named_colour = nn.Linear(width, len(words.COLOURS))
        self.named_place = nn.Linear(width, 9)
        self.named_count = nn.Linear(width, MOST + 1)


class Oracle(nn.Module):
    """Patches as the decoder would like them: the word's (and the colour's) embedding plus a mark "read" or "seen"."""

    token: Tensor
    kind: Tensor
    hue: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.mark = nn.Embedding(3, width)  # nothing, a word, a thing
        nn.init.normal_(self.mark.weight, std=0.02)
        ids = words.tokenizer().convert_tokens_to_ids
        token = [0] + [ids(c.strip("[]")) for c in draw.CLASSES[1:]]
        mark = [0] + [2 if c.startswith("[") else 1 for c in draw.CLASSES[1:]]
        self.register_buffer("token", torch.tensor(token), persistent=False)
        self.register_buffer("kind", torch.tensor(mark), persistent=False)
        self.register_buffer("hue", torch.tensor([ids(c) for c in words.COLOURS]), persistent=False)

    def forward(
        self, embed: nn.Embedding, label: Int[Tensor, "b n"], colour: Int[Tensor, "b n"], place: bool = False
    ) -> Float[Tensor, "b n d"]:
        label, kind = label.clamp(min=0), self.kind[label.clamp(min=0)]
        word = embed(self.token[label]) * (kind > 0)[..., None]
        hue = embed(self.hue[colour.clamp(min=0)]) * (colour >= 0)[..., None]
        patches = word + hue + self.mark(kind)
        if not place:
            return patches
        n = math.isqrt(label.shape[1])
        return patches + 0.5 * embed.weight.detach().std() * math.sqrt(2) * sincos(n, patches.shape[-1]).to(patches)
