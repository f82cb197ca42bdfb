"""`davsp reproduce gate`: one seed a call; all seeds that lie in the model's folder are pooled.

out/seed-N/                       a run as `davsp eval` leaves it; a killed one goes on
out/seed-N/prompts/davsp          the border, with its gate.json
out/seed-N/looks.npz              scores of every look on the held-out and the test queries
out/seed-N/twins/, twins.json     answers to the harmless twins of the malicious queries (`davsp.experiments.gate.twins`)
out/metrics.json                  rows of all seeds together
out/gate.md, roc.svg, manifest.json
"""

import io
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from davsp import metrics
from davsp.defenses import ECSO, Defense, Gate, NoDefense, SafetyText, VisualPrompt
from davsp.defenses.ecso import Templates
from davsp.defenses.gate import calibrate
from davsp.errors import DavspError
from davsp.experiments.gate.figures import LOOK_ECSO, areas, gates, rates
from davsp.experiments.gate.looks import Features, features, scores, see, weighed
from davsp.experiments.gate.once import Once, answered
from davsp.experiments.gate.table import markdown, roc
from davsp.experiments.gate.twins import FILE as TWINS
from davsp.experiments.gate.twins import Twins, told, twin_rows
from davsp.experiments.seeds import OUTCOMES, check_alike, check_beside, keep, manifests
from davsp.experiments.stages import Stages, fitted_vector, trained_prompt
from davsp.lvlm import LVLM, fingerprint, model_name
from davsp.metrics import Outcome
from davsp.prompts import VisualSafetyPrompt
from davsp.query import Query
from davsp.runtime import parallel
from davsp.runtime.files import manifest, read_bytes, read_json, write_bytes, write_json, write_text
from davsp.runtime.progress import bar
from davsp.store import queries_hash
from davsp.training import TrainSettings
from davsp.vector import HarmfulnessVector

if TYPE_CHECKING:
    from davsp.embedded.data import Protocol

SIZES = {"harm": 300, "utility": 100, "mme": 150, "llava_bench": 100}
"""Of the test: 1,200 malicious and 950 benign queries with pictures."""

LOOKS = "looks.npz"


