"""Does it hold here? "Deep alignment" against answers alone, from what `davsp reproduce deep-alignment` left beside the tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from davsp.experiments.cells import signed
from davsp.experiments.deep.borders import EVERY
from davsp.experiments.paper.claims import FAILS, HOLDS, UNTESTED, Claim
from davsp.runtime.files import read_json

Row = Mapping[str, Any]
SOURCE = "said in words"


@dataclass(frozen=True)
class Part:
    """A part of the deep alignment test, and the figures of it that decide.

    Attributes:
        folder: below that of the model.
        text: where DAVSP is said to resist more than a border trained on answers alone.
        benchmark, metric: of the rows that decide; of differences without "_difference".
        named: how the rows name a border.
        both: which of the borders is DAVSP's.
    """

    folder: str
    text: str
    benchmark: str
    metric: str = "rsr"
    named: str = "{}"
    both: str = "both"


CURVE = "at equal utility (at most 10 points lost; the best of its settings)"
PARTS = (
    Part("curve", CURVE, "malicious", "rsr_at_10", "best of {}", "both, any λ"),
    *(Part(f"kinds-{k}", f"on kinds of harm never met, {k} of four met", "unseen") for k in (1, 2, 3)),
    Part("forms", "on forms of picture never met", "unseen"),
    Part("forms-blind", "on forms of picture that nothing met", "unseen"),
    Part("wordings", "on wordings never met", "unseen"),
    Part(".", "where answers are made to begin with a word of compliance", "begun 1"),
    Part("turns", "after four turns", "4 turns"),
    Part("turns-hard/turns", "after four turns, by borders that met the four hard kinds alone", "4 turns"),
)


def deeper(folder: Path) -> list[Claim]:
    """A claim for each part that is there; one that says so if none is.

    Args:
        folder: of the model, as `davsp reproduce deep-alignment --out` has it.

    Raises:
        DavspError: a file in it is damaged.
    """
    found = [_claim(part, folder / part.folder) for part in PARTS if (folder / part.folder / "metrics.json").exists()]
    nothing = "`davsp reproduce deep-alignment` was not run beside this folder"
    return found or [Claim("deep alignment resists what answers alone do not", SOURCE, UNTESTED, nothing)]


def _claim(part: Part, folder: Path) -> Claim:
    text = f"deep alignment resists more than answers alone {part.text}"
    rows, facts = (read_json(folder / name) for name in ("metrics.json", "manifest.json"))
    if half := facts.get("under_way"):
        return Claim(text, SOURCE, UNTESTED, f"this part is under way: {', '.join(half)}; give its command again")
    at = {
        (r["defense"], r["metric"]): r
        for r in rows["rows"]
        if (r["benchmark"], r["split"]) == (part.benchmark, "total")
    }
    both, answer = (part.named.format(name) for name in (part.both, "answer"))
    ours, theirs = at.get((both, part.metric)), at.get((answer, part.metric))
    gain = at.get((f"{both} against answer", f"{part.metric}_difference"))
    alone, every = (
        at.get((f"{part.named.format(name)} against answer", f"{part.metric}_difference"))
        for name in ("projection", EVERY)
    )
    if ours is None or theirs is None or gain is None:
        return Claim(text, SOURCE, UNTESTED, "this part is under way: give its command again")
    if None in (ours["value"], theirs["value"], gain["value"]):
        return Claim(text, SOURCE, UNTESTED, "not both have a border that loses so little utility")
    if not ours["value"] and not theirs["value"]:
        return Claim(text, SOURCE, UNTESTED, f"neither resists any of {ours['n']} queries")
    noise = " (within the noise)" if gain["low"] <= 0 <= gain["high"] else ""
    evidence = f"RSR {100 * ours['value']:.1f}, answers alone {100 * theirs['value']:.1f}: {signed(gain)}{noise}"
    if alone is not None and alone["value"] is not None:
        evidence += f"; the projection alone: {signed(alone)}"
    if every is not None and every["value"] is not None:
        evidence += f"; both with every malicious row refused, as answers alone have it: {signed(every)}"
    seeds = len(facts["seeds"])
    return Claim(
        text, SOURCE, HOLDS if gain["value"] > 0 else FAILS, f"{evidence}; {seeds} seed{'s' if seeds > 1 else ''}"
    )
