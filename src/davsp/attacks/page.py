"""The figures of an attack as Markdown, on a terminal, and as one page with plots and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from rich.console import Console
from rich.text import Text

from davsp.attacks.checks import Check
from davsp.attacks.run import AttackResult
from davsp.attacks.settings import BY_GRADIENT, CLEAN
from davsp.attacks.table import ALL, ANY, WORST, deed_counts, names, sizes
from davsp.defenses import Defense
from davsp.metrics import WORST as BOUND
from davsp.report.cells import label, markdown_table
from davsp.report.html import uri
from davsp.report.plots import MARKERS, STYLE, colours, spread, svg
from davsp.report.terminal import print_caveat
from davsp.runtime.files import write_text
from davsp.runtime.table import TextTable

Rows = Sequence[Mapping[str, Any]]
MARKS = {"good": "✓", "doubt": "?", "not run": "–"}
SHADES = {"noise": "#7d8590", "transfer": "#2a9d8f", "comply": "#d4552b", "deed": "#8c2f1b", "hide": "#c8860d", "both": "#b0509f", "joint": "#5b8c3e", "universal": "#4a5fb0", "square": "#3d9ac9"}  # fmt: skip
EXAMPLES = 3
DEEDS = "Of the broken answers to queries that tell their deed: how many name verb and thing of the request"


def rate(rows: Rows, defense: str, attack: str, eps: int | None, metric: str = "rsr") -> Mapping[str, Any] | None:
    """The row over all queries; None if there is none."""
    values = (defense, attack, eps, ALL if metric != "over_refusal" else "benign", "total", metric)
    keys = ("defense", "attack", "eps", "benchmark", "split", "metric")
    return next((r for r in rows if tuple(r[key] for key in keys) == values), None)


def number(row: Mapping[str, Any] | None) -> str:
    """A rate and its interval in percent; a dash where there is none."""
    if row is None or row["value"] is None:
        return "–"
    return f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def worst_table(rows: Rows, results: Sequence[AttackResult]) -> tuple[list[str], list[list[str]]]:
    """Heading and lines: each defense's clean figures, its worst case over pictures at each size, under words, and over all attacks."""
    at = sizes(results)
    by_size = [f"picture, {eps}/255" for eps in at]
    heading = ["Defense", "clean", "redrawn", *by_size, "words", "any", "utility", "over-refusal"]
    lines = []
    for name in names(results):
        redrawn = any(a.defense == name and a.attack.startswith("redraw") for a in results)
        cells = [rate(rows, name, CLEAN, None), rate(rows, name, WORST, 0, BOUND) if redrawn else None]
        cells += [rate(rows, name, WORST, eps, BOUND) for eps in at]
        cells += [rate(rows, name, "suffix", None), rate(rows, name, ANY, None, BOUND)]
        cells += [rate(rows, name, CLEAN, None, metric) for metric in ("accuracy", "over_refusal")]
        lines.append([label(name), *map(number, cells)])
    return heading, lines


def deed_table(results: Sequence[AttackResult]) -> tuple[list[str], list[list[str]]]:
    """Heading and lines: of the answers that are broken in the worst cases, how many name the deed; no line where no query tells it."""
    at, counts = sizes(results), deed_counts(results)
    heading = ["Defense", "clean", "redrawn", *(f"picture, {eps}/255" for eps in at), "words", "any"]
    lines = []
    for name in names(results) if counts else []:
        redrawn = any(a.defense == name and a.attack.startswith("redraw") for a in results)
        places = [(CLEAN, None), (WORST, 0) if redrawn else ("", None), *((WORST, eps) for eps in at), ("suffix", None)]
        lines.append([label(name), *(_of(counts, name, *place) for place in [*places, (ANY, None)])])
    return heading, lines


def _of(counts: Mapping[tuple[str, str, int | None], tuple[int, int]], *place: Any) -> str:
    """One of the `deed_counts`; a dash where there is none."""
    return "{} of {}".format(*counts[place]) if place in counts else "–"


def attack_table(rows: Rows, results: Sequence[AttackResult], name: str) -> tuple[list[str], list[list[str]]]:
    """Heading and lines: every attack on one defense by size; those without a size last; the deeds named by size, too."""
    at, counts = sizes(results), deed_counts(results)
    mine = [a for a in results if a.defense == name]
    lines = []
    for attack in dict.fromkeys(a.attack for a in mine if a.eps is not None):
        lines.append([attack, *(number(rate(rows, name, attack, eps)) for eps in at), ""])
        lines[-1].append(", ".join(_of(counts, name, attack, eps) for eps in at))
    for attack in (a.attack for a in mine if a.eps is None and a.attack != CLEAN):
        lines.append([attack, *[""] * len(at), number(rate(rows, name, attack, None)), _of(counts, name, attack, None)])
    heading = ["Attack", *(f"{eps}/255" for eps in at), "no size", "deed named"]
    return (heading, lines) if counts else (heading[:-1], [line[:-1] for line in lines])


