"""The borders that the parts compare, additive noise by the three objectives, and the outcomes of several seeds as one table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from davsp import metrics
from davsp.defenses import Defense, NoDefense, VisualPrompt
from davsp.experiments.cells import points
from davsp.experiments.seeds import MANIFEST, OUTCOMES, check_alike, lacks
from davsp.experiments.stages import Stages, trained_prompt
from davsp.lvlm import LVLM
from davsp.metrics import Outcome
from davsp.prompts import AdditiveNoise, VisualSafetyPrompt
from davsp.runtime.files import read_json
from davsp.training import TrainSettings
from davsp.vector import HarmfulnessVector

if TYPE_CHECKING:
    from davsp.embedded.data import Protocol

Objective = Literal["projection", "answer", "both"]
OBJECTIVES: tuple[Objective, ...] = ("projection", "answer", "both")
EVERY = "every"
BORDERS: dict[str, dict[str, Any]] = {
    **{objective: {"objective": objective} for objective in OBJECTIVES},
    EVERY: {"objective": "both", "lam": 6.0, "malicious_answer_share": 1.0},
}
"""What a border of each name is trained by. Both carries the refusal on a quarter of the malicious rows, answers alone on all of them, as
the last one does: it differs from answers alone in the projection alone."""
TITLES = {
    "none": "*no defense*", "text": "*the text alone, white border*", "projection": "border, projection alone",
    "answer": "border, answers alone", "both": "border, both (DAVSP)", EVERY: "border, both, λ 6, every row refused",
}  # fmt: skip
NOISE = "additive-"
NOISE_TITLES = {
    f"{NOISE}projection": "noise, projection alone", f"{NOISE}answer": "noise, answers alone", f"{NOISE}both": "noise, both",
}  # fmt: skip
Outcomes = dict[str, list[Outcome]]


def start(lvlm: LVLM, text: str, colour: Literal["grey", "white"] = "grey") -> VisualSafetyPrompt:
    """A border before training, a twelfth of the canvas wide."""
    return VisualSafetyPrompt.create(lvlm.canvas, round(lvlm.canvas / 12), colour, text=text)


def unmoved(lvlm: LVLM, text: str) -> dict[str, Defense]:
    """What the borders are compared with: no defense, and the text with a white border."""
    return {"none": NoDefense(), "text": VisualPrompt(start(lvlm, text, "white"), "text")}


def borders(
    stages: Stages, lvlm: LVLM, data: "Protocol", vector: HarmfulnessVector, settings: TrainSettings, text: str
) -> dict[str, Defense]:
    """The borders of `BORDERS`, trained or kept, in `prompts/NAME` of the stages' folder."""
    found: dict[str, Defense] = {}
    for name, how in BORDERS.items():
        chosen, saved = settings.model_copy(update=how), stages.out / "prompts" / name
        border = trained_prompt(stages, name, start(lvlm, text), lvlm, data, vector, chosen, saved)
        found[name] = VisualPrompt(border, name)
    return found


def noises(
    stages: Stages, lvlm: LVLM, data: "Protocol", vector: HarmfulnessVector, settings: TrainSettings, text: str
) -> dict[str, Defense]:
    """Additive noise of each objective over the whole picture, of at most 32/255 as in the ablation of `davsp reproduce`."""
    found: dict[str, Defense] = {}
    for objective in OBJECTIVES:
        chosen, name = settings.model_copy(update={"objective": objective}), f"{NOISE}{objective}"
        start, saved = AdditiveNoise.create(lvlm.canvas, text=text), stages.out / "prompts" / name
        found[name] = VisualPrompt(trained_prompt(stages, name, start, lvlm, data, vector, chosen, saved), name)
    return found


def kept(out: Path) -> tuple[list[dict[str, Any]], Outcomes]:
    """Facts and outcomes of the seeds in a folder, in the order of their names; of the defenses that every one of them has.

    Seeds that are under way are left out, unless no seed is whole: a half would take from the others what it does not have.

    Raises:
        DavspError: they were made in different ways.
    """
    folders = sorted(path.parent for path in out.glob(f"seed-*/{OUTCOMES}"))
    facts = {folder: read_json(folder / MANIFEST) for folder in folders}
    check_alike(out, list(facts.values()))
    folders = [folder for folder in folders if not lacks(facts[folder])] or folders
    found = [read_json(folder / OUTCOMES) for folder in folders]
    outcomes: Outcomes = {
        name: [Outcome(**row) for one in found for row in one[name]]
        for name in found[0]
        if all(name in one for one in found)
    }
    return [facts[folder] for folder in folders], outcomes


def compared(model: str, outcomes: Mapping[str, Sequence[Outcome]]) -> list[dict[str, Any]]:
    """Rows of all defenses, paired with none, and of what the projection adds to answers alone, paired with these: of borders, and of
    noise where it is there."""
    table: list[dict[str, Any]] = []
    for name, rows in outcomes.items():
        table += metrics.rows(model, name, rows, None if name == "none" else outcomes["none"])
    for kind in ("", NOISE):
        for name in (f"{kind}projection", f"{kind}both", f"{kind}{EVERY}"):
            if name in outcomes:
                against = metrics.rows(model, f"{name} against {kind}answer", outcomes[name], outcomes[f"{kind}answer"])
                table += [row for row in against if row["metric"].endswith("_difference")]
    return table


def titled(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The defenses that a table has a line of, and what they are called there."""
    there = {row["defense"] for row in rows}
    return {name: title for name, title in TITLES.items() if name in there}


def against(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The borders that are compared with answers alone, and what the line is called."""
    return {
        n: f"{title}, less answers alone" for n, title in titled(rows).items() if n in ("projection", "both", EVERY)
    }


def unscored(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line below a table: where answers could not be scored, and how many; none if all were."""
    found = [r for r in rows if (r["split"], r["metric"]) == ("total", "unscored") and r["value"]]
    where = [f"{r['defense']}, {r['benchmark']}: {round(r['value'] * r['n'])} of {r['n']}" for r in found]
    return [f"- Unscored, and left out of RSR: {'; '.join(where)}."] if where else []


def difference(figure: Mapping[str, Any] | None) -> str:
    """A paired difference in points; a star where p < 0.05; – where there is none."""
    return points(figure) + "\\*" * (figure is not None and figure["p"] < 0.05)
