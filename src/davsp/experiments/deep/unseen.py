"""Kinds of harm, forms of picture and wordings that training never met: does what it was supervised by matter there?

A *split* says what a border meets in training (splits.py). All that it never met is in the test. Of each split vector, layer and the
borders are made, for `NOISY` parts three noises as well; beside them stands the split that met everything, the same for `forms` and
`wordings`. `forms-blind` goes without: the test is that of `forms`, where it stands.

out/seed-N/SPLIT/   of each split: vector, `prompts/OBJECTIVE`, and answers to the test as `davsp eval` leaves them; a killed run goes on
out/seed-N/outcomes.json, manifest.json   of the splits that are done; written anew after each
out/metrics.json    rows of all seeds; `split` names the split, or "total" over all of them
out/unseen.md, manifest.json
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from davsp import metrics
from davsp.embedded.data import FORMS
from davsp.evaluation import evaluate
from davsp.experiments.cells import rate
from davsp.experiments.deep.begun import NOTE
from davsp.experiments.deep.borders import (
    BORDERS,
    EVERY,
    NOISE,
    NOISE_TITLES,
    TITLES,
    Outcomes,
    borders,
    compared,
    difference,
    kept,
    noises,
    titled,
    unmoved,
)
from davsp.experiments.deep.splits import FORM, NEW, data_of, place, splits_of
from davsp.experiments.gate.kinds import ALL
from davsp.experiments.gate.once import Once
from davsp.experiments.seeds import MANIFEST, check_beside, keep, notes, under_way
from davsp.experiments.stages import Stages, fitted_vector
from davsp.lvlm import LVLM, fingerprint, model_name
from davsp.metrics import Outcome
from davsp.query import Query
from davsp.runtime import parallel
from davsp.runtime.files import manifest, write_json, write_text
from davsp.store import queries_hash
from davsp.training import TrainSettings

NOISY = ("forms",)
"""Parts with additive noise beside the borders; not in the split that met everything."""


def unseen(
    lvlm: LVLM, out: Path, part: str, *, text: str, settings: TrainSettings, seed: int = 0, batch_size: int = 32,
    console: Console | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train the borders of each split of a part, and answer its test under all of them.

    Args:
        out: the part's folder.
        part: one of `PARTS`; `out` ends in its name.
        text: before every question of all rows but none.
        settings: of the borders, whatever their objective.

    Returns:
        The rows of metrics.json: of all seeds in `out`. Of several processes the first returns them; the others none.

    Raises:
        DavspError: what the steps raise.
        Interrupted: Ctrl-C; the same call goes on.
    """
    console = console or Console()
    settings, folder = settings.model_copy(update={"seed": seed}), out / f"seed-{seed}"
    made_of = {
        "weights": fingerprint(lvlm), "text": text, "part": part, "settings": settings.model_dump(exclude={"seed", "objective"}),
        "wanted": [split for split in splits_of(part) if split != ALL],
    }  # fmt: skip
    check_beside(out, seed, made_of)
    once = {name: Once(defense) for name, defense in unmoved(lvlm, text).items()}
    found: dict[str, Outcomes] = {}
    seconds, layers = dict[str, float](), dict[str, int]()
    rows: list[dict[str, Any]] = []
    for split in splits_of(part):
        data = data_of(part, split, seed)
        trained_as = "forms" if split == ALL and not part.startswith("kinds") else part
        stages = Stages(out.with_name(trained_as) / folder.name / split, console)
        vector = fitted_vector(stages, lvlm, data, text)
        defenses = {**once, **borders(stages, lvlm, data, vector, settings, text)}
        if part in NOISY and split != ALL:
            defenses |= noises(stages, lvlm, data, vector, settings, text)
        made = evaluate(
            lvlm,
            defenses,
            data.test,
            folder / split,
            batch_size=batch_size,
            redo=True,
            seed=seed,
            console=stages.console,
        )
        layers[split] = vector.layer
        seconds |= {f"{split}: {name}": took for name, took in stages.seconds.items()}
        found[split] = {
            name: metrics.outcomes(data.test, made.responses[name], verdicts)
            for name, verdicts in made.verdicts.items()
        }
        if split == ALL or parallel.rank() > 0:
            continue
        facts = manifest(
            model=model_name(lvlm), revision=lvlm.revision, seed=seed, **made_of, done=[one for one in found if one != ALL],
            layers=layers, stages=seconds,
            test={"queries": len(data.test), "sha256": queries_hash(data.test)},
        )  # fmt: skip
        keep(folder, facts, outcomes_of(part, found, {q.id: q for q in data.test}, seed))
        rows = pool(out, model_name(lvlm), part)
    return rows