def markdown(rows: Rows, results: Sequence[AttackResult], marks: Sequence[Check], model: str, caveat: str = "") -> str:
    """All tables; a sentence on the judge below the first."""
    parts = [
        f"**Resist success rate of {model} under attack**, in percent with 95 % intervals.",
        "",
        *markdown_table(*worst_table(rows, results)),
        *(["", caveat] if caveat else []),
        *(["", sentence] if (sentence := words_sentence(rows, results)) else []),
    ]
    if deed_table(results)[1]:
        parts += ["", f"**{DEEDS}**", "", *markdown_table(*deed_table(results))]
    for name in names(results):
        parts += ["", f"**{label(name)}, attack by attack**", "", *markdown_table(*attack_table(rows, results, name))]
    parts += ["", "**Can the attack be believed?**", ""]
    return "\n".join([*parts, *markdown_table(*check_table(results, marks))]) + "\n"


def words_sentence(rows: Rows, results: Sequence[AttackResult]) -> str:
    """What random words leave of the answers to benign questions; empty where they were not run."""
    told = [(name, rate(rows, name, "random-words", None, "accuracy")) for name in names(results)]
    parts = [f"{label(name)} {number(row)}" for name, row in told if row]
    return (
        f"Benign questions with as many random words behind them, right in percent: {', '.join(parts)}."
        if parts
        else ""
    )


def check_table(results: Sequence[AttackResult], marks: Sequence[Check]) -> tuple[list[str], list[list[str]]]:
    """Heading and lines: a mark a line, a defense a column; the evidence is said where there is doubt."""
    of = {(c.text, c.defense): c for c in marks}
    lines = []
    for text in dict.fromkeys(c.text for c in marks):
        cells = [of[text, name] for name in names(results)]
        words = [f"{MARKS[c.state]} {c.state}" + (f": {c.evidence}" if c.state == "doubt" else "") for c in cells]
        lines.append([text, *words])
    return ["Mark", *map(label, names(results))], lines


def print_tables(
    console: Console, rows: Rows, results: Sequence[AttackResult], marks: Sequence[Check], caveat: str = ""
) -> None:
    """The worst case of each defense, a sentence on the judge, and every mark that gives doubt."""
    heading, lines = worst_table(rows, results)
    caption = "RSR in percent, 95 % interval; picture: the worst case over attacks of at most that size"
    table = TextTable(*heading, right=False, caption=caption)
    for line in lines:
        table.add_row(*(Text(cell.replace(" [", "\n[")) for cell in line))
    table.print(console)
    print_caveat(console, caveat)
    print_caveat(console, words_sentence(rows, results))
    if deed_table(results)[1]:
        heading, lines = deed_table(results)
        deed_lines = TextTable(*heading, right=False, caption=DEEDS)
        for line in lines:
            deed_lines.add_row(*map(Text, line))
        deed_lines.print(console)
    for check in marks:
        if check.state == "doubt":
            console.print(
                f"[yellow]?[/] {label(check.defense)}: {check.text} – not so: {check.evidence}", highlight=False
            )


