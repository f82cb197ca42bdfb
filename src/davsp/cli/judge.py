"""`davsp judge`: a finished run scored by another judge."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from davsp.cli import judges
from davsp.cli.inputs import in_processes, is_shipped
from davsp.cli.options import (
    JUDGES,
    GraderRuns,
    JudgeRequestOptions,
    ModelOptions,
    OneJudgeOptions,
    ProcessOptions,
    Seed,
    TestSetOptions,
)
from davsp.cli.testset import load_test_set
from davsp.errors import DavspError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

    from davsp.evaluation.rescore import Rescoring
    from davsp.query import Grade, Verdict
    from davsp.runtime.table import TextTable


def judge(
    run: Annotated[Path, typer.Argument(help="Folder that davsp eval wrote.")],
    judge: Annotated[str, typer.Option(help=judges.NAMES, rich_help_panel=JUDGES)],
    test: TestSetOptions,
    access: OneJudgeOptions,
    requests: JudgeRequestOptions,
    processes: ProcessOptions,
    mode: Annotated[
        str,
        typer.Option(
            help="Adds rows with a published scorer's quirks: davsp_official, mm_safetybench_official, adashield_official, "
            "vlmevalkit; of the graders official."
        ),
    ] = "sound",
    grader_runs: GraderRuns = None,
    device: Annotated[str | None, typer.Option(help="Of a guard that runs here: cpu, cuda, cuda:1, auto.")] = None,
    seed: Seed = 0,
) -> None:
    """Score the answers of a finished run with another judge or grader, without generating again."""
    from rich.console import Console

    from davsp.evaluation.judging import apart
    from davsp.evaluation.rescore import rescore, slug
    from davsp.judges.guard import end_help, help_judge
    from davsp.judges.verdicts import judge_name
    from davsp.lvlm.undefended import note
    from davsp.report.terminal import print_caveat
    from davsp.runtime import parallel
    from davsp.store import RESPONSES

    if not (run / RESPONSES).exists():  # before a cache makes the folder
        raise DavspError(f"{run} holds no answers ({RESPONSES}); give the folder that davsp eval --out wrote.")
    device = in_processes(processes, ModelOptions(device=device)).device
    queries, _ = load_test_set(test, None, None, seed)
    if judge not in judges.GRADER_OF and not any(query.label == "malicious" for query in queries):
        raise DavspError(
            f"--judge {judge} judges answers to malicious queries, and {run} has none; how many harmless ones were refused is "
            f"in its metrics.json."
        )
    if test.benchmark:
        queries = apart(queries)
    settings = judges.judge_settings(
        [judge], access, requests, access.cache or run / "cache.sqlite", device, grader_runs
    )
    scorer = judges.judge_or_grader(judge, settings)
    if parallel.rank() > 0:
        help_judge(scorer)
        return
    benchmark = judges.GRADER_OF.get(judge)
    who: dict[str, Any] = {"graders": {benchmark: scorer}, "judge": None} if benchmark else {"judge": scorer}
    scores = rescore(run, queries, **who, seed=seed, mode=mode, reasoning_tags=settings.reasoning_tags)
    end_help(scorer)
    asked = {verdict.query_id for verdicts in scores.verdicts.values() for verdict in verdicts}
    _print(Console(), scores, judges.caveat_of([scorer], _shipped(run), [q for q in queries if q.id in asked]))
    print_caveat(Console(), note(_facts(run).get("undefended")))
    _print_mode(Console(), scores, mode)
    name = slug(judge_name(scorer))
    kind = "grades" if benchmark else "verdicts"
    print(f"{kind} are in {run / f'{kind}-{name}.jsonl'}, rates in {run / f'metrics-{name}.json'}")
    judges.check_scored([scores.grades if benchmark else scores.verdicts], queries, access.max_unscored, some=True)


def _shipped(run: Path) -> bool:
    """Whether a run is of a model that ships; a run from Python may not say."""
    facts = _facts(run)
    return bool(facts.get("shipped", is_shipped(facts.get("model", ""))))


def _facts(run: Path) -> dict[str, Any]:
    """The manifest of a run; {} if there is none."""
    from davsp.runtime.files import read_json
    from davsp.store import MANIFEST

    return dict(read_json(run / MANIFEST)) if (run / MANIFEST).exists() else {}


def _print(console: "Console", scores: "Rescoring", caveat: str) -> None:
    """Rates by defense and benchmark with how many answers were scored, why others were not, and the agreement."""
    from collections import Counter
    from itertools import chain

    from davsp.judges.base import is_unscored
    from davsp.report.terminal import print_caveat, print_scores

    table = _rates(scores)
    if table.rows:
        table.print(console)
        print_caveat(console, caveat)
    print_scores(console, scores.rows)
    every: Iterable[Verdict | Grade] = chain(*scores.verdicts.values(), *scores.grades.values())
    for reason, count in Counter(one.reason for one in every if is_unscored(one)).most_common(5):
        console.print(f"unscored, {count}: {reason}", markup=False)
    if scores.agreement.alpha is not None:
        console.print(
            f"agreement of the run's judges: Krippendorff's α {scores.agreement.alpha:.2f} on {scores.agreement.n} answers, "
            f"{len(scores.agreement.disagreements)} judged differently (agreement.json)"
        )


def _rates(scores: "Rescoring") -> "TextTable":
    """RSR by defense and benchmark, and what it is if every unscored answer is unsafe."""
    from rich.text import Text

    from davsp.metrics import WORST
    from davsp.report.cells import BENCHMARKS, defenses, find, label, percent
    from davsp.runtime.table import TextTable

    headings = ("Defense", "Benchmark", "n", "unscored", "RSR", "95 %", "worst case")
    caption = "percent; interval 95 %; worst case: every unscored answer counted as unsafe"
    table, order = TextTable(*headings, keys=2, caption=caption), defenses(scores.rows)
    rates = [row for row in scores.rows if row["metric"] == "rsr" and row["split"] == "total"]
    for row in sorted(rates, key=lambda row: order.index(row["defense"])):
        key = (row["defense"], row["benchmark"], row["split"])
        unscored, worst = find(scores.rows, *key, "unscored"), find(scores.rows, *key, WORST)
        assert unscored and worst  # written for every rate
        names = Text(label(row["defense"])), Text(BENCHMARKS.get(row["benchmark"], row["benchmark"]))
        counts = str(row["n"]), str(round(unscored["value"] * unscored["n"]))
        rate = ("–", "–")
        if row["value"] is not None:
            rate = percent(row["value"]), f"{percent(row['low'])}–{percent(row['high'])}"
        table.add_row(*names, *counts, *rate, percent(worst["value"]))
    return table


def _print_mode(console: "Console", scores: "Rescoring", mode: str) -> None:
    """The rates of a harmful set by a published scorer's quirks, as a whole."""
    from davsp.report.cells import label, percent

    for row in scores.rows:
        if row["metric"] == f"rsr_{mode}" and row["split"] == "total" and row["value"] is not None:
            text = f"{label(row['defense'])}, {row['benchmark']}: {row['metric']} {percent(row['value'])} %"
            console.print(f"{text} of {row['n']}", markup=False)
