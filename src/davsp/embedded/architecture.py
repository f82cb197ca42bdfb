"""The small LVLMs before they have learnt anything, and the parts that are thrown away after training.

What a family's transformers class calls its tower, its projector and its positions is said here and nowhere else, so that
one training script makes them all.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from davsp.embedded import draw, words
from davsp.lvlm.qwen2_vl import patchify

MEAN, STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # CLIP's, as all families have them
MOST = 5  # of one thing in a picture
HEAD = 32  # width of an attention head, in tower and decoder
FRAMES = 2  # Qwen2-VL's tower takes a picture as two equal frames


@dataclass(frozen=True)
class Blueprint:
    """What sets one small LVLM apart from the others.

    Attributes:
        family: "llava" or "qwen2_vl".
        width: of tower and decoder, a multiple of 32.
        layers, mlp: of the decoder; the tower has four layers.
        side, patch: of its canvas, in pixels: always 12 x 12 patches on a picture of the little world.
    """

    family: str
    width: int
    layers: int
    mlp: int
    side: int = draw.SIDE
    patch: int = draw.PATCH


BLUEPRINTS = {
    "davsp-mini": Blueprint("llava", width=192, layers=6, mlp=512),
    "davsp-mini-narrow": Blueprint("llava", width=160, layers=5, mlp=448, side=192, patch=16),
    "davsp-mini-qwen": Blueprint("qwen2_vl", width=160, layers=6, mlp=448),
}


def new_model(name: str = "davsp-mini", seed: int = 0) -> Any:
    """One of `BLUEPRINTS` before training; davsp-mini: 4.3 M parameters, 168 px canvas, 144 image tokens, 6 decoder layers."""
    torch.manual_seed(seed)
    blueprint = BLUEPRINTS[name]
    return {"llava": _llava, "qwen2_vl": _qwen2_vl}[blueprint.family](blueprint)


def _llava(blueprint: Blueprint) -> Any:
    vocabulary, heads = words.vocabulary(), blueprint.width // HEAD
    vision = CLIPVisionConfig(
        hidden_size=blueprint.width, intermediate_size=blueprint.mlp, num_hidden_layers=4, num_attention_heads=heads,
        image_size=blueprint.side, patch_size=blueprint.patch, projection_dim=blueprint.width,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=blueprint.width, intermediate_size=blueprint.mlp, num_hidden_layers=blueprint.layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=1024, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    n = blueprint.side // blueprint.patch
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=vocabulary.index("<image>"), vision_feature_layer=-1,
        vision_feature_select_strategy="default", image_seq_length=n * n, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    # CLIP starts positions near zero, and then a patch cannot find its neighbours for a long time.
    parameters = dict(model.model.vision_tower.named_parameters())
    positions = next(p for n, p in parameters.items() if n.endswith("position_embedding.weight"))
    with torch.no_grad():
        positions[1:] = 0.35 * sincos(n, n, blueprint.width)
    return model


def _qwen2_vl(blueprint: Blueprint) -> Any:
    vocabulary, heads = words.vocabulary(), blueprint.width // HEAD
    image = vocabulary.index("<image>")
    unused = len(vocabulary)  # of video and of a picture's fences: the template writes none
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(vocabulary), "hidden_size": blueprint.width, "intermediate_size": blueprint.mlp,
            "num_hidden_layers": blueprint.layers, "num_attention_heads": heads, "num_key_value_heads": heads,
            "max_position_embeddings": 1024, "use_sliding_window": False, "tie_word_embeddings": True, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        },
        vision_config={
            # a merge of 1: with 2 the tower would have four times the patches to look at for each token
            "depth": 4, "embed_dim": blueprint.width, "hidden_size": blueprint.width, "num_heads": heads, "mlp_ratio": 3,
            "patch_size": blueprint.patch, "spatial_merge_size": 1, "temporal_patch_size": FRAMES,
        },
        image_token_id=image, video_token_id=unused, vision_start_token_id=unused + 1, vision_end_token_id=unused + 2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config)


def is_qwen(model: Any) -> bool:
    return model.config.model_type == "qwen2_vl"


def projector(model: Any) -> nn.Module:
    """From the tower's patches to the decoder's tokens."""
    return model.model.visual.merger if is_qwen(model) else model.model.multi_modal_projector


def tower_parameters(model: Any) -> Iterator[nn.Parameter]:
    """The tower's, without the projector's."""
    if not is_qwen(model):
        return model.model.vision_tower.parameters()
    return (p for n, p in model.model.visual.named_parameters() if not n.startswith("merger."))


def sizes(model: Any) -> tuple[tuple[int, int], ...]:
    """(height, width) of the pictures that a model is trained on, in units of `draw.PATCH`; often the same one."""
    square = (12, 12)
    return (square,) * 5 + ((11, 13), (13, 11), (10, 14), (14, 10), (11, 11)) if is_qwen(model) else (square,)


@dataclass
class TowerOutput:
    """Patches after each block of the tower (its class token left out), and as the decoder gets them; each (b, n, d)."""

    states: list[Float[Tensor, "b n d"]]
    tokens: Float[Tensor, "b n d"]


def see(model: Any, pictures: list[draw.Picture]) -> TowerOutput:
    """Tower and projector on pictures of one size."""
    pixels = normalised(model, pictures)
    if not is_qwen(model):
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        return TowerOutput([s[:, 1:] for s in states[1:]], model.model.multi_modal_projector(states[-1][:, 1:]))
    visual = model.model.visual
    (b, _, h, w), patch = pixels.shape, model.config.vision_config.patch_size
    grid = torch.tensor([[1, h // patch, w // patch]] * b, device=pixels.device)
    states = visual(patchify(pixels, patch, 1, FRAMES), grid, output_hidden_states=True).hidden_states
    apart = [s.unflatten(0, (b, -1)) for s in states[1:]]
    return TowerOutput(apart, visual.merger(states[-1]).unflatten(0, (b, -1)))


def normalised(model: Any, pictures: list[draw.Picture]) -> Float[Tensor, "b 3 h w"]:
    """Pixels as the image processor that ships makes them."""
    device = next(model.parameters()).device
    pixels = [p.pixels for p in pictures]
    if not is_qwen(model) and (side := model.config.vision_config.image_size) != pixels[0].shape[0]:
        pixels = [np.asarray(Image.fromarray(x).resize((side, side), Image.Resampling.BICUBIC)) for x in pixels]
    x = torch.from_numpy(np.stack(pixels)).to(device).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN, device=device)[:, None, None]) / torch.tensor(STD, device=device)[:, None, None]


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
            rows = torch.randn(len(slow), attention.q_proj.in_features, generator=draw_)
            rows = 1.95 * rows / rows.norm(dim=1, keepdim=True)  # alike: a logit of 3 to 8; unlike: near 0
            for projection in (attention.q_proj, attention.k_proj):
                projection.weight[head * size : (head + 1) * size] = 0
                if projection.bias is not None:
                    projection.bias[head * size : (head + 1) * size] = 0
                projection.weight[[head * size + i for i in slow]] = rows.to(projection.weight)


def sincos(rows: int, columns: int, d: int) -> Float[Tensor, "n d"]:
    """2-D sine/cosine positions of a grid, row by row: half of the width for rows and half for columns."""
    freq = torch.exp(torch.arange(d // 4) * (-math.log(100.0) / (d // 4)))
    angle = torch.arange(max(rows, columns))[:, None] * freq
    line = torch.cat([angle.sin(), angle.cos()], 1)  # (n, d/2)
    high, wide = line[:rows, None].expand(-1, columns, -1), line[None, :columns].expand(rows, -1, -1)
    return torch.cat([high, wide], 2).reshape(rows * columns, d)


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
        self,
        embed: nn.Embedding,
        label: Int[Tensor, "b n"],
        colour: Int[Tensor, "b n"],
        grid: tuple[int, int] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """grid: rows and columns of patches, to mark each patch with its place; None: no marks of place."""
        label, kind = label.clamp(min=0), self.kind[label.clamp(min=0)]
        word = embed(self.token[label]) * (kind > 0)[..., None]
        hue = embed(self.hue[colour.clamp(min=0)]) * (colour >= 0)[..., None]
        patches = word + hue + self.mark(kind)
        if grid is None:
            return patches
        return patches + 0.5 * embed.weight.detach().std() * math.sqrt(2) * sincos(*grid, patches.shape[-1]).to(patches)


class Hints(nn.Module):
    """Thrown away too: from each block of a tower to the same block of the tower that it learns beside."""

    def __init__(self, width: int, teacher: Any):
        super().__init__()
        vision = teacher.config.vision_config
        self.maps = nn.ModuleList(nn.Linear(width, vision.hidden_size) for _ in range(vision.num_hidden_layers))

    def forward(self, output: TowerOutput, teacher_output: TowerOutput) -> Tensor:
        """Mean squared error, block by block, in units of the teacher's spread (its states are normalised)."""
        errors = [
            (guess(a) - nn.functional.layer_norm(b, b.shape[-1:])).square().mean()
            for guess, a, b in zip(self.maps, output.states, teacher_output.states, strict=True)
        ]
        return torch.stack(errors).mean()
