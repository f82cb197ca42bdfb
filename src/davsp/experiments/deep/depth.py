"""What a border moves at each layer, and what is said where the refusal's first token cannot be.

Of the test's pictures, at the last input token of each layer: the projection on the vector's direction of that layer, in units of the
vector's own data (0: the mean of its benign queries, 1: of its malicious ones), and by the logit lens the log-odds of the refusal's first
token. Then every malicious picture is answered with that token barred from the first place: does the rest refuse by other words?

out/seed-N/barred/  answers as `davsp eval` leaves them; borders and plain answers are those of `begun`, in the folder above
out/metrics.json    rows of all seeds; `split` is "layer 3" of a projection, "total" of a rate
out/depth.md, depth.svg, manifest.json
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from torch import Tensor

from davsp import metrics
from davsp.defenses import Defense
from davsp.defenses.base import batches
from davsp.evaluation import evaluate
from davsp.experiments.cells import rate
from davsp.experiments.deep.begun import NOTE, PLAIN
from davsp.experiments.deep.borders import (
    EVERY,
    Outcomes,
    against,
    borders,
    compared,
    difference,
    kept,
    titled,
    unmoved,
)
from davsp.experiments.seeds import MANIFEST, check_beside, keep
from davsp.experiments.stages import Stages, fitted_vector
from davsp.lvlm import LVLM, fingerprint, model_name
from davsp.lvlm.hooks import catching, wide
from davsp.metrics import Outcome
from davsp.query import Query
from davsp.report import plots
from davsp.runtime import parallel
from davsp.runtime.files import manifest, write_json, write_text
from davsp.store import queries_hash
from davsp.training import TrainSettings
from davsp.vector import HarmfulnessVector

if TYPE_CHECKING:
    from davsp.embedded.data import Protocol

BARRED = "first token barred"
SEEN = ("projection", "refusal_odds")


def depth(
    lvlm: LVLM, data: "Protocol", out: Path, *, text: str, settings: TrainSettings, seed: int = 0, batch_size: int = 32,
    console: Console | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Look at every layer under each border, and bar the refusal's first token.

    Args:
        data, text, settings: as of `begun`, whose borders they are; one that is not there is trained.
        out: the model's folder; the part's is `depth` in it.

    Returns:
        The rows of metrics.json: of all seeds in `out/depth`. Of several processes the first returns them; the others none.

    Raises:
        DavspError: what the steps raise.
        Interrupted: Ctrl-C; the same call goes on.
    """
    stages, folder = Stages(out / f"seed-{seed}", console or Console()), out / "depth" / f"seed-{seed}"
    settings = settings.model_copy(update={"seed": seed})
    made_of = {
        "weights": fingerprint(lvlm), "text": text, "barred": settings.refusal.split()[0],
        "settings": settings.model_dump(exclude={"seed", "objective"}),
    }  # fmt: skip
    check_beside(out / "depth", seed, made_of)
    vector = fitted_vector(stages, lvlm, data, text)
    defenses = unmoved(lvlm, text) | borders(stages, lvlm, data, vector, settings, text)
    pictured = [q for q in data.test if q.image is not None]
    outcomes: Outcomes = {}
    for name, defense in defenses.items():
        seen = see(lvlm, defense, pictured, vector, settings.refusal, batch_size)
        outcomes[name] = [
            Outcome(f"{seed} {q.id}", q.label, f"layer {layer}", metric, q.group, float(seen[metric][i, layer - 1]))
            for metric in SEEN
            for layer in range(1, seen[metric].shape[1] + 1)
            for i, q in enumerate(pictured)
        ]
    asked = {PLAIN: (lvlm, stages.out / "as-asked", pictured)}
    malicious = [q for q in pictured if q.label == "malicious"]
    asked[BARRED] = (lvlm.without(settings.refusal), folder / "barred", malicious)
    for benchmark, (model, where, queries) in asked.items():
        made = evaluate(
            model, defenses, queries, where, batch_size=batch_size, redo=True, seed=seed, console=stages.console
        )
        for name, verdicts in made.verdicts.items():
            found = metrics.outcomes(queries, made.responses[name], verdicts)
            outcomes[name] += [
                replace(o, query_id=f"{seed} {o.query_id}", benchmark=benchmark)
                for o in found
                if (o.split, o.metric) == ("total", "rsr")
            ]
    if parallel.rank() > 0:
        return []
    facts = manifest(
        model=model_name(lvlm), revision=lvlm.revision, seed=seed, **made_of, layer=vector.layer,
        test={"queries": len(pictured), "sha256": queries_hash(pictured)},
    )  # fmt: skip
    keep(folder, facts, outcomes)
    return pool(out / "depth", model_name(lvlm))


