"""What each stage minimises: losses of the tower, of packed lessons, of the bridge between them."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from davsp.embedded import draw, words
from davsp.embedded.architecture import MOST, Heads, Hints, Oracle, TowerOutput, see, sizes
from davsp.embedded.questions import Lesson, framed, picture_lesson, sum_turn, word_turn

PATCHES = (draw.SIDE // draw.PATCH) ** 2  # of a picture of the usual size
ROOM = 200  # tokens of questions and answers behind one picture; rows of one length waste nothing on padding
SUMS = {"joint": 16, "skills": 4, "polish": 4}  # in words, a row: cheap, and the picture's sums are learnt from them


def tower_loss(
    model: Any,
    heads: Heads,
    rng: random.Random,
    batch: int,
    whole: bool,
    hints: Hints | None = None,
    teacher: Any = None,
) -> tuple[Tensor, dict]:
    """`patch_loss` on fresh pages, one in seven of them a lesson's picture.

    Args:
        whole: pages of whole words.
        hints, teacher: a tower that has learnt already; each block is drawn to the same block of it, on pictures of the
            teacher's size.
    """
    grid, pictures = rng.choice(sizes(model)), []
    for _ in range(batch):
        lesson = picture_lesson(rng).picture if rng.random() > 0.85 else None
        pictures.append((lesson or draw.page(rng, whole=whole and rng.random() < 0.85)).resized(grid))
    output = see(model, pictures)
    loss, stats = patch_loss(heads, output, pictures)
    if hints is None or grid != (12, 12):
        return loss, stats
    with torch.no_grad():
        shown = see(teacher, pictures)
    hint = hints(output, shown)
    return loss + 4.0 * hint, {**stats, "hint": hint.item()}


def patch_loss(heads: Heads, output: TowerOutput, pictures: list[draw.Picture]) -> tuple[Tensor, dict]:
    """Cross-entropy of every patch's class (nothing weighs 0.15), colour and letter, and the share of words and things right."""
    last, early = output.states[-1], output.states[1]
    device = last.device
    label, colour, letter = (
        torch.from_numpy(np.stack(x)).to(device) for x in zip(*(draw.patch_labels(p) for p in pictures), strict=True)
    )
    weight = torch.ones(len(draw.CLASSES), device=device)
    weight[0] = 0.15
    guess = heads.label(last)
    loss = F.cross_entropy(guess.flatten(0, 1), label.flatten(), weight, ignore_index=-100)
    loss = loss + 0.3 * _mean_cross_entropy(heads.colour(last), colour)
    loss = loss + 0.5 * _mean_cross_entropy(heads.letter(early), letter)
    shown = label > 0
    return loss, {"patch_accuracy": (guess.argmax(-1) == label)[shown].float().mean().item()}


