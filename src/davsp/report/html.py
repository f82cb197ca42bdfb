"""One self-contained HTML page: no script, no network, light and dark, from a phone's width to a wall's."""

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from davsp.judges import refused, withheld
from davsp.lvlm.undefended import note
from davsp.metrics import correct
from davsp.query import Query, Response, Verdict
from davsp.report import Example, Report, plots
from davsp.report.cells import (
    BENCHMARKS,
    COST_HEADINGS,
    POOLED,
    SUMS,
    RateCell,
    RateColumn,
    cell,
    costs,
    cut_note,
    defenses,
    find,
    label,
    main_columns,
    number,
    percent,
    points,
    score_rows,
    utility_columns,
)
from davsp.runtime.files import write_text

LARGEST = 448
"""Pictures are embedded at no more than this many pixels a side."""

PANELS = {
    "loss": {"loss": ("", "-")},
    "mean projection": {"projection_malicious": ("malicious", "-"), "projection_benign": ("benign", ":")},
    "held-out malicious above μ₊": {"probe_rsr": ("", "-")},
}
"""Training curves: axis -> field of metrics.jsonl -> its name in the legend and its line style."""


def write_report(path: Path, report: Report, show_unsafe: bool = False) -> None:
    """Write the page; with `show_unsafe` the compliant answers to malicious queries are printed, else redacted.

    Raises:
        DavspError: the file can't be written.
    """
    write_text(path, render(report, show_unsafe))


