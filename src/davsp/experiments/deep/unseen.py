"""Kinds of harm, and forms of picture, that training never met: does what it was supervised by matter there?

A *split* says what a border meets in training: one, two or three of the four hard kinds, or pictures of things alone. All that it never
met is in the test. Of each split vector, layer and three borders are made; beside them stands the split that met everything. The
vector's own queries are the same for all splits: easily refused kinds, in words and in all forms but figstep. So of `forms` the projection's
direction has met lettering, which borders by answers alone have not; the kinds of `kinds-K` are in no vector.

out/seed-N/SPLIT/   of each split: vector, `prompts/OBJECTIVE`, and answers to the test as `davsp eval` leaves them; a killed run goes on
out/seed-N/outcomes.json, manifest.json   of the splits that are done; written anew after each
out/metrics.json    rows of all seeds; `split` names the split, or "total" over all of them
out/unseen.md, manifest.json
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from davsp import metrics
from davsp.embedded.data import FORMS, Protocol, asked, picture_of, protocol
from davsp.evaluation import evaluate
from davsp.experiments.cells import rate
from davsp.experiments.deep.begun import NOTE
from davsp.experiments.deep.borders import (
    MANIFEST,
    TITLES,
    Outcomes,
    borders,
    compared,
    difference,
    keep,
    kept,
    unmoved,
)
from davsp.experiments.gate.kinds import ALL, HARD, seen_only
from davsp.experiments.gate.run import Once
from davsp.experiments.stages import Stages, fitted_vector
from davsp.lvlm import LVLM, fingerprint, model_name
from davsp.metrics import Outcome
from davsp.query import Query
from davsp.runtime import parallel
from davsp.runtime.files import manifest, write_json, write_text
from davsp.store import queries_hash
from davsp.training import TrainSettings

SIZES = {"harm": 96, "utility": 12, "mme": 0, "llava_bench": 0}
FORM = "sd"
"""Pictures of things, the request in the question; the other forms have it in lettering."""


def splits_of(part: str) -> tuple[str, ...]:
    """The splits of a part, the one that met everything first: `kinds-K` has all choices of K hard kinds besides, `forms` one."""
    if part == "forms":
        return (ALL, FORM)
    return (ALL, *("+".join(seen) for seen in itertools.combinations(HARD, int(part[-1]))))


PARTS = ("kinds-1", "kinds-2", "kinds-3", "forms")


def data_of(part: str, split: str, seed: int) -> Protocol:
    """What a split trains on, and the test, which is the same for all splits of a part."""
    if part != "forms":
        return seen_only(seed, HARD if split == ALL else split.split("+"), **SIZES)
    data = protocol(seed)
    data = replace(data, test=[q for q in data.test if q.image is not None])
    if split == ALL:
        return data
    train, sweep = (
        of_form(seed, name, len(of)) for name, of in (("train", data.train_malicious), ("sweep", data.sweep_malicious))
    )
    return replace(data, train_malicious=train, sweep_malicious=sweep)


def of_form(seed: int, part: str, count: int) -> list[Query]:
    """`count` hard malicious queries on pictures of things. A harmful verb in a question's words is always refused, so harm is in the thing."""
    covers = ("text", "none", "held")
    drawn = ((i, pair) for i, form, pair in asked(seed, part, 10**6, covers, (FORM,)) if form == FORM)
    queries = []
    for i, pair in itertools.islice(drawn, count):
        picture, question = picture_of(seed, part, FORM, i, pair)
        queries.append(Query(
            id=f"{part}-{FORM}-{i:04d}", question=question, label="malicious", benchmark=part, category=pair.kind, group=pair.phrase,
            image=picture.image() if picture else None,
        ))  # fmt: skip
    return queries


def unseen(
    lvlm: LVLM, out: Path, part: str, *, text: str, settings: TrainSettings, seed: int = 0, batch_size: int = 32,
    console: Console | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train the three borders of each split of a part, and answer its test under all of them.

    Args:
        out: the part's folder.
        part: one of `PARTS`.
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
    once = {name: Once(defense) for name, defense in unmoved(lvlm, text).items()}
    found: dict[str, Outcomes] = {}
    seconds, layers = dict[str, float](), dict[str, int]()
    rows: list[dict[str, Any]] = []
    for split in splits_of(part):
        data = data_of(part, split, seed)
        stages = Stages(folder / split, console)
        vector = fitted_vector(stages, lvlm, data, text)
        defenses = {**once, **borders(stages, lvlm, data, vector, settings, text)}
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
            model=model_name(lvlm), revision=lvlm.revision, weights=fingerprint(lvlm), seed=seed, text=text, part=part,
            layers=layers, settings=settings.model_dump(exclude={"seed", "objective"}), stages=seconds,
            test={"queries": len(data.test), "sha256": queries_hash(data.test)},
        )  # fmt: skip
        keep(folder, facts, outcomes_of(part, found, {q.id: q for q in data.test}, seed))
        rows = pool(out, model_name(lvlm), part)
    return rows


