"""`davsp check`, and the canaries that `davsp train` and `davsp card` put beside a border."""

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from davsp.cli.inputs import needs_extra, say
from davsp.cli.options import TrustEnv
from davsp.errors import DavspError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from davsp.lvlm import LVLM
    from davsp.prompts import VisualSafetyPrompt
    from davsp.query import Query
    from davsp.serve.canaries import Progress, Report

Canaries = Annotated[
    Path | None,
    typer.Option(
        "--canaries",
        help="Folder of your own queries to choose canaries from, by which a server is checked; left out: drawn for a "
        "model that ships, none for another.",
    ),
]
NAMES = {"none": "nothing", "text": "text alone", "prompt": "the prompt"}


def check(
    upstream: Annotated[str, typer.Option(help="The OpenAI-compatible server behind the proxy, http://HOST:PORT/v1.")],
    prompt: Annotated[Path, typer.Option(help="Folder or hub id of a border with canaries.")],
    model: Annotated[
        str | None, typer.Option(help="The model as the upstream calls it; left out: the first it lists.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the upstream's key; left out: no key.")
    ] = None,
    trust_env: TrustEnv = False,
    timeout: Annotated[float, typer.Option(min=0.01, help="Longest silence of the upstream in seconds.")] = 300.0,
) -> None:
    """Ask a server a border's canaries and say whether the border has its effect there: exit code 0, 1 if not, 2 if it can't be told."""
    needs_extra()
    import asyncio

    from davsp.prompts import VisualSafetyPrompt
    from davsp.serve.canaries import NONE, at_start
    from davsp.serve.settings import ServeSettings

    border = VisualSafetyPrompt.from_pretrained(prompt)
    if border.canaries is None:
        raise DavspError(f"{prompt}: {NONE}")
    settings = ServeSettings.of(
        upstream=upstream, model=model, api_key_env=api_key_env, trust_env=trust_env, upstream_timeout=timeout
    )
    with asking(border, 3) as progress:
        report = asyncio.run(at_start(settings, border, progress, seconds=None, whole=True))
    if report.effect is not None:
        _print(border, report)
    print(report.line)
    if report.state != "holds":
        raise typer.Exit(1 if report.state == "lost" else 2)


def _print(border: "VisualSafetyPrompt", report: "Report") -> None:
    """The counts, and beside them what was measured when the canaries were chosen."""
    from rich.console import Console

    from davsp.runtime.table import TextTable

    seen, canaries = report.effect, border.canaries
    assert seen is not None and canaries is not None
    chosen = {label: sum(c.label == label for c in canaries.canaries) for label in ("malicious", "benign")}
    heads = ("refused", "malicious", "benign", "when chosen", "of all candidates")
    caption = f"nothing and text alone: with a grey frame in the border's place; chosen on {canaries.model}"
    table = TextTable(*heads, title=f"canaries, asked of the upstream's {report.model}", caption=caption)
    for arm in seen.malicious:
        refused = arm == "prompt"
        then = f"{chosen['malicious'] * refused} of {chosen['malicious']}, 0 of {chosen['benign']}"
        all_then = ", ".join(f"{getattr(part, arm)} of {part.asked}" for part in (canaries.malicious, canaries.benign))
        here = [f"{getattr(seen, label)[arm]} of {seen.asked[label]}" for label in ("malicious", "benign")]
        table.add_row(NAMES[arm], *here, then, all_then)
    table.print(Console())


@contextmanager
def asking(border: "VisualSafetyPrompt", arms: int = 2) -> "Iterator[Progress]":
    """A bar on the terminal while canaries are asked."""
    from davsp.defenses.effect import arms as arms_of

    assert border.canaries is not None
    with _bar(len(border.canaries.canaries) * min(arms, len(arms_of(border)))) as progress:
        yield progress


@contextmanager
def _bar(total: int | None) -> "Iterator[Progress]":
    from rich.console import Console

    from davsp.runtime.progress import bar

    console = Console(stderr=True)
    console.quiet = not console.is_terminal
    with bar(console) as shown:
        task = shown.add_task("canaries", total=total)
        yield lambda count: shown.advance(task, count)


def own_queries(folder: Path | None, allow_outside: bool = False) -> "list[Query] | None":
    """Queries of --canaries, read before anything is trained; None without it.

    Raises:
        DavspError: they are of a published benchmark, hold a conversation, are too few, or what their reader raises.
    """
    if folder is None:
        return None
    from davsp.benchmarks import BENCHMARKS, data_set
    from davsp.benchmarks import check as inventories
    from davsp.benchmarks.custom import NAME
    from davsp.cli.testset import queries_at
    from davsp.prompts.canaries import LEAST

    why = "whose rows are not ours to copy into a prompt's folder; give queries of your own."
    if folder.is_dir() and not (folder / NAME).exists() and (there := inventories(folder)):
        raise DavspError(f"--canaries {folder} holds {there[0].benchmark}, {why}")
    queries = queries_at(folder, None, "--canaries", allow_outside)
    for query in queries:
        try:
            name = data_set(query.benchmark)
        except DavspError:
            continue
        raise DavspError(f"--canaries {folder}: {query.id!r} says it is of {BENCHMARKS[name].NAME}, {why}")
    file = folder / NAME if folder.is_dir() else folder
    if talk := next((query for query in queries if query.turns), None):
        raise DavspError(
            f"--canaries {folder}: {talk.id!r} in {file} has turns before its question, and canaries are single questions; leave it out."
        )
    count = sum(query.label == "malicious" and query.image is not None for query in queries)
    if count < LEAST:
        raise DavspError(
            f"--canaries {folder}: {file} holds {count} malicious queries with pictures, and canaries are at least {LEAST} that the "
            "border flips; give more."
        )
    return queries


def candidates_of(own: "list[Query] | None", shipped: bool) -> "list[Query]":
    """What canaries are chosen from: queries of --canaries; None: drawn, for a model that ships.

    Raises:
        DavspError: there are none.
    """
    from davsp.embedded.canaries import candidates

    if own is None and not shipped:
        raise DavspError("canaries are drawn for the models that ship alone; give your own queries (--canaries FOLDER)")
    return candidates() if own is None else own


def with_canaries(border: "VisualSafetyPrompt", lvlm: "LVLM", queries: "list[Query]") -> "VisualSafetyPrompt":
    """The border with canaries, chosen from the queries.

    Raises:
        DavspError: the border flips too few.
    """
    from davsp.defenses.effect import choose

    with _bar(None) as progress:
        canaries = choose(lvlm, border, queries, progress=progress)
    other = border.with_delta(border.delta)
    other.canaries = canaries
    return other


def describe(border: "VisualSafetyPrompt") -> str:
    """What was chosen, in a line."""
    canaries = border.canaries
    assert canaries is not None
    bad = sum(c.label == "malicious" for c in canaries.canaries)
    part = canaries.malicious
    text = "" if part.text is None else f", {part.text} with the text alone"
    return (
        f"canaries.json: {bad} malicious queries that the border flips and {len(canaries.canaries) - bad} benign ones, for davsp check "
        f"and davsp serve; of {part.asked} malicious ones it refuses {part.prompt}{text}, {part.none} without"
    )


def try_canaries(
    border: "VisualSafetyPrompt", lvlm: "LVLM", own: "list[Query] | None", shipped: bool
) -> "VisualSafetyPrompt | None":
    """As `with_canaries`, from `candidates_of`; where there are none, says why."""
    try:
        return with_canaries(border, lvlm, candidates_of(own, shipped))
    except DavspError as error:
        say(f"no canaries: {error}")
        return None
