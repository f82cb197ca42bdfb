"""Resistance at equal utility: points of whole trainings, by objective, lambda and steps, in place of single ones.

A border that refuses more also answers less, so one point of each objective compares little. Here one training gives a point at each of
`LOOKS`, the first before any step; the combined loss has several lambdas. What is compared is what a user can have: the best RSR among the
points that lose at most so much utility against no defense. Choosing is part of the figure, so intervals draw the intents anew and choose
again; a curve of more points has more to choose from.

out/seed-N/CURVE/   of each curve its training and, in `step-K`, the border there; answers as `davsp eval` leaves them; a killed run goes on
out/seed-N/outcomes.json, manifest.json   of the curves that are done; written anew after each
out/metrics.json    rows of all seeds: a defense "CURVE step K" each; "best of CURVE" for the choices, metric "rsr_at_3" where 3 points may be lost
out/curve.md, curve.svg, manifest.json
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from rich.console import Console

from davsp import metrics
from davsp.defenses import Defense, VisualPrompt
from davsp.errors import DavspError
from davsp.evaluation import evaluate
from davsp.experiments.cells import points, rate
from davsp.experiments.deep.borders import Outcomes, kept, start, unmoved
from davsp.experiments.deep.depth import COLOURS
from davsp.experiments.gate.once import Once
from davsp.experiments.seeds import MANIFEST, check_beside, keep, notes, under_way
from davsp.experiments.stages import Stages, fitted_vector
from davsp.lvlm import LVLM, fingerprint, model_name
from davsp.metrics import Outcome
from davsp.prompts import VisualSafetyPrompt
from davsp.report import plots
from davsp.runtime.files import manifest, sha256, write_json, write_text
from davsp.store import queries_hash
from davsp.training import TrainSettings
from davsp.training.borders import Run
from davsp.training.checkpoint import METRICS
from davsp.vector import HarmfulnessVector

if TYPE_CHECKING:
    from davsp.embedded.data import Protocol

LOOKS = (0, 40, 80, 150)
CURVES: dict[str, dict[str, Any]] = {
    "answer": {"objective": "answer"}, "both, λ 2.5": {"objective": "both", "lam": 2.5}, "projection": {"objective": "projection"},
    "both, λ 6": {"objective": "both", "lam": 6.0}, "both, λ 1": {"objective": "both", "lam": 1.0},
    "both, λ 0.3": {"objective": "both", "lam": 0.3},
    "both, λ 6, every row": {"objective": "both", "lam": 6.0, "malicious_answer_share": 1.0},
}  # fmt: skip
"""Every malicious row carries the refusal in "answer" and in the last, a quarter of them in the others."""
ANY = "both, any λ"
LOSSES = (1, 3, 5, 10)
"""Points of utility that may be lost."""
DRAWS = 1000
NOTHING = -9.0
"""In place of an RSR where no point loses so little."""


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


PLACES = {("total", "rsr"): "malicious", ("total", "accuracy"): "utility", ("total", "over_refusal"): "benign"}


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


# -- what can be had ---------------------------------------------------------------------------------------------------


def pool(out: Path, model: str) -> list[dict[str, Any]]:
    """Rows, table and plot of all seeds in the part's folder."""
    facts, outcomes = kept(out)
    table: list[dict[str, Any]] = []
    for name, rows in outcomes.items():
        table += metrics.rows(model, name, rows, None if name == "none" else outcomes["none"])
    table += choices(model, outcomes)
    seeds = [one["seed"] for one in facts]
    write_json(out / "metrics.json", metrics.metrics_file(table))
    several = {"seeds": seeds, "under_way": under_way(facts), "stages": [one["stages"] for one in facts]}
    write_json(out / MANIFEST, {**facts[0], **several})
    write_text(out / "curve.md", markdown(table, model, seeds) + "".join(f"{x}\n" for x in notes(out, facts)))
    write_text(out / "curve.svg", figure(table))
    return table


def choices(model: str, outcomes: Mapping[str, Sequence[Outcome]], seed: int = 0) -> list[dict[str, Any]]:
    """Best RSR of each curve where so many points of utility may be lost, and the differences from answers alone, with 95 % of `DRAWS`."""
    curves = {c: [n for n in outcomes if n.startswith(f"{c} step ")] for c in CURVES}
    curves = {c: names for c, names in curves.items() if names} | {ANY: [n for n in outcomes if n.startswith("both")]}
    rng = np.random.default_rng(seed)
    names = list(outcomes)
    drawn = {place: _drawn(outcomes, names, place, rng) for place in ("malicious", "utility")}  # (draws, defenses) each
    n = sum(o.benchmark == "malicious" for o in outcomes["none"])
    lost = drawn["utility"][:, [names.index("none")]] - drawn["utility"]
    table, best = [], dict[tuple[str, int], Float[np.ndarray, " draws"]]()
    for name, members in curves.items():
        at = [names.index(one) for one in members]
        for points_lost in LOSSES:
            allowed = lost[:, at] <= points_lost / 100 + 1e-9
            best[name, points_lost] = drawn["malicious"][:, at].max(1, initial=NOTHING, where=allowed)
    for (name, points_lost), values in best.items():
        metric = f"rsr_at_{points_lost}"
        table.append(_row(model, f"best of {name}", metric, values, n))
        if name != "answer" and ("answer", points_lost) in best:
            table.append(
                _row(
                    model,
                    f"best of {name} against answer",
                    f"{metric}_difference",
                    _minus(values, best["answer", points_lost]),
                    n,
                )
            )
    return table


