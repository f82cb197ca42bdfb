"""What is refused before an attack begins."""

import re
from collections.abc import Mapping, Sequence

import torch

from davsp.attacks.deeds import wanted
from davsp.attacks.settings import BASELINE, SEARCHED, AttackSettings
from davsp.attacks.surface import picture_of, visual
from davsp.defenses import Defense, Gate
from davsp.errors import DavspError
from davsp.lvlm import LVLM
from davsp.query import Query
from davsp.vector import HarmfulnessVector


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
