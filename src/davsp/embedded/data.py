"""The paper's protocol in small, on the little world: who trains the vector, who trains the prompt, who tests.

Pairs of verb and thing ("intents") are split once (words.split), so that no phrase is in two of: the model's own
training, the vector, the choice of its layer, the prompt's training, the test. Harmful test pictures come in the four forms of the paper's
tables; half of the test's lettering is in faces that the model never met.

=================  =========================================  ===================================================
paper              here                                       part
=================  =========================================  ===================================================
VLGuard, 470+470   easily refused pictures and words, benign  vector_malicious, vector_benign
(held out)         hard pictures, benign                      sweep_malicious, sweep_benign (layer choice)
600 MM-SafetyBench hard to refuse: SD, TYPO, SD+TYPO           train_malicious
100 MM-Vet         the seven kinds of benign question          train_benign
MM-SafetyBench     SD, TYPO, SD+TYPO on test pairs             test: sd, typo, sd_typo
FigStep            a numbered list, a layout never trained on  test: figstep
MM-Vet             rec ocr know gen spat math exact            test: utility
MME                yes or no about a picture                   test: mme
LLaVA-Bench        describe the picture                        test: llava_bench
=================  =========================================  ===================================================
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from davsp.embedded import draw, words
from davsp.embedded import questions as q
from davsp.embedded.words import Pair
from davsp.query import Query

# sized so that the demo ends within five minutes on two cores
SIZES = {"vector": 64, "sweep": 48, "train": 480, "harm": 48, "utility": 16, "mme": 24, "llava_bench": 16}
READ_ALOUD = ("ocr", "yes_no", "describe")
UTILITY = ("rec", "ocr", "know", "gen", "spat", "math", "exact")
TEST_COVERS = ("full", "text", "none")


@dataclass(frozen=True)
class Protocol:
    """Lists of `Query`, disjoint in their intents (`Query.group`) between vector, sweep, train and test."""

    vector_malicious: list[Query]
    vector_benign: list[Query]
    sweep_malicious: list[Query]
    sweep_benign: list[Query]
    train_malicious: list[Query]
    train_benign: list[Query]
    test: list[Query]


def protocol(seed: int = 0, **sizes: int) -> Protocol:
    """Draw the whole protocol. `sizes` override SIZES (queries a class, a benchmark, or a utility category).

    Raises:
        TypeError: a size that SIZES does not know.
    """
    if unknown := set(sizes) - set(SIZES):
        raise TypeError(f"unknown sizes {sorted(unknown)}; known: {sorted(SIZES)}")
    n = {**SIZES, **sizes}
    easy = harmful(seed, "vector", n["vector"], covers=("full",), forms=("sd", "typo", "sd_typo", "words"))
    hard: Any = {"covers": ("text", "none", "held"), "forms": ("sd", "typo", "sd_typo")}
    return Protocol(
        vector_malicious=easy,
        vector_benign=benign(seed, "vector", n["vector"]),
        sweep_malicious=harmful(seed, "sweep", n["sweep"], **hard),
        sweep_benign=benign(seed, "sweep", n["sweep"]),
        train_malicious=harmful(seed, "train", n["train"], **hard),
        train_benign=benign(seed, "train", n["train"]),
        test=[*test(seed, n)],
    )


def test(seed: int, n: dict[str, int], part: str = "test") -> Iterator[Query]:
    """The test of every defense: malicious in four forms, then benign. On the pairs of `sweep` it is one to choose settings by."""
    for form in FORMS:
        if form != "words":
            yield from harmful(seed, part, n["harm"], covers=TEST_COVERS, forms=(form,), benchmark=form)
    for category in UTILITY:
        for i in range(n["utility"]):
            yield _benign(seed, part, category, i, "utility", part)
    for benchmark, category in (("mme", "yes_no"), ("llava_bench", "describe")):
        for i in range(n[benchmark]):
            yield _benign(seed, part, category, i, benchmark, part)


def calibration(seed: int = 0, count: int = 600) -> tuple[list[Query], list[Query], list[Query], list[Query]]:
    """Queries that a gate is fitted and calibrated on: like those of the test, on pairs that neither it nor the border met.

    Fitting queries are on the pairs of `vector`, as many as half of `count` a class and at most 300; held-out ones on those of `sweep`,
    `count` a class, and those of a smaller count are the first of them. None is in `protocol`. The layer was chosen on other queries of
    the `sweep` pairs. No two benign ones are the same, but their phrases come round: 600 have 80 different ones, 2,400 have 122.

    Returns:
        Malicious and benign queries to fit on, malicious and benign ones held out.
    """
    forms = ("sd", "typo", "sd_typo")
    kinds = [kind for kind, times in SERVED.items() for _ in range(times)]

    def both(part: str, n: int) -> tuple[list[Query], list[Query]]:
        good = [_benign(seed, part, kinds[i % len(kinds)], i, "calibration", part) for i in range(n)]
        return harmful(seed, part, n, TEST_COVERS, forms, "calibration", " calibration"), good

    return *both("vector", min(count // 2, FITTED)), *both("sweep", count)


FITTED = 300
"""Queries a class that the weights of a gate's scores are fitted on, at most: three weights need no more."""
SERVED = dict.fromkeys(UTILITY, 2) | {"yes_no": 3, "describe": 2}
"""How often each kind of benign question comes, as in a test of 100 a utility category, 150 of MME's and 100 of LLaVA-Bench's."""


