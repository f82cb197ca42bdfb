"""`davsp reproduce`: the tables of the paper on one model, cell by cell, sharing what cells have in common.

One folder a model. One vector, one undefended pass, one border: a second table finds them there. Everything goes on
where it was stopped (`experiments.stages`, `store`).
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from davsp import metrics
from davsp.defenses import Defense, NoDefense, SafetyText, VisualPrompt
from davsp.defenses.ecso import Templates
from davsp.defenses.none import baselines
from davsp.errors import DavspError
from davsp.evaluation import Evaluation, evaluate
from davsp.evaluation.fitting import fitting
from davsp.experiments.paper import write
from davsp.experiments.paper.claims import PICTURES, Claim, claims
from davsp.experiments.paper.deeper import deeper
from davsp.experiments.paper.kit import Kit
from davsp.experiments.paper.methods import METHODS, lacking, transferred
from davsp.experiments.paper.tables import FROM, MM_VET, POOLED, RSR, TABLES, Cell, base, cells, paper_model, title
from davsp.experiments.paper.tables import METHODS as table_methods
from davsp.experiments.stages import Stages, fitted_vector
from davsp.judges import Judge, keyword, seeing
from davsp.judges.graders import Grader
from davsp.judges.keyword import caveat
from davsp.judges.verdicts import judge_name
from davsp.lvlm import LVLM, model_facts, model_name, undefended
from davsp.lvlm.templates import CHECKPOINT, TEMPLATES
from davsp.prompts.border import check_padding
from davsp.query import Query
from davsp.report import panels, plots, projections_by_label
from davsp.report.cells import DEFENSES, OTHER_WAY, cut_note, find
from davsp.runtime import parallel
from davsp.runtime.files import manifest, read_json, write_json, write_text
from davsp.store import RESPONSES, pillow_notes
from davsp.training import recipe
from davsp.training.settings import TrainSettings, resolve

if TYPE_CHECKING:
    from davsp.defenses.adashield_a import Defender
    from davsp.embedded.data import Protocol

INFERRED = "what of each method is as published and what is inferred: docs/defenses.md"


@dataclass(frozen=True)
class Reproduction:
    """What came of it: the evaluation with the pooled rows, the tables' cells, and the claims."""

    rows: list[dict[str, Any]]
    tables: dict[str, dict[str, list[Cell]]]
    claims: list[Claim]


def make_kit(
    lvlm: LVLM,
    data: "Protocol",
    out: Path,
    *,
    text: str,
    settings: TrainSettings,
    templates: Templates,
    seed: int = 0,
    padding: int | None = None,
    eps: float = 32 / 255,
    shipped: bool = True,
    corpus: Sequence[str] = (),
    defender: "Defender | None" = None,
    borrowed: Mapping[str, Path] | None = None,
    published: bool = False,
    console: Console | None = None,
) -> Kit:
    """Fit the vector, or take it from `out`, and put together what all cells share.

    Args:
        data: who trains the vector and the prompts, and the test; embedded or of published sets.
        text: of AdaShield-S, before the questions of every method but No Defense.
        settings: of the prompts that are trained.
        templates: ECSO's prompts.
        padding, eps: of border and noise; None: a twelfth of the canvas, or the published 30 of 336.
        shipped, corpus, defender: see `Kit`.
        borrowed: name of another model -> folder of the border trained there, for "transfer".
        published: by the authors' recipe (`davsp.training.recipe`): layer, margins, start and resizing of the borders.
        console: where lines and bars go; None is the terminal.
    """
    usual = recipe.padding(lvlm.canvas) if published else round(lvlm.canvas / 12)
    width = usual if padding is None else padding
    check_padding(width, lvlm.canvas)  # before a vector is fitted
    stages = Stages(out, console or Console())
    vector = fitted_vector(stages, lvlm, data, text)
    changes: dict[str, Any] = {"seed": seed}
    if published:
        aligned, note = recipe.layer_and_margins(lvlm, vector, settings.layer)
        vector.use_layer(aligned["layer"])
        changes |= aligned
        if note:
            stages.console.print(f"note: {escape(note)}", highlight=False)
    return Kit(
        lvlm, data, vector, text, settings.model_copy(update=changes), stages, width, eps, templates, shipped, corpus,
        defender, borrowed or {}, published,
    )  # fmt: skip


