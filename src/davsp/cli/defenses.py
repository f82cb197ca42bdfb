"""From --defense, --prompt and --text to the rows of `davsp eval`.

A spec is read from left to right: METHOD or METHOD:OPTIONS, then + and what it is put around or before. A value behind = goes
to the spec's end, so that a folder or a text may hold any sign: `ecso+davsp=out/a+b`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from davsp.cli.inputs import safety_text
from davsp.cli.options import GRAMMAR
from davsp.errors import DavspError

if TYPE_CHECKING:
    from davsp.defenses import Defense
    from davsp.vector import HarmfulnessVector

METHODS = ("none", "safety-text", "adashield-s", "pat", "ecso", "ecso-adaptive", "gate", "intervention")


@dataclass(frozen=True)
class _Context:
    """What a spec does not say itself.

    Attributes:
        text: of safety-text; "" if there is none.
        shipped: the model is one of those that ship, so that texts and prompts are in its words.
        vector: of --vector.
    """

    text: str
    shipped: bool
    vector: "HarmfulnessVector | None"


def rows(
    specs: Sequence[str],
    prompt: Path | None,
    text: str | None,
    shipped: bool,
    vector: "HarmfulnessVector | None" = None,
) -> "dict[str, Defense]":
    """Name -> defense. With --defense just those that it names; else none, the safety text and the prompt, if there are any.

    Args:
        specs: as `GRAMMAR` says. A row is called as its spec, but for folders and texts.
        prompt: folder or hub id of a prompt, whose row is named by its kind.
        text: of the row safety-text; "" leaves it out.
        shipped: the model is one of those that ship: the safety text, AdaShield-S, PAT and ECSO use its words.
        vector: of `intervention`.

    Raises:
        DavspError: a spec that is none of these, a name twice, or a prompt that can't be read.
    """
    from davsp.defenses import load_defense

    context = _Context(safety_text(text, shipped), shipped, vector)
    defenses: dict[str, Defense] = {}
    for spec in specs or ["none", *["safety-text"] * bool(context.text)]:
        defense = _read(spec, context)
        if defense.name in defenses:
            raise DavspError(f"--defense names {defense.name!r} twice; give each row a name of its own.")
        defenses[defense.name] = defense
    if prompt:
        defense = load_defense(prompt)
        if defense.name in defenses:
            raise DavspError(f"--prompt and --defense both make the row {defense.name!r}; leave one out.")
        defenses[defense.name] = defense
    return defenses


def _read(spec: str, context: _Context) -> "Defense":
    """The defense that a spec means; its name is that of the row."""
    from davsp.defenses import ECSO, Chain, Intervention, load_defense
    from davsp.defenses.load import holds_gate

    head, plus, rest = spec.partition("+")
    method, _, options = head.partition(":")
    if not plus or "=" in head or (method not in METHODS and Path(spec).is_dir()):
        head, plus, rest = spec, "", ""
    if method.startswith("gate,"):
        raise DavspError(f"--defense {head} does not say how the gate looks: gate:answer,ecso (or first, states).")
    if method == "gate" and "," in options:
        return _then_ecso(spec, head, rest, context)
    inside, _, value = rest.partition("=")
    if method == "gate" and "+" not in inside and holds_gate(value or inside):
        if value and set(inside) & set(":/"):
            raise DavspError(
                f"--defense {spec}: the name {inside!r} may not hold : or /; the gate's folder says what it looks through"
            )
        return load_defense(spec)  # its folder says what is looked through
    if method == "gate" and inside == "none" and value:
        raise DavspError(
            f"--defense {spec}: {value} holds no gate (gate.json); make one with davsp gate {value} --look none."
        )
    if plus and head.startswith("none:"):
        raise DavspError(
            f"--defense {spec}: {head} is a row of its own; to show all undefended pictures so, give --undefended"
        )
    inner = _read(rest, context) if plus else None
    name = f"{head}+{inner.name}" if inner else head
    if method == "ecso":
        return ECSO(inner, **_switches(head, options, context), name=name)
    if method == "ecso-adaptive":
        if inner is None:
            raise DavspError("--defense ecso-adaptive needs what answers again: ecso-adaptive+NAME=FOLDER.")
        return ECSO(instead=inner, **_switches(head, options, context), name=name)
    if method == "gate":
        return _gate(head, options, inner, name)
    if method == "intervention":
        if context.vector is None:
            raise DavspError(f"--defense {head} needs --vector, the folder of a vector.")
        return Intervention(context.vector, **_amount(head, options, context.vector), inner=inner, name=name)
    first = _single(head, context)
    return Chain([first, inner], f"{first.name}+{inner.name}") if inner else first


def _single(spec: str, context: _Context) -> "Defense":
    """A defense that only changes the input."""
    from davsp.defenses import NoDefense, SafetyText, adashield_s, load_defense
    from davsp.embedded import SAFETY_TEXT

    name, _, value = spec.partition("=")
    if spec == "none":
        return NoDefense()
    if spec.startswith("none:"):
        return NoDefense(spec.removeprefix("none:"))
    if name == "safety-text":
        if not (value or context.text):
            raise DavspError("--defense safety-text needs a text: safety-text=TEXT, or --text.")
        return SafetyText(value or context.text)
    if spec in ("adashield-s", "adashield-s:prefix"):
        return adashield_s("prefix" if ":" in spec else "sandwich", SAFETY_TEXT if context.shipped else None)
    if name == spec and name.startswith("pat:"):
        return _published_pat(spec, context)
    if value and name and not set(name) & set(":+") and name not in METHODS:
        return load_defense(value, name)
    if spec and name not in METHODS and Path(spec).is_dir():
        return load_defense(spec)
    raise _unknown(spec)


def _published_pat(spec: str, context: _Context) -> "Defense":
    """One of PAT's published strings, behind AdaShield's text or alone."""
    from davsp.defenses.adashield_s import DAVSP
    from davsp.defenses.pat.defense import PAT
    from davsp.embedded import SAFETY_TEXT

    _, preset, *alone = spec.split(":")
    if alone not in ([], ["alone"]):
        raise _unknown(spec)
    defense = PAT.published(preset, "" if alone else SAFETY_TEXT if context.shipped else DAVSP)
    defense.name = spec
    return defense


def _switches(spec: str, options: str, context: _Context) -> dict[str, Any]:
    """ECSO's, from what stands behind the colon; its prompts go with the model."""
    from davsp.defenses.ecso import PUBLISHED
    from davsp.embedded.ecso_templates import TEMPLATES

    known = {"published": {"rule": "published"}, "whole": {"follow": "whole"}}
    words = options.split(",") if options or ":" in spec else []
    if not set(words) <= set(known):
        raise DavspError(
            f"--defense {spec!r} is not known: behind ecso: may stand published, whole, or published,whole."
        )
    switches = {key: value for word in words for key, value in known[word].items()}
    return {**switches, "templates": TEMPLATES if context.shipped else PUBLISHED}


