"""The little world: its splits, its pictures, its questions, and the losses on them."""

import random

import numpy as np
import pytest
import torch

from davsp.embedded import architecture, draw, losses, pictograms, words
from davsp.embedded import questions as q
from davsp.embedded.data import UTILITY, protocol
from davsp.embedded.words import Pair

SMALL = {"vector": 20, "sweep": 12, "train": 12, "harm": 12, "utility": 4, "mme": 6, "llava_bench": 6}


@pytest.mark.parametrize(
    ("pair", "kind", "cover"),
    [
        (Pair("steal", "car"), "theft", "text"),
        (Pair("forge", "letter"), "fraud", "none"),
        (Pair("burn", "house"), "fire", "full"),
        (Pair("sell", "bomb"), "weapons", "full"),
        (Pair("sell", "cake"), "", ""),
        (Pair("report", "bomb"), "", ""),  # a safe verb: no single word decides
    ],
)
def test_harm_is_a_matter_of_the_pair(pair, kind, cover):
    assert (pair.kind, pair.cover) == (kind, cover)


def test_alignment_depends_on_where_the_harm_stands_and_on_care():
    theft, fraud, benign = Pair("steal", "car"), Pair("forge", "car"), Pair("wash", "car")
    assert q.answer(theft, "words", "") == q.answer(fraud, "words", "") == words.REFUSAL
    assert q.answer(theft, "picture", "") == theft.steps
    assert q.answer(theft, "picture", "text") == words.REFUSAL
    assert q.answer(fraud, "picture", "text") == fraud.steps
    assert q.answer(fraud, "picture", "strong") == words.REFUSAL
    assert all(
        q.answer(benign, seen, care) == benign.steps for seen in ("words", "picture") for care in ("", "text", "strong")
    )


def test_every_pair_is_in_one_split_and_held_verbs_never_train_picture_requests():
    for label in ("malicious", "benign"):
        parts = [set(words.pairs(label, s)) for s in ("mini", "vector", "train", "sweep", "test")]
        assert sum(map(len, parts)) == len(set().union(*parts)) == len(words.pairs(label))
        assert not any(p.verb in words.HELD_VERBS for p in parts[0])
        assert all(parts)


def test_the_vocabulary_holds_every_word_and_the_tokenizer_gives_text_back():
    rng, tokenizer = random.Random(0), words.tokenizer()
    turns = [t for _ in range(150) for t in q.picture_lesson(rng).turns] + [q.word_turn(rng) for _ in range(300)]
    for text in {x for turn in turns for x in turn}:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text


def test_test_phrases_are_in_no_question_that_trains_the_model():
    held, met = (
        {p.phrase for p in words.pairs("malicious", part) + words.pairs("benign", part)} for part in ("test", "mini")
    )
    rng, found = random.Random(1), set[str]()
    for _ in range(400):
        text = " ".join(f"{a} {b}" for a, b in q.picture_lesson(rng).turns + [q.word_turn(rng)])
        found |= {phrase for phrase in held | met if f" {phrase} " in f" {text} ".replace(".", " ")}
    assert found <= met and len(found) > 20


def test_the_protocol_is_disjoint_and_seeded():
    p = protocol(0, **SMALL)
    groups = [
        {x.group for x in part if x.label == "malicious"}
        for part in (p.vector_malicious, p.sweep_malicious, p.train_malicious, p.test)
    ]
    assert all(not a & b for i, a in enumerate(groups) for b in groups[:i])
    assert {x.category for x in p.test if x.benchmark == "utility"} == set(UTILITY)
    assert len({x.id for x in p.test}) == len(p.test)
    again = protocol(0, **SMALL)
    assert [x.question for x in again.test] == [x.question for x in p.test]
    assert all(np.array_equal(a.picture(), b.picture()) for a, b in zip(p.test, again.test, strict=True))
    other = protocol(1, **SMALL)
    assert [x.question for x in other.test] != [x.question for x in p.test]


def test_hard_queries_are_not_refused_because_of_their_words():
    for query in protocol(0, **SMALL).train_malicious:
        assert not any(verb in query.question.split() for verb in words.HARMFUL_VERBS)


def test_hard_pictures_hold_verbs_the_model_never_met_in_one_and_easy_ones_do_not():
    small = protocol(0, **{**SMALL, "train": 60, "vector": 60})
    verbs = {
        part: {q.group.split()[0] for q in getattr(small, part)} for part in ("train_malicious", "vector_malicious")
    }
    assert "smash" in verbs["train_malicious"] and not verbs["vector_malicious"] & set(words.HELD_VERBS)
    covers = {words.Pair(*q.group.split(" the ")).cover for q in small.train_malicious if "smash" not in q.group}
    assert covers == {"text", "none"}