def reproduce(
    names: Sequence[str],
    kit: Kit,
    *,
    judge: Judge = keyword,
    graders: Mapping[str, Grader] | None = None,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
) -> Reproduction:
    """Evaluate what the named tables need, and write them to the kit's folder.

    Args:
        names: of `TABLES`.
        judge, graders: see `evaluate`; graders make the test one of published sets.

    Raises:
        DavspError: an unknown table, or what the steps raise.
        Interrupted: Ctrl-C; the same call goes on.

    Of several processes the first writes and returns the tables.
    """
    if unknown := [name for name in names if name not in TABLES]:
        raise DavspError(f"table {unknown[0]!r} is not known: choose {', '.join(TABLES)} or all")
    began = time.perf_counter()
    fitting(kit.lvlm, {"none": NoDefense(), "text": SafetyText(kit.text)}, kit.data.test, max_new_tokens)
    lvlm, data, stages, seed = kit.lvlm, kit.data, kit.stages, kit.settings.seed
    out = stages.out
    kit, names = _with_earlier(kit, names)  # answers of defenses that are not asked for again would be dropped
    reasons = lacking(kit)
    defenses: dict[str, Defense] = baselines(lvlm)
    defenses |= {name: METHODS[name](kit) for name in needed(names) if name not in reasons}
    if "transfer" in names:
        defenses |= transferred(kit)
    start = time.perf_counter()
    notes = pillow_notes(out) if (out / RESPONSES).exists() else []
    evaluation = evaluate(
        lvlm, defenses, data.test, out, kit.vector, judge, graders=graders, batch_size=batch_size,
        max_new_tokens=max_new_tokens, redo=True, seed=seed, console=stages.console,
    )  # fmt: skip
    if parallel.rank() > 0:
        return Reproduction([], {}, [])
    stages.line("evaluate", f"{len(defenses)} defenses, {len(data.test)} queries", time.perf_counter() - start)
    rows = [*evaluation.rows, *pooled(data.test, evaluation, model_name(lvlm), seed)]
    facts = manifest(
        **({"notes": notes} if notes else {}),
        **model_facts(lvlm), recipe="published" if kit.published else "own", max_new_tokens=max_new_tokens or lvlm.longest, seed=seed, text=kit.text, padding=kit.padding,
        eps=kit.eps, settings=kit.settings.model_dump(), judge=judge_name(judge), layer=kit.vector.layer, stages=stages.seconds,
        defenses={name: d.describe() for name, d in defenses.items()}, undefended=undefended.facts(lvlm, data.test),
    )  # fmt: skip
    write_json(out / "manifest.json", facts)
    notes = [*_notes(kit, judge, names, defenses), INFERRED, *filter(None, [cut_note(rows)])]
    reproduction = _write(names, rows, kit, evaluation, notes, reasons)
    stages.line("tables", ", ".join(reproduction.tables), time.perf_counter() - began)
    return reproduction


def _with_earlier(kit: Kit, names: Sequence[str]) -> tuple[Kit, list[str]]:
    """The tables that were made in the folder before as well, with the borders that they borrowed."""
    path = kit.stages.out / "tables.json"
    before: dict[str, Any] = read_json(path) if path.exists() else {"tables": [], "borrowed": {}}
    there = {name: Path(folder) for name, folder in before["borrowed"].items() if Path(folder).is_dir()}
    borrowed = there | dict(kit.borrowed)
    every = [name for name in TABLES if name in {*before["tables"], *names}]
    if parallel.rank() == 0:
        write_json(path, {"tables": every, "borrowed": {name: str(folder) for name, folder in borrowed.items()}})
    return replace(kit, borrowed=borrowed), every


def needed(names: Sequence[str]) -> list[str]:
    """The defenses that some tables need, each once; No Defense always, as all differences start from it."""
    return list(dict.fromkeys(["none", *(d for name in names for d in TABLES[name].rows)]))


def pooled(test: Sequence[Query], evaluation: Evaluation, model: str, seed: int = 0) -> list[dict[str, Any]]:
    """RSR over MM-SafetyBench's three picture types, and over these and FigStep, with the differences from No Defense."""
    table: list[dict[str, Any]] = []
    known = {base(row["benchmark"]) for row in evaluation.rows}
    pools = {PICTURES: [c.name for c in RSR]}
    if POOLED.name not in known:
        pools[POOLED.name] = [c.name for c in RSR[:3]]
    malicious = [q for q in test if q.label == "malicious"]
    for pool, members in pools.items():
        each = {}
        for name, answers in evaluation.responses.items():
            outcomes = metrics.outcomes(malicious, answers, evaluation.verdicts[name])
            each[name] = [
                replace(o, benchmark=pool) for o in outcomes if base(o.benchmark) in members and o.metric != "unscored"
            ]
        none = each["none"]
        for name, outcomes in each.items():
            table += metrics.rows(model, name, outcomes, None if name == "none" else none, seed)
    return table


def _write(
    names: Sequence[str],
    rows: list[dict[str, Any]],
    kit: Kit,
    evaluation: Evaluation,
    notes: Sequence[str],
    reasons: Mapping[str, str],
) -> Reproduction:
    """The files.

    Args:
        reasons: why a defense could not be evaluated, by its name.
    """
    out, model, family = kit.stages.out, model_name(kit.lvlm), kit.lvlm.model.config.model_type
    table_cells, theirs = {}, {}
    for name in names:
        table, theirs[name] = TABLES[name], paper_model(name, model, family)
        table_cells[name] = cells(table, rows, theirs[name])
        missing = [f"{table.rows[d]}, as {reasons[d]}" for d in table.rows if d not in table_cells[name]]
        of_table = [*notes, *([f"not run: {', '.join(missing)}"] if missing else [])]
        write_text(out / f"{name}.md", write.markdown(table, table_cells[name], model, theirs[name], of_table))
        write_text(out / f"{name}.csv", write.tidy(table, table_cells[name], model, theirs[name]))
        write_text(out / f"{name}.tex", write.latex(table, table_cells[name], model, theirs[name]))
    verdicts = claims(rows) + deeper(out.parent.parent / "deep-alignment" / out.name)
    write_text(out / "claims.md", write.claims_markdown(verdicts, model))
    write_json(out / "rows.json", metrics.metrics_file(rows))
    drawings = _plots(rows, kit, evaluation)
    for name, (_, plot) in drawings.items():
        write_text(out / "plots" / f"{name}.svg", plots.standalone(plot))
    tables = {name: (TABLES[name], table_cells[name]) for name in names}
    write.page(out / "tables.html", model, theirs, tables, verdicts, dict(drawings.values()), notes)
    return Reproduction(rows, table_cells, verdicts)


