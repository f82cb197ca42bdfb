"""Tables of `davsp reproduce` that are not the paper's: the gate, deep alignment, and a border of several models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from davsp.cli.inputs import is_shipped, load_lvlm
from davsp.cli.options import ModelOptions
from davsp.errors import DavspError
from davsp.runtime import parallel

OWN = ("gate", "gate-kinds", "deep-alignment", "leave-one-out")
PARTS = (
    "begun", "depth", "turns", "turns-hard", "kinds-1", "kinds-2", "kinds-3", "forms", "forms-blind", "wordings", "curve",
)  # fmt: skip
"""Of deep-alignment: a table and a folder each."""
ALONE = ("turns", "turns-hard", "curve")
"""Parts that several processes do not share."""


def only_of_tables(options: dict[str, Any]) -> None:
    """Raise DavspError if an option is given that these tables do not know: it would be passed over for hours."""
    if given := [
        name.replace("_", "-")
        for name, value in options.items()
        if not (value is None or value is False or value == [])
    ]:
        raise DavspError(f"--{given[0]} goes with the paper's tables, not with {', '.join(OWN)}; leave it out.")


def own(
    names: list[str], model: ModelOptions, steps: int | None, out: Path | None, batch_size: int, seed: int, ecso: bool,
    part: str | None, published: bool,
) -> None:  # fmt: skip
    """Make one of the tables and print it. They need more queries than a split of the published sets has, drawn for the models that
    ship alone."""
    if len(names) > 1:
        raise DavspError(f"{', '.join(OWN)} have folders of their own; make each apart from the tables.")
    (table,) = names
    if published or not is_shipped(model.name):
        raise DavspError(
            f"reproduce {table} is for the models that ship; take davsp train, gate and eval with your own queries."
        )
    if table == "leave-one-out" and model.name is not None:
        raise DavspError(f"reproduce {table} asks all models that ship; leave --model out.")
    from davsp import embedded

    name = (model.name or "davsp-mini").rstrip("/").split("/")[-1]
    out = out or (Path("out") / table if table == "leave-one-out" else Path("out") / table / name)
    how: dict[str, Any] = {
        "text": embedded.SAFETY_TEXT, "settings": embedded.SETTINGS.model_copy(update={"steps": steps} if steps else {}),
        "seed": seed, "batch_size": batch_size,
    }  # fmt: skip
    if table == "deep-alignment":
        pages = _deep(model, out, part, how)
    elif table == "leave-one-out":
        pages = [_leave_one_out(model, out, how)]
    else:
        pages = [_gate(model, out, ecso, how) if table == "gate" else _kinds(model, out, how)]
    for page in pages if parallel.rank() == 0 else ():
        print(page.read_text())


def _gate(model: ModelOptions, out: Path, ecso: bool, how: dict[str, Any]) -> Path:
    from davsp import embedded
    from davsp.embedded.data import calibration
    from davsp.embedded.ecso_templates import TEMPLATES
    from davsp.embedded.twins import sounding, twins
    from davsp.experiments.gate.run import SIZES, gate
    from davsp.experiments.gate.twins import Twins

    seed = how["seed"]
    gate(
        load_lvlm(model), embedded.protocol(seed, **SIZES), calibration(seed), out, refusal_text=embedded.REFUSAL,
        templates=TEMPLATES, with_ecso=ecso, twins=Twins(twins(seed, SIZES["harm"]), sounding(seed)), **how,
    )  # fmt: skip
    return out / "gate.md"


def _kinds(model: ModelOptions, out: Path, how: dict[str, Any]) -> Path:
    from davsp import embedded
    from davsp.experiments.gate.kinds import kinds

    kinds(load_lvlm(model), out, refusal_text=embedded.REFUSAL, **how)
    return out / "kinds.md"


def _leave_one_out(model: ModelOptions, out: Path, how: dict[str, Any]) -> Path:
    from davsp import embedded
    from davsp.experiments.deep.borders import BORDERS, EVERY
    from davsp.experiments.leave_one_out import leave_one_out

    lvlms = {name: load_lvlm(replace(model, name=name)) for name in embedded.MODELS}
    how["settings"] = how["settings"].model_copy(
        update=BORDERS[EVERY]
    )  # of all, the one that comes out alike each time
    leave_one_out(lvlms, embedded.protocol(how["seed"]), out, **how)
    return out / "leave-one-out.md"


def _deep(model: ModelOptions, out: Path, part: str | None, how: dict[str, Any]) -> list[Path]:
    """The part that was asked for, in a folder of its own but for `begun`; left out: `begun`, and `depth` of the same borders."""
    from davsp import embedded
    from davsp.embedded.recipes import TOKENS
    from davsp.experiments.deep.begun import begun
    from davsp.experiments.deep.curve import curve
    from davsp.experiments.deep.depth import depth
    from davsp.experiments.deep.splits import data_of
    from davsp.experiments.deep.turns import turns
    from davsp.experiments.deep.unseen import unseen
    from davsp.experiments.gate.kinds import ALL

    if part not in (None, *PARTS):
        raise DavspError(f"--part {part!r} is not known; choose {', '.join(PARTS)}.")
    lvlm, data = load_lvlm(model), embedded.protocol(how["seed"])
    pages = []
    if part in (None, "begun"):
        begun(lvlm, data, out, beginning=TOKENS["target"], **how)
        pages.append(out / "deep-alignment.md")
    if part in (None, "depth"):
        depth(lvlm, data, out, **how)
        pages.append(out / "depth" / "depth.md")
    if part == "turns":
        turns(lvlm, data, out, **how)
        pages.append(out / "turns" / "turns.md")
    if part == "turns-hard":  # the border that met the four hard kinds, and nothing else
        turns(lvlm, data_of("kinds-2", ALL, how["seed"]), out / part, **how)
        pages.append(out / part / "turns" / "turns.md")
    if part == "curve":
        curve(lvlm, data, out / part, **how)
        pages.append(out / part / "curve.md")
    if part and part.startswith(("kinds", "forms", "wordings")):
        unseen(lvlm, out / part, part, **how)
        pages.append(out / part / "unseen.md")
    return pages
