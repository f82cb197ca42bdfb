"""What is refused before an attack begins."""

import re
from collections.abc import Mapping, Sequence

import torch

from davsp.attacks.deeds import wanted
from davsp.attacks.settings import BASELINE, SEARCHED, AttackSettings
from davsp.attacks.suffix import random_words
from davsp.attacks.surface import picture_of, visual
from davsp.defenses import Defense, Gate
from davsp.errors import DavspError
from davsp.lvlm import LVLM
from davsp.query import Query
from davsp.vector import HarmfulnessVector

UNWANTING = ("noise", "redraw", "random-words", "hide")
"""Attacks that want no answer."""


def slug(name: str) -> str:
    """A defense's name as a folder's, which stays in its own."""
    return re.sub(r"^\.+", "_", re.sub(r"[^\w.+-]+", "_", name))


def check(
    lvlm: LVLM,
    defenses: Mapping[str, Defense],
    malicious: Sequence[Query],
    settings: AttackSettings,
    vector: HarmfulnessVector | None,
    training: Sequence[Query],
) -> None:
    """Raises DavspError for what can't be attacked, or not so (`davsp.attacks.attack` says what)."""
    if lvlm.server is not None:
        raise DavspError("an attack needs the gradients of a model that is loaded here; a server gives none")
    if lvlm.dtype == torch.float16:
        raise DavspError("an attack in float16 loses small gradients: load the model in bfloat16 or float32 (--dtype)")
    if not malicious:
        raise DavspError("there is no malicious query with a picture to attack")
    _check_words(lvlm, settings.target, "target")
    if "deed" in settings.attacks:
        for query in malicious:
            if (deed := wanted(query, settings.target)) is None:
                raise DavspError(
                    f"the attack 'deed' needs to know what is asked for, and query {query.id} has no context; leave it out, or give one"
                )
            _check_words(lvlm, deed, f"query {query.id}: the answer that 'deed' wants")
    if "universal" in settings.attacks:
        _check_training(malicious, training)
    if (needs := {"hide", "both"} & set(settings.attacks)) and vector is None:
        raise DavspError(f"the attack {min(needs)!r} needs the defender's vector (--vector), or leave it out")
    if words := [a for a in SEARCHED if a in settings.attacks and any(isinstance(d, Gate) for d in defenses.values())]:
        raise DavspError(f"the attack {words[0]!r} does not know gates, which ask a question twice; leave it out")
    if "joint" in settings.attacks and "suffix" not in settings.attacks:
        raise DavspError("the attack 'joint' goes on from the words of 'suffix'; name that, too")
    if "transfer" in settings.attacks and not (BASELINE in defenses and "comply" in settings.attacks):
        raise DavspError("the attack 'transfer' needs the defense 'none' and the attack 'comply', by which it is made")
    if len({slug(name) for name in defenses}) < len(defenses):
        raise DavspError("two defenses have names that differ in punctuation alone; rename one")
    if vector is not None:
        vector.check(lvlm)
    for defense in defenses.values():
        defense.check(lvlm)
        visual(defense)


def check_room(
    lvlm: LVLM,
    defenses: Mapping[str, Defense],
    clean: Sequence[Query],
    settings: AttackSettings,
    training: Sequence[Query],
    max_new_tokens: int | None,
) -> None:
    """Raises DavspError where an attack makes a question, or wants an answer, that a model has no room for; `clean` is all it asks.

    The words of a search are not known yet. They take as many tokens as random ones, but for how these run into each other.
    """
    attacks, malicious = settings.attacks, [query for query in clean if query.label == "malicious"]
    longest, target = max_new_tokens or lvlm.longest, _tokens(lvlm, settings.target)
    if searched := {"suffix", "joint"}.intersection(attacks):
        longest = max(longest, target)
    if searched or "random-words" in attacks:
        for worded in random_words(
            lvlm, clean if "random-words" in attacks else malicious, settings.words, settings.seed
        ):
            _check_room(
                lvlm, defenses, worded, longest, f"--words {settings.words} is too many for query {worded.id!r}"
            )
    if wanting := [name for name in attacks if name not in UNWANTING]:
        asked = [*malicious, *(training if "universal" in attacks else ())]
        for query in asked if wanting != ["deed"] else ():
            _check_room(lvlm, defenses, query, target, f"--target is too long for query {query.id!r}")
    for query in malicious if "deed" in attacks else ():
        deed = _tokens(lvlm, wanted(query, settings.target) or "")
        _check_room(lvlm, defenses, query, deed, f"the answer that 'deed' wants of query {query.id!r} is too long")


def _tokens(lvlm: LVLM, answer: str) -> int:
    """Of an answer, with the token that ends it."""
    return len(lvlm.tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1


def _check_room(lvlm: LVLM, defenses: Mapping[str, Defense], query: Query, answer: int, what: str) -> None:
    for name, defense in defenses.items():
        try:
            defense.asked(lvlm).check_query(*defense.outline(query, query.size()), answer)
        except DavspError as error:
            cause, _, _ = str(error).partition(";")
            raise DavspError(f"{what} under {name}: {cause}; take less, or leave the query out") from error


def _check_words(lvlm: LVLM, text: str, what: str) -> None:
    unknown = lvlm.tokenizer.unk_token_id
    if unknown is not None and unknown in lvlm.tokenizer(text, add_special_tokens=False)["input_ids"]:
        raise DavspError(f"{what} {text!r} holds words that {lvlm.model_id} does not know; give others")


def _check_training(malicious: Sequence[Query], training: Sequence[Query]) -> None:
    if not training:
        raise DavspError(
            "the attack 'universal' needs pictures to be trained on that are not attacked, or leave it out"
        )
    if any(q.label != "malicious" for q in training):
        raise DavspError("the attack 'universal' is trained on malicious queries; leave the others out")
    attacked = {picture_of(q).tobytes() for q in malicious}
    if same := next((q.id for q in training if picture_of(q).tobytes() in attacked), None):
        raise DavspError(
            f"the attack 'universal' may not be trained on pictures that are attacked, as that of {same} is"
        )