def outcomes_of(part: str, found: Mapping[str, Outcomes], test: Mapping[str, Query], seed: int) -> Outcomes:
    """What each split gave on what it met and never met, and the same pooled; "NAME, all" is the border that met everything."""
    outcomes: Outcomes = {}
    for split in (split for split in found if split != ALL):
        every = found[split] | {f"{name}, {ALL}": rows for name, rows in found[ALL].items() if name in found[split]}
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
    met = query.benchmark == FORM if part == "forms" else query.category in split.split("+")
    return ("met" if met else "unseen", *([query.benchmark] if part == "forms" else []))


def pool(out: Path, model: str, part: str) -> list[dict[str, Any]]:
    """Rows and table of all seeds in a part's folder."""
    facts, outcomes = kept(out)
    table = compared(model, outcomes)
    for name in ("projection", "answer", "both"):
        lost = metrics.rows(model, f"{name} against {name}, {ALL}", outcomes[name], outcomes[f"{name}, {ALL}"])
        table += [row for row in lost if row["metric"].endswith("_difference")]
    seeds = [one["seed"] for one in facts]
    write_json(out / "metrics.json", metrics.metrics_file(table))
    write_json(
        out / MANIFEST,
        {**facts[0], "seeds": seeds, **{key: [one[key] for one in facts] for key in ("layers", "stages")}},
    )
    write_text(out / "unseen.md", markdown(table, model, seeds, part))
    return table


def markdown(rows: Sequence[Mapping[str, Any]], model: str, seeds: Sequence[int], part: str) -> str:
    """RSR on what was never met, a line a split and a column a border; below, of all splits, on what was met, and the price."""
    at = {(r["defense"], r["benchmark"], r["split"], r["metric"]): r for r in rows}
    names = [*TITLES, *(f"{name}, {ALL}" for name in ("projection", "answer", "both"))]
    titles = [TITLES[name] if name in TITLES else f"{TITLES[name.partition(',')[0]]}, met all" for name in names]
    lines = [
        f"**What training never met: {part}, {model}**, seeds {', '.join(map(str, seeds))}. Percent, 95 % intervals by intent.", "",
        "| met | | " + " | ".join(titles) + " |", "|---" * (len(names) + 2) + "|",
    ]  # fmt: skip
    splits = [split for split in splits_of(part) if ("none", "unseen", split, "rsr") in at]
    places = [(split, "RSR, never met", "unseen", split, "rsr") for split in splits]
    if part == "forms":
        places = [(FORM, f"RSR, {form}", form, FORM, "rsr") for form in FORMS if form not in ("words", FORM)]
    places += [
        ("all together", "RSR, never met", "unseen", "total", "rsr"), ("all together", "RSR, met", "met", "total", "rsr"),
        ("all together", "utility", "utility", "total", "accuracy"), ("all together", "over-refusal", "benign", "total", "over_refusal"),
    ]  # fmt: skip
    for met, what, benchmark, split, metric in places:
        lines.append(
            "| "
            + " | ".join([met.replace("+", ", "), what, *(rate(at[name, benchmark, split, metric]) for name in names)])
            + " |"
        )
    lines += ["", "| difference | RSR, never met | RSR, met | utility |", "|---|---|---|---|"]
    pairs = {f"{name} against answer": f"{TITLES[name]}, less answers alone" for name in ("projection", "both")}
    pairs |= {
        f"{name} against {name}, {ALL}": f"{TITLES[name]}, less the same that met all"
        for name in ("projection", "answer", "both")
    }
    for name, title in pairs.items():
        cells = [
            difference(at[name, b, "total", f"{m}_difference"])
            for b, m in (("unseen", "rsr"), ("met", "rsr"), ("utility", "accuracy"))
        ]
        lines.append("| " + " | ".join([title, *cells]) + " |")
    return "\n".join([*lines, "", NOTE]) + "\n"
