"""Answers that are made to begin with words of compliance: "a few tokens deep", or not.

All borders are asked the same queries, first as they are, then with answers that are made to begin with more and more words.

out/seed-N/prompts/OBJECTIVE   the borders
out/seed-N/begun-K/            a run as `davsp eval --prefill` leaves it, with the first K words of the beginning; a killed one goes on
out/metrics.json               rows of all seeds: benchmark "begun 3" is the pool of malicious pictures under three words
out/deep-alignment.md, manifest.json
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from davsp import metrics
from davsp.evaluation import evaluate
from davsp.experiments.cells import rate
from davsp.experiments.deep.borders import (
    Outcomes,
    against,
    borders,
    compared,
    difference,
    kept,
    titled,
    unmoved,
    unscored,
)
from davsp.experiments.seeds import MANIFEST, check_beside, keep
from davsp.experiments.stages import Stages, fitted_vector
from davsp.lvlm import LVLM, fingerprint, model_name
from davsp.metrics import Outcome
from davsp.runtime import parallel
from davsp.runtime.files import manifest, write_json, write_text
from davsp.store import queries_hash
from davsp.training import TrainSettings

if TYPE_CHECKING:
    from davsp.embedded.data import Protocol

PLAIN = "as asked"
METRICS = ("rsr", "unscored", "over_refusal", "accuracy")


def beginnings(text: str) -> dict[str, str]:
    """Name of a benchmark -> how answers begin there: nothing, the first word, three words, all of the text."""
    words = text.split()
    counts = sorted({count for count in (1, 3, len(words)) if count <= len(words)})
    return {PLAIN: ""} | {f"begun {count}": " ".join(words[:count]) for count in counts}


def begun(
    lvlm: LVLM, data: "Protocol", out: Path, *, text: str, beginning: str, settings: TrainSettings, seed: int = 0,
    batch_size: int = 32, console: Console | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train the borders and ask the test's queries with pictures under each beginning.

    Args:
        data: who trains vector and borders, and the test. Benign queries are asked without a beginning only.
        out: the model's folder.
        text: before every question of all rows but none.
        beginning: words of compliance.
        settings: of the borders, whatever their objective.

    Returns:
        The rows of metrics.json: of all seeds in `out`. Of several processes the first returns them; the others none.

    Raises:
        DavspError: what the steps raise.
        Interrupted: Ctrl-C; the same call goes on.
    """
    folder = out / f"seed-{seed}"
    stages = Stages(folder, console or Console())
    settings = settings.model_copy(update={"seed": seed})
    made_of = {
        "weights": fingerprint(lvlm), "text": text, "beginning": beginning,
        "settings": settings.model_dump(exclude={"seed", "objective"}),
    }  # fmt: skip
    check_beside(out, seed, made_of)
    vector = fitted_vector(stages, lvlm, data, text)
    defenses = unmoved(lvlm, text) | borders(stages, lvlm, data, vector, settings, text)
    pictured = [q for q in data.test if q.image is not None]
    outcomes: Outcomes = {name: [] for name in defenses}
    for benchmark, words in beginnings(beginning).items():
        asked = [q for q in pictured if not words or q.label == "malicious"]
        made = evaluate(
            lvlm.begun(words) if words else lvlm, defenses, asked, folder / benchmark.replace(" ", "-"),
            batch_size=batch_size, redo=True, seed=seed, console=stages.console,
        )  # fmt: skip
        for name, verdicts in made.verdicts.items():
            found = metrics.outcomes(asked, made.responses[name], verdicts)
            outcomes[name] += [_placed(o, benchmark, seed) for o in found if o.split == "total" and o.metric in METRICS]
    if parallel.rank() > 0:
        return []
    facts = manifest(
        model=model_name(lvlm), revision=lvlm.revision, seed=seed, **made_of, layer=vector.layer, stages=stages.seconds,
        test={"queries": len(pictured), "sha256": queries_hash(pictured)},
    )  # fmt: skip
    keep(folder, facts, outcomes)
    return pool(out, model_name(lvlm))


def _placed(o: Outcome, benchmark: str, seed: int) -> Outcome:
    """Malicious pictures of all forms are one pool under each beginning, benign ones one pool."""
    pooled = benchmark if o.metric in ("rsr", "unscored") else "utility" if o.metric == "accuracy" else o.benchmark
    return replace(o, query_id=f"{seed} {o.query_id}", benchmark=pooled)


def pool(out: Path, model: str) -> list[dict[str, Any]]:
    """Rows and table of all seeds in a model's folder."""
    facts, outcomes = kept(out)
    table = compared(model, outcomes)
    seeds = [one["seed"] for one in facts]
    write_json(out / "metrics.json", metrics.metrics_file(table))
    write_json(out / MANIFEST, {**facts[0], "seeds": seeds, "stages": [one["stages"] for one in facts]})
    write_text(out / "deep-alignment.md", markdown(table, model, seeds, facts[0]["beginning"]))
    return table


def markdown(rows: Sequence[Mapping[str, Any]], model: str, seeds: Sequence[int], beginning: str) -> str:
    """RSR under each beginning, a line a defense, utility and over-refusal behind; then what the projection adds to answers alone."""
    at = {(r["defense"], r["benchmark"], r["metric"]): r for r in rows if r["split"] == "total"}
    columns = {name: f"`{words}`" if words else name for name, words in beginnings(beginning).items()}
    lines = [
        f"**How deep is a refusal? {model}**, seeds {', '.join(map(str, seeds))}. RSR on {at['none', PLAIN, 'rsr']['n']} malicious pictures "
        "where every answer is made to begin so, judged by what follows; percent, 95 % intervals by intent.", "",
        "| | " + " | ".join(columns.values()) + " | utility | over-refusal |", "|---" * (len(columns) + 3) + "|",
    ]  # fmt: skip
    places = [*((name, "rsr") for name in columns), ("utility", "accuracy"), ("benign", "over_refusal")]
    for name, title in titled(rows).items():
        lines.append("| " + " | ".join([title, *(rate(at[name, *place]) for place in places)]) + " |")
    for name, title in against(rows).items():
        cells = [difference(at.get((f"{name} against answer", b, f"{m}_difference"))) for b, m in places]
        lines.append("| " + " | ".join([title, *cells]) + " |")
    return "\n".join([*lines, "", NOTE, *unscored(rows)]) + "\n"


NOTE = "- \\*: p < 0.05, paired, not corrected for the number of cells. The judge is `keyword`."
