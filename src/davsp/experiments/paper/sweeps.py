"""One setting of DAVSP at a time: what the paper's appendix would show, and what a user who trains a border asks first.

Each value is a border of its own, trained and evaluated like the table's, everything else as it is there.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from davsp import metrics
from davsp.defenses import Defense, NoDefense, SafetyText, VisualPrompt
from davsp.errors import DavspError
from davsp.evaluation import evaluate
from davsp.evaluation.fitting import fitting
from davsp.experiments.paper.claims import PICTURES, Figures
from davsp.experiments.paper.kit import Kit
from davsp.experiments.stages import Stages, trained_prompt
from davsp.judges import Judge, keyword, seeing
from davsp.judges.graders import Grader
from davsp.judges.keyword import caveat
from davsp.lvlm import model_name
from davsp.report import plots
from davsp.report.cells import cut_note
from davsp.runtime import parallel
from davsp.runtime.files import read_json, write_json, write_text

PADDINGS = (7, 14, 21, 28, 42, 56)  # pixels of 336, scaled to the canvas
LAMBDAS = (0.0, 0.2, 1.0, 2.5, 5.0)
SHARES = (1 / 16, 1 / 4, 1)  # of the training set
STEPS = (25, 50, 100, 150, 300)
QUANTILES = (0.3, 0.5, 0.75, 0.9)  # of the malicious projections: mu_plus


def _padding(kit: Kit) -> dict[str, Kit]:
    widths = dict.fromkeys(max(1, round(p * kit.lvlm.canvas / 336)) for p in PADDINGS)
    return {f"{p}": replace(kit, padding=p) for p in widths}


def _layer(kit: Kit) -> dict[str, Kit]:
    every = range(1, kit.lvlm.num_layers)
    some = every[:: max(1, len(every) // 8)]
    return {f"{layer}": _with(kit, layer=layer, mu_plus=None, mu_minus=None) for layer in some}


def _margins(kit: Kit) -> dict[str, Kit]:
    layer = kit.vector.layer
    return {f"{x:g}": _with(kit, mu_plus=kit.vector.margins(layer, (x, 0.75))[0]) for x in QUANTILES}


def _data(kit: Kit) -> dict[str, Kit]:
    bad, good = kit.data.train_malicious, kit.data.train_benign
    sizes = {share: (max(1, round(len(bad) * share)), max(1, round(len(good) * share))) for share in SHARES}
    return {
        f"{n + m}": replace(kit, data=replace(kit.data, train_malicious=bad[:n], train_benign=good[:m]))
        for n, m in sizes.values()
    }


def _with(kit: Kit, **changes: Any) -> Kit:
    return replace(kit, settings=kit.settings.model_copy(update=changes))


SWEEPS: dict[str, tuple[str, Callable[[Kit], dict[str, Kit]]]] = {
    "padding": ("width of the border, pixels", _padding),
    "layer": ("layer of the projection", _layer),
    "lam": ("weight of the answer loss", lambda kit: {f"{x:g}": _with(kit, lam=x) for x in LAMBDAS}),
    "margins": ("quantile of the malicious projections that μ₊ is", _margins),
    "data": ("training queries", _data),
    "steps": ("steps", lambda kit: {f"{n}": _with(kit, steps=n) for n in STEPS}),
    "text": ("safety text", lambda kit: {"with": kit, "without": replace(kit, text="")}),
}
"""Name on the command line -> axis, and the kits to train with, by value."""


def sweep(
    names: list[str],
    kit: Kit,
    out: Path,
    *,
    judge: Judge = keyword,
    graders: Mapping[str, Grader] | None = None,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Train and evaluate every value of the named sweeps; `out/sweeps.md`, `.json` and a plot each, with those made there before.

    Returns:
        A record a value: sweep, value, RSR over all malicious pictures, utility and over-refusal, each with its interval.

    Raises:
        DavspError: an unknown sweep, or what the steps raise.
    """
    if unknown := [name for name in names if name not in SWEEPS]:
        raise DavspError(f"sweep {unknown[0]!r} is not known: choose {', '.join(SWEEPS)}")
    from davsp.experiments.paper.run import pooled

    fitting(kit.lvlm, {"none": NoDefense(), "text": SafetyText(kit.text)}, kit.data.test, max_new_tokens)
    console = console or Console()
    stages = Stages(out, console)
    written = out / "sweeps.json"
    before = {r["sweep"] for r in read_json(written)["records"]} if written.exists() else set()
    names = [name for name in SWEEPS if name in before or name in names]  # those of an earlier command stay
    defenses: dict[str, Defense] = {"none": NoDefense()}
    for name in names:
        for value, changed in SWEEPS[name][1](kit).items():
            row = f"{name}={value}"
            start = changed.border()
            saved = out / "prompts" / row
            border = trained_prompt(
                stages, row, start, kit.lvlm, changed.data, kit.vector, changed.settings, saved,
                vector_file=kit.stages.out / "vector" / "vector.safetensors",
            )  # fmt: skip
            defenses[row] = VisualPrompt(border, row)
    evaluation = evaluate(
        kit.lvlm, defenses, kit.data.test, out, kit.vector, judge, graders=graders, batch_size=batch_size,
        max_new_tokens=max_new_tokens, redo=True, seed=seed, console=console,
    )  # fmt: skip
    if parallel.rank() > 0:
        return []
    rows = [*evaluation.rows, *pooled(kit.data.test, evaluation, model_name(kit.lvlm), seed)]
    records = [_record(rows, row) for row in defenses]
    write_json(written, {"schema": metrics.SCHEMA, "records": records})
    notes = filter(None, (caveat(judge, kit.shipped), seeing.note(judge, kit.data.test), cut_note(rows)))
    write_text(out / "sweeps.md", markdown(records, model_name(kit.lvlm), " ".join(notes)))
    for name in names:
        mine = [r for r in records if r["sweep"] == name]
        write_text(out / f"{name}.svg", plots.standalone(plots.lines(mine, SWEEPS[name][0])))
    return records


def _record(rows: list[dict[str, Any]], row: str) -> dict[str, Any]:
    name, _, value = row.partition("=")
    f = Figures(rows)
    figures = {
        "rsr": f.row(row, PICTURES, "rsr"), "utility": f.utility(row), "over_refusal": f.row(row, "benign", "over_refusal"),
    }  # fmt: skip
    cells = {k: None if r is None else {x: r[x] for x in ("value", "low", "high", "n")} for k, r in figures.items()}
    return {"sweep": name, "value": value, **cells}


def markdown(records: list[dict[str, Any]], model: str, caveat: str = "") -> str:
    """The records as a table for a README, and what is to be known of them."""
    lines = [f"**DAVSP on {model}, one setting at a time**; points of a hundred, 95 % intervals.", ""]
    lines += ["| setting | value | RSR, all pictures | utility | over-refusal |", "|---|---|---|---|---|"]
    for r in records:
        cells = (
            "–" if x is None else f"{100 * x['value']:.1f} [{100 * x['low']:.1f}, {100 * x['high']:.1f}]"
            for x in (r["rsr"], r["utility"], r["over_refusal"])
        )  # fmt: skip
        lines.append(f"| {r['sweep']} | {r['value']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *(["", caveat] if caveat else [])]) + "\n"
