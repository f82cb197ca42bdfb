"""`davsp reproduce leave-one-out`: a border of two models on the third, against the single source of the paper's Table 3.

Every model has a border of its own, and every two of them one that was trained on both, a step on each in turns, with as many steps on
each as its own border had. Nothing is trained on the model that is asked.

out/seed-N/MODEL/          the model's vector and its own border (`prompts/alone`); `asked/`: answers as `davsp eval` leaves them
out/seed-N/A+B/            the border of two
out/metrics.json           rows of all seeds: the model that is asked, under "alone" (its own border), "A", "B" and "both"; "all" are the three.
                           Of several seeds each has a split of its own for the differences
out/leave-one-out.md, manifest.json
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from davsp import metrics
from davsp.defenses import Defense, VisualPrompt
from davsp.evaluation import evaluate
from davsp.experiments.cells import points, rate
from davsp.experiments.deep.borders import Outcomes, kept, start, unmoved, unscored
from davsp.experiments.seeds import MANIFEST, check_beside, keep
from davsp.experiments.stages import Stages, fitted_vector, trained_prompt
from davsp.lvlm import LVLM, fingerprint
from davsp.metrics import Outcome
from davsp.prompts import VisualSafetyPrompt
from davsp.runtime.files import manifest, sha256, write_json, write_text
from davsp.store import queries_hash
from davsp.training import TrainSettings
from davsp.training.in_turns import Pupil, train_in_turns

if TYPE_CHECKING:
    from davsp.embedded.data import Protocol

ALONE, ONE, BOTH, ALL = "alone", "one", "both", "all"
AGAINST = ((ONE, "text"), (BOTH, "text"), (BOTH, ONE))
"""What is compared, query by query; `ONE` is either single source, each query beside both."""
PLACES = {"rsr": "RSR", "accuracy": "utility", "over_refusal": "over-refusal"}


def leave_one_out(
    lvlms: Mapping[str, LVLM], data: "Protocol", out: Path, *, text: str, settings: TrainSettings, seed: int = 0,
    batch_size: int = 32, console: Console | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train a border on every model and on every two, and ask each model under its own and under those that never met it.

    Args:
        lvlms: name of a model -> the model; three of them.
        data: who trains vectors and borders, and the test; the same for all.
        text: before every question of all rows but none.
        settings: of all borders; `steps` are those on each model.

    Returns:
        The rows of metrics.json: of all seeds in `out`.

    Raises:
        DavspError: what the steps raise.
        Interrupted: Ctrl-C; the same call goes on.
    """
    console, folder = console or Console(), out / f"seed-{seed}"
    settings = settings.model_copy(update={"seed": seed})
    made_of = {
        "weights": {name: fingerprint(lvlm) for name, lvlm in lvlms.items()}, "text": text,
        "settings": settings.model_dump(exclude={"seed"}),
    }  # fmt: skip
    check_beside(out, seed, made_of)
    pupils, alone = dict[str, Pupil](), dict[str, VisualSafetyPrompt]()
    for name, lvlm in lvlms.items():
        console.print(f"[bold]{name}[/], alone", highlight=False)
        stages = Stages(folder / name, console)
        vector = fitted_vector(stages, lvlm, data, text)
        pupils[name] = Pupil(lvlm, vector, data.train_malicious, data.train_benign)
        saved = stages.out / "prompts" / ALONE
        alone[name] = trained_prompt(stages, ALONE, start(lvlm, text), lvlm, data, vector, settings, saved)
    pictured = [q for q in data.test if q.image is not None]
    outcomes: Outcomes = {}
    for name, lvlm in lvlms.items():
        sources = [other for other in lvlms if other != name]
        console.print(f"[bold]{' and '.join(sources)}[/], then {name} is asked", highlight=False)
        found = {ALONE: alone[name], **{source: alone[source] for source in sources}}
        found[BOTH] = _of_two(folder, {source: pupils[source] for source in sources}, text, settings, console)
        defenses: dict[str, Defense] = unmoved(lvlm, text)
        defenses |= {label: VisualPrompt(border.resized(lvlm.canvas), label) for label, border in found.items()}
        made = evaluate(
            lvlm, defenses, pictured, folder / name / "asked", batch_size=batch_size, redo=True, seed=seed, console=console
        )  # fmt: skip
        for label, verdicts in made.verdicts.items():
            scored = metrics.outcomes(pictured, made.responses[label], verdicts)
            outcomes.setdefault(label, []).extend(
                replace(o, query_id=f"{seed} {name} {o.query_id}", benchmark=name)
                for o in scored
                if o.split == "total" and o.metric in (*PLACES, "unscored")
            )
    facts = manifest(
        models=list(lvlms), seed=seed, **made_of, layers={name: pupil.vector.layer for name, pupil in pupils.items()},
        test={"queries": len(pictured), "sha256": queries_hash(pictured)},
    )  # fmt: skip
    keep(folder, facts, outcomes)
    return pool(out)


