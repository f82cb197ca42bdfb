"""`davsp judge`: a finished run scored by another judge."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from davsp.cli import judges
from davsp.cli.options import (
    JUDGE_KEY,
    JUDGE_URL,
    Benchmark,
    Cache,
    Concurrency,
    Device,
    GraderRuns,
    JudgeModel,
    MaxUnscored,
    Queries,
    Rebuild,
    Seed,
    SkipBroken,
    Split,
    Timeout,
    Types,
)  # fmt: skip
from davsp.cli.testset import asked
from davsp.errors import DavspError

if TYPE_CHECKING:
    from rich.console import Console

    from davsp.evaluation.rescore import Rescoring


def judge(
    run: Annotated[Path, typer.Argument(help="Folder that davsp eval wrote.")],
    judge: Annotated[str, typer.Option(help=judges.NAMES)],
    queries: Queries = None,
    benchmark: Benchmark = None,
    split: Split = "test",
    types: Types = None,
    rebuild: Rebuild = False,
    skip_broken: SkipBroken = False,
    mode: Annotated[
        str,
        typer.Option(
            help="Adds rows with a published scorer's quirks: davsp_official, mm_safetybench_official, adashield_official, "
            "vlmevalkit; of the graders official."
        ),
    ] = "sound",
    grader_runs: GraderRuns = None,
    judge_url: Annotated[list[str] | None, typer.Option("--judge-url", "--base-url", help=JUDGE_URL)] = None,
    judge_model: JudgeModel = None,
    judge_key_env: Annotated[list[str] | None, typer.Option("--judge-key-env", "--api-key-env", help=JUDGE_KEY)] = None,
    max_unscored: MaxUnscored = 0.02,
    concurrency: Concurrency = 8,
    timeout: Timeout = 60.0,
    cache: Cache = None,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Score the answers of a finished run with another judge or grader, without generating again."""
    from rich.console import Console

    from davsp.evaluation.judging import apart
    from davsp.evaluation.rescore import rescore, slug
    from davsp.judges.verdicts import judge_name
    from davsp.store import RESPONSES

    if not (run / RESPONSES).exists():  # before a cache makes the folder
        raise DavspError(f"{run} holds no answers ({RESPONSES}); give the folder that davsp eval --out wrote.")
    test, _ = asked(benchmark or [], split, queries, None, None, seed, skip_broken, rebuild, types or [])
    if benchmark:
        test = apart(test)
    how = judges.asking(
        [judge], judge_url, judge_model, judge_key_env, grader_runs, concurrency=concurrency, timeout=timeout,
        cache=cache or run / "cache.sqlite", device=device, console=Console(stderr=True),
    )  # fmt: skip
    chosen = judges.named(judge, how)
    graded = judges.GRADER_OF.get(judge)
    if graded:
        found = rescore(run, test, None, seed=seed, graders={graded: chosen}, mode=mode)
    else:
        found = rescore(run, test, chosen, seed=seed, mode=mode)
    _print(Console(), found)
    _print_mode(Console(), found, mode)
    name = slug(judge_name(chosen))
    kind = "grades" if graded else "verdicts"
    print(f"{kind} are in {run / f'{kind}-{name}.jsonl'}, rates in {run / f'metrics-{name}.json'}")
    judges.check([found.grades if graded else found.verdicts], test, max_unscored, some=True)


def _print(console: "Console", found: "Rescoring") -> None:
    """Rates by defense and benchmark with how many answers were scored, why others were not, and the agreement."""
    from collections import Counter

    from davsp.judges.base import is_unscored
    from davsp.metrics import WORST
    from davsp.report.cells import BENCHMARKS, defenses, find, label, percent
    from davsp.report.terminal import print_scores
    from davsp.runtime.table import TextTable

    headings = ("Defense", "Benchmark", "n", "unscored", "RSR", "95 %", "worst case")
    caption = "percent; interval 95 %; worst case: every unscored answer counted as unsafe"
    table = TextTable(*headings, keys=2, caption=caption)
    order = defenses(found.rows)
    for row in sorted(
        (r for r in found.rows if r["metric"] == "rsr" and r["split"] == "total"),
        key=lambda r: order.index(r["defense"]),
    ):
        key = (row["defense"], row["benchmark"], row["split"])
        unscored, worst = find(found.rows, *key, "unscored"), find(found.rows, *key, WORST)
        assert unscored and worst  # written for every rate
        table.add_row(
            label(row["defense"]),
            BENCHMARKS.get(row["benchmark"], row["benchmark"]),
            str(row["n"]),
            str(round(unscored["value"] * unscored["n"])),
            "–" if row["value"] is None else percent(row["value"]),
            "–" if row["value"] is None else f"{percent(row['low'])}–{percent(row['high'])}",
            percent(worst["value"]),
        )
    if table.rows:
        table.print(console)
    print_scores(console, found.rows)
    said = [one for by_defense in (found.verdicts, found.grades) for group in by_defense.values() for one in group]
    reasons = Counter(one.reason for one in said if is_unscored(one))
    for reason, count in reasons.most_common(5):
        console.print(f"unscored, {count}: {reason}", markup=False)
    if found.agreement.alpha is not None:
        console.print(
            f"agreement of the run's judges: Krippendorff's α {found.agreement.alpha:.2f} on {found.agreement.n} answers, "
            f"{len(found.agreement.disagreements)} judged differently (agreement.json)"
        )


def _print_mode(console: "Console", found: "Rescoring", mode: str) -> None:
    """The rates of a harmful set by a published scorer's quirks, as a whole."""
    from davsp.report.cells import label, percent

    for row in found.rows:
        if row["metric"] == f"rsr_{mode}" and row["split"] == "total" and row["value"] is not None:
            told = f"{label(row['defense'])}, {row['benchmark']}: {row['metric']} {percent(row['value'])} %"
            console.print(f"{told} of {row['n']}", markup=False)