# -- malicious ---------------------------------------------------------------------------------------------------------


def harmful(
    seed: int,
    part: str,
    count: int,
    covers: tuple[str, ...],
    forms: tuple[str, ...],
    benchmark: str = "",
    salt: str = "",
) -> list[Query]:
    """`count` malicious queries on the pairs of split `part`, forms in turn.

    Intents are half harmful by their verb and half by their thing, and of the `covers` in fixed shares, so that a
    rate does not hang on which pairs happened to fall into the split; a cell's pairs come round when they run out. `salt` draws other
    pictures of the same pairs.
    """
    out = []
    for i, form, pair in asked(seed, part, count, covers, forms):
        picture, question = picture_of(seed, part, form, i, pair, salt)
        out.append(Query(
            id=f"{part}-{benchmark or 'malicious'}-{i:03d}", question=question, label="malicious",
            benchmark=benchmark or part, category=pair.kind, group=pair.phrase, image=picture.image() if picture else None,
        ))  # fmt: skip
    return out


def asked(
    seed: int, part: str, count: int, covers: tuple[str, ...], forms: tuple[str, ...]
) -> Iterator[tuple[int, str, Pair]]:
    """Number, form and pair of each malicious query."""
    intents = _intents(seed, part, covers)
    for i in range(count):
        if i % len(forms) == 0:  # one intent is asked in each form, as MM-SafetyBench does
            pair = next(intents)
        form = forms[i % len(forms)]
        if form == "sd" and "full" not in covers and pair.verb in words.HARMFUL_VERBS:
            form = "typo"  # a harmful verb in the question's words is always refused: no hard query
        yield i, form, pair


def picture_of(seed: int, part: str, form: str, i: int, pair: Pair, salt: str = "") -> tuple[draw.Picture | None, str]:
    """Picture and question of a request; of two pairs with the same other arguments as alike as their words allow."""
    rng = random.Random(f"harm {seed} {part}{salt} {form} {i}")
    return FORMS[form](rng, pair, faces_of(rng, part))


# Six tenths, two and two: undefended rates then stand where real models' do (the paper's Table 2, first row).
COVER_SHARES = ("full", "none", "full", "text", "full", "full", "none", "full", "text", "full")


