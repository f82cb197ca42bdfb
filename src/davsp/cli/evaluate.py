"""`davsp eval`: models, defenses and test sets to a run folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from davsp.cli import judges
from davsp.cli.defenses import rows
from davsp.cli.engine import EngineOptions, StatesOptions, lvlm_of, served_states, server_of
from davsp.cli.inputs import compare_pictures, compare_templates, compare_texts, in_processes, is_shipped, terminal
from davsp.cli.options import (
    JUDGES,
    GraderRuns,
    Limit,
    MaxNewTokens,
    ModelOptions,
    Out,
    ProcessOptions,
    RequestOptions,
    RowOptions,
    Seed,
    TestSetOptions,
    VerdictOptions,
)
from davsp.cli.testset import load_test_set, with_room
from davsp.errors import DavspError

if TYPE_CHECKING:
    from davsp.defenses import Defense
    from davsp.evaluation import Evaluation
    from davsp.lvlm import AnsweringLVLM
    from davsp.query import Query

BATCH, SERVED = 32, 64  # queries a batch, here and of a server; a run keeps it, so --concurrency does not decide it


def evaluate(
    row: RowOptions,
    test: TestSetOptions,
    model: ModelOptions,
    engine: EngineOptions,
    states: StatesOptions,
    processes: ProcessOptions,
    access: VerdictOptions,
    requests: RequestOptions,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Repeatable; the first one's rates are metrics.json. {judges.NAMES} Left out: keyword.",
            rich_help_panel=JUDGES,
        ),
    ] = None,
    out: Out = Path("out/eval"),
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Queries answered and kept at a time, so that no more are under way; left out: 32, of a server 64.",
        ),
    ] = None,
    grader_runs: GraderRuns = None,
    show_unsafe: Annotated[
        bool, typer.Option("--show-unsafe", help="Print compliant answers to malicious queries in the report.")
    ] = False,
    prefill: Annotated[
        str | None,
        typer.Option(
            help="Every answer is made to begin with this text, as if the model had said it itself: does its refusal hold?"
        ),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Answer a test set under each defense, judge the answers, and report rates with 95 % intervals, paired with No Defense."""
    from davsp.defenses.none import baselines
    from davsp.evaluation import evaluate
    from davsp.evaluation.judging import apart
    from davsp.judges.guard import help_judge
    from davsp.lvlm import answer_length, loaded
    from davsp.runtime import keys, parallel
    from davsp.vector import HarmfulnessVector

    server = server_of(engine, model, processes.num_processes)
    served = served_states(states, server)
    model = in_processes(processes, model)
    keys.read(engine.api_key_env, "model")  # a key given in place of its variable would get into the manifest
    names = judge or []
    settings = judges.judge_settings(
        names, access, requests, access.cache or out / "cache.sqlite", model.device, grader_runs
    )
    _check_graders(names, test.benchmark or [])
    queries, notes = load_test_set(test, model.name, limit, seed)
    scorers, graders = judges.judges_and_graders(
        names, settings
    )  # makes the cache, so a refused test set leaves nothing
    direction = HarmfulnessVector.load(row.vector) if row.vector else None
    # the embedded test is asked of models that ship alone, by whatever name a server calls them
    shipped = test.embedded or is_shipped(server[0] if server else model.name)
    defenses = rows(row.defense or [], row.prompt, row.text, shipped, direction)
    judges.check_prompts(scorers, queries)
    attacked = any(query.label == "malicious" for query in queries)
    if test.benchmark:
        queries = apart(queries)
    lvlm = lvlm_of(model, server, engine, requests, served)
    lvlm.reasoning_tags = settings.reasoning_tags
    lvlm.longest = answer_length(shipped)
    if prefill is not None:
        lvlm = loaded(lvlm, "--prefill goes with a model loaded here: not every server goes on with an answer.").begun(
            prefill
        )
        notes = [
            *notes,
            f"every answer was made to begin with {prefill!r}; kept and judged is what the model says behind it",
        ]
    if not row.defense:  # of a model that looks at tiles, No Defense on one tile as well
        defenses = baselines(lvlm) | defenses
    _check(lvlm, defenses, direction)
    queries, left_out = with_room(lvlm, defenses, queries, max_new_tokens, test.skip_broken)
    notes += left_out
    caveat = judges.caveat_of(scorers, shipped, queries) if attacked else ""
    facts = _facts(lvlm, engine.engine, notes, defenses, names or ["keyword"], test, seed)
    facts |= {"shipped": shipped, "judge_sees": settings.sees}
    evaluation = evaluate(
        lvlm, defenses, queries, out, direction, scorers[0],
        graders=graders if test.benchmark else None,
        batch_size=batch_size or (SERVED if server else BATCH),
        max_new_tokens=max_new_tokens, seed=seed, console=terminal(), manifest=facts,
    )  # fmt: skip
    if parallel.rank() > 0:
        for other in scorers[1:]:
            help_judge(other)
        return
    _finish(out, queries, evaluation, defenses, scorers[1:], show_unsafe, access.max_unscored, seed, caveat)