def outcomes_of(part: str, found: Mapping[str, Outcomes], test: Mapping[str, Query], seed: int) -> Outcomes:
    """What each split gave on what it met and never met, and the same pooled; "NAME, all" is the border that met everything."""
    outcomes: Outcomes = {}
    for split in (split for split in found if split != ALL):
        every = found[split] | {
            f"{name}, {ALL}": rows for name, rows in found.get(ALL, {}).items() if name in found[split]
        }
        for name, rows in every.items():
            for o in rows:
                if o.split != "total" or o.metric not in ("rsr", "over_refusal", "accuracy"):
                    continue
                for benchmark in _places(part, split, o, test[o.query_id]):
                    one = replace(o, query_id=f"{seed} {split} {o.query_id}", benchmark=benchmark)
                    outcomes.setdefault(name, []).extend([one, replace(one, split=split)])
    return outcomes


def _places(part: str, split: str, o: Outcome, query: Query) -> tuple[str, ...]:
    if o.metric != "rsr":
        return ("utility" if o.metric == "accuracy" else o.benchmark,)
    return (place(part, split, query), *([query.benchmark] if part.startswith("forms") else []))


def pool(out: Path, model: str, part: str) -> list[dict[str, Any]]:
    """Rows and table of all seeds in a part's folder."""
    facts, outcomes = kept(out)
    table = compared(model, outcomes)
    for name in (name for name in BORDERS if f"{name}, {ALL}" in outcomes):
        lost = metrics.rows(model, f"{name} against {name}, {ALL}", outcomes[name], outcomes[f"{name}, {ALL}"])
        table += [row for row in lost if row["metric"].endswith("_difference")]
    seeds = [one["seed"] for one in facts]
    write_json(out / "metrics.json", metrics.metrics_file(table))
    write_json(
        out / MANIFEST,
        {
            **facts[0],
            "seeds": seeds,
            "under_way": under_way(facts),
            **{key: [one[key] for one in facts] for key in ("layers", "stages")},
        },
    )
    write_text(out / "unseen.md", markdown(table, model, seeds, part) + "".join(f"{x}\n" for x in notes(out, facts)))
    return table


def markdown(rows: Sequence[Mapping[str, Any]], model: str, seeds: Sequence[int], part: str) -> str:
    """RSR on what was never met, a line a split and a column a border; below, of all splits, on what was met, and the price."""
    at = {(r["defense"], r["benchmark"], r["split"], r["metric"]): r for r in rows}
    titles = titled(rows) | {
        name: title for name, title in NOISE_TITLES.items() if (name, "unseen", "total", "rsr") in at
    }
    controls = {name: f"{name}, {ALL}" for name in BORDERS if (f"{name}, {ALL}", "unseen", "total", "rsr") in at}
    names = titles | {control: f"{TITLES[name]}, met all" for name, control in controls.items()}
    lines = [
        f"**What training never met: {part}, {model}**, seeds {', '.join(map(str, seeds))}. Percent, 95 % intervals by intent.", "",
        "| met | | " + " | ".join(names.values()) + " |", "|---" * (len(names) + 2) + "|",
    ]  # fmt: skip
    splits = [split for split in splits_of(part) if ("none", "unseen", split, "rsr") in at]
    places = [(split, "RSR, never met", "unseen", split, "rsr") for split in splits]
    if part.startswith("forms"):
        places = [(FORM, f"RSR, {form}", form, FORM, "rsr") for form in FORMS if form not in ("words", FORM)]
    places += [
        ("all together", "RSR, never met", "unseen", "total", "rsr"), ("all together", "RSR, met", "met", "total", "rsr"),
        *([("all together", "RSR, new to the model", NEW, "total", "rsr")] if part == "wordings" else []),
        ("all together", "utility", "utility", "total", "accuracy"), ("all together", "over-refusal", "benign", "total", "over_refusal"),
    ]  # fmt: skip
    for met, what, benchmark, split, metric in places:
        lines.append(
            "| "
            + " | ".join([met.replace("+", ", "), what, *(rate(at[name, benchmark, split, metric]) for name in names)])
            + " |"
        )
    columns = {"RSR, never met": ("unseen", "rsr"), "RSR, met": ("met", "rsr"), "utility": ("utility", "accuracy")}
    if part == "wordings":
        columns["RSR, new to the model"] = (NEW, "rsr")
    lines += ["", "| difference | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    pairs = {
        f"{name} against {NOISE if name.startswith(NOISE) else ''}answer": f"{title}, less answers alone"
        for name, title in titles.items()
        if name.endswith(("projection", "both", EVERY))
    }
    pairs |= {
        f"{name} against {control}": f"{TITLES[name]}, less the same that met all" for name, control in controls.items()
    }
    for name, title in pairs.items():
        cells = [difference(at.get((name, b, "total", f"{m}_difference"))) for b, m in columns.values()]
        lines.append("| " + " | ".join([title, *cells]) + " |")
    return "\n".join([*lines, "", NOTE]) + "\n"
