"""Resistance at equal utility: points of whole trainings, by objective, lambda and steps, in place of single ones.

A border that refuses more also answers less, so one point of each objective compares little. Here one training gives a point at each of
`LOOKS`, the first before any step; the combined loss has several lambdas. What is compared is what a user can have: the best RSR among the
points that lose at most so much utility against no defense. Choosing is part of the figure, so intervals draw the intents anew and choose
again; a curve of more points has more to choose from.

out/seed-N/CURVE/   of each curve its training and, in `step-K`, the border there; answers as `davsp eval` leaves them; a killed run goes on
out/seed-N/outcomes.json, manifest.json   of the curves that are done; written anew after each
out/metrics.json    rows of all seeds: a defense "CURVE step K" each, and "CURVE step K against answer", paired, at the same step; "best of
                    CURVE" for the choices, metric "rsr_at_3" where 3 points may be lost
out/curve.md, curve.svg, manifest.json
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from davsp import metrics
from davsp.defenses import Defense, VisualPrompt
from davsp.errors import DavspError
from davsp.evaluation import evaluate
from davsp.experiments.deep.borders import Outcomes, start, unmoved
from davsp.experiments.deep.curve_table import CURVES, PLACES, pool
from davsp.experiments.gate.once import Once
from davsp.experiments.seeds import check_beside, keep
from davsp.experiments.stages import Stages, fitted_vector
from davsp.lvlm import LVLM, fingerprint, model_name
from davsp.metrics import Outcome
from davsp.prompts import VisualSafetyPrompt
from davsp.runtime.files import manifest, sha256
from davsp.store import queries_hash
from davsp.training import TrainSettings
from davsp.training.borders import Run
from davsp.training.checkpoint import METRICS
from davsp.vector import HarmfulnessVector

if TYPE_CHECKING:
    from davsp.embedded.data import Protocol

LOOKS = (0, 40, 80, 150)


def curve(
    lvlm: LVLM, data: "Protocol", out: Path, *, text: str, settings: TrainSettings, seed: int = 0, batch_size: int = 32,
    console: Console | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train every curve, and answer the test's pictures under each of its borders.

    Args:
        data: who trains vector and borders, and the test.
        out: the part's folder.
        text: before every question of all rows but none.
        settings: of the borders; objective and lambda are the curves'. Their steps are the last look, where the learning rate's schedule
            ends; the others are those of `LOOKS` before it.

    Returns:
        The rows of metrics.json: of all seeds in `out`.

    Raises:
        DavspError: what the steps raise.
        Interrupted: Ctrl-C; the same call goes on.
    """
    console, folder = console or Console(), out / f"seed-{seed}"
    made_of = {
        "weights": fingerprint(lvlm), "text": text, "curves": CURVES, "wanted": list(CURVES),
        "settings": settings.model_dump(exclude={"seed", "objective", "lam", "malicious_answer_share"}),
    }  # fmt: skip
    check_beside(out, seed, made_of)
    stages = Stages(folder, console)
    vector = fitted_vector(stages, lvlm, data, text)
    pictured = [q for q in data.test if q.image is not None]
    once = {name: Once(defense) for name, defense in unmoved(lvlm, text).items()}
    outcomes: Outcomes = {}
    rows: list[dict[str, Any]] = []
    for done, (name, how) in enumerate(CURVES.items(), 1):
        chosen = settings.model_copy(update={**how, "seed": seed})
        borders = looked_at(stages, _folder(name), lvlm, data, vector, chosen, text)
        defenses: dict[str, Defense] = {**once, **{f"{name} step {k}": VisualPrompt(b) for k, b in borders.items()}}
        made = evaluate(
            lvlm,
            defenses,
            pictured,
            folder / _folder(name),
            batch_size=batch_size,
            redo=True,
            seed=seed,
            console=console,
        )
        for defense, answers in made.responses.items():
            found = metrics.outcomes(pictured, answers, made.verdicts[defense])
            outcomes[defense] = [_placed(o, seed) for o in found if (o.split, o.metric) in PLACES]
        facts = manifest(
            model=model_name(lvlm), revision=lvlm.revision, seed=seed, **made_of, done=list(CURVES)[:done], layer=vector.layer,
            stages=stages.seconds,
            test={"queries": len(pictured), "sha256": queries_hash(pictured)},
        )  # fmt: skip
        keep(folder, facts, outcomes)
        rows = pool(out, model_name(lvlm))
    return rows


def _placed(o: Outcome, seed: int) -> Outcome:
    return replace(o, query_id=f"{seed} {o.query_id}", benchmark=PLACES[o.split, o.metric])


def _folder(name: str) -> str:
    return name.replace(", λ ", "-").replace(", ", "-").replace(" ", "-")


def looked_at(
    stages: Stages,
    name: str,
    lvlm: LVLM,
    data: "Protocol",
    vector: HarmfulnessVector,
    settings: TrainSettings,
    text: str,
) -> dict[int, VisualSafetyPrompt]:
    """The border of one training at each of `LOOKS` before its last step and there, as it reads back from `NAME/step-K`."""
    steps = [*(k for k in LOOKS if k < settings.steps), settings.steps]
    folder = stages.out / "train" / name
    saved = {k: stages.out / name / f"step-{k}" for k in steps}

    def read(k: int) -> VisualSafetyPrompt:
        if not saved[k].is_dir():  # from_pretrained would take the name for one on the hub
            raise DavspError(f"there is no folder {saved[k]}")
        return VisualSafetyPrompt.from_pretrained(saved[k])

    def whole_before(step: int) -> bool:
        try:
            for k in steps:
                if k < step:
                    read(k)
        except DavspError:
            return False
        return True

    def make(resume: bool) -> None:
        run = Run(lvlm, start(lvlm, text), data.train_malicious, data.train_benign, vector, settings, folder, [])
        resume = resume and (folder / METRICS).exists()  # a checkpoint without its metrics can't be gone on from
        state = run.checkpoint.restore(lvlm.device) if resume else None
        if state is None or not whole_before(state.step):  # a look that is lost can't be had again from a later step
            state = run.checkpoint.start(run.prompt.delta.to(lvlm.device))
        while True:
            if state.step in saved:
                run.prompt.with_delta(state.delta.cpu()).save_pretrained(saved[state.step])
                run.checkpoint.save(state)
            if state.step >= steps[-1]:
                return
            state, _ = run.advance(state)

    parts = (data.train_malicious, data.train_benign)
    vector_file = sha256(stages.out / "vector" / "vector.safetensors")
    inputs = [fingerprint(lvlm), text, steps, settings.model_dump(), vector_file, *map(queries_hash, parts)]
    return stages.run(name, inputs, make, lambda: {k: read(k) for k in steps})