def _check_graders(names: list[str], sets: list[str]) -> None:
    """Raise DavspError if a grader's set is not among the published sets of --benchmark."""
    known = {spec.partition("=")[0] for spec in sets}
    for name in names:
        if judges.GRADER_OF.get(name, "") not in {"", *known}:
            raise DavspError(f"--judge {name} grades {judges.GRADER_OF[name]}, which no --benchmark names.")


def _check(lvlm: "AnsweringLVLM", defenses: "dict[str, Defense]", direction: Any) -> None:
    """Refuse what does not go with the model before anything is answered."""
    from davsp.defenses import VisualPrompt

    if direction is not None:
        direction.check(lvlm)
        compare_pictures(direction, lvlm)
    for defense in defenses.values():
        defense.check(lvlm)
        if isinstance(defense, VisualPrompt) and direction is not None:
            compare_texts(direction, defense.prompt.text, "the prompt puts")
    compare_templates(lvlm, {"the vector": direction, **{f"the prompt of {name}": d for name, d in defenses.items()}})


def _facts(
    lvlm: "AnsweringLVLM", engine: str, notes: list[str], defenses: "dict[str, Defense]", names: list[str], test: TestSetOptions,
    seed: int,
) -> dict[str, Any]:  # fmt: skip
    """What manifest.json says, but for the model and the queries, which `evaluate` and the store know."""
    from davsp.runtime.files import manifest

    return manifest(
        engine=engine, server=lvlm.server,
        defenses={name: defense.describe() for name, defense in defenses.items()}, judges=names,
        benchmarks=test.benchmark or [], split=test.split, notes=notes, seed=seed,
    )  # fmt: skip


def _finish(
    out: Path, queries: "list[Query]", evaluation: "Evaluation", defenses: "dict[str, Defense]", others: list[Any],
    show_unsafe: bool, max_unscored: float, seed: int, caveat: str,
) -> None:  # fmt: skip
    """The other judges, the report and the tables; fails at the end if too much is unscored."""
    from rich.console import Console

    from davsp import metrics, report
    from davsp.evaluation.rescore import rescore, slug
    from davsp.judges.guard import end_help
    from davsp.judges.verdicts import judge_name
    from davsp.lvlm import undefended
    from davsp.report.html import write_report
    from davsp.report.terminal import print_caveat, print_costs, print_scores, print_table
    from davsp.runtime.files import read_json
    from davsp.store import MANIFEST

    groups: list[dict[str, list[Any]]] = [dict(evaluation.verdicts), dict(evaluation.grades)]
    for judge in others:
        rescored = rescore(out, queries, judge, seed=seed)
        end_help(judge)
        groups.append(dict(rescored.verdicts))
        print(f"rates by {judge_name(judge)} are in {out / f'metrics-{slug(judge_name(judge))}.json'}")
    shown = [name for name in defenses if name != "none"] or list(defenses)
    facts = read_json(out / MANIFEST)
    page = report.build(
        facts["model"], queries, evaluation, defenses, defense=shown[-1], published=bool(facts["benchmarks"]),
        manifest=facts, caveat=caveat,
    )  # fmt: skip
    write_report(out / "report.html", page, show_unsafe)
    print_table(Console(), evaluation.rows, caveat=caveat)
    print_caveat(Console(), undefended.note(facts["undefended"]))
    print_scores(Console(), evaluation.rows)
    print_costs(Console(), evaluation.rows, metrics.latency(evaluation.responses))
    print(f"answers, verdicts, metrics.json and report.html are in {out}")
    judges.check_scored(groups, queries, max_unscored)