@torch.no_grad()
def see(
    lvlm: LVLM, defense: Defense, queries: Sequence[Query], vector: HarmfulnessVector, refusal: str, batch_size: int
) -> dict[str, Float[np.ndarray, "n l"]]:
    """Projection (all layers but the last one, which comes after the final norm) and the refusal's log-odds at each layer.

    Several processes share the batches; the first one has all.
    """
    layers = list(range(1, lvlm.num_layers + 1))
    bottom, top = vector.mean_benign, vector.mean_malicious
    seen = {
        "projection": np.zeros((len(queries), len(layers) - 1)),
        "refusal_odds": np.zeros((len(queries), len(layers))),
    }
    every = batches(queries, batch_size)

    def of_batch(number: int) -> dict[str, Float[np.ndarray, "b l"]]:
        batch = every[number]
        some = {name: np.zeros((len(batch), array.shape[1])) for name, array in seen.items()}
        prepared = defense.shown([queries[i] for i in batch])
        pictures = [picture for query in prepared if (picture := query.picture()) is not None]
        canvas = lvlm.preprocess(pictures) if pictures else None
        tokens = lvlm.encode([query.asked for query in prepared], lvlm.sizes(canvas))
        with catching(lvlm.layers, layers, tokens.last, stop=True) as caught:
            lvlm.model(**lvlm.inputs(tokens, canvas), use_cache=False)
        for layer in layers:
            some["refusal_odds"][:, layer - 1] = _odds(lvlm, caught[layer], refusal).cpu().numpy()
            if layer < lvlm.num_layers:
                s = vector.project(caught[layer], layer).cpu() - bottom[layer - 1]
                some["projection"][:, layer - 1] = (s / (top[layer - 1] - bottom[layer - 1])).numpy()
        return some

    for number, some in parallel.work(len(every), of_batch):
        for name, array in some.items():
            seen[name][every[number]] = array
    return seen


def _odds(lvlm: LVLM, state: Float[Tensor, "b d"], refusal: str) -> Float[Tensor, " b"]:
    """Log-odds of the refusal's first token, if what a layer leaves were read by the model's own head (the logit lens)."""
    head, norm = lvlm.model.get_output_embeddings(), lvlm.model.get_decoder().norm
    first = lvlm.tokenizer(refusal, add_special_tokens=False)["input_ids"][0]
    logits = wide(head(norm(state.to(head.weight.dtype))))
    rest = torch.cat([logits[:, :first], logits[:, first + 1 :]], 1)
    return logits[:, first] - rest.logsumexp(1)


def pool(out: Path, model: str) -> list[dict[str, Any]]:
    """Rows, table and plot of all seeds in the part's folder."""
    facts, outcomes = kept(out)
    rates = {name: [o for o in rows if o.metric == "rsr"] for name, rows in outcomes.items()}
    table = compared(model, rates) + means(model, outcomes)
    seeds = [one["seed"] for one in facts]
    write_json(out / "metrics.json", metrics.metrics_file(table))
    write_json(out / MANIFEST, {**facts[0], "seeds": seeds, "layers": [one["layer"] for one in facts]})
    write_text(out / "depth.md", markdown(table, model, seeds, [one["layer"] for one in facts], facts[0]["barred"]))
    write_text(out / "depth.svg", figure(table))
    return table


