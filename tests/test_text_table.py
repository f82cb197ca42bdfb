"""Tables on the terminal: every word of every heading and cell stays whole, with or without a terminal."""

import io
import os
import re

import pytest
from rich.console import Console
from rich.text import Text

from davsp.attacks.page import print_tables
from davsp.benchmarks import mm_safetybench, vlguard
from davsp.doctor import Finding, print_findings
from davsp.query import COST
from davsp.report.cells import (
    COST_HEADINGS,
    DEFENSES,
    cell,
    costs,
    defenses,
    label,
    main_columns,
    number,
    score_rows,
)
from davsp.report.terminal import print_costs, print_scores, print_table
from davsp.runtime.table import TextTable

LINES = re.compile(r"[─━│┃┏┓┗┛┡┩└┘├┤┬┴┼┳┻╇╞╡═┠┨]+")


def rows(mark: str = "") -> list[dict[str, object]]:
    """Figures of the six published sets and of custom queries under every defense that has a name, and a user's."""
    harmful = [*mm_safetybench.TYPES, mm_safetybench.NAME, "figstep", *(f"vlguard_{s}" for s in vlguard.SUBSETS[:2])]
    keys = [(name + mark, "total", metric) for name in harmful for metric in ("rsr", "unscored", "rsr_worst_case")]
    keys += [("utility", "total", "accuracy"), ("benign", "total", "over_refusal")]
    keys += [(name + mark, "total", "over_refusal") for name in ("vlguard_safe_safes", "mm_vet", "mme", "llava_bench")]
    keys += [
        ("mme" + mark, part, f"score_{parser}")
        for part in ("perception", "cognition", "total")
        for parser in ("official", "lenient")
    ]
    for name, score in (("mm_vet", "score"), ("llava_bench", "relative_score")):
        keys += [(name + mark, "total", metric) for metric in (score, f"{score}_worst_case", "unscored")]
    keys += [("cost", "total", what) for what in COST]
    table: list[dict[str, object]] = []
    for defense in (*DEFENSES, "adashield-a+my-defense"):
        for benchmark, split, metric in keys:
            head = {"model": "m", "defense": defense, "benchmark": benchmark, "split": split, "metric": metric}
            value = 1523.4 if metric.startswith("score_") and benchmark.startswith("mme") else 0.875
            table.append(head | {"value": value, "low": 0.9 * value, "high": 1.1 * value, "n": 100})
            if defense != "none" and metric in ("rsr", *COST):
                change = {"metric": f"{metric}_difference", "value": -0.25, "low": -0.5, "high": 0.0, "p": 0.01}
                table.append(table[-1] | change)
    return table


def no_terminal(descriptor: int = 0) -> os.terminal_size:
    raise OSError("not a terminal")


def console(width: int | None) -> Console:
    return Console(file=io.StringIO(), width=width)


def printed(target: Console) -> list[str]:
    return target.file.getvalue().splitlines()  # type: ignore[attr-defined]


def words(lines: list[str]) -> set[str]:
    """The words in printed lines, without the lines between cells."""
    return {word for line in lines for word in LINES.sub(" ", line).split()}


@pytest.mark.parametrize("mark", ["", "_embedded"])
@pytest.mark.parametrize("width", [80, None, 100])
def test_the_widest_tables_break_no_word(width: int | None, mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All sets, all defenses. Without a terminal and without COLUMNS a table has 80 columns."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(os, "get_terminal_size", no_terminal)
    table, latency = rows(mark), dict.fromkeys((*DEFENSES, "adashield-a+my-defense"), 1.1)
    names = [label(name) for name in defenses(table)]

    target = console(width)
    print_table(target, table, "davsp-mini, 12 s in all")
    cells = [cell(table, name, column) for name in defenses(table) for column in main_columns(table)]
    expected = " ".join(
        ["Defense", *names, *(c.heading for c in main_columns(table)), *(c.value for c in cells)]
    ).split()
    sets = {"SD+TYPO", "FigStep", "vlguard_safe_unsafes"} if not mark else {"sd_typo_embedded", "figstep_embedded"}
    assert sets | {"Over-refusal", "adashield-a+my-defense"} <= set(expected)
    assert set(expected) <= words(printed(target))

    scores = console(width)
    print_scores(scores, table)
    numbers = [number(row) for *_, cells in score_rows(table) for row in cells]
    assert set(" ".join([*names, *numbers]).split()) <= words(printed(scores))
    assert {"relative_score_worst_case", f"llava_bench{mark},"} <= words(printed(scores))

    cost = console(width)
    print_costs(cost, table, latency)
    texts = [text for _, texts in costs(table, latency) for text in texts]
    assert set(" ".join([*names, *texts, *COST_HEADINGS]).split()) <= words(printed(cost))

    assert all(len(line) <= (width or 80) for c in (target, scores, cost) for line in printed(c))


def test_columns_that_do_not_fit_stand_below_with_their_keys() -> None:
    table = TextTable("who", "first_figure", "second_figure", "third_figure", title="a title", caption="a caption")
    table.add_row("one", "1", "2", "3")
    target = console(40)
    table.print(target)
    lines = printed(target)
    assert lines[0] == "a title" and lines[-1] == "a caption"
    assert [LINES.sub(" ", line).split() for line in lines if "who" in line] == [
        ["who", "first_figure", "second_figure"],
        ["who", "third_figure"],
    ]
    assert sum("one" in line for line in lines) == 2


def test_a_column_without_room_follows_as_lines() -> None:
    """A path that is longer than the line stays whole, too, so that it can be copied."""
    path = "/data/" + "a-very-long-folder/" * 5 + "mm-vet"
    table = TextTable("set", "folder", "note", right=False)
    table.add_row("mm_vet", Text(path), "some [bold]words[/] that are more than one line can hold, so they go on below")
    target = console(60)
    table.print(target)
    assert {path, "words", "folder", "note"} <= words(printed(target)) and "bold" not in " ".join(printed(target))
    assert [line for line in printed(target) if path in line] == [" " * 4 + path]


def test_a_hash_without_room_beside_its_name_stands_below_it() -> None:
    """Without a frame there are no headings either."""
    table = TextTable("field", "value", right=False, frame=False)
    for name, value in (("canvas", "168"), ("data_hashes.malicious", "0123456789abcdef" * 4)):
        table.add_row(name, Text(value))
    target = console(80)
    table.print(target)
    assert printed(target) == ["  canvas: 168", "  data_hashes.malicious:", "    " + "0123456789abcdef" * 4]


def test_a_narrow_terminal_wraps_between_words_only() -> None:
    texts = ["Random border + text", "Utility", "Over-refusal", "ECSO + DAVSP, adaptive"]
    table = TextTable(*texts[:3])
    table.add_row(texts[3], "87.5\n79–92", "1.0")
    for width in range(27, 70):
        target = console(width)
        table.print(target)
        assert set(" ".join(texts).split()) <= words(printed(target))
        assert all(len(line) <= width for line in printed(target))


def test_a_row_has_a_cell_for_each_heading() -> None:
    with pytest.raises(ValueError, match="2 cells under 3 headings"):
        TextTable("a", "b", "c").add_row("1", "2")


def test_the_other_tables_do_the_same() -> None:
    """Those of an installation and of an attack, whose cells are long."""
    target = console(80)
    mend = "install torch anew: https://pytorch.org/get-started"
    print_findings(
        target, [Finding("needed", "torch", "2.0, but ImportError: libcudart.so.12 is missing", "broken", mend)]
    )
    print_tables(target, [], [], [])
    assert set(mend.split()) | {"libcudart.so.12", "broken"} <= words(printed(target))
