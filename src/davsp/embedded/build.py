"""How davsp-mini is made: five resumable, seeded stages, then the folder that ships.

====== ===================================================== =========================================================
stage  trains                                                on
====== ===================================================== =========================================================
tower  the vision tower, with throw-away heads               pages of words and things, a class for every patch
read   the same, on                                          pages of whole words: reading is the slowest to come
words  the decoder                                           questions without pictures, and pictures whose patches
                                                             are handed over as word embeddings ("oracle" patches)
bridge the projector                                         regression onto the oracle patches
joint  everything                                            lessons: pictures with several questions each
====== ===================================================== =========================================================

`tower` and `words` do not need each other and can run side by side. Data is a pure function of (seed, stage, step):
a killed run goes on from its last checkpoint and ends the same. What was tried and failed: docs/log.md.
"""

import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from davsp.embedded import draw, words
from davsp.embedded.questions import Lesson, picture_lesson, word_turn
from davsp.errors import DavspError
from davsp.files import read_json, read_tensors, save_tensors, write_json

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, as LLaVA has them
PATCHES = (draw.SIDE // draw.PATCH) ** 2
TURNS = 5  # questions packed behind one picture


@dataclass(frozen=True)
class Stage:
    """steps of `batch` pictures (plus `texts` rows of questions without a picture), peak learning rate."""

    steps: int
    batch: int
    lr: float
    texts: int = 0
    after: tuple[str, ...] = ()


STAGES = {
    "tower": Stage(steps=2600, batch=24, lr=9e-4),
    "words": Stage(steps=2000, batch=6, lr=1e-3, texts=2),
    "read": Stage(steps=2400, batch=24, lr=7e-4, after=("tower",)),
    "bridge": Stage(steps=250, batch=24, lr=2e-3, after=("read", "words")),
    "joint": Stage(steps=4200, batch=8, lr=6e-4, texts=1, after=("bridge",)),
}


def new_model(seed: int = 0) -> Any:
    """davsp-mini before training: 4.3 M parameters, 168 px canvas, 144 image tokens, 6 decoder layers."""
    torch.manual_seed(seed)
    vocabulary = words.vocabulary()
    vision = CLIPVisionConfig(
        hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6, image_size=draw.SIDE,
        patch_size=draw.PATCH, projection_dim=192,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6,
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
        positions[1:] = 0.35 * _sincos(draw.SIDE // draw.PATCH, vision.hidden_size)
    return model


def _position_name(model: Any) -> str:
    names = [n for n, _ in model.model.vision_tower.named_parameters() if n.endswith("position_embedding.weight")]
    return names[0]


def _sincos(n: int, d: int) -> Float[Tensor, "n2 d"]:
    """2-D sine/cosine positions of an n x n grid, half of the width for rows and half for columns."""
    freq = torch.exp(torch.arange(d // 4) * (-math.log(100.0) / (d // 4)))
    angle = torch.arange(n)[:, None] * freq
    line = torch.cat([angle.sin(), angle.cos()], 1)  # (n, d/2)
    return torch.cat([line[:, None].expand(n, n, -1), line[None].expand(n, n, -1)], 2).reshape(n * n, d)


def pixel_values(pictures: list[draw.Picture], device: str | torch.device = "cpu") -> Float[Tensor, "b 3 h w"]:
    """Normalised pixels, as the image processor that ships makes them."""
    x = torch.from_numpy(np.stack([p.pixels for p in pictures])).to(device).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN, device=device)[:, None, None]) / torch.tensor(STD, device=device)[:, None, None]


# -- the tower ---------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Throw-away classifiers of a patch: its class and a thing's colour from the last layer, its letter from layer 2."""

    def __init__(self, width: int):
        super().__init__()
        self.label = nn.Linear(width, len(draw.CLASSES))
        self.colour = nn.Linear(width, len(words.COLOURS))
        self.letter = nn.Linear(width, len(draw.LETTERS))


def tower_loss(model: Any, heads: Heads, rng: random.Random, batch: int, whole: bool) -> tuple[Tensor, dict]:
    """`patch_loss` on fresh pages, one in seven of them a lesson's picture; `whole`: pages of whole words."""
    pictures = []
    for _ in range(batch):
        lesson = picture_lesson(rng).picture if rng.random() > 0.85 else None
        pictures.append(lesson or draw.page(rng, whole=whole and rng.random() < 0.85))
    states = model.model.vision_tower(
        pixel_values(pictures, next(model.parameters()).device), output_hidden_states=True
    ).hidden_states
    return patch_loss(heads, states, pictures)


def patch_loss(heads: Heads, states: tuple[Tensor, ...], pictures: list[draw.Picture]) -> tuple[Tensor, dict]:
    """Cross-entropy of every patch's class (nothing weighs 0.15), colour and letter, and the share of words and things right."""
    device = states[-1].device
    label, colour, letter = (
        torch.from_numpy(np.stack(x)).to(device) for x in zip(*(draw.patch_labels(p) for p in pictures), strict=True)
    )
    last, early = states[-1][:, 1:], states[2][:, 1:]
    weight = torch.ones(len(draw.CLASSES), device=device)
    weight[0] = 0.15
    guess = heads.label(last)
    loss = F.cross_entropy(guess.flatten(0, 1), label.flatten(), weight, ignore_index=-100)
    loss = loss + 0.3 * F.cross_entropy(heads.colour(last).flatten(0, 1), colour.flatten(), ignore_index=-100)
    loss = loss + 0.5 * F.cross_entropy(heads.letter(early).flatten(0, 1), letter.flatten(), ignore_index=-100)
    shown = label > 0
    return loss, {"patch_accuracy": (guess.argmax(-1) == label)[shown].float().mean().item()}


# -- packed lessons ----------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """Packed rows: ids (B,T); position (B,T); mask (B,1,T,T), True = may look; target (B,T), -100 = no loss; weight (B,T)."""

    ids: Int[Tensor, "b t"]
    position: Int[Tensor, "b t"]
    mask: Bool[Tensor, "b 1 t t"]
    target: Int[Tensor, "b t"]
    weight: Float[Tensor, "b t"]


class Packer:
    """Turns lessons into rows: the picture once, then each question with its answer, blind to the other questions."""

    def __init__(self) -> None:
        self.tokenizer = words.tokenizer()
        self.image, self.user, self.assistant = (
            self.tokenizer.convert_tokens_to_ids(t) for t in ("<image>", "user:", "assistant:")
        )
        self.cache: dict[str, list[int]] = {}

    def text(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self.cache[text]

    def rows(self, lessons: list[Lesson], device: str | torch.device) -> Rows:
        packed = [self._row(lesson) for lesson in lessons]
        width = max(len(r[0]) for r in packed)
        ids, position, segment, target, weight = (
            np.stack([np.pad(np.array(r[i]), (0, width - len(r[i])), constant_values=fill) for r in packed])
            for i, fill in enumerate((0, 0, -1, -100, 0.0))
        )
        segment_ = torch.from_numpy(segment).to(device)
        same = (segment_[:, :, None] == segment_[:, None, :]) | (segment_[:, None, :] == 0)
        mask = (same & torch.ones(width, width, dtype=torch.bool, device=device).tril())[:, None]
        ids_, position_ = (torch.from_numpy(x).to(device) for x in (ids, position))
        return Rows(
            ids_, position_, mask, torch.from_numpy(target).to(device), torch.from_numpy(weight).float().to(device)
        )

    def _row(self, lesson: Lesson) -> tuple[list, list, list, list, list]:
        ids = [1, self.user] + [self.image] * (PATCHES if lesson.picture else 0)
        start = len(ids)
        position, segment, target, weight = list(range(start)), [0] * start, [-100] * start, [0.0] * start
        for number, (question, reply) in enumerate(lesson.turns, 1):
            asked, replied = [*self.text(question), self.assistant], [*self.text(reply), 2]
            n = len(asked) + len(replied)
            ids += asked + replied
            position += range(start, start + n)
            segment += [number] * n
            # the token at i predicts the one at i + 1; short answers count for almost as much as long ones
            target += [-100] * (len(asked) - 1) + replied + [-100]
            weight += [0.0] * (len(asked) - 1) + [len(replied) ** -0.5] * len(replied) + [0.0]
        return ids, position, segment, target, weight


def lesson_loss(model: Any, rows: Rows, image: Float[Tensor, "patches d"] | None) -> tuple[Tensor, dict]:
    """Weighted cross-entropy of the answers; `image` are the patch embeddings of the rows that have a picture."""
    decoder = model.get_decoder()
    inputs = decoder.embed_tokens(rows.ids)
    if image is not None:
        inputs = inputs.masked_scatter((rows.ids == 3)[..., None], image.to(inputs.dtype))
    states = decoder(inputs_embeds=inputs, attention_mask=rows.mask, position_ids=rows.position, use_cache=False)
    answered = rows.target >= 0
    logits = model.lm_head(states.last_hidden_state[answered])
    target, weight = rows.target[answered], rows.weight[answered]
    loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
    return loss, {"token_accuracy": (logits.argmax(-1) == target).float().mean().item()}


def lessons(rng: random.Random, batch: int, texts: int) -> list[Lesson]:
    """`batch` picture lessons, each with at most TURNS of its questions, then `texts` rows of questions in words."""
    out = []
    for _ in range(batch):
        lesson = picture_lesson(rng)
        keep = sorted(rng.sample(range(len(lesson.turns)), min(TURNS, len(lesson.turns))))
        out.append(Lesson(lesson.picture, [lesson.turns[i] for i in keep]))
    return out + [Lesson(None, [word_turn(rng) for _ in range(8)]) for _ in range(texts)]


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
        self, embed: nn.Embedding, label: Int[Tensor, "b n"], colour: Int[Tensor, "b n"]
    ) -> Float[Tensor, "b n d"]:
        label, kind = label.clamp(min=0), self.kind[label.clamp(min=0)]
        word = embed(self.token[label]) * (kind > 0)[..., None]
        hue = embed(self.hue[colour.clamp(min=0)]) * (colour >= 0)[..., None]
        return word + hue + self.mark(kind)


def oracle_labels(pictures: list[draw.Picture], device) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"]]:
    found = [draw.patch_labels(p)[:2] for p in pictures]
    return tuple(torch.from_numpy(np.stack(x)).to(device) for x in zip(*found, strict=True))  # type: ignore[return-value]


def words_loss(
    model: Any, oracle: Oracle, packer: Packer, rng: random.Random, stage: Stage, step: int
) -> tuple[Tensor, dict]:
    """Lessons on oracle patches, made as unreliable as a real tower: 12 % lost, noise of a third of their size."""
    device = next(model.parameters()).device
    only_words = step < 300  # the first steps teach the language
    batch = lessons(rng, 0 if only_words else stage.batch, 4 if only_words else stage.texts)
    rows = packer.rows(batch, device)
    pictures = [x.picture for x in batch if x.picture]
    if not pictures:
        return lesson_loss(model, rows, None)
    label, colour = oracle_labels(pictures, device)
    noise = torch.Generator().manual_seed(rng.getrandbits(40))
    lost = torch.rand(label.shape, generator=noise).to(device) < 0.12
    patches = oracle(model.get_decoder().embed_tokens, label.masked_fill(lost, 0), colour.masked_fill(lost, -100))
    patches = patches + torch.randn(patches.shape, generator=noise).to(device) * patches.detach().std() * 0.33
    return lesson_loss(model, rows, patches.flatten(0, 1))


def bridge_loss(model: Any, oracle: Oracle, rng: random.Random, batch: int) -> tuple[Tensor, dict]:
    """Mean squared error of the projected patches against the oracle's, in units of their variance."""
    device = next(model.parameters()).device
    pictures = [picture_lesson(rng).picture for _ in range(batch)]
    label, colour = oracle_labels(pictures, device)  # type: ignore[arg-type]
    with torch.no_grad():
        wanted = oracle(model.get_decoder().embed_tokens, label, colour)
    got = image_features(model, pictures)  # type: ignore[arg-type]
    weight = torch.where(label > 0, 1.0, 0.15) * (label >= 0)
    loss = ((got - wanted) ** 2).mean(-1).mul(weight).sum() / weight.sum() / wanted[label > 0].var()
    return loss, {}


def image_features(model: Any, pictures: list[draw.Picture]) -> Float[Tensor, "b n d"]:
    states = model.model.vision_tower(pixel_values(pictures, next(model.parameters()).device)).last_hidden_state
    return model.model.multi_modal_projector(states[:, 1:])


def joint_loss(model: Any, heads: Heads, packer: Packer, rng: random.Random, stage: Stage) -> tuple[Tensor, dict]:
    """Lessons through the whole model; the tower's own lesson goes on beside it, so that it reads better still."""
    device = next(model.parameters()).device
    batch = lessons(rng, stage.batch, stage.texts)
    rows = packer.rows(batch, device)
    pictures = [x.picture for x in batch if x.picture]
    states = model.model.vision_tower(pixel_values(pictures, device), output_hidden_states=True).hidden_states
    features = model.model.multi_modal_projector(states[-1][:, 1:])
    loss, stats = lesson_loss(model, rows, features.flatten(0, 1))
    seeing, seen = patch_loss(heads, states, pictures)
    return loss + 0.3 * seeing, {**stats, **seen, "answer_loss": loss.item()}


# -- the stages --------------------------------------------------------------------------------------------------------


def groups(model: Any, name: str, extra: nn.Module, lr: float) -> list[dict]:
    """The parameters that stage `name` trains, with their learning rates."""
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    decoder = [*model.get_decoder().parameters()]
    chosen = {
        "tower": [(tower.parameters(), lr), (extra.parameters(), lr)],
        "read": [(tower.parameters(), lr), (extra.parameters(), lr)],
        "words": [(decoder, lr), (extra.parameters(), lr)],
        "bridge": [(projector.parameters(), lr)],
        "joint": [
            (tower.parameters(), lr * 0.6),
            (projector.parameters(), lr),
            (decoder, lr),
            (extra.parameters(), lr),
        ],
    }[name]
    model.requires_grad_(False)
    out = []
    for parameters, rate in chosen:
        listed = [p.requires_grad_(True) for p in parameters]
        out.append({"params": listed, "lr": rate, "peak": rate})
    return out


def schedule(step: int, steps: int) -> float:
    """100 steps of warm-up, flat to 40 %, then a cosine to 3 %."""
    if step < 100:
        return (step + 1) / 100
    done = max(0.0, (step / steps - 0.4) / 0.6)
    return 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * done))


def run_stage(
    name: str, out: Path, seed: int = 0, device: str = "cpu", steps: int | None = None, save_every: int = 100
) -> Iterator[dict]:
    """Run one stage, or what is left of it; yields a record a step. Ends with `out/NAME/done.json` written.

    Raises:
        DavspError: the stages it needs are not done, or the folder holds another run's checkpoint.
    """
    stage, folder = STAGES[name], out / name
    steps = steps or stage.steps
    model, heads, oracle = new_model(seed), Heads(192), Oracle(192)
    for needed in stage.after:
        if not (out / needed / "done.json").exists():
            raise DavspError(
                f"stage '{name}' needs stage '{needed}' in {out}; run `davsp mini train --stage {needed}` first."
            )
        _load_parts({"model": model, "heads": heads, "oracle": oracle}, out / needed / "state.safetensors", needed)
    extra = oracle if name in ("words", "bridge") else heads
    both = nn.ModuleDict({"model": model, "heads": heads, "oracle": oracle}).to(device).train()
    optimizer = torch.optim.AdamW(groups(model, name, extra, stage.lr), betas=(0.9, 0.98), weight_decay=0.01)
    about = {"stage": name, "seed": seed, "steps": steps, "batch": stage.batch, "lr": stage.lr}
    first, seconds = _resume(both, optimizer, folder, about)
    packer, log = Packer(), (folder / "metrics.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    _truncate(log, first)
    clock = time.monotonic()
    for step in range(first, steps):
        rng = random.Random(f"{seed} {name} {step}")
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, steps)
        if name in ("tower", "read"):
            loss, stats = tower_loss(model, heads, rng, stage.batch, whole=name == "read")
        elif name == "words":
            loss, stats = words_loss(model, oracle, packer, rng, stage, step)
        elif name == "bridge":
            loss, stats = bridge_loss(model, oracle, rng, stage.batch)
        else:
            loss, stats = joint_loss(model, heads, packer, rng, stage)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        record = {"stage": name, "step": step + 1, "steps": steps, "loss": round(loss.item(), 5), **stats}
        with log.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if (step + 1) % save_every == 0 or step + 1 == steps:
            _save(
                both,
                optimizer,
                folder,
                {**about, "step": step + 1, "seconds": round(seconds + time.monotonic() - clock, 1)},
            )
        yield record
    write_json(folder / "done.json", read_json(folder / "checkpoint.json"))


def _load_parts(parts: dict[str, nn.Module], path: Path, stage: str) -> None:
    """Take over what `stage` trained: tower and heads from "tower", decoder and oracle from "words", all from the rest."""
    state = read_tensors(path)
    tower = ("model.model.vision_tower.", "heads.")
    wanted = {"tower": tower, "read": tower, "words": ("model.model.language_model.", "model.lm_head.", "oracle.")}
    for name, module in parts.items():
        inner = {k.removeprefix(f"{name}."): v for k, v in state.items()
                 if k.startswith(f"{name}.") and k.startswith(wanted.get(stage, ""))}  # fmt: skip
        module.load_state_dict(inner, strict=False)


def _save(both: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, about: dict) -> None:
    state = {k: v.detach().cpu().clone().contiguous() for k, v in both.state_dict().items()}
    for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        for k, v in optimizer.state[p].items():
            state[f"optimizer.{i}.{k}"] = v.detach().cpu().clone().contiguous()
    save_tensors(folder / "state.safetensors", state, metadata={"step": str(about["step"])})
    write_json(folder / "checkpoint.json", about)


def _resume(both: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, about: dict) -> tuple[int, float]:
    """Load the checkpoint of `folder`, if any; returns (first step to run, seconds spent before)."""
    if not (folder / "checkpoint.json").exists():
        return 0, 0.0
    found = read_json(folder / "checkpoint.json")
    differ = {k: (found.get(k), v) for k, v in about.items() if found.get(k) != v}
    if differ:
        raise DavspError(
            f"{folder} holds a run with other settings {differ} (found, asked); choose another --out or delete it."
        )
    state = read_tensors(folder / "state.safetensors")
    both.load_state_dict({k: v for k, v in state.items() if not k.startswith("optimizer.")})
    for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        prefix = f"optimizer.{i}."
        entry = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if entry:
            optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in entry.items()}
    return found["step"], found["seconds"]


def _truncate(log: Path, step: int) -> None:
    """Drop the lines that a killed run wrote after its last checkpoint."""
    if log.exists():
        kept = [line for line in log.read_text().splitlines() if line and json.loads(line)["step"] <= step]
        log.write_text("".join(f"{line}\n" for line in kept))


def export(out: Path, folder: Path, seed: int = 0) -> None:
    """Write the joint stage's model as a Hugging Face folder: float16 safetensors (9 MB), tokenizer, image processor."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = new_model(seed)
    _load_parts({"model": model}, out / "joint" / "state.safetensors", "joint")
    model.eval().half()
    model.generation_config.update(max_new_tokens=48, do_sample=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)
    words.tokenizer().save_pretrained(folder)
    size = {"height": draw.SIDE, "width": draw.SIDE}
    CLIPImageProcessorPil(
        size={"shortest_edge": draw.SIDE}, crop_size=size, image_mean=list(MEAN), image_std=list(STD), resample=3,
    ).save_pretrained(folder)  # fmt: skip