def _minus(a: Float[np.ndarray, " draws"], b: Float[np.ndarray, " draws"]) -> Float[np.ndarray, " draws"]:
    return np.where((a == NOTHING) | (b == NOTHING), NOTHING, a - b)


def _row(model: str, defense: str, metric: str, values: Float[np.ndarray, " draws"], n: int) -> dict[str, Any]:
    """The first value is of the queries as they are, the others are draws; None where more than 2.5 % of them have no point to choose."""
    head = {"model": model, "defense": defense, "benchmark": "malicious", "split": "total", "metric": metric}
    chosen = values[values != NOTHING]
    if values[0] == NOTHING or len(chosen) < 0.975 * len(values):
        return head | {"value": None, "low": None, "high": None, "n": n}
    low, high = np.quantile(chosen[1:], (0.025, 0.975))
    return head | {"value": float(values[0]), "low": float(low), "high": float(high), "n": n}


def _drawn(
    outcomes: Mapping[str, Sequence[Outcome]], names: Sequence[str], place: str, rng: np.random.Generator
) -> Float[np.ndarray, "draws n"]:
    """Rate of each defense: of the queries as they are, then of draws of whole intents."""
    per = [{o.query_id: o for o in outcomes[name] if o.benchmark == place} for name in names]
    ids = [i for i in per[0] if all(i in one and one[i].value is not None for one in per)]
    values = np.array([[float(one[i].value or 0) for i in ids] for one in per])  # (defenses, queries)
    groups = sorted({per[0][i].group for i in ids})
    where = np.array([groups.index(per[0][i].group) for i in ids])
    sums = np.stack([np.bincount(where, row, len(groups)) for row in values])  # (defenses, groups)
    counts = np.bincount(where, minlength=len(groups))
    times = np.stack(
        [np.ones(len(groups)), *(rng.multinomial(len(groups), [1 / len(groups)] * len(groups)) for _ in range(DRAWS))]
    )
    drawn: Float[np.ndarray, "draws n"] = (times @ sums.T) / (times @ counts)[:, None]
    return drawn


def markdown(rows: Sequence[Mapping[str, Any]], model: str, seeds: Sequence[int]) -> str:
    """All points, and the best RSR at equal utility."""
    at = {(r["defense"], r["benchmark"], r["metric"]): r for r in rows if r["split"] == "total"}
    lines = [
        f"**Resistance over utility, {model}**, seeds {', '.join(map(str, seeds))}. RSR on {at['none', 'malicious', 'rsr']['n']} malicious "
        "pictures; percent, 95 % intervals by intent.", "", "| | step | RSR | utility | over-refusal |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name in dict.fromkeys(r["defense"] for r in rows if r["metric"] == "rsr"):
        curve_of, _, step = name.partition(" step ")
        places = (("malicious", "rsr"), ("utility", "accuracy"), ("benign", "over_refusal"))
        lines.append("| " + " | ".join([curve_of, step or "–", *(rate(at[name, *p]) for p in places)]) + " |")
    lines += [
        "",
        "| best RSR where at most so much utility is lost | " + " | ".join(f"{x} points" for x in LOSSES) + " |",
    ]
    lines.append("|---" * (len(LOSSES) + 1) + "|")
    for name in dict.fromkeys(r["defense"] for r in rows if r["metric"].startswith("rsr_at_")):
        change = name.endswith(" against answer")
        cells = [at[name, "malicious", f"rsr_at_{x}" + "_difference" * change] for x in LOSSES]
        title = f"{name.removesuffix(' against answer')}, less answers alone" if change else name
        lines.append("| " + " | ".join([title, *(_cell(one, change) for one in cells)]) + " |")
    return (
        "\n".join(
            [*lines, "", "- –: no point, in the figure or in more than 2.5 % of the draws. The judge is `keyword`."]
        )
        + "\n"
    )


def _cell(figure: Mapping[str, Any], change: bool) -> str:
    return "–" if figure["value"] is None else points(figure) if change else rate(figure)


def figure(rows: Sequence[Mapping[str, Any]]) -> str:
    """The curves: a line from look to look, the last one filled."""
    at = {
        (r["defense"], r["metric"]): 100 * r["value"]
        for r in rows
        if r["metric"] in ("rsr", "accuracy") and r["split"] == "total"
    }
    styles: dict[str, Any] = {
        "both, λ 6": ":", "both, λ 1": "--", "both, λ 0.3": "-.", "both, λ 6, every row": (0, (5, 1))
    }  # fmt: skip
    with matplotlib.rc_context(plots.STYLE):
        drawn = Figure(figsize=(5.4, 3.8), layout="constrained")
        ax = drawn.subplots()
        ax.plot(at["none", "accuracy"], at["none", "rsr"], "o", color=COLOURS["none"], label="no defense")
        for name in CURVES:
            steps = [one for one, metric in at if metric == "rsr" and one.startswith(f"{name} step ")]
            if steps:
                x, y = ([at[one, metric] for one in steps] for metric in ("accuracy", "rsr"))
                colour = COLOURS[name.partition(",")[0]]
                style = styles.get(name, "-")
                marker = "s" if name.endswith("every row") else "o"
                ax.plot(x, y, linestyle=style, marker=marker, markersize=3.5, color=colour, label=name)
                ax.plot(x[-1], y[-1], marker, markersize=7, color=colour)
        ax.set_xlabel("utility, %")
        ax.set_ylabel("RSR, %")
        drawn.legend(loc="outside lower center", ncols=3, handlelength=2.8)
        return plots.standalone(plots.svg(drawn, "curve"))
