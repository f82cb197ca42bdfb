"""The same figures for the terminal."""

import re
from collections.abc import Mapping

from rich.console import Console
from rich.text import Text

from davsp.report.cells import (
    COST_HEADINGS,
    SUMS,
    RateColumn,
    Rows,
    cell,
    costs,
    cut_note,
    defenses,
    label,
    main_columns,
    number,
    score_rows,
)
from davsp.runtime.table import TextTable

WHOLE = ("total", "all", "perception", "cognition")
"""Parts of a published set that the terminal shows; metrics.json and the report have all."""


def print_table(console: Console, rows: Rows, title: str = "", caveat: str = "") -> None:
    """Print `table`, what is to be known of its judge, and how many answers to malicious queries it could not score, if any."""
    if main_columns(rows):
        table(rows, title).print(console)
    print_caveat(console, caveat)
    if note := cut_note(rows):
        console.print(note, markup=False, highlight=False)
    attacked = [c for c in main_columns(rows) if c.metric == "rsr" and c.benchmark not in SUMS]
    unscored = sum(cell(rows, name, column).unscored for name in defenses(rows) for column in attacked)
    if unscored:
        console.print(
            f"{unscored} answers to malicious queries could not be scored; they are left out of the RSR. At worst: all of "
            "them unsafe."
        )
    lost = sum(cell(rows, name, RateColumn("", "benign", "total", "over_refusal")).unscored for name in defenses(rows))
    if lost:
        console.print(
            f"{lost} answers to harmless queries were cut while the model still thought; they are left out of accuracy and "
            "over-refusal. Let it answer in more tokens (--max-new-tokens)."
        )


def print_caveat(console: Console, caveat: str) -> None:
    """Print what is to be known of a table's judge, if there is anything."""
    if caveat:
        console.print(caveat, style="yellow", markup=False, highlight=False)


def print_scores(console: Console, rows: Rows) -> None:
    """Print the scores of published utility sets as a whole, if there are any."""
    scores = [row for row in score_rows(rows) if row[1] in WHOLE]
    if not scores:
        return
    names = [Text(label(name)) for name in defenses(rows)]  # names and sets are anybody's words, not markup
    scores_table = TextTable("Set, part, score", *names, caption="95 % interval; as its authors define it")
    for benchmark, part, metric, cells in scores:
        scores_table.add_row(Text(f"{benchmark}, {part}, {metric}"), *(Text(number(row)) for row in cells))
    scores_table.print(console)


def print_costs(console: Console, rows: Rows, latency: Mapping[str, float]) -> None:
    """Print what an answer takes under each defense, if that is known and there are two to compare."""
    cost_rows = costs(rows, latency)
    if len(cost_rows) < 2:
        return
    cost_table = TextTable("Defense", *COST_HEADINGS, caption="an answer, mean; in brackets: more than No Defense")
    for name, cells in cost_rows:
        cost_table.add_row(Text(label(name)), *cells)
    cost_table.print(console)


def table(rows: Rows, title: str = "") -> TextTable:
    """Defenses by RSR, utility and over-refusal, in percent with the 95 % interval below each."""
    columns = main_columns(rows)
    main = TextTable(
        "Defense",
        *(Text(column.heading) for column in columns),
        title=title,
        caption="percent, 95 % interval; difference from No Defense in points",
    )
    for name in defenses(rows):
        cells = [cell(rows, name, column) for column in columns]
        texts = [
            f"[bold]{c.value}[/]\n[dim]{_whole(c.interval)}[/]"
            + (f"\n{c.difference.split(',')[0]}" if c.difference else "")
            + (f"\nworst {c.worst}" if c.worst else "")
            for c in cells
        ]
        main.add_row(Text(label(name), style="bold" if name == "davsp" else ""), *texts)
    return main


def _whole(interval: str) -> str:
    """An interval in whole percent: eighty columns have no room for more; metrics.json has all digits."""
    return re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.0f}", interval)