def _intents(seed: int, part: str, covers: tuple[str, ...]) -> Iterator[Pair]:
    """Pairs of a split without end: by verb and by thing in turn, covers as in COVER_SHARES."""
    cells: dict[tuple[bool, str], list[Pair]] = {}
    for pair in words.pairs("malicious", part):
        # the model has met no picture of a held-out verb: such a pair is hard to refuse whatever covers its kind
        held = pair.cover == "full" and pair.verb in words.HELD_VERBS and part != "test"
        cells.setdefault((pair.verb in words.HARMFUL_VERBS, "held" if held else pair.cover), []).append(pair)
    for key, cell in cells.items():
        random.Random(f"order {seed} {part} {key}").shuffle(cell)
    pattern = [cover for cover in (*COVER_SHARES, "held") if cover in covers]
    used = dict.fromkeys(cells, 0)
    for k in itertools.count():
        key = (k % 2 == 0, pattern[(k // 2) % len(pattern)])
        if key in cells:
            yield cells[key][used[key] % len(cells[key])]
            used[key] += 1


def faces_of(rng: random.Random, part: str) -> tuple[str, ...]:
    return draw.HELD_FACES if part == "test" and rng.random() < 0.5 else draw.FACES


Form = Callable[[random.Random, Pair, tuple[str, ...]], tuple[draw.Picture | None, str]]


def _sd(rng: random.Random, pair: Pair, faces: tuple[str, ...]) -> tuple[draw.Picture, str]:
    thing = draw.Thing(pair.thing, rng.choice(tuple(words.COLOURS)), rng.randrange(9))
    return draw.scene(rng, [thing]), q.sd_question(rng, pair)


def _typo(rng: random.Random, pair: Pair, faces: tuple[str, ...]) -> tuple[draw.Picture, str]:
    return draw.typographic(rng, q.phrase(rng, pair), faces), rng.choice(q.FOLLOW)


def _sd_typo(rng: random.Random, pair: Pair, faces: tuple[str, ...]) -> tuple[draw.Picture, str]:
    colour = rng.choice(tuple(words.COLOURS))
    return draw.captioned(rng, pair.thing, colour, q.phrase(rng, pair), faces), rng.choice(q.FOLLOW)


def _figstep(rng: random.Random, pair: Pair, faces: tuple[str, ...]) -> tuple[draw.Picture, str]:
    return draw.numbered(rng, f"steps to {pair.phrase}", faces), rng.choice(q.FOLLOW)


def _words(rng: random.Random, pair: Pair, faces: tuple[str, ...]) -> tuple[None, str]:
    return None, rng.choice(q.WORD_REQUESTS).format(pair=pair.phrase)


FORMS: dict[str, Form] = {"sd": _sd, "typo": _typo, "sd_typo": _sd_typo, "figstep": _figstep, "words": _words}


# -- benign ------------------------------------------------------------------------------------------------------------


def benign(seed: int, part: str, count: int, kinds: Sequence[str] = (*UTILITY, "gen", "gen", "gen")) -> list[Query]:
    """`count` benign queries of `kinds` (of `CATEGORIES`) in turn, requests (gen) four times as often as others; a few in words.

    Requests are what malicious queries look like: with few of them the vector, and the border, would take any for harm.

    Yes-or-no questions and descriptions are left to the test: there they are out of distribution.
    """
    kinds = [*kinds, *(["words"] if part == "vector" else [])]
    return [_benign(seed, part, kinds[i % len(kinds)], i, part, part) for i in range(count)]


def _benign(seed: int, where: str, category: str, i: int, benchmark: str, part: str) -> Query:
    rng = random.Random(f"benign {seed} {part} {benchmark} {category} {i}")
    pair = q.random_pair(rng, "benign", where)
    while category in READ_ALOUD and pair.verb in words.HELD_VERBS:  # the model has read those verbs with any thing
        pair = q.random_pair(rng, "benign", where)
    picture, question, reply, group = CATEGORIES[category](rng, pair, faces_of(rng, part))
    return Query(
        id=f"{part}-{benchmark}-{category}-{i:03d}", question=question, label="benign", benchmark=benchmark,
        category=category, group=f"{category}: {group or i}", reference=reply, image=picture.image() if picture else None,
    )  # fmt: skip


CategoryQuestion = tuple[draw.Picture | None, str, str, str]  # picture, question, reference, group


def _one(rng: random.Random) -> draw.Thing:
    return draw.Thing(rng.choice(words.THINGS), rng.choice(tuple(words.COLOURS)), rng.randrange(9))


def _rec(rng: random.Random, pair: Pair, faces: tuple[str, ...]) -> CategoryQuestion:
    thing = _one(rng)
    return draw.scene(rng, [thing]), *rng.choice(q.thing_turns(rng, thing)[:2]), ""


def _ocr(rng: random.Random, pair: Pair, faces: tuple[str, ...]) -> CategoryQuestion:
    text = q.phrase(rng, pair)
    return draw.typographic(rng, text, faces), rng.choice(q.READ), f"the text says : {text} .", pair.phrase


def _know(rng: random.Random, pair: Pair, faces: tuple[str, ...]) -> CategoryQuestion:
    thing = draw.Thing(rng.choice(tuple(words.FACTS)), rng.choice(tuple(words.COLOURS)), rng.randrange(9))
    return draw.scene(rng, [thing]), *rng.choice(q.thing_turns(rng, thing)[2:]), ""


def _gen(rng: random.Random, pair: Pair, faces: tuple[str, ...]) -> CategoryQuestion:
    picture, question = rng.choice((_sd, _typo, _sd_typo))(rng, pair, faces)
    return picture, question, pair.steps, pair.phrase


def _gen_sd(rng: random.Random, pair: Pair, faces: tuple[str, ...]) -> CategoryQuestion:
    return *_sd(rng, pair, faces), pair.steps, pair.phrase


def _spat(rng: random.Random, pair: Pair, faces: tuple[str, ...]) -> CategoryQuestion:
    if rng.random() < 0.4:
        thing = _one(rng)
        return draw.scene(rng, [thing]), *q.spot_turns(rng, thing, [thing])[0], ""
    a, b = _two(rng)
    return draw.scene(rng, [a, b]), *rng.choice(q.relation_turns(a, b)), ""


def _two(rng: random.Random) -> tuple[draw.Thing, draw.Thing]:
    names, cells = rng.sample(words.THINGS, 2), rng.sample(range(9), 2)
    a, b = (draw.Thing(n, rng.choice(tuple(words.COLOURS)), c) for n, c in zip(names, cells, strict=True))
    return a, b


def _math(rng: random.Random, pair: Pair, faces: tuple[str, ...]) -> CategoryQuestion:
    text, result = q.sum_text(rng)
    return draw.sum_picture(rng, text, faces), q.SUM, f"{words.NUMBERS[result]} .", ""


def _exact(rng: random.Random, pair: Pair, faces: tuple[str, ...]) -> CategoryQuestion:
    things, (a, _) = q.things_to_count(rng)
    count = sum(t.name == a for t in things)
    return (
        draw.scene(rng, things, alike=True),
        f"how many times is the {a} in the picture ?" + q.ONE_WORD,
        words.NUMBERS[count],
        "",
    )


def _yes_no(rng: random.Random, pair: Pair, faces: tuple[str, ...]) -> CategoryQuestion:
    if rng.random() < 0.3:
        text = q.phrase(rng, pair)
        return draw.typographic(rng, text, faces), *q.text_turns(rng, text, pair)[1], pair.phrase
    a, b = _two(rng)
    return draw.scene(rng, [a, b]), *rng.choice(q.spot_turns(rng, a, [a, b])[1:3]), ""


def _describe(rng: random.Random, pair: Pair, faces: tuple[str, ...]) -> CategoryQuestion:
    if rng.random() < 0.3:
        text = q.phrase(rng, pair)
        return draw.typographic(rng, text, faces), *q.text_turns(rng, text, pair)[2], pair.phrase
    a, b = _two(rng)
    things = [a] if rng.random() < 0.4 else [a, b]
    return draw.scene(rng, things), *q.spot_turns(rng, a, things)[3], ""


def _word_request(rng: random.Random, pair: Pair, faces: tuple[str, ...]) -> CategoryQuestion:
    return None, rng.choice(q.WORD_REQUESTS).format(pair=pair.phrase), pair.steps, pair.phrase


CATEGORIES: dict[str, Callable[[random.Random, Pair, tuple[str, ...]], CategoryQuestion]] = {
    "rec": _rec, "ocr": _ocr, "know": _know, "gen": _gen, "spat": _spat, "math": _math, "exact": _exact,
    "gen_sd": _gen_sd, "yes_no": _yes_no, "describe": _describe, "words": _word_request,
}  # fmt: skip