def _gate(spec: str, options: str, inner: "Defense | None", name: str) -> "Defense":
    """What it looks through stands behind the plus; its thresholds are in that folder."""
    from davsp.defenses.load import gated

    if inner is None:
        raise _looks_through(spec)
    return gated(inner, options if ":" in spec else "answer", name)


def _then_ecso(spec: str, head: str, rest: str, context: _Context) -> "Defense":
    """A gate whose passing queries ECSO answers: gate:KIND,ecso+INNER."""
    from davsp.defenses import ECSO, Gate

    alone, _, behind = head.partition(",")
    if behind != "ecso":
        raise DavspError(
            f"--defense {spec!r} is not known: behind the comma may stand ecso, which answers what passes."
        )
    if not rest:
        raise _looks_through(head)
    gate = _read(f"{alone}+{rest}", context)
    assert isinstance(gate, Gate)
    return gate.then(ECSO(**_switches("ecso", "", context)), gate.name.replace(alone, head, 1))


def _amount(spec: str, options: str, vector: "HarmfulnessVector") -> dict[str, Any]:
    """The intervention's, from what stands behind the colon."""
    margins = {"plus": vector.mu_plus, "minus": vector.mu_minus}
    if options in margins:
        return {"to": margins[options]}
    to, _, value = options.rpartition(":")
    try:
        return {{"": "times", "to": "to"}[to]: float(value)}
    except (ValueError, KeyError):
        raise DavspError(
            f"--defense {spec!r} does not say by how much: intervention:1 (times the distance of the class means; -1 takes it "
            "away), intervention:plus or :minus (to a margin), or intervention:to:NUMBER."
        ) from None


def _looks_through(spec: str) -> DavspError:
    return DavspError(f"--defense {spec} needs what it looks through: {spec}+NAME=FOLDER.")


def _unknown(spec: str) -> DavspError:
    return DavspError(f"--defense {spec!r} is not known: give {GRAMMAR}")
