"""The same figures for the terminal."""

import re
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from davsp.report.cells import (
    COST_HEADINGS,
    SUMS,
    Rows,
    cell,
    costs,
    defenses,
    label,
    main_columns,
    number,
    score_rows,
)

WHOLE = ("total", "all", "perception", "cognition")
"""Parts of a published set that the terminal shows; metrics.json and the report have all."""


def print_table(console: Console, rows: Rows, title: str = "") -> None:
    """Print `table`, and how many answers to malicious queries the judge could not score, if there are any."""
    if main_columns(rows):
        console.print(table(rows, title))
    asked = [c for c in main_columns(rows) if c.metric == "rsr" and c.benchmark not in SUMS]
    unscored = sum(cell(rows, name, column).unscored for name in defenses(rows) for column in asked)
    if unscored:
        console.print(
            f"{unscored} answers to malicious queries could not be scored; they are left out of the RSR. At worst: all of "
            "them unsafe."
        )


def print_scores(console: Console, rows: Rows) -> None:
    """Print the scores of published utility sets as a whole, if there are any."""
    found = [one for one in score_rows(rows) if one[1] in WHOLE]
    if not found:
        return
    made = Table("Set", "Part", "Score", caption="95 % interval; as its authors define it", title_justify="left")
    for name in defenses(rows):
        made.add_column(label(name), justify="right")
    for benchmark, part, metric, cells in found:
        made.add_row(benchmark, part, metric, *(number(row) for row in cells))
    console.print(made)


def print_costs(console: Console, rows: Rows, latency: Mapping[str, float]) -> None:
    """Print what an answer takes under each defense, if that is known and there are two to compare."""
    found = costs(rows, latency)
    if len(found) < 2:
        return
    made = Table("Defense", caption="an answer, mean; in brackets: more than No Defense", title_justify="left")
    for heading in COST_HEADINGS:
        made.add_column(heading, justify="right")
    for name, cells in found:
        made.add_row(label(name), *cells)
    console.print(made)


def table(rows: Rows, title: str = "") -> Table:
    """Defenses by RSR, utility and over-refusal, in percent with the 95 % interval below each."""
    columns = main_columns(rows)
    made = Table(
        title=title or None,
        caption="percent, 95 % interval; difference from No Defense in points",
        title_justify="left",
    )
    made.add_column("Defense", no_wrap=True)
    for column in columns:
        made.add_column(column.heading, justify="right", overflow="fold")
    for name in defenses(rows):
        cells = [cell(rows, name, column) for column in columns]
        texts = [
            f"[bold]{c.value}[/]\n[dim]{_whole(c.interval)}[/]"
            + (f"\n{c.difference.split(',')[0]}" if c.difference else "")
            + (f"\nworst {c.worst}" if c.worst else "")
            for c in cells
        ]
        made.add_row(f"[bold]{label(name)}[/]" if name == "davsp" else label(name), *texts)
    return made


def _whole(interval: str) -> str:
    """An interval in whole percent: eighty columns have no room for more; metrics.json has all digits."""
    return re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.0f}", interval)