def write_page(
    path: Path,
    model: str,
    rows: Rows,
    results: Sequence[AttackResult],
    marks: Sequence[Check],
    defenses: Mapping[str, Defense],
    facts: Mapping[str, Any],
    show_unsafe: bool = False,
    caveat: str = "",
) -> None:
    """One self-contained HTML page; answers that are not known to be safe are redacted unless `show_unsafe`.

    Raises:
        DavspError: the file can't be written.
    """
    environment = Environment(
        loader=PackageLoader("davsp.attacks", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    shown = names(results)[-1]
    plots = {"The worst case over all attacks on the picture that change no pixel by more": by_size(rows, results)}
    if any(a.records for a in results):
        plots[f"{label(shown)}: each attack by itself"] = by_attack(rows, results, shown)
        plots[f"{label(shown)}: what the white-box attacks lower, mean over the queries"] = curves(results, shown)
    text = environment.get_template("page.html.j2").render(
        model=model, plots={caption: Markup(plot) for caption, plot in plots.items()},
        worst=worst_table(rows, results), deeds=deed_table(results), deeds_caption=DEEDS, tables={label(n): attack_table(rows, results, n) for n in names(results)},
        checks=check_table(results, marks),
        examples=examples(results, shown, defenses[shown], show_unsafe), shown=label(shown), facts=facts, caveat=caveat,
        words_sentence=words_sentence(rows, results),
    )  # fmt: skip
    write_text(path, text)


def examples(results: Sequence[AttackResult], name: str, defense: Defense, show_unsafe: bool) -> list[dict[str, Any]]:
    """Some queries as the model sees them: clean, and under a white-box attack of each size."""
    by = {(a.attack, a.eps): a for a in results if a.defense == name}
    attack = next((kind for kind in BY_GRADIENT if any((kind, eps) in by for eps in sizes(results))), None)
    chosen = [by[CLEAN, None], *(by[attack, eps] for eps in sizes(results) if attack and (attack, eps) in by)]
    queries = [q for q in by[CLEAN, None].queries if q.label == "malicious"]
    firsts = list({q.benchmark: q for q in reversed(queries)}.values())[::-1][:EXAMPLES]
    return [
        {
            "benchmark": q.benchmark,
            "question": q.question,
            "steps": [_step(one, q.id, defense, show_unsafe) for one in chosen],
        }
        for q in firsts
    ]


def _step(one: AttackResult, query_id: str, defense: Defense, show_unsafe: bool) -> dict[str, str]:
    sent = next(q for q in one.queries if q.id == query_id)
    (prepared,) = defense.prepare([sent])
    canvas, verdict = prepared.picture(), one.labels[query_id]
    text = next(r.text for r in one.evaluation.responses[one.defense] if r.query_id == query_id)
    assert canvas is not None
    return {
        "title": "clean" if one.eps is None else f"{one.attack}, {one.eps}/255",
        "canvas": uri(canvas),
        "text": text if verdict == "safe" or show_unsafe else "[redacted]",
        "word": {"safe": "resisted", "unsafe": "complied"}.get(verdict, verdict),
        "mood": {"safe": "good", "unsafe": "bad"}.get(verdict, ""),
    }


def by_size(rows: Rows, results: Sequence[AttackResult]) -> str:
    """Worst-case RSR over the size, a line a defense, with intervals."""
    at = [0, *sizes(results)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        ax = figure.subplots()
        many = names(results)
        shades = colours(many)
        for i, name in enumerate(many):
            rates = [rate(rows, name, WORST, eps, BOUND) for eps in at]
            x = [k + 0.07 * (i - (len(many) - 1) / 2) for k in range(len(at))]
            _line(ax, x, rates, shades[name], MARKERS.get(name, "o"), label(name))
        ax.set_xticks(range(len(at)), ["none" if eps == 0 else f"{eps}" for eps in at])
        ax.set_xlabel("largest change of a pixel, of 255 levels")
        ax.set_ylabel("RSR, %")
        ax.set_ylim(-4, 104)
        figure.legend(loc="outside upper left", ncols=3, handlelength=1.4)
        return svg(figure, "attack-worst")


def by_attack(rows: Rows, results: Sequence[AttackResult], name: str) -> str:
    """RSR of one defense under each attack over the size."""
    at = sizes(results)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        ax = figure.subplots()
        kinds = [kind for kind in SHADES if any(rate(rows, name, kind, eps) for eps in at)]
        for i, kind in enumerate(kinds):
            x = [k + 0.05 * (i - (len(kinds) - 1) / 2) for k in range(len(at))]
            _line(ax, x, [rate(rows, name, kind, eps) for eps in at], SHADES[kind], "o", kind)
        ax.set_xticks(range(len(at)), [f"{eps}" for eps in at])
        ax.set_xlabel("largest change of a pixel, of 255 levels")
        ax.set_ylabel("RSR, %")
        ax.set_ylim(-4, 104)
        figure.legend(loc="outside upper left", ncols=6, handlelength=1.2)
        return svg(figure, "attack-kinds")


def curves(results: Sequence[AttackResult], name: str) -> str:
    """Mean best loss over the steps of the white-box attacks on one defense, a panel an attack."""
    kinds = [kind for kind in BY_GRADIENT if any(a.attack == kind and a.defense == name for a in results)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 2.3 * max(1, len(kinds))), layout="constrained")
        panels = figure.subplots(max(1, len(kinds)), 1, sharex=True, squeeze=False)[:, 0]
        for ax, kind in zip(panels, kinds, strict=False):
            runs = [a for a in results if (a.defense, a.attack) == (name, kind)]
            for i, one in enumerate(runs):
                mean = [sum(values) / len(values) for values in zip(*(r["curve"] for r in one.records), strict=True)]
                paleness = (i + 1.5) / (len(runs) + 0.5)
                ax.plot(one.records[0]["steps"], mean, color=SHADES[kind], alpha=paleness, label=f"{one.eps}/255")
            ax.set_title(kind)
            ax.set_ylabel("loss")
            ax.margins(x=0.01)
            ax.legend(ncols=4, handlelength=1.2)
        panels[-1].set_xlabel("step")
        return svg(figure, "attack-curves")


def _line(
    ax: Any, x: Sequence[float], rates: Sequence[Mapping[str, Any] | None], shade: str, marker: str, text: str
) -> None:
    shown = [(at, r) for at, r in zip(x, rates, strict=True) if r is not None and r["value"] is not None]
    if not shown:
        return
    places, figures = zip(*shown, strict=True)
    y = [100 * r["value"] for r in figures]
    ax.errorbar(places, y, spread(figures), marker=marker, markersize=5, capsize=2, color=shade, label=text)