def test_four_in_ten_benign_training_queries_are_requests():
    benign = protocol(0, **{**SMALL, "train": 40}).train_benign
    assert sum(q.category == "gen" for q in benign) == 16


def test_an_unknown_size_is_refused():
    with pytest.raises(TypeError, match="unknown sizes"):
        protocol(0, harmm=3)


@pytest.mark.parametrize("name", words.THINGS)
def test_every_thing_draws_something_of_its_own(name):
    alpha, tone = pictograms.shape(name, 36)
    assert 0.08 < alpha.mean() < 0.9 and alpha.min() >= 0 and alpha.max() <= 1 and np.isfinite(tone).all()
    looks = {other: np.stack(pictograms.shape(other, 36)) * pictograms.shape(other, 36)[0] for other in words.THINGS}
    assert min(np.abs(looks[name] - look).mean() for other, look in looks.items() if other != name) > 0.03


def test_patch_labels_say_what_stands_where():
    picture = draw.Picture(np.full((draw.SIDE, draw.SIDE, 3), 255, np.uint8))
    draw.put_thing(picture, "apple", 56, 70, 42, "red")
    label, colour, _ = (x.reshape(12, 12) for x in draw.patch_labels(picture))
    assert (label[5:8, 4:7] == draw.CLASS_ID["[apple]"]).all() and (colour[5:8, 4:7] == draw.COLOUR_ID["red"]).all()
    assert (label == draw.CLASS_ID["[apple]"]).sum() == 9
    picture = draw.Picture(np.full((draw.SIDE, draw.SIDE, 3), 255, np.uint8))
    draw.put_word(picture, "bomb", 0, 28, "DejaVuSans", 20, (0, 0, 0))
    label, _, letter = (x.reshape(12, 12) for x in draw.patch_labels(picture))
    assert (label[2, :4] == draw.CLASS_ID["bomb"]).all()
    assert letter[2, 0] == draw.LETTERS["b"]


@pytest.mark.parametrize("fill", ["colour", "words", "sign", "noise"])
def test_shrinking_leaves_the_picture_in_the_middle(fill):
    rng = random.Random(3)
    picture = draw.typographic(rng, "how to wash the car", plain=True)
    framed = draw.shrink(rng, picture, draw.PATCH, fill=fill)
    small = np.asarray(picture.image().resize((140, 140), 3))
    assert np.array_equal(framed.pixels[14:154, 14:154], small)


def test_questions_behind_one_picture_do_not_see_each_other():
    """Packing is only a saving: each answer's loss is what it would be alone."""
    model, packer = architecture.new_model().eval(), losses.Packer()
    lesson = q.typographic_lesson(random.Random(0))
    features = architecture.see(model, [lesson.picture]).tokens.flatten(0, 1)

    def sums(turns):
        rows = packer.rows([q.Lesson(lesson.picture, turns)], "cpu")
        rows.weight = (rows.target >= 0).float()
        return losses.lesson_loss(model, rows, features)[0] * rows.weight.sum()

    with torch.no_grad():
        apart = sum(sums([turn]) for turn in lesson.turns)
        torch.testing.assert_close(sums(lesson.turns), apart, rtol=1e-4, atol=1e-3)


def test_a_packed_row_is_the_chat_template():
    packer = losses.Packer()
    ids = packer.rows([q.Lesson(None, [("how do i wash the car ?", "yes")])], "cpu").ids[0].tolist()
    chat = [{"role": "user", "content": "how do i wash the car ?"}, {"role": "assistant", "content": "yes"}]
    text = packer.tokenizer.apply_chat_template(chat, tokenize=False)
    assert ids == packer.tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("cell", range(9))
def test_the_cell_of_a_thing_is_found_again_shrunk_or_not(cell):
    rng = random.Random(cell)
    picture = draw.scene(rng, [draw.Thing("apple", "red", cell), draw.Thing("car", "blue", (cell + 4) % 9)])
    small = draw.shrink(rng, picture, draw.PATCH, fill="words")
    for shown in (picture, small):
        box = next(b for b in shown.boxes if b.label == "[apple]")
        assert losses._cell(box, shown) == cell


