"""Tables on the terminal that never break a word, however narrow the terminal is and however many columns there are."""

import textwrap
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text


class TextTable:
    """Headings and rows, whose lines are broken between words only.

    Where the columns do not fit beside each other, as many as fit make one table, the next ones another below it, and so
    on; each begins with the key columns, and all but the first leave out rows without text. A column that has no room
    beside the keys (long paths) follows as lines.

    Args:
        headings: of the columns.
        keys: how many of the columns, from the first, say what a row is about.
        right: whether the other columns stand to the right, as figures do.
        title, caption: a line above and a line below.
        frame: False leaves out the headings and the lines between cells.

    Headings and cells are rich markup, or `Text` where the characters are meant as they are.
    """

    def __init__(
        self,
        *headings: str | Text,
        keys: int = 1,
        right: bool = True,
        title: str = "",
        caption: str = "",
        frame: bool = True,
    ) -> None:
        self.headings, self.keys, self.right = [_text(h) for h in headings], keys, right
        self.title, self.caption, self.frame = title, caption, frame
        self.rows: list[tuple[list[Text], str, int]] = []  # cells, style, section
        self._section = 0

    def add_row(self, *cells: str | Text, style: str = "") -> None:
        """Add a row with a cell for each heading."""
        if len(cells) != len(self.headings):
            raise ValueError(f"a row of {len(cells)} cells under {len(self.headings)} headings")
        self.rows.append(([_text(cell) for cell in cells], style, self._section))

    def add_section(self) -> None:
        """Draw a line below the last row."""
        self._section += 1

    def print(self, console: Console) -> None:
        """Print the table in the width of the console, which is 80 where there is no terminal and COLUMNS is not set."""
        if self.title:
            _print_line(console, self.title, "table.title")
        parts, alone = self._parts(console.width)
        for number, part in enumerate(parts):
            shown = [row for row in self.rows if number == 0 or any(row[0][c].plain for c in part[self.keys :])]
            console.print(self._table(part, shown, console.width))
        for column in alone:
            if self.frame:
                _print_line(console, self.headings[column].plain, "bold")
            for cells, style, _ in self.rows:
                key = " ".join(cell.plain for cell in cells[: self.keys] if cell.plain)
                for line in filter(None, cells[column].plain.split("\n")):
                    _print_line(console, f"{key}: {line}", style, indent="  ")
        if self.caption:
            _print_line(console, self.caption, "table.caption")

    def _parts(self, room: int) -> tuple[list[list[int]], list[int]]:
        """The columns of each table, and those that have no room beside the keys."""
        keys = list(range(self.keys))
        parts: list[list[int]] = []
        alone: list[int] = []
        for column in range(self.keys, len(self.headings)):
            if parts and self._least([*parts[-1], column]) <= room:
                parts[-1].append(column)
            elif self._least([*keys, column]) <= room:
                parts.append([*keys, column])
            else:
                alone.append(column)
        return parts, alone

    def _least(self, columns: Sequence[int]) -> int:
        """Width of a table of these columns with a line a word."""
        return sum(self._longest_word(c) for c in columns) + self._between(columns)

    def _between(self, columns: Sequence[int]) -> int:
        """What spaces and lines take: `│ a │ b │`, and `a  b ` without a frame."""
        return 3 * len(columns) + 1 if self.frame else 2 * len(columns)

    def _longest_word(self, column: int) -> int:
        return max((cell_len(word) for cell in self._column(column) for word in cell.plain.split()), default=1)

    def _longest_line(self, column: int) -> int:
        return max((cell_len(line) for cell in self._column(column) for line in cell.plain.split("\n")), default=1)

    def _column(self, column: int) -> list[Text]:
        """What is printed of a column: its heading, if there is a frame, and its cells."""
        cells = [cells[column] for cells, _, _ in self.rows]
        return [self.headings[column], *cells] if self.frame else cells

    def _table(self, columns: Sequence[int], rows: Sequence[tuple[list[Text], str, int]], room: int) -> Table:
        """The rich table, each column as wide as its longest line, the widest ones narrowed to their words as needed."""
        widths = {c: self._longest_line(c) for c in columns}
        least = {c: self._longest_word(c) for c in columns}
        while sum(widths.values()) + self._between(columns) > room:
            widest = max((c for c in columns if widths[c] > least[c]), key=lambda c: widths[c])
            widths[widest] -= 1
        table = Table(show_header=False, box=None) if not self.frame else Table()
        for c in columns:
            table.add_column(
                self.headings[c], width=widths[c], justify="right" if self.right and c >= self.keys else "left"
            )
        for number, (cells, style, section) in enumerate(rows, 1):
            ends = number < len(rows) and rows[number][2] != section
            table.add_row(*(cells[c] for c in columns), style=style, end_section=ends)
        return table


def _text(cell: str | Text) -> Text:
    return cell if isinstance(cell, Text) else Text.from_markup(cell)


def _print_line(console: Console, line: str, style: str, indent: str = "") -> None:
    """Print a line broken between words; a word longer than the terminal is left whole."""
    wrapper = textwrap.TextWrapper(console.width, indent, 2 * indent, break_long_words=False, break_on_hyphens=False)
    for text in wrapper.wrap(line):
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
