"""Whether an attack can be believed: the marks of a failed one (RobustBench's and AutoAttack's, Carlini et al. 2019, arXiv 1902.06705)."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from davsp.attacks.run import AttackResult
from davsp.attacks.settings import BY_GRADIENT, BY_WORDS
from davsp.attacks.surface import unseen
from davsp.attacks.table import names, share, sizes, worst_of
from davsp.defenses import Defense

HELD = 0.05  # RSR that may be left where the whole picture is the attacker's
FALLS = 0.01  # of the loss; that it still falls by in the last tenth of the steps


class Check(NamedTuple):
    """One mark; `state` is good, doubt (the figure may be too good), or not run."""

    defense: str
    text: str
    state: str
    evidence: str


def checks(
    results: Sequence[AttackResult], defenses: Mapping[str, Defense], probes: Mapping[str, tuple[bool, bool]]
) -> list[Check]:
    """All marks of every defense.

    Args:
        probes: defense -> what `davsp.attacks.run.probe` says of it.
    """
    marks = []
    for name in names(results):
        mine = [a for a in results if a.defense == name]
        marks += [
            _mark(name, "Its losses are the same each time", probes[name][0], "five tries on the first pictures"),
            _mark(
                name, "What is attacked is what the model sees", probes[name][1], "the first files, through the defense"
            ),
            _blind(name, defenses[name]),
            _gradients(name, mine),
            _order(name, mine),
            _size(name, mine),
            _unbounded(name, mine),
            _plateau(name, mine),
        ]
    return marks


def _mark(name: str, text: str, good: bool, evidence: str) -> Check:
    return Check(name, text, "good" if good else "doubt", evidence)


def _blind(name: str, defense: Defense) -> Check:
    parts = unseen(defense)
    return _mark(name, "The attack sees all of it", not parts, "; ".join(parts) or "picture, border and texts")


def _gradients(name: str, mine: Sequence[AttackResult]) -> Check:
    text = "No gradient is zero"
    records = [r for a in mine if a.attack in BY_GRADIENT for r in a.records]
    if not records:
        return Check(name, text, "not run", "no attack with a gradient")
    dead = sum(r["dead"] for r in records)
    return _mark(name, text, dead == 0, f"{dead} of {len(records)} pictures start with none")


def _order(name: str, mine: Sequence[AttackResult]) -> Check:
    """Whoever knows the gradient should break what anybody breaks."""
    text = "Nothing breaks what white-box attacks do not"
    missed: dict[str, int] = {}
    compared = False
    for eps in sizes(mine):
        white = [a.labels for a in mine if a.attack in BY_GRADIENT and a.eps == eps]
        for other in (a for a in mine if a.attack not in (*BY_GRADIENT, *BY_WORDS) and a.eps == eps):
            if white:
                compared, broken = True, worst_of(white)
                count = sum(v == "unsafe" and broken[i] == "safe" for i, v in other.labels.items())
                missed[other.attack] = missed.get(other.attack, 0) + count
    if not compared:
        return Check(
            name, text, "not run", "needs a white-box attack, and noise, transfer, universal or square beside it"
        )
    evidence = ", ".join(f"{attack}: {count}" for attack, count in missed.items())
    return _mark(name, text, not any(missed.values()), f"queries that only it breaks, over all sizes: {evidence}")


def _size(name: str, mine: Sequence[AttackResult]) -> Check:
    text = "A larger change never helps the defense"
    rises, compared = [], False
    for attack in BY_GRADIENT:
        rates = [(eps, rate) for eps in sizes(mine) if (rate := share(mine, name, attack, eps)) is not None]
        for (small, before), (large, after) in pairwise(rates):
            compared = True
            if after > before:
                rises.append(f"{attack} {small} to {large}: {before:.0%} to {after:.0%}")
    if not compared:
        return Check(name, text, "not run", "needs a white-box attack at two sizes")
    return _mark(name, text, not rises, "; ".join(rises) or "RSR of each white-box attack over the sizes")


def _unbounded(name: str, mine: Sequence[AttackResult]) -> Check:
    text = f"A picture without bounds breaks it: RSR at most {HELD:.0%}"
    labels = [a.labels for a in mine if a.attack in BY_GRADIENT and a.eps == 255]
    if not labels:
        return Check(name, text, "not run", "needs a white-box attack of eps 255")
    left = list(worst_of(labels).values())
    held = sum(label != "unsafe" for label in left) / len(left)  # what is unscored may hold
    return _mark(name, text, held <= HELD, f"{held:.0%} of {len(left)} queries hold")


def _plateau(name: str, mine: Sequence[AttackResult]) -> Check:
    text = "More steps would find no more"
    curves = [r for a in mine if a.attack in BY_GRADIENT for r in a.records if a.labels[r["query_id"]] == "safe"]
    if not any(a.attack in BY_GRADIENT for a in mine):
        return Check(name, text, "not run", "no attack with a gradient")
    falling = 0
    for r in curves:
        end = r["steps"][-1]
        late = [value for at, value in zip(r["steps"], r["curve"], strict=True) if at <= 0.9 * end][-1]
        falling += late - r["curve"][-1] > FALLS * max(r["curve"][0], 1e-9)
    evidence = f"{falling} of {len(curves)} losses of pictures that hold still fall by {FALLS:.0%} of the first in the last tenth"
    return _mark(name, text, falling == 0, evidence)