def gate(
    lvlm: LVLM,
    data: "Protocol",
    sets: tuple[list[Query], list[Query], list[Query], list[Query]],
    out: Path,
    *,
    text: str,
    refusal_text: str,
    settings: TrainSettings,
    templates: Templates,
    seed: int = 0,
    twins: Twins | None = None,
    with_ecso: bool = True,
    batch_size: int = 32,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Train a border, calibrate its gate, answer the test under all defenses, and score every look.

    Args:
        data: who trains vector and border, and the test.
        sets: malicious and benign queries to fit on, malicious and benign ones held out (`embedded.data.calibration`).
        out: the model's folder.
        text: before every question of all rows but none and ECSO.
        refusal_text: the model's.
        settings: of the border.
        templates: ECSO's.
        seed: names the folder below `out`; data and settings are of it.
        twins: the test's malicious queries, each with a harmless twin, and what sounds harmful (`embedded.twins`); they may be added to
            a folder that is finished.
        with_ecso: also ECSO and adaptive ECSO with the border, which ask up to four times a query, and gates before ECSO.

    Returns:
        The rows of metrics.json: of all seeds in `out`. Of several processes the first returns them; the others none.

    Raises:
        DavspError: what the steps raise.
        Interrupted: Ctrl-C; the same call goes on.
    """
    folder = out / f"seed-{seed}"
    settings = settings.model_copy(update={"seed": seed})
    made_of = {"weights": fingerprint(lvlm), "text": text, "settings": settings.model_dump()}
    check_beside(out, seed, made_of)
    stages = Stages(folder, console or Console())
    vector = fitted_vector(stages, lvlm, data, text)
    start = VisualSafetyPrompt.create(lvlm.canvas, round(lvlm.canvas / 12), text=text)
    saved = folder / "prompts" / "davsp"
    border = trained_prompt(stages, "davsp", start, lvlm, data, vector, settings, saved)
    border = with_gate(stages, lvlm, border, vector, sets, refusal_text, saved, batch_size)

    none, davsp = Once(NoDefense()), Once(VisualPrompt(border))
    defenses: dict[str, Defense] = {"none": none, "davsp": davsp}
    defenses["gate-answer"] = Gate(davsp, "answer", None, none, tokens=lvlm.longest)
    for kind in ("states", "first"):
        defenses[f"gate-{kind}"] = Gate(VisualPrompt(border), kind, border.gate, none)
    if with_ecso:
        ecso = Once(ECSO(none, templates=templates))
        defenses["ecso"] = ecso
        defenses["ecso-adaptive+davsp"] = ECSO(none, instead=davsp, templates=templates)
        defenses["gate-answer,ecso"] = Gate(davsp, "answer", None, ecso, tokens=lvlm.longest)
        defenses["gate-first,ecso"] = Gate(VisualPrompt(border), "first", border.gate, ecso)
    evaluation = answered(
        lvlm, defenses, data.test, folder, batch_size=batch_size, redo=True, seed=seed, console=stages.console
    )
    outcomes = parallel.shared({
        name: [replace(o, query_id=f"{seed} {o.query_id}") for o in metrics.outcomes(data.test, evaluation.responses[name], verdicts)
               if o.split == "total" and o.metric in ("rsr", "over_refusal", "accuracy")]
        for name, verdicts in evaluation.verdicts.items()
    })  # fmt: skip  # the first process alone has verdicts
    _look(stages, lvlm, data.test, sets, border, vector.layer, text, refusal_text, seed, batch_size)
    if twins:
        told(stages, lvlm, defenses, twins, outcomes, seed, batch_size)
    if parallel.rank() > 0:
        return []
    facts = manifest(
        model=model_name(lvlm), revision=lvlm.revision, seed=seed, **made_of,
        layer=vector.layer, gate=border.gate and border.gate.model_dump(exclude={"direction"}),
        defenses={name: d.describe() for name, d in defenses.items()},
        test={"queries": len(data.test), "sha256": queries_hash(data.test)}, stages=stages.seconds,
    )  # fmt: skip
    keep(folder, facts, outcomes)
    return pool(out, model_name(lvlm))


def with_gate(
    stages: Stages, lvlm: LVLM, border: VisualSafetyPrompt, vector: HarmfulnessVector, sets: Sequence[list[Query]],
    refusal_text: str, saved: Path, batch_size: int,
) -> VisualSafetyPrompt:  # fmt: skip
    """The border in `saved` with its gate, calibrated on `sets` (as of `gate`) if it has none."""
    fit, held = (sets[0], sets[1]), (sets[2], sets[3])

    def make(resume: bool) -> None:
        border.gate = calibrate(lvlm, VisualPrompt(border), vector, fit, held, refusal_text, batch_size=batch_size)
        if parallel.rank() == 0:
            border.save_pretrained(saved)

    def load() -> VisualSafetyPrompt:
        if (read := VisualSafetyPrompt.from_pretrained(saved)).gate is None:  # gone with a border that was saved anew
            raise DavspError(f"there is no gate.json in {saved}")
        return read

    inputs = [border.pixels_sha256(), fingerprint(lvlm), refusal_text, *map(queries_hash, sets)]
    return stages.run("gate", inputs, make, load, together=True)


def _look(
    stages: Stages, lvlm: LVLM, test: Sequence[Query], sets: Sequence[list[Query]], border: VisualSafetyPrompt, layer: int,
    text: str, refusal_text: str, seed: int, batch_size: int,
) -> None:  # fmt: skip
    """Scores of each look through each defense that only changes the input, and of the undefended look and the border's together, in
    looks.npz.
    """
    random_border = VisualSafetyPrompt.create(lvlm.canvas, border.padding, "random", seed, text)
    through: dict[str, Defense] = {
        "none": NoDefense(), "safety-text": SafetyText(text), "random-border": VisualPrompt(random_border),
        "davsp": VisualPrompt(border),
    }  # fmt: skip
    queries = [*sets, list(test)]
    file = stages.out / LOOKS

    def make(resume: bool) -> None:
        arrays: dict[str, Any] = {
            "malicious": np.array([q.label == "malicious" for q in test]), "group": np.array([q.group for q in test]),
            "benchmark": np.array([q.benchmark for q in test]), "id": np.array([f"{seed} {q.id}" for q in test]),
        }  # fmt: skip
        pairs: dict[str, Features] = {}
        with bar(stages.console) as shown:
            for name, defense in through.items():
                advance = partial(shown.advance, shown.add_task(f"look: {name}", total=sum(map(len, queries))))
                seen = [see(lvlm, defense, part, refusal_text, batch_size, advance) for part in queries]
                others = {"held-malicious": seen[2], "held-benign": seen[3], "test": seen[4]}
                pairs[name] = features(seen[0], seen[1], layer, others)
                every = scores(seen[0], seen[1], pairs[name], others)
                arrays |= {f"{name} {look}/{which}": s for look, sets in every.items() for which, s in sets.items()}
        two = {which: np.concatenate([pairs["none"][which], pairs["davsp"][which]], 1) for which in pairs["none"]}
        arrays |= {f"none+davsp both/{which}": s for which, s in weighed(two).items()}
        if parallel.rank() > 0:
            return
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_bytes(file, buffer.getvalue())

    inputs = ["two", border.pixels_sha256(), fingerprint(lvlm), layer, refusal_text, *map(queries_hash, queries)]
    stages.run("looks", inputs, make, lambda: read_looks(file), together=True)


def read_looks(file: Path) -> dict[str, np.ndarray]:
    """What `_look` wrote: "THROUGH LOOK/SET" -> scores, and malicious, group, benchmark, id of the test's queries."""
    with np.load(io.BytesIO(read_bytes(file)), allow_pickle=False) as arrays:
        return dict(arrays)


def pool(out: Path, model: str) -> list[dict[str, Any]]:
    """Rows, table and plot of all seeds in a model's folder."""
    seeds, facts = sorted(out.glob(f"seed-*/{OUTCOMES}")), manifests(out)
    check_alike(out, facts)
    looks = [read_looks(path.parent / LOOKS) for path in seeds]
    for path, one in zip(seeds, looks, strict=True):
        if lacking := sorted({"id", *looks[-1], *looks[0]} - set(one)):
            raise DavspError(
                f"{path.parent / LOOKS} is of another version and has no {lacking[0]!r}; give reproduce gate with its seed again."
            )
    twins = [path.parent / TWINS for path in seeds if (path.parent / TWINS).exists()]
    outcomes = _pooled(seeds)
    every = outcomes | gates(looks, outcomes["none"])
    if "ecso" in outcomes:
        every |= gates(looks, [o for o in outcomes["ecso"] if o.benchmark not in ("mme", "llava_bench")], LOOK_ECSO)
    table = rates(model, every) + areas(model, looks) + twin_rows(model, _pooled(twins))
    write_json(out / "metrics.json", metrics.metrics_file(table))
    write_json(
        out / "manifest.json", {**facts[0], "seeds": [f["seed"] for f in facts], "stages": [f["stages"] for f in facts]}
    )
    held = {f["seed"]: set(read_json(path)) for f, path in zip(facts, seeds, strict=True)}
    some = {name: [seed for seed, names in held.items() if name in names] for name in outcomes}
    partly = {name: of for name, of in some.items() if len(of) < len(seeds)}
    write_text(out / "gate.md", markdown(table, model, [f["seed"] for f in facts], partly))
    write_text(out / "roc.svg", roc(looks, model))
    return table


def _pooled(files: Sequence[Path]) -> dict[str, list[Outcome]]:
    """Defense -> outcomes of all seeds."""
    outcomes: dict[str, list[Outcome]] = {}
    for path in files:
        for name, rows in read_json(path).items():
            outcomes.setdefault(name, []).extend(Outcome(**row) for row in rows)
    return outcomes
