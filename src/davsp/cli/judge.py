"""`davsp judge`: a finished run scored by another judge."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from davsp.cli.inputs import embedded_protocol, queries_at
from davsp.cli.options import Device, Seed
from davsp.errors import DavspError

if TYPE_CHECKING:
    from rich.console import Console

    from davsp.judges import Judge
    from davsp.judges.rescore import Rescored


def judge(
    run: Annotated[Path, typer.Argument(help="Folder that davsp eval wrote.")],
    judge: Annotated[
        str,
        typer.Option(
            help="keyword, keyword-gcg, keyword-adashield, keyword-vlguard, keyword-lmms-eval; davsp, davsp-mmsafety, "
            "mm-safetybench, adashield; llama-guard-3, llama-guard-4, harmbench."
        ),
    ],
    queries: Annotated[
        Path | None, typer.Option(help="Folder or .jsonl of the run's queries; left out: the embedded test.")
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(help="An OpenAI-compatible server; left out: OpenAI, and guards run here by transformers."),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(help="The model to ask; left out: a guard's own weights, if it runs here.")
    ] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            help="Environment variable with the server's key; left out: OPENAI_API_KEY for OpenAI, no key else."
        ),
    ] = None,
    max_unscored: Annotated[
        float, typer.Option(min=0, max=1, help="Share of unscored answers above which the command fails.")
    ] = 0.02,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once; fewer after a 429.")] = 8,
    timeout: Annotated[float, typer.Option(min=0.01, help="Seconds for one request.")] = 60.0,
    cache: Annotated[
        Path | None, typer.Option(help="File of verdicts to look up and add to; left out: one in the run's folder.")
    ] = None,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Score the answers of a finished run with another judge, without generating again."""
    from rich.console import Console

    from davsp.judges.base import check_unscored
    from davsp.judges.rescore import rescore, slug

    asked = queries_at(queries, None if queries else embedded_protocol(None, seed).test, "--queries")
    chosen = _judge(
        judge, base_url, judge_model, api_key_env, concurrency, timeout,
        cache or run / "cache.sqlite", device, Console(stderr=True),
    )  # fmt: skip
    found = rescore(run, asked, chosen, seed=seed)
    _print(Console(), found)
    name = slug(next(v.judge for verdicts in found.verdicts.values() for v in verdicts))
    print(f"verdicts are in {run / f'verdicts-{name}.jsonl'}, rates in {run / f'metrics-{name}.json'}")
    for verdicts in found.verdicts.values():
        check_unscored(verdicts, max_unscored)


def _judge(
    name: str,
    base_url: str | None,
    model: str | None,
    api_key_env: str | None,
    concurrency: int,
    timeout: float,
    cache: Path,
    device: str | None,
    console: "Console",
) -> "Judge":
    """The judge of that name."""
    from davsp.judges import keyword
    from davsp.judges.keyword_lists import LISTS
    from davsp.judges.prompts import CHAT

    if name == "keyword":
        return keyword
    if name in LISTS:
        return LISTS[name]
    from davsp.client import OPENAI
    from davsp.judges.cache import VerdictCache
    from davsp.judges.chat import ChatJudge
    from davsp.judges.guard import GUARDS, LocalGuard

    if name in GUARDS and base_url is None:
        return LocalGuard(GUARDS[name], model, device=device, cache=VerdictCache(cache), console=console)
    if name not in CHAT | GUARDS:
        known = ", ".join(["keyword", *LISTS, *CHAT, *GUARDS])
        raise DavspError(f"there is no judge {name!r}; choose one of {known}.")
    if model is None:
        raise DavspError(f"--judge-model is missing: the judge {name} asks a model on a server.")
    variable = api_key_env or ("OPENAI_API_KEY" if base_url is None else None)
    return ChatJudge(
        (CHAT | GUARDS)[name], model, base_url or OPENAI, variable,
        cache=VerdictCache(cache), concurrency=concurrency, timeout=timeout, console=console,
    )  # fmt: skip


def _print(console: "Console", found: "Rescored") -> None:
    """Rates by defense and benchmark with how many answers were scored, why others were not, and the agreement."""
    from collections import Counter

    from rich.table import Table

    from davsp.judging import WORST
    from davsp.report.cells import BENCHMARKS, defenses, find, label, percent

    table = Table(caption="percent; interval 95 %; worst case: every unscored answer counted as unsafe")
    for heading in ("Defense", "Benchmark", "n", "unscored", "RSR", "95 %", "worst case"):
        table.add_column(heading, justify="left" if heading in ("Defense", "Benchmark") else "right")
    order = defenses(found.rows)
    for row in sorted((r for r in found.rows if r["metric"] == "rsr"), key=lambda r: order.index(r["defense"])):
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
    console.print(table)
    reasons = Counter(v.reason for verdicts in found.verdicts.values() for v in verdicts if v.label == "unscored")
    for reason, count in reasons.most_common(5):
        console.print(f"unscored, {count}: {reason}", markup=False)
    if found.agreement.alpha is not None:
        console.print(
            f"agreement of the run's judges: Krippendorff's α {found.agreement.alpha:.2f} on {found.agreement.n} answers, "
            f"{len(found.agreement.disagreements)} judged differently (agreement.json)"
        )