def _of_two(
    folder: Path, pupils: Mapping[str, Pupil], text: str, settings: TrainSettings, console: Console
) -> VisualSafetyPrompt:
    """The border of two models, trained or kept; on the canvas of the first."""
    stages = Stages(folder / "+".join(pupils), console)
    first, saved = next(iter(pupils.values())).lvlm, stages.out / "prompts" / BOTH
    together = settings.model_copy(update={"steps": settings.steps * len(pupils)})

    def make(resume: bool) -> None:
        where, progress = stages.out / "train" / BOTH, not console.quiet
        train_in_turns(start(first, text), list(pupils.values()), together, where, resume, progress).save_pretrained(
            saved
        )

    inputs = [
        text, together.model_dump(), *(fingerprint(pupil.lvlm) for pupil in pupils.values()),
        *(sha256(folder / name / "vector" / "vector.safetensors") for name in pupils),
        *(queries_hash(queries) for pupil in pupils.values() for queries in (pupil.malicious, pupil.benign)),
    ]  # fmt: skip
    return stages.run(BOTH, inputs, make, lambda: VisualSafetyPrompt.from_pretrained(saved))


def pool(out: Path) -> list[dict[str, Any]]:
    """Rows and table of all seeds in a folder."""
    facts, outcomes = kept(out)
    models, seeds = facts[0]["models"], [one["seed"] for one in facts]
    table: list[dict[str, Any]] = []
    for label, found in outcomes.items():
        table += chain.from_iterable(
            metrics.rows(
                asked, label, _asked(asked, found), None if label == "none" else _asked(asked, outcomes["none"])
            )
            for asked in models
            if label != asked
        )
    table += _compared(models, outcomes)
    for seed in seeds if len(seeds) > 1 else ():  # trainings differ by more than queries do
        of_seed = {label: [o for o in rows if o.query_id.startswith(f"{seed} ")] for label, rows in outcomes.items()}
        table += [row | {"split": f"seed {seed}"} for row in _compared(models, of_seed)]
    write_json(out / "metrics.json", metrics.metrics_file(table))
    write_json(out / MANIFEST, {**facts[0], "seeds": seeds})
    write_text(out / "leave-one-out.md", markdown(table, models, seeds))
    return table


def _compared(models: Sequence[str], outcomes: Outcomes) -> list[dict[str, Any]]:
    """The paired differences of `AGAINST`, of each model and of all."""
    table: list[dict[str, Any]] = []
    for asked in (*models, ALL):
        some = models if asked == ALL else [asked]
        for label, other in AGAINST:
            better, worse = (_each(some, models, outcomes, one) for one in (label, other))
            rows = metrics.rows(asked, f"{label} against {other}", better, worse)
            table += [row for row in rows if row["metric"].endswith("_difference")]
    return table


def _asked(model: str, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """What one model answered."""
    return [o for o in outcomes if o.benchmark == model]


def _each(
    asked: Sequence[str], models: Sequence[str], outcomes: Mapping[str, Sequence[Outcome]], label: str
) -> list[Outcome]:
    """What some models answered, once for each of the other two: under a border of that one (`ONE`), or twice the same."""
    return [
        replace(o, query_id=f"{o.query_id} {source}", benchmark=ALL)
        for model in asked
        for source in models
        if source != model
        for o in _asked(model, outcomes[source if label == ONE else label])
    ]


def markdown(rows: Sequence[Mapping[str, Any]], models: Sequence[str], seeds: Sequence[int]) -> str:
    """For each model that is asked a line a border, and what two sources are better than one, on average over the two."""
    at = {(r["model"], r["defense"], r["metric"]): r for r in rows if r["split"] == "total"}
    lines = [
        f"**A border of two models on the third**, seeds {', '.join(map(str, seeds))}. Percent, 95 % intervals by intent; "
        f"{at[models[0], 'none', 'rsr']['n']} malicious pictures and {at[models[0], 'none', 'accuracy']['n']} benign questions a model. "
        "Nothing was trained on the model that is asked, but for its own border.", "",
        f"| asked | border | {' | '.join(PLACES.values())} |", "|---" * (len(PLACES) + 2) + "|",
    ]  # fmt: skip
    for asked in models:
        first, second = (name for name in models if name != asked)
        titles = {
            "none": "*no defense*", "text": "*the text alone, white border*", ALONE: "its own", first: f"of {first}",
            second: f"of {second}", BOTH: "of both",
        }  # fmt: skip
        for label, title in titles.items():
            lines.append(f"| {asked} | {title} | " + " | ".join(rate(at[asked, label, m]) for m in PLACES) + " |")
        lines += _gains(at, asked)
    lines += _gains(at, ALL)
    note = '- Differences are in points and paired; "of one" is each query under either single source. The judge is `keyword`.'
    return "\n".join([*lines, "", note, *unscored(rows)]) + "\n"


def _gains(at: Mapping[tuple[str, str, str], Mapping[str, Any]], asked: str) -> list[str]:
    """What borders of others are better than the text, and of two better than of one."""
    titles = {ONE: "of one", BOTH: "of both", "text": "the text"}
    return [
        f"| {asked} | {titles[label]}, less {titles[other]} | "
        + " | ".join(points(at.get((asked, f"{label} against {other}", f"{metric}_difference"))) for metric in PLACES)
        + " |"
        for label, other in AGAINST
    ]