def means(model: str, outcomes: Mapping[str, Sequence[Outcome]]) -> list[dict[str, Any]]:
    """Mean projection and log-odds by class and layer, with intervals by intent."""
    groups: dict[tuple[str, str, str, str], list[Outcome]] = {}
    for name, rows in outcomes.items():
        for o in rows:
            if o.metric in SEEN:
                groups.setdefault((name, o.benchmark, o.split, o.metric), []).append(o)
    table = []
    for (name, benchmark, split, metric), rows in groups.items():
        values, intents = [float(o.value or 0) for o in rows], [o.group for o in rows]
        low, high = metrics.cluster_bootstrap(values, intents)
        row = {"model": model, "defense": name, "benchmark": benchmark, "split": split, "metric": metric}
        table.append(row | {"value": float(np.mean(values)), "low": low, "high": high, "n": len(values)})
    return table


def markdown(
    rows: Sequence[Mapping[str, Any]], model: str, seeds: Sequence[int], layers: Sequence[int], barred: str
) -> str:
    """Both measures by layer, malicious and benign in a cell; RSR as asked and with the token barred."""
    at = {(r["defense"], r["benchmark"], r["split"], r["metric"]): r for r in rows}
    heads = {
        "projection": "projection (0: the mean of benign queries, 1: of malicious ones)",
        "refusal_odds": f"log-odds of `{barred}`",
    }
    lines = [
        f"**What a border moves, {model}**, seeds {', '.join(map(str, seeds))} (the borders were trained at layer {', '.join(map(str, layers))}). "
        "Means over malicious and, behind the bar, benign pictures, at the last input token.",
    ]  # fmt: skip
    for metric, head in heads.items():
        splits = list(dict.fromkeys(r["split"] for r in rows if r["metric"] == metric))
        lines += ["", f"| {head} | " + " | ".join(splits) + " |", "|---" * (len(splits) + 1) + "|"]
        for name, title in titled(rows).items():
            pairs = [[at[name, label, split, metric]["value"] for label in ("malicious", "benign")] for split in splits]
            lines.append(
                "| " + " | ".join([title, *(f"{bad:.1f} / {good:.1f}".replace("-", "−") for bad, good in pairs)]) + " |"
            )
    lines += ["", f"| RSR, percent | {PLAIN} | `{barred}` barred from the first place |", "|---|---|---|"]
    for name, title in titled(rows).items():
        lines.append("| " + " | ".join([title, *(rate(at[name, b, "total", "rsr"]) for b in (PLAIN, BARRED))]) + " |")
    for name, title in against(rows).items():
        cells = [difference(at.get((f"{name} against answer", b, "total", "rsr_difference"))) for b in (PLAIN, BARRED)]
        lines.append("| " + " | ".join([title, *cells]) + " |")
    return "\n".join([*lines, "", NOTE]) + "\n"


COLOURS = {
    "none": "#7d8590",
    "text": "#c8860d",
    "projection": "#2a9d8f",
    "answer": "#b0509f",
    "both": "#2f6fde",
    EVERY: "#0b2a6b",
}


def figure(rows: Sequence[Mapping[str, Any]]) -> str:
    """Both measures over the layers: malicious solid, benign dashed."""
    with matplotlib.rc_context(plots.STYLE):
        drawn = Figure(figsize=(7.2, 3.2), layout="constrained")
        for ax, metric, title in zip(
            drawn.subplots(1, 2), SEEN, ("projection", "log-odds of the refusal's first token"), strict=True
        ):
            for name in titled(rows):
                for label, style in (("malicious", "-"), ("benign", "--")):
                    values = [
                        r["value"] for r in rows if (r["defense"], r["benchmark"], r["metric"]) == (name, label, metric)
                    ]
                    shown = name if label == "malicious" else None
                    ax.plot(range(1, len(values) + 1), values, style, color=COLOURS[name], label=shown)
            ax.set_title(title)
            ax.set_xlabel("layer")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles, names = ax.get_legend_handles_labels()
        drawn.legend(handles, names, loc="outside lower center", ncols=6, handlelength=1.2)
        return plots.standalone(plots.svg(drawn, "depth"))