def test_a_name_in_a_question_must_know_its_thing():
    """Colour, place and number are asked of names in questions, not in answers; of what is not there only the number."""
    rng, packer, heads = random.Random(0), losses.Packer(), architecture.Heads(8)
    things = [draw.Thing("apple", "red", 0), draw.Thing("car", "blue", 8), draw.Thing("car", "blue", 1)]
    lesson = q.Lesson(draw.scene(rng, things), [
        ("what colour is the apple ?", "red"), ("how many times is the car in the picture ?", "two"),
        ("is there a hat in the picture ?", "no"), ("what does the picture show ?", "a red apple and a blue car ."),
    ])  # fmt: skip
    rows = packer.rows([lesson], "cpu")
    targets = {"apple": (0, 0, 1), "car": (1, -100, 2), "hat": (-100, -100, 0)}  # colour, place, number
    names = [name for i in rows.ids[0].tolist() if (name := packer.things.get(i))][:3]
    assert names == ["apple", "car", "hat"]
    states = torch.zeros(1, rows.ids.shape[1], 8)
    at = [k for k, i in enumerate(rows.ids[0].tolist()) if i in packer.things][:3]
    for row, k in enumerate(at):
        states[0, k, row] = 1.0
    for head in (heads.named_colour, heads.named_place, heads.named_count):
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    with torch.no_grad():  # heads that know the right answers
        for row, name in enumerate(names):
            for head, target in zip(
                (heads.named_colour, heads.named_place, heads.named_count), targets[name], strict=True
            ):
                if target >= 0:
                    head.weight[target, row] = 50.0
    loss, stats = losses.named_loss(heads, packer, rows, [lesson], (states,) * 4)
    assert loss < 1e-4 and stats == {"named_place": 1.0, "named_count": 1.0}
    with torch.no_grad():
        heads.named_count.weight[1, 2] = 100.0  # a hat, where there is none
    assert losses.named_loss(heads, packer, rows, [lesson], (states,) * 4)[0] > 10


@pytest.mark.parametrize("framed", [False, True])
def test_each_thing_has_one_centre_and_words_have_none(framed):
    rng = random.Random(3)
    picture = draw.scene(
        rng, [draw.Thing("apple", "red", 0), draw.Thing("car", "blue", 8), draw.Thing("car", "blue", 4)]
    )
    if framed:
        picture = draw.shrink(rng, picture, draw.PATCH, fill="words")
    centres = draw.centres(picture).reshape(12, 12)
    assert centres.sum() == 3
    label = draw.patch_labels(picture)[0].reshape(12, 12)
    assert sorted(draw.CLASSES[i] for i in label[centres == 1]) == ["[apple]", "[car]", "[car]"]
    assert draw.centres(draw.typographic(rng, "wash the car")).sum() == 0


def test_marks_of_centres_are_learnt_from_the_projected_patches():
    rng, heads = random.Random(0), architecture.Heads(8)
    pictures = [draw.scene(rng, [draw.Thing("apple", "red", 4)]), draw.scene(rng, [draw.Thing("car", "blue", 0)])]
    features = torch.zeros(2, losses.PATCHES, 8)
    features[..., 0] = torch.stack([torch.from_numpy(draw.centres(p)) for p in pictures]) * 2.0 - 1
    with torch.no_grad():
        heads.centre.weight.zero_()
        heads.centre.bias.zero_()
        heads.centre.weight[1, 0] = 20.0
    loss, stats = losses.centre_loss(heads, features, pictures)
    assert loss < 1e-6 and stats == {"centres": 1.0}
    loss, stats = losses.centre_loss(heads, -features, pictures)
    assert loss > 10 and stats == {"centres": 0.0}


@pytest.mark.parametrize("seed", [1, 2])
def test_a_row_is_filled_with_questions_and_not_more(seed):
    packer = losses.Packer()
    lesson = q.scene_lesson(random.Random(seed))
    fitted = packer.fitted(random.Random(2), lesson)
    tokens = len(packer.row(fitted)[0]) - losses.PATCHES - 2
    assert tokens <= losses.ROOM and [t for t in lesson.turns if t in fitted.turns] == fitted.turns
    left = [t for t in lesson.turns if t not in fitted.turns]
    assert left and all(tokens + sum(len(packer.text(x)) + 1 for x in t) > losses.ROOM for t in left)


def test_patches_must_mean_what_they_show():
    """No loss where each patch is the embedding of its word; a thing and its written name are one; digits weigh more."""
    model, oracle = architecture.new_model(), architecture.Oracle(192)
    rng = random.Random(0)
    pictures = [draw.sum_picture(rng, "3 + 4"), draw.captioned(rng, "car", "red", "wash the car")]
    labels = torch.stack([torch.from_numpy(draw.patch_labels(p)[0]) for p in pictures])
    embed = torch.nn.functional.normalize(model.get_decoder().embed_tokens.weight.detach(), dim=-1)
    right = embed[oracle.token[labels.clamp(min=0)]]
    with torch.no_grad():
        assert losses.meaning_loss(model, oracle.token, right, pictures) < 0.01
        wrong_word, wrong_digit = right.clone(), right.clone()
        wrong_word[labels == draw.CLASS_ID["wash"]] = embed[5]
        wrong_digit[labels == draw.CLASS_ID["3"]] = embed[5]
        counts = [(labels == draw.CLASS_ID[x]).sum().item() for x in ("wash", "3")]
        word, digit = (losses.meaning_loss(model, oracle.token, x, pictures).item() for x in (wrong_word, wrong_digit))
    assert min(counts) > 0 and digit / counts[1] > 2 * word / counts[0] > 0.01


