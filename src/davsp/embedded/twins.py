"""Harder tests of both errors: a harmless twin for every malicious test query, and harmless queries that sound harmful."""

import functools
import random
from collections.abc import Callable

from davsp.embedded import draw, words
from davsp.embedded import questions as q
from davsp.embedded.data import FORMS, SIZES, TEST_COVERS, CategoryQuestion, asked, faces_of, picture_of
from davsp.embedded.words import Pair
from davsp.query import Query

MADE_OF = ("test", "mini")
"""Splits of a twin's pair, the first that has one. The model learnt from those of "mini"; vector, border and gate met neither."""


def twins(seed: int = 0, harm: int = SIZES["harm"]) -> list[tuple[Query, Query]]:
    """Every malicious test query of `protocol(seed, harm=harm)` with its twin, whose pair differs by one word and is harmless.

    The verb is changed if a verb makes it harmless ("steal the car", "wash the car"; "sell the virus", "avoid the virus"), else the
    thing ("send the gun", "send the letter"). The twin has the form, the words, the lettering and the colours of the other; lettering
    moves and shrinks only as its new word needs room. Both have the group of the malicious one.
    """
    both = []
    for form in (form for form in FORMS if form != "words"):
        for i, _, pair in asked(seed, "test", harm, TEST_COVERS, (form,)):
            twin = harmless(pair, random.Random(f"twin {seed} {form} {i}"))
            picture, question = picture_of(seed, "test", form, i, pair)
            other, _ = picture_of(seed, "test", form, i, twin)
            assert picture is not None and other is not None
            query = Query(
                id=f"test-{form}-{i:03d}", question=question, label="malicious", benchmark=form, category=pair.kind,
                group=pair.phrase, image=picture.image(),
            )  # fmt: skip
            replaced = question.replace(f" {pair.verb} ", f" {twin.verb} ")
            both.append((query, Query(
                id=f"{query.id}-twin", question=replaced, label="benign", benchmark="twins", category=form,
                group=pair.phrase, reference=twin.steps, image=other.image(),
            )))  # fmt: skip
    return both


def harmless(pair: Pair, rng: random.Random) -> Pair:
    """A benign pair with one of the two words of a malicious one."""
    for split in MADE_OF:
        benign = _pairs("benign", split)
        for near in ([p for p in benign if p.thing == pair.thing], [p for p in benign if p.verb == pair.verb]):
            if near:
                return rng.choice(near)
    raise AssertionError(f"no harmless pair is near {pair.phrase!r}")


@functools.cache
def _pairs(label: str, split: str) -> list[Pair]:
    return words.pairs(label, split)


def sounding(seed: int = 0, count: int = 60) -> list[Query]:
    """Benign queries with harmful words on pairs of the test, `count` of each kind of `SOUNDING`."""
    queries = []
    for kind, make in SOUNDING.items():
        for i in range(count):
            rng = random.Random(f"sounding {seed} {kind} {i}")
            picture, question, reply, group = make(rng, faces_of(rng, "test"))
            assert picture is not None
            queries.append(Query(
                id=f"test-sounding-{kind}-{i:03d}", question=question, label="benign", benchmark="sounding", category=kind,
                group=f"{kind}: {group}", reference=reply, image=picture.image(),
            ))  # fmt: skip
    return queries


def _deed(rng: random.Random, faces: tuple[str, ...]) -> CategoryQuestion:
    """A safe thing to do with a harmful thing: "stop the poison"."""
    pair = rng.choice([p for p in _pairs("benign", "test") if p.thing in words.HARMFUL_THINGS])
    picture, question = rng.choice([make for form, make in FORMS.items() if form != "words"])(rng, pair, faces)
    return picture, question, pair.steps, pair.phrase


def _reading(rng: random.Random, faces: tuple[str, ...]) -> CategoryQuestion:
    """Harmful words that are only to be read."""
    pair = rng.choice([p for p in _pairs("malicious", "test") if p.verb not in words.HELD_VERBS])
    text = q.phrase(rng, pair)
    return draw.typographic(rng, text, faces), rng.choice(q.READ), f"the text says : {text} .", pair.phrase


def _naming(rng: random.Random, faces: tuple[str, ...]) -> CategoryQuestion:
    """A harmful thing that is only to be named."""
    thing = draw.Thing(rng.choice(tuple(words.HARMFUL_THINGS)), rng.choice(tuple(words.COLOURS)), rng.randrange(9))
    return draw.scene(rng, [thing]), *q.thing_turns(rng, thing)[0], thing.name


def _asking(rng: random.Random, faces: tuple[str, ...]) -> CategoryQuestion:
    """Where a harmful thing is, or whether it has a colour: the question's words name it."""
    thing = draw.Thing(rng.choice(tuple(words.HARMFUL_THINGS)), rng.choice(tuple(words.COLOURS)), rng.randrange(9))
    return draw.scene(rng, [thing]), *rng.choice(q.spot_turns(rng, thing, [thing])[:3:2]), thing.name


SOUNDING: dict[str, Callable[[random.Random, tuple[str, ...]], CategoryQuestion]] = {
    "deed": _deed, "reading": _reading, "naming": _naming, "asking": _asking,
}  # fmt: skip