def _mean_cross_entropy(guess: Float[Tensor, "b n c"], target: Int[Tensor, "b n"]) -> Float[Tensor, ""]:
    """Over the targets that are not -100; 0 if there are none (a page without a thing has no colour)."""
    total = F.cross_entropy(guess.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum")
    return total / (target >= 0).sum().clamp(min=1)


# -- packed lessons ----------------------------------------------------------------------------------------------------


@dataclass
class PackedRows:
    """Packed rows: ids (B,T); position (B,T), or (3,B,T) for Qwen2-VL; mask (B,1,T,T), True = may look; target (B,T), -100 = no loss; weight (B,T)."""

    ids: Int[Tensor, "b t"]
    position: Int[Tensor, "b t"] | Int[Tensor, "3 b t"]
    mask: Bool[Tensor, "b 1 t t"]
    target: Int[Tensor, "b t"]
    weight: Float[Tensor, "b t"]


class Packer:
    """Turns lessons into rows: the picture once, then each question with its answer, blind to the other questions.

    Args:
        axes: of positions: 1; or 3 (time, height, width), as Qwen2-VL counts them.
    """

    def __init__(self, axes: int = 1) -> None:
        self.axes = axes
        self.tokenizer = words.tokenizer()
        self.image, self.user, self.assistant = (
            self.tokenizer.convert_tokens_to_ids(t) for t in ("<image>", "user:", "assistant:")
        )
        self.cache: dict[str, list[int]] = {}
        self.things = {self.tokenizer.convert_tokens_to_ids(name): name for name in words.THINGS}

    def text(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self.cache[text]

    def fitted(self, rng: random.Random, lesson: Lesson) -> Lesson:
        """The lesson with those of its questions, drawn by lot, that a row has room for; their order stays."""
        room, keep = ROOM + (0 if lesson.picture else PATCHES), []
        for i in rng.sample(range(len(lesson.turns)), len(lesson.turns)):
            need = sum(len(self.text(part)) + 1 for part in lesson.turns[i])
            if need <= room:
                room -= need
                keep.append(i)
        return Lesson(lesson.picture, [lesson.turns[i] for i in sorted(keep)])

    def rows(self, lessons: list[Lesson], device: str | torch.device) -> PackedRows:
        packed = [self.row(lesson) for lesson in lessons]
        width = max(len(r[0]) for r in packed)
        ids, segment, target, weight = (
            np.stack([np.pad(np.array(r[i]), (0, width - len(r[i])), constant_values=fill) for r in packed])
            for i, fill in ((0, 0), (2, -1), (3, -100), (4, 0.0))
        )
        position = np.stack([np.pad(r[1], ((0, 0), (0, width - r[1].shape[1]))) for r in packed], axis=1)
        position = position if self.axes == 3 else position[0]
        segment_ = torch.from_numpy(segment).to(device)
        same = (segment_[:, :, None] == segment_[:, None, :]) | (segment_[:, None, :] == 0)
        mask = (same & torch.ones(width, width, dtype=torch.bool, device=device).tril())[:, None]
        ids_, position_ = (torch.from_numpy(x).to(device) for x in (ids, position))
        return PackedRows(
            ids_, position_, mask, torch.from_numpy(target).to(device), torch.from_numpy(weight).float().to(device)
        )

    def row(self, lesson: Lesson) -> tuple[list, np.ndarray, list, list, list]:
        """ids, positions (3, t), segment (0: the picture, seen by all), target, weight."""
        down, across = lesson.picture.grid if lesson.picture else (0, 0)
        ids = [1, self.user] + [self.image] * (down * across)
        start = len(ids)
        spots = np.stack([np.zeros(down * across, np.int64), *np.indices((down, across)).reshape(2, -1)])
        head = np.concatenate([np.tile(np.arange(2), (3, 1)), spots + 2], axis=1)
        after = 2 + max(down, across)  # Qwen2-VL's words go on behind the picture's longer side
        if self.axes == 1:
            head, after = np.tile(np.arange(start), (3, 1)), start
        position, segment, target, weight = [head], [0] * start, [-100] * start, [0.0] * start
        for number, (question, reply) in enumerate(lesson.turns, 1):
            question_ids, reply_ids = [*self.text(question), self.assistant], [*self.text(reply), 2]
            n = len(question_ids) + len(reply_ids)
            ids += question_ids + reply_ids
            position.append(np.tile(np.arange(after, after + n), (3, 1)))
            segment += [number] * n
            # the token at i predicts the one at i + 1; short answers count for almost as much as long ones
            target += [-100] * (len(question_ids) - 1) + reply_ids + [-100]
            weight += [0.0] * (len(question_ids) - 1) + [len(reply_ids) ** -0.5] * len(reply_ids) + [0.0]
        return ids, np.concatenate(position, axis=1), segment, target, weight


def lesson_loss(model: Any, rows: PackedRows, image: Float[Tensor, "patches d"] | None) -> tuple[Tensor, dict]:
    """Weighted cross-entropy of the answers; `image` are the patch embeddings of the rows that have a picture."""
    loss, stats, _ = _lesson_loss(model, rows, image)
    return loss, stats


def _lesson_loss(
    model: Any, rows: PackedRows, image: Float[Tensor, "patches d"] | None
) -> tuple[Tensor, dict, tuple[Tensor, ...]]:
    """As `lesson_loss`, and the decoder's hidden states."""
    decoder = model.get_decoder()
    inputs = decoder.embed_tokens(rows.ids)
    if image is not None:
        inputs = inputs.masked_scatter((rows.ids == 3)[..., None], image.to(inputs.dtype))
    states = decoder(
        inputs_embeds=inputs, attention_mask=rows.mask, position_ids=rows.position,
        use_cache=False, output_hidden_states=True,
    )  # fmt: skip
    answered = rows.target >= 0
    logits = model.lm_head(states.last_hidden_state[answered])
    target, weight = rows.target[answered], rows.weight[answered]
    loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
    return loss, {"token_accuracy": (logits.argmax(-1) == target).float().mean().item()}, states.hidden_states


def named_loss(
    heads: Heads, packer: Packer, rows: PackedRows, batch: list[Lesson], states: tuple[Tensor, ...]
) -> tuple[Tensor, dict]:
    """What a thing's name in a question knows of that thing in the picture: its colour, its place, how many there are.

    Answers alone did not teach it: with two things in the picture a question about one of them was a coin flip.
    """
    device, at, colour, place, count = rows.ids.device, [], [], [], []
    ids = rows.ids.tolist()
    for row, lesson in enumerate(batch):
        if lesson.picture is None:
            continue
        shown: dict[str, list[draw.Box]] = {}
        for box in lesson.picture.boxes:
            if box.label.startswith("["):
                shown.setdefault(box.label.strip("[]"), []).append(box)
        written = {box.label for box in lesson.picture.boxes}
        down, across = lesson.picture.grid
        for column in range(down * across + 2, len(ids[row])):
            name = packer.things.get(ids[row][column])
            if name is None or rows.target[row, column - 1] >= 0:  # only in questions
                continue
            if name in written:  # "is the word car in the picture ?" is another matter
                continue
            boxes = shown.get(name, [])
            at.append((row, column))
            count.append(min(len(boxes), MOST))
            colour.append(draw.COLOUR_ID[boxes[0].colour] if boxes and len({b.colour for b in boxes}) == 1 else -100)
            place.append(_cell(boxes[0], lesson.picture) if len(boxes) == 1 else -100)
    if not at:
        return states[0].new_zeros(()), {}
    # how many takes one more look than what and where
    middle, later = (states[i][tuple(torch.tensor(at, device=device).T)] for i in (2, 3))
    targets = [torch.tensor(x, device=device) for x in (colour, place, count)]
    guesses = [heads.named_colour(middle), heads.named_place(middle), heads.named_count(later)]
    loss = sum(
        (_mean_cross_entropy(g[None], t[None]) for g, t in zip(guesses, targets, strict=True)),
        start=middle.new_zeros(()),
    )
    known = targets[1] >= 0
    right = (guesses[1].argmax(-1) == targets[1])[known].float().mean().item() if known.any() else 1.0
    count_accuracy = (guesses[2].argmax(-1) == targets[2]).float().mean().item()
    return loss, {"named_place": right, "named_count": count_accuracy}


def meaning_loss(
    model: Any, tokens: Int[Tensor, " classes"], features: Float[Tensor, "b n d"], pictures: list[draw.Picture]
) -> Tensor:
    """Each patch must be nearest to the embedding of the word or thing that it shows: what `bridge` taught, kept up.

    Cross-entropy of cosines over all classes but "nothing", at a temperature of 0.07. Digits weigh four times: they are
    few, and a picture of a sum holds little else.

    Args:
        tokens: token id of each of `draw.CLASSES` (the first is not used), as `Oracle.token` has them.
        features: projected patches.
    """
    label = torch.from_numpy(np.stack([draw.patch_labels(p)[0] for p in pictures])).to(features.device)
    shown = label > 0
    embeddings = F.normalize(model.get_decoder().embed_tokens.weight[tokens[1:]], dim=-1)
    guess = F.normalize(features[shown], dim=-1) @ embeddings.T / 0.07
    # a thing and its written name share one embedding: either is right
    same = tokens[1:][None] == tokens[label[shown]][:, None]
    likely = torch.logsumexp(guess.masked_fill(~same, -1e9), -1) - torch.logsumexp(guess, -1)
    digits = torch.tensor([c in words.DIGITS for c in draw.CLASSES], device=label.device)[label[shown]]
    weight = 1.0 + 3.0 * digits
    return -(likely * weight).sum() / weight.sum()


def centre_loss(heads: Heads, features: Float[Tensor, "b n d"], pictures: list[draw.Picture]) -> tuple[Tensor, dict]:
    """Whether a thing's centre is in the patch: one mark a thing, which can be counted as its 9 to 16 patches can't."""
    target = torch.from_numpy(np.stack([draw.centres(p) for p in pictures])).to(features.device)
    guess, weight = heads.centre(features), torch.tensor([0.1, 1.0], device=features.device)
    loss = F.cross_entropy(guess.flatten(0, 1), target.flatten(), weight)
    right = (guess.argmax(-1) == target).all(-1).float().mean().item()  # whole pictures
    return loss, {"centres": right}


def _cell(box: draw.Box, picture: draw.Picture) -> int:
    """Which of the 3 x 3 cells of the picture (of its inside, if it was shrunk) a box is in."""
    height, width = picture.pixels.shape[:2]
    inner = next((b for b in picture.boxes if not b.label), draw.Box("", 0, 0, width, height))
    x = (box.x0 + box.x1) / 2 - inner.x0, inner.x1 - inner.x0
    y = (box.y0 + box.y1) / 2 - inner.y0, inner.y1 - inner.y0
    column, line = (min(max(int(3 * part / whole), 0), 2) for part, whole in (x, y))
    return 3 * line + column


def lessons(
    rng: random.Random, packer: Packer, batch: int, texts: int, stage: str, grid: tuple[int, int] = (12, 12)
) -> list[Lesson]:
    """`batch` picture lessons, then `texts` rows of questions in words, of each as many questions as there is room for."""
    out = [packer.fitted(rng, picture_lesson(rng, stage)) for _ in range(batch)]
    out = [Lesson(x.picture.resized(grid), x.turns) for x in out if x.picture]
    for _ in range(texts):
        turns = [word_turn(rng, stage) for _ in range(8)] + [sum_turn(rng) for _ in range(SUMS.get(stage, 0))]
        out.append(packer.fitted(rng, Lesson(None, turns)))
    return out


def oracle_labels(pictures: list[draw.Picture], device) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"]]:
    labels = [draw.patch_labels(p)[:2] for p in pictures]
    return tuple(torch.from_numpy(np.stack(x)).to(device) for x in zip(*labels, strict=True))  # type: ignore[return-value]


def words_loss(
    model: Any,
    heads: Heads,
    oracle: Oracle,
    packer: Packer,
    rng: random.Random,
    count: int,
    texts: int,
    step: int,
    stage: str,
) -> tuple[Tensor, dict]:
    """Lessons on oracle patches, made as unreliable as a real tower: 12 % lost, noise of a third of their size."""
    device = next(model.parameters()).device
    only_words = step < 300 and stage != "place"  # the first steps teach the language
    kind, grid = {"words": "words", "place": "joint", "speak": "skills"}[stage], rng.choice(sizes(model))
    batch = lessons(rng, packer, 0 if only_words else count, 4 if only_words else texts, kind, grid)
    rows = packer.rows(batch, device)
    pictures = [x.picture for x in batch if x.picture]
    if not pictures:
        return lesson_loss(model, rows, None)
    label, colour = oracle_labels(pictures, device)
    noise = torch.Generator().manual_seed(rng.getrandbits(40))
    lost = torch.rand(label.shape, generator=noise).to(device) < 0.12
    patches = oracle(
        model.get_decoder().embed_tokens,
        label.masked_fill(lost, 0),
        colour.masked_fill(lost, -100),
        None if stage == "words" else grid,
    )
    patches = patches + torch.randn(patches.shape, generator=noise).to(device) * patches.detach().std() * 0.33
    if stage != "speak":
        return lesson_loss(model, rows, patches.flatten(0, 1))
    loss, stats, hidden = _lesson_loss(model, rows, patches.flatten(0, 1))
    knowing, naming_stats = named_loss(heads, packer, rows, batch, hidden)
    return loss + 0.3 * knowing, {**stats, **naming_stats, "answer_loss": loss.item()}


def bridge_loss(model: Any, heads: Heads, oracle: Oracle, rng: random.Random, count: int) -> tuple[Tensor, dict]:
    """How far the projected patches are from the oracle's, and the tower's own lesson beside it.

    The tower goes along: the projector alone is too small to turn classes into words.
    """
    grid = rng.choice(sizes(model))
    pictures = [p.resized(grid) for _ in range(count) if (p := picture_lesson(rng, "joint").picture)]
    output = see(model, pictures)
    loss = _oracle_error(model, oracle, output, pictures)
    seeing, stats = patch_loss(heads, output, pictures)
    return loss + 0.1 * seeing, {**stats, "error": loss.item()}


def _oracle_error(model: Any, oracle: Oracle, output: TowerOutput, pictures: list[draw.Picture]) -> Tensor:
    """Mean squared error of the projected patches against the oracle's with their places, in units of their variance."""
    label, colour = oracle_labels(pictures, output.tokens.device)
    with torch.no_grad():
        target = oracle(model.get_decoder().embed_tokens, label, colour, pictures[0].grid)
    weight = torch.where(label > 0, 1.0, 0.15) * (label >= 0)
    return ((output.tokens - target) ** 2).mean(-1).mul(weight).sum() / weight.sum() / target[label > 0].var()


def sight_loss(
    model: Any, heads: Heads, oracle: Oracle, rng: random.Random, count: int, stage: str = "sight"
) -> tuple[Tensor, dict]:
    """Tower and projector without the decoder, so ten pictures for the price of one: pages, and lessons' pictures.

    In stage `look` the projected patches are drawn to the oracle's besides.
    """
    grid, pictures = rng.choice(sizes(model)), []
    for _ in range(count):
        lesson = picture_lesson(rng, "skills").picture if rng.random() < 0.65 else None
        pictures.append((lesson or framed(rng, draw.page(rng, whole=True))[0]).resized(grid))
    output = see(model, pictures)
    seeing, stats = patch_loss(heads, output, pictures)
    meaning = meaning_loss(model, oracle.token, output.tokens, pictures)
    centre, centre_stats = centre_loss(heads, output.tokens, pictures)
    loss, record = seeing + 0.5 * meaning + 0.5 * centre, {**stats, **centre_stats, "meaning": meaning.item()}
    if stage == "look":
        error = _oracle_error(model, oracle, output, pictures)
        loss, record = loss + 3.0 * error, {**record, "error": error.item()}
    return loss, record


def joint_loss(
    model: Any, heads: Heads, oracle: Oracle, packer: Packer, rng: random.Random, count: int, texts: int, stage: str
) -> tuple[Tensor, dict]:
    """Lessons through the whole model; the tower's own lesson goes on beside it, so that it does not forget to read."""
    device = next(model.parameters()).device
    batch = lessons(rng, packer, count, texts, stage, rng.choice(sizes(model)))
    rows = packer.rows(batch, device)
    pictures = [x.picture for x in batch if x.picture]
    output = see(model, pictures)
    loss, stats, hidden = _lesson_loss(model, rows, output.tokens.flatten(0, 1))
    seeing, seeing_stats = patch_loss(heads, output, pictures)
    knowing, naming_stats = named_loss(heads, packer, rows, batch, hidden)
    meaning = meaning_loss(model, oracle.token, output.tokens, pictures)
    centre, centre_stats = centre_loss(heads, output.tokens, pictures)
    record = stats | seeing_stats | naming_stats | centre_stats
    record |= {"meaning": meaning.item(), "answer_loss": loss.item()}
    return loss + 0.5 * seeing + 0.3 * knowing + 0.4 * meaning + 0.2 * centre, record