def render(report: Report, show_unsafe: bool = False) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("davsp.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    template = environment.get_template("report.html.j2")
    rows = report.rows
    main = _table(report, main_columns(rows))
    return template.render(
        report=report,
        headline=headline(report),
        tiles=_tiles(report),
        main=main,
        utility=_table(report, utility_columns(rows)),
        costs=costs(rows, report.latency),
        cost_headings=COST_HEADINGS,
        cut_note=cut_note(rows),
        scores=[(*key, [number(row) for row in cells]) for *key, cells in score_rows(rows)],
        defenses=defenses(rows),
        pictures=[(p, uri(p.image)) for p in report.pictures],
        malicious=[_shown(e, show_unsafe) for e in report.examples if e.query.label == "malicious"],
        benign=[_shown(e, show_unsafe) for e in report.examples if e.query.label == "benign"],
        histograms=_histograms(report),
        sweep=Markup(plots.sweep(report.sweep, report.layer or 0)) if report.sweep else None,
        curves=_curves(report),
        scatter=_scatter(report),
        manifest=json.dumps(report.manifest, indent=2, ensure_ascii=False, default=str),
        undefended=note(report.manifest.get("undefended")),
        label=label,
        colours=plots.colours(defenses(rows)),
        show_unsafe=show_unsafe,
        query_counts=_counts_in_words(report),
        unscored=any(c.unscored for _, cells in main[1] for _, c in cells),
    )


def headline(report: Report) -> str:
    """The result in one sentence, from the rows, whichever way it went; says where a change is not significant.

    Says so as well if the defense or the baseline was not measured.
    """

    def rate(defense: str, benchmark: str, metric: str) -> float | None:
        row = find(report.rows, defense, benchmark, "total", metric)
        return None if row is None else row["value"]

    def change(benchmark: str, metric: str) -> str:
        after, before = rate(report.defense, benchmark, metric), rate(report.baseline, benchmark, metric)
        if after is None or before is None:
            return ""
        row = find(report.rows, report.defense, benchmark, "total", f"{metric}_difference")
        doubt = " (not significant)" if row and row["value"] and row["p"] >= 0.05 else ""
        return f"from {_percent(before)} to {_percent(after)}{doubt}"

    name = label(report.defense)
    places = [(c.benchmark, c.heading) for c in _attacked(report, "in distribution", "out of distribution", "on {}")]
    parts = [f"{moved} {words}" for b, words in places if (moved := change(b, "rsr"))]
    if not parts:
        return f"{name} on {report.model}: no resist success rate was measured."
    sentence = f"{name} takes the resist success rate on malicious queries {_listed(parts)}"
    costs = {"utility": change("utility", "accuracy"), "over-refusal": change("benign", "over_refusal")}
    moves = [f"{what} goes {moved}" for what, moved in costs.items() if moved]
    return "; ".join([sentence, *moves]) + "."


def _attacked(report: Report, inside: str, outside: str, each: str) -> list[RateColumn]:
    """Where resistance is told of first: in and out of distribution or, where nothing is pooled, on each set."""
    benchmarks = {row["benchmark"] for row in report.rows}
    pooled = [RateColumn(words, POOLED[key], "total", "rsr") for key, words in (("in", inside), ("out", outside))]
    sets = [c for c in main_columns(report.rows) if c.metric == "rsr" and c.benchmark not in SUMS]
    return [c for c in pooled if c.benchmark in benchmarks] or [
        replace(c, heading=each.format(c.heading)) for c in sets
    ]


def _listed(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _counts_in_words(report: Report) -> str:
    """How many malicious queries each benchmark has, and of how many intents."""
    return ", ".join(
        f"{BENCHMARKS.get(b, b)} {n} queries of {intents} intents" for b, (n, intents) in report.query_counts.items()
    )


def _percent(value: float) -> str:
    return f"{percent(value)}\N{NO-BREAK SPACE}%"


def uri(image: Image.Image) -> str:
    """The picture as a PNG data URI."""
    image = image.convert("RGB")
    if max(image.size) > LARGEST:
        image = image.copy()
        image.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _tiles(report: Report) -> list[dict[str, str]]:
    """The figures on top: name, value, what it was without a defense, and the difference."""
    columns = (
        *_attacked(report, "RSR, in distribution", "RSR, out of distribution", "RSR, {}"),
        RateColumn("Utility", "utility", "total", "accuracy"),
        RateColumn("Over-refusal", "benign", "total", "over_refusal", high_is_good=False),
    )
    tiles = []
    for column in columns:
        after, before = (
            find(report.rows, d, column.benchmark, "total", column.metric) for d in (report.defense, report.baseline)
        )
        if after and before and after["value"] is not None and before["value"] is not None:
            c = cell(report.rows, report.defense, column)
            change = points(after["value"] - before["value"])
            tiles.append(
                {"name": column.heading, "value": c.value, "interval": c.interval, "before": percent(before["value"])}
            )
            tiles[-1] |= {"change": change, "direction": c.direction}
    return tiles


RateTable = tuple[list[RateColumn], list[tuple[str, list[tuple[RateColumn, RateCell]]]]]


def _table(report: Report, columns: list[RateColumn]) -> RateTable:
    return columns, [(d, [(c, cell(report.rows, d, c)) for c in columns]) for d in defenses(report.rows)]


def _shown(example: Example, show_unsafe: bool) -> dict[str, Any]:
    q = example.query
    picture, canvas = q.picture(), example.defended.picture()
    return {
        "query": q,
        "kind": " · ".join(x for x in (BENCHMARKS.get(q.benchmark, q.benchmark), q.category) if x),
        "defended_question": example.defended.told,
        "picture": None if picture is None else uri(picture),
        "canvas": None if canvas is None else uri(canvas),
        "before": _answer(q, example.before, example.before_verdict, show_unsafe),
        "after": _answer(q, example.after, example.after_verdict, show_unsafe),
    }


def _answer(query: Query, response: Response, verdict: Verdict | None, show_unsafe: bool) -> dict[str, str]:
    """As `_judged`; of an answer that was cut at the longest the word says so."""
    said = _judged(query, response, verdict, show_unsafe)
    return said | ({"word": f"{said['word']}, cut at the longest"} if response.finish == "length" else {})


def _judged(query: Query, response: Response, verdict: Verdict | None, show_unsafe: bool) -> dict[str, str]:
    """Text, a word on it, and whether that is good, as the rates have it; what is not known to be safe is redacted."""
    if query.label == "malicious":
        verdict_label = verdict.label if verdict else "unscored"
        word = {"safe": "resisted", "unsafe": "complied", "unscored": "unscored"}[verdict_label]
        text = response.text if verdict_label == "safe" or show_unsafe else "[redacted]"
        return {"text": text, "word": word, "mood": {"safe": "good", "unsafe": "bad"}.get(verdict_label, "")}
    if response.cut:
        return {"text": response.text, "word": "unscored", "mood": ""}
    if withheld(response.text):
        word = "refused" if refused(response.text) else "no words"
        return {"text": response.text, "word": word, "mood": "bad"}
    if not (query.reference or query.answers):
        return {"text": response.text, "word": "answered", "mood": ""}
    right = correct(query, response.text)
    return {"text": response.text, "word": "right" if right else "wrong", "mood": "good" if right else "bad"}


def _histograms(report: Report) -> Markup | None:
    before, after = report.projections.get(report.baseline), report.projections.get(report.defense)
    if not before or not after or report.margins is None:
        return None
    return Markup(plots.histograms(before, after, (label(report.baseline), label(report.defense)), report.margins))


def _curves(report: Report) -> list[Markup]:
    panels = (plots.curves(report.curves, panel, series) for panel, series in PANELS.items())
    return [Markup(svg) for svg in panels if svg is not None]


def _scatter(report: Report) -> Markup | None:
    titles: Mapping[str, str] = {POOLED["in"]: "In distribution", POOLED["out"]: "Out of distribution"}
    attacks = {
        b: t for b, t in titles.items() if any(find(report.rows, d, b, "total", "rsr") for d in defenses(report.rows))
    }
    has_utility = any(find(report.rows, d, "utility", "total", "accuracy") for d in defenses(report.rows))
    return Markup(plots.scatter(report.rows, attacks)) if attacks and has_utility else None
