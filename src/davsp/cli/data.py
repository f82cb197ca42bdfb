"""`davsp data`: what lies in a folder of downloaded benchmarks, and small ones drawn by code."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from davsp.cli.groups import add
from davsp.cli.options import Benchmark, Rebuild, Seed, SkipBroken
from davsp.cli.testset import folders, noted
from davsp.errors import DavspError

if TYPE_CHECKING:
    from rich.console import Console

    from davsp.benchmarks.source import Inventory

app = typer.Typer(no_args_is_help=True, help="Benchmarks: whether a download is whole, and small ones drawn by code.")

SHOWN = 20


def check(
    root: Annotated[Path, typer.Argument(help="A benchmark's folder, or one that holds several.", show_default=False)],
    every: Annotated[
        bool, typer.Option("--all", help="All categories, faults and hashes, not only what falls short.")
    ] = False,
) -> None:
    """Count benchmarks against the published numbers and look at every picture (exit code 2 if anything is wrong)."""
    from rich.console import Console
    from rich.markup import escape

    from davsp.benchmarks import BENCHMARKS, check
    from davsp.runtime.table import TextTable

    console, reports = Console(), check(root)
    table = TextTable("data set", "folder", "layout", "counts", "broken", "index, sha256", right=False)
    for report in reports:
        *cells, listed = map(escape, _row(report))
        state = "[green]" if report.good else "[red]"
        table.add_row(*(f"{state}{cell}" for cell in cells), listed)
    if reports:
        table.print(console)
    for report in reports:
        _print_faults(console, report, every)
    absent = [name for name in BENCHMARKS if name not in {report.benchmark for report in reports}]
    if absent:
        console.print(f"not found in {escape(str(root))}: {', '.join(absent)} (docs/benchmarks.md: where to get them)")
    if not reports or not all(report.good for report in reports):
        raise typer.Exit(2)


def _row(report: "Inventory") -> tuple[str, ...]:
    """What the table says of a data set: name, folder, layout, counts, how many pictures or rows are broken, and its files."""
    from davsp.benchmarks.source import MARK
    from davsp.runtime.files import sha256_bytes

    known = sum(count.published is not None for count in report.counts)
    against = "drawn" if (report.root / MARK).exists() else "published"
    as_said = f"{known - len(report.short)} of {known} as {against}" if known else ""
    unknown = f"{len(report.counts) - known} unknown" if known < len(report.counts) else ""
    counts = ", ".join(filter(None, (as_said, unknown))) or f"0 of 0 as {against}"
    files = list(report.index.items())
    listed = "\n".join(f"{name} {digest[:12]}" for name, digest in files)
    if len(files) > 3:
        together = "".join(f"{digest}  {name}\n" for name, digest in files).encode()
        listed = f"{len(files)} files, of their list {sha256_bytes(together)[:12]}"
    if report.official:
        listed += f"\nofficial: {sum(report.official.values())} of {len(report.official)}"
    return report.benchmark, str(report.root), report.layout, counts, str(len(report.broken)), listed


def _print_faults(console: "Console", report: "Inventory", every: bool) -> None:
    """What falls short of a data set, a line each; or all categories, faults and hashes."""
    from rich.markup import escape

    name = escape(report.benchmark)
    for count in report.counts if every else report.short:
        console.print(f"{name}: {'' if count.good else '[red]'}{escape(str(count))}")
    for file, digest in report.index.items() if every else ():
        console.print(f"{name}: {digest}  {escape(file)}", soft_wrap=True)
    other = [file for file, official in report.official.items() if not official]
    if other:
        rest = "" if every or len(other) <= 3 else f" and {len(other) - 3} more"
        names = ", ".join(other if every else other[:3]) + rest
        console.print(f"{name}: edited, or saved anew (not the official bytes): {escape(names)}", soft_wrap=True)
    sentences = report.broken if every else report.broken[:SHOWN]
    for sentence in sentences:
        console.print(f"{name}: [red]{escape(sentence)}", soft_wrap=True)
    if len(sentences) < len(report.broken):
        console.print(f"{name}: and {len(report.broken) - len(sentences)} more faults (--all shows them)")
    if report.note:
        console.print(f"{name}: {escape(report.note)}", soft_wrap=True)


def embedded(
    out: Annotated[Path, typer.Argument(help="Folder for the six.", show_default=False)],
    seed: Annotated[int, typer.Option(help="Seed of all random choices.")] = 0,
) -> None:
    """Draw mild counterparts of the six benchmarks, in their own layouts, for davsp-mini and for trying things out."""
    from davsp.embedded.counterparts import SETS, write

    write(out, seed)
    print(f"{', '.join(SETS)} are in {out}; look at them with: davsp data check {out}")


def split(
    out: Annotated[Path, typer.Argument(help="FILE.json to write.", show_default=False)],
    benchmark: Benchmark = None,
    run: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of davsp eval --defense none over VLGuard's train split or MM-SafetyBench. Repeatable."
        ),
    ] = None,
    blind: Annotated[
        bool, typer.Option("--blind", help="Draw MM-SafetyBench's intents without a look at what was answered.")
    ] = False,
    vector: Annotated[int, typer.Option(min=1, help="Queries of each class for the vector.")] = 470,
    intents: Annotated[int, typer.Option(min=1, help="Intents of MM-SafetyBench for training.")] = 200,
    helpful: Annotated[int, typer.Option(min=1, help="Questions of MM-Vet for training.")] = 100,
    rebuild: Rebuild = False,
    skip_broken: SkipBroken = False,
    seed: Seed = 0,
) -> None:
    """Draw the paper's split: what the vector, the training and the test take of VLGuard, MM-SafetyBench, MM-Vet and others."""
    from collections import Counter

    from davsp.benchmarks.protocol import draw

    if out.suffix != ".json":
        raise DavspError(f"{out} is to be called FILE.json, so that --split knows it for a file.")
    roots = folders(benchmark or [])
    new_split, _ = noted(
        lambda: draw(
            roots, run or [], blind=blind, skip_broken=skip_broken, rebuild=rebuild,
            seed=seed, vector=vector, intents=intents, helpful=helpful,
        )
    )  # fmt: skip
    new_split.save(out)
    for name, queries in new_split.parts.items():
        print(f"{name}: {len(queries)}")
    for queries in new_split.test.values():
        counts = Counter(q.benchmark for q in queries)
        print("test: " + ", ".join(f"{count} of {name}" for name, count in counts.items()))
    print(f"the split is in {out}; davsp vector, train, eval and judge take it as --split {out}")


add(app, check)
add(app, embedded)
add(app, split)
