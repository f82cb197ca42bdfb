"""The tables as Markdown, CSV, LaTeX and one HTML page: ours with its interval, the paper's, the difference."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from davsp.experiments.paper.claims import Claim
from davsp.experiments.paper.tables import Cell, Table, title
from davsp.runtime.files import write_text

Cells = Mapping[str, Sequence[Cell]]


def shown(cell: Cell) -> str:
    """A cell in words: 94.4 [90.1, 97.0]; a dash where there is nothing."""
    if cell.value is None:
        return "–"
    digits = 0 if cell.points and cell.value > 100 else 1
    interval = "" if cell.low is None or cell.high is None else f" [{cell.low:.{digits}f}, {cell.high:.{digits}f}]"
    return f"{cell.value:.{digits}f}{interval}"


def beside(cell: Cell) -> str:
    """The paper's figure and how far ours is from it: (98.7, −4.3); empty if the paper has none."""
    if cell.paper is None:
        return ""
    apart = "" if cell.difference is None else f", {cell.difference:+.1f}".replace("-", "−")
    return f"({cell.paper:g}{apart})"


def markdown(table: Table, cells: Cells, model: str, theirs: str, notes: Sequence[str] = ()) -> str:
    """The table for a README; the paper's figure and the difference in brackets."""
    columns = [i for i in range(len(table.columns)) if any(row[i].value is not None for row in cells.values())]
    lines = [
        f"**Table {table.number}: {table.caption}.** {model}, with 95 % intervals; in brackets the paper's {theirs} and the difference.",
        "",
        "| | " + " | ".join(table.columns[i].title for i in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name, row in cells.items():
        lines.append(
            f"| {title(table, name)} | "
            + " | ".join(f"{shown(row[i])} {beside(row[i])}".strip() for i in columns)
            + " |"
        )
    return "\n".join([*lines, *(["", *(f"- {note}" for note in notes)] if notes else [])]) + "\n"


def tidy(table: Table, cells: Cells, model: str, theirs: str) -> str:
    """The table as CSV, a line a figure."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(
        ["table", "model", "defense", "column", "value", "low", "high", "n", "paper_model", "paper", "difference"]
    )
    for name, row in cells.items():
        for column, c in zip(table.columns, row, strict=True):
            figures = [c.value, c.low, c.high, c.n, theirs, c.paper, c.difference]
            lines.writerow([table.name, model, name, column.name, *("" if x is None else x for x in figures)])
    return out.getvalue()


def latex(table: Table, cells: Cells, model: str, theirs: str) -> str:
    """The table for a paper (booktabs); the best of each column in bold."""
    columns = [i for i in range(len(table.columns)) if any(row[i].value is not None for row in cells.values())]
    best = {i: max(v for row in cells.values() if (v := row[i].value) is not None) for i in columns}
    lines = [
        r"\begin{table}[t]", r"\centering",
        rf"\caption{{{_tex(table.caption)}. {_tex(model)}; the figures in grey are the paper's for {_tex(theirs)}.}}",
        rf"\begin{{tabular}}{{l{'c' * len(columns)}}}", r"\toprule",
        " & ".join(["", *(_tex(table.columns[i].title) for i in columns)]) + r" \\", r"\midrule",
    ]  # fmt: skip
    for name, row in cells.items():
        parts = []
        for i in columns:
            text = _tex(shown(row[i]))
            text = rf"\textbf{{{text}}}" if row[i].value == best[i] else text
            parts.append(text + (rf" {{\color{{gray}}{row[i].paper:g}}}" if row[i].paper is not None else ""))
        lines.append(" & ".join([_tex(title(table, name)), *parts]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def _tex(text: str) -> str:
    for mark in "&%_#":
        text = text.replace(mark, "\\" + mark)
    return text.replace("–", "--").replace("−", "$-$")


def claims_markdown(claims: Sequence[Claim], model: str) -> str:
    """The page "does it hold here?"."""
    lines = [
        f"**Does it hold here?** The paper's claims on {model}.",
        "",
        "| claim | where | here | figures |",
        "|---|---|---|---|",
    ]
    lines += [f"| {c.text} | {c.source} | **{c.verdict}** | {c.evidence} |" for c in claims]
    return "\n".join(lines) + "\n"


def page(
    path: Path,
    model: str,
    theirs: Mapping[str, str],
    tables: Mapping[str, tuple[Table, Cells]],
    claims: Sequence[Claim],
    plots: Mapping[str, str],
    notes: Sequence[str],
) -> None:
    """One self-contained HTML page of everything.

    Args:
        theirs: table -> the paper's model beside it.
        tables: name -> table and its cells.
        plots: caption -> SVG.
        notes: on judges, sizes, what was inferred.
    """
    environment = Environment(
        loader=PackageLoader("davsp.experiments.paper", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    text = environment.get_template("page.html.j2").render(
        model=model, theirs=theirs, tables=tables, claims=claims, notes=notes, shown=shown, beside=beside, title=title,
        plots={caption: Markup(svg) for caption, svg in plots.items()},
    )  # fmt: skip
    write_text(path, text)