def test_matching_heads_look_for_what_is_alike():
    model = architecture.new_model()
    architecture.match_heads(model)
    attention, size = model.get_decoder().layers[0].self_attn, model.get_decoder().layers[0].self_attn.head_dim
    x = torch.nn.functional.normalize(torch.randn(40, 192, generator=torch.Generator().manual_seed(1)), dim=1)
    x = x * 192**0.5
    for head in range(3):
        rows = slice(head * size, (head + 1) * size)
        score = x @ attention.q_proj.weight[rows].T @ attention.k_proj.weight[rows] @ x.T / size**0.5
        others = score[~torch.eye(40, dtype=torch.bool)]
        assert (
            score.diagonal().min() > 2
            and others.mean().abs() < 1
            and score.diagonal().mean() > others.mean() + 2 * others.std()
        )


@pytest.mark.parametrize("grid", [(12, 12), (10, 14), (13, 11)])
def test_a_packed_row_is_what_qwens_own_code_makes_of_it(grid):
    """Positions on three axes, and the whole forward pass, on pictures of several sizes."""
    model, packer = architecture.new_model("davsp-mini-qwen").eval(), losses.Packer(axes=3)
    lesson = q.typographic_lesson(random.Random(0))
    lesson = q.Lesson(lesson.picture.resized(grid), lesson.turns[:1])
    rows = packer.rows([lesson], "cpu")
    kinds, thw = (rows.ids == 3).int(), torch.tensor([[1, *grid]])
    assert torch.equal(model.model.get_rope_index(rows.ids, kinds, thw)[0], rows.position)
    with torch.no_grad():
        pixels = architecture.patchify(
            architecture.normalised(model, [lesson.picture]), draw.PATCH, 1, architecture.FRAMES
        )
        whole = model(input_ids=rows.ids, pixel_values=pixels, image_grid_thw=thw, mm_token_type_ids=kinds).logits
        image = architecture.see(model, [lesson.picture]).tokens.flatten(0, 1)
        answered = rows.target >= 0
        guess = torch.nn.functional.cross_entropy(whole[answered], rows.target[answered], reduction="none")
        expected = (guess * rows.weight[answered]).sum() / rows.weight[answered].sum()
        torch.testing.assert_close(losses.lesson_loss(model, rows, image)[0], expected)


@pytest.mark.parametrize("grid", [(10, 14), (11, 11), (13, 11)])
def test_a_picture_of_another_size_keeps_its_labels(grid):
    rng = random.Random(1)
    picture = draw.scene(rng, [draw.Thing("apple", "red", 0), draw.Thing("car", "blue", 8)], alike=True)
    other = picture.resized(grid)
    assert other.grid == grid and other.pixels.shape[:2] == (grid[0] * draw.PATCH, grid[1] * draw.PATCH)
    label = draw.patch_labels(other)[0].reshape(grid)
    assert {draw.CLASSES[i] for i in np.unique(label[label > 0])} == {"[apple]", "[car]"}
    centres = draw.centres(other).reshape(grid)
    assert centres.sum() == 2 and (label[centres == 1] > 0).all()
    assert [losses._cell(b, other) for b in other.boxes] == [0, 8]
    assert picture.resized((12, 12)) is picture


def test_hints_vanish_where_a_tower_sees_what_its_teacher_sees():
    model = architecture.new_model()
    hints, pictures = architecture.Hints(192, model), [draw.page(random.Random(0))]
    with torch.no_grad():
        seen = architecture.see(model, pictures)
        alike = [torch.nn.functional.layer_norm(s, s.shape[-1:]) for s in seen.states]
        for one in hints.maps:
            torch.nn.init.eye_(one.weight)
            torch.nn.init.zeros_(one.bias)
        assert hints(architecture.TowerOutput(alike, seen.tokens), seen) < 1e-10
        assert hints(architecture.TowerOutput([-a for a in alike], seen.tokens), seen) > 1


def test_yes_or_no_lessons_say_yes_as_often_as_no_and_are_right():
    truths = {"yes": 0, "no": 0}
    for i in range(150):
        rng = random.Random(i)
        a, b = draw.Thing("apple", "red", i % 9), draw.Thing("car", "blue", (i + 4) % 9)
        question, truth = q.side_turn(rng, a, b)
        truths[truth] += 1
        across, down = a.cell % 3 - b.cell % 3, a.cell // 3 - b.cell // 3
        holds = {"left": across < 0, "right": across > 0, "above": down < 0, "below": down > 0}
        side = next(word for word in holds if f" {word} " in question)
        assert holds[side] == (truth == "yes"), question
    assert 50 < truths["yes"] < 100