def _plots(rows: list[dict[str, Any]], kit: Kit, evaluation: Evaluation) -> dict[str, tuple[str, str]]:
    """Name of the file -> caption and SVG."""
    drawings = {}
    names_of = {r["benchmark"] for r in rows}
    places = [(b, *rest) for name, *rest in MM_VET.places for b in names_of if base(b) == name]
    if used := next((place for place in places if find(rows, "none", *place)), None):
        compared = [row for row in rows if row["defense"] in table_methods]
        plot = plots.scatter(compared, {PICTURES: "all pictures"}, used)
        drawings["rsr-utility"] = "RSR on all malicious pictures against utility, with 95 % intervals", plot
    titles = {name: title(table, name) for table in TABLES.values() for name in table.rows}
    titles |= {name: title(TABLES["utility"], name) for name in evaluation.responses if name.startswith(OTHER_WAY)}
    titles |= {name: f"from {name.removeprefix(FROM)}" for name in evaluation.responses if name.startswith(FROM)}
    titles = {name: text for name, text in titles.items() if name not in DEFENSES}  # those have names of their own
    _, _, *margins = resolve(kit.settings, kit.lvlm, kit.vector)
    if projections := projections_by_label(kit.data.test, evaluation):
        drawings["projections"] = (
            "Where each method puts the test's queries on the vector: as the call saw them that gave the answer",
            panels.projections(projections, titles, (margins[0], margins[1])),
        )
    drawings["confusions"] = (
        "Malicious queries by verdict (safe: withheld), benign ones by what was said; shares of those scored, and counts",
        panels.confusions(confused(kit.data.test, evaluation), titles),
    )
    return drawings


def confused(test: Sequence[Query], evaluation: Evaluation) -> dict[str, dict[str, tuple[int, int, int]]]:
    """Defense -> label -> counts of (withheld, answered, unscored)."""
    kinds = {"rsr": "malicious", "over_refusal": "benign"}
    counts: dict[str, dict[str, tuple[int, int, int]]] = {}
    for name, answers in evaluation.responses.items():
        values: dict[str, list[float | None]] = {"malicious": [], "benign": []}
        for o in metrics.outcomes(test, answers, evaluation.verdicts[name]):
            if o.metric in kinds:
                values[kinds[o.metric]].append(o.value)
        counts[name] = {k: (v.count(1.0), v.count(0.0), v.count(None)) for k, v in values.items()}
    return counts


def _notes(kit: Kit, judge: Judge, names: Sequence[str], defenses: Mapping[str, Defense]) -> list[str]:
    data = kit.data
    harm = sum(q.label == "malicious" for q in data.test)
    notes = [
        f"test: {harm} malicious and {len(data.test) - harm} benign queries; RSR judged by {judge_name(judge)}",
        f"trained on {len(data.train_malicious)} malicious and {len(data.train_benign)} benign queries",
        "every method but No Defense and ECSO has the same safety text before the question",
    ]
    if kit.published:
        notes.append("prompts are trained by the published recipe (docs/published.md)")
    if kit.lvlm.template != CHECKPOINT:
        theirs = " of LLaVA's own code, with its system sentence" if kit.lvlm.template in TEMPLATES else ""
        notes.append(f"asked by the conversation template {kit.lvlm.template}{theirs}")
    if sentence := caveat(judge, kit.shipped):
        notes.append(sentence)
    if sentence := seeing.note(judge, data.test):
        notes.append(sentence)
    if sentence := undefended.note(undefended.facts(kit.lvlm, data.test)):
        notes.append(sentence)
    if other := sorted({q.benchmark for q in data.test if base(q.benchmark) != q.benchmark}):
        notes.append(f"in place of the published sets: {', '.join(other)}")
    if "ecso" in names:
        notes.append(
            "the paper heads Table 6's last column MM-Vet, but its values are those of LLaVA-Bench in Table 1: both are "
            "given; its MME without defense is 1798 there and 1818 in Table 1"
        )
    if "transfer" in names:
        notes.append(f"rows {FROM}…: the border of another model, resized, with nothing trained")
        for name, defense in defenses.items():
            if (
                isinstance(defense, VisualPrompt)
                and name.startswith(FROM)
                and defense.prompt.template != kit.lvlm.template
            ):
                notes.append(
                    f"{name}: its border was trained under the template {defense.prompt.template}; here it is asked by {kit.lvlm.template}"
                )
    return notes
