"""`davsp eval`: models, defenses and test sets to a run folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from davsp.cli import judges
from davsp.cli.defenses import GRAMMAR, rows
from davsp.cli.inputs import compare_texts, in_processes, is_embedded, load_lvlm
from davsp.cli.options import (
    Benchmark,
    Cache,
    Canvas,
    Concurrency,
    Device,
    Dtype,
    GraderRuns,
    JudgeKey,
    JudgeModel,
    JudgeUrl,
    MaxUnscored,
    Model,
    Out,
    Processes,
    Quantization,
    Queries,
    Rebuild,
    Revision,
    Seed,
    SkipBroken,
    Split,
    Timeout,
    Types,
)  # fmt: skip
from davsp.cli.testset import asked
from davsp.errors import DavspError

if TYPE_CHECKING:
    from davsp.defenses import Defense
    from davsp.evaluation import Evaluation
    from davsp.lvlm import AnsweringLVLM
    from davsp.query import Query

BATCH, SERVED = 32, 64  # queries a batch, here and of a server; a run keeps it, so --concurrency does not decide it


def evaluate(
    prompt: Annotated[
        Path | None, typer.Option(help="Folder or hub id of a prompt: adds the row davsp, or additive for noise.")
    ] = None,
    queries: Queries = None,
    benchmark: Benchmark = None,
    split: Split = "test",
    defense: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A row of the table, repeatable: {GRAMMAR} See docs/defenses.md. Left out: none, the safety text and --prompt."
        ),
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(help=f"Repeatable; the first one's rates are metrics.json. {judges.NAMES} Left out: keyword."),
    ] = None,
    out: Out = Path("out/eval"),
    model: Model = None,
    text: Annotated[
        str | None, typer.Option(help='Safety text of the row safety-text ("" leaves the row out).')
    ] = None,
    vector: Annotated[
        Path | None, typer.Option(help="Folder of a vector: records the projection of every answer.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many of each set (drawn; of your own queries the first).")
    ] = None,
    types: Types = None,
    rebuild: Rebuild = False,
    skip_broken: SkipBroken = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 48,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Queries answered and kept at a time, so that no more are under way; left out: 32, of a server 64.",
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="transformers: the model is loaded here; openai: a server runs it (vLLM, SGLang).")
    ] = "transformers",
    base_url: Annotated[str | None, typer.Option(help="The model's server, http://HOST:PORT/v1.")] = None,
    api_model: Annotated[str | None, typer.Option(help="The model as its server calls it; left out: --model.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the key of the model's server; left out: no key.")
    ] = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    judge_key_env: JudgeKey = None,
    grader_runs: GraderRuns = None,
    max_unscored: MaxUnscored = 0.02,
    concurrency: Concurrency = 8,
    timeout: Timeout = 300.0,
    cache: Cache = None,
    show_unsafe: Annotated[
        bool, typer.Option("--show-unsafe", help="Print compliant answers to malicious queries in the report.")
    ] = False,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    canvas: Canvas = None,
    num_processes: Processes = 1,
    seed: Seed = 0,
) -> None:
    """Answer a test set under each defense, judge the answers, and report rates with 95 % intervals, paired with No Defense."""
    from rich.console import Console

    from davsp.evaluation import evaluate
    from davsp.evaluation.judging import apart
    from davsp.runtime import keys, parallel
    from davsp.vector import HarmfulnessVector

    served = _served(engine, base_url, api_model or model, (revision, device, dtype, quantization), num_processes)
    keys.read(api_key_env, "model")  # a key given in place of its variable would get into the manifest
    how = judges.asking(
        judge or [], judge_url, judge_model, judge_key_env, grader_runs, concurrency=concurrency, timeout=timeout,
        cache=cache or out / "cache.sqlite", device=device, console=Console(stderr=True),
    )  # fmt: skip
    in_processes(num_processes)
    sets = {name.partition("=")[0] for name in benchmark or []}
    for name in judge or []:
        if judges.GRADER_OF.get(name, "") not in {"", *sets}:
            raise DavspError(f"--judge {name} grades {judges.GRADER_OF[name]}, which no --benchmark names.")
    test, notes = asked(benchmark or [], split, queries, model, limit, seed, skip_broken, rebuild, types or [])
    named, graders = judges.sorted_out(judge or [], how)  # makes the cache, so a refused test set leaves nothing
    direction = HarmfulnessVector.load(vector) if vector else None
    defenses = rows(
        defense or [], prompt, text, own=not (queries or benchmark), mini=is_embedded(served[0] if served else model),
        vector=direction,
    )  # fmt: skip
    judges.fit(named, test)
    if benchmark:
        test = apart(test)
    lvlm: AnsweringLVLM
    if served:
        from davsp.lvlm.remote import RemoteLVLM

        lvlm = RemoteLVLM(*served, api_key_env, canvas=canvas, concurrency=concurrency, timeout=timeout)
    else:
        lvlm = load_lvlm(model, revision, device, dtype, quantization, canvas)
    _fit(lvlm, defenses, direction)
    facts = _facts(lvlm, engine, notes, defenses, judge or ["keyword"], benchmark or [], split, seed)
    found = evaluate(
        lvlm, defenses, test, out, direction, named[0],
        graders=graders if benchmark else None,
        batch_size=batch_size or (SERVED if served else BATCH),
        max_new_tokens=max_new_tokens, seed=seed, console=Console(stderr=True), manifest=facts,
    )  # fmt: skip
    if parallel.rank() == 0:
        _finish(out, test, found, defenses, named[1:], show_unsafe, max_unscored, seed)


def _served(
    engine: str, base_url: str | None, model: str | None, local: tuple[str | None, ...], processes: int
) -> tuple[str, str] | None:
    """Model and address of the server that answers; None if the model is loaded here."""
    if engine not in ("transformers", "openai"):
        raise DavspError(f"--engine {engine!r} is not known: choose transformers or openai.")
    if engine == "transformers":
        if base_url:
            raise DavspError("--base-url goes with --engine openai.")
        return None
    if not base_url or not model:
        raise DavspError("--engine openai needs --base-url and --api-model (or --model), as the server calls it.")
    if any(local) or processes > 1:
        raise DavspError(
            "--revision, --device, --dtype, --quantization and --num-processes go with a model loaded here."
        )
    return model, base_url


def _fit(lvlm: "AnsweringLVLM", defenses: "dict[str, Defense]", direction: Any) -> None:
    """Refuse what does not go with the model before anything is answered."""
    from davsp.defenses import VisualPrompt

    if direction is not None:
        if lvlm.server:
            raise DavspError("--vector does not go with --engine openai: a server gives no hidden states.")
        direction.check(lvlm)
    for defense in defenses.values():
        defense.check(lvlm)
        if isinstance(defense, VisualPrompt) and direction is not None:
            compare_texts(direction, defense.prompt.text, "the prompt puts")


def _facts(
    lvlm: "AnsweringLVLM", engine: str, notes: list[str], defenses: "dict[str, Defense]", named: list[str], sets: list[str],
    split: str, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """What manifest.json says, but for the queries, which the store knows."""
    from davsp.lvlm import fingerprint, model_name
    from davsp.runtime.files import manifest

    return manifest(
        model=model_name(lvlm), revision=lvlm.revision, weights=fingerprint(lvlm), engine=engine, server=lvlm.server,
        defenses={name: defense.describe() for name, defense in defenses.items()}, judges=named,
        benchmarks=sets, split=split, notes=notes, seed=seed,
    )  # fmt: skip


def _finish(
    out: Path, test: "list[Query]", found: "Evaluation", defenses: "dict[str, Defense]", others: list[Any],
    show_unsafe: bool, max_unscored: float, seed: int,
) -> None:  # fmt: skip
    """The other judges, the report and the tables; fails at the end if too much is unscored."""
    from rich.console import Console

    from davsp import metrics, report
    from davsp.evaluation.rescore import rescore, slug
    from davsp.judges.verdicts import judge_name
    from davsp.report.html import write_report
    from davsp.report.terminal import print_costs, print_scores, print_table
    from davsp.runtime.files import read_json
    from davsp.store import MANIFEST

    said: list[dict[str, list[Any]]] = [dict(found.verdicts), dict(found.grades)]
    for judge in others:
        again = rescore(out, test, judge, seed=seed)
        said.append(dict(again.verdicts))
        print(f"rates by {judge_name(judge)} are in {out / f'metrics-{slug(judge_name(judge))}.json'}")
    shown = [name for name in defenses if name != "none"] or list(defenses)
    facts = read_json(out / MANIFEST)
    page = report.build(
        facts["model"], test, found, defenses, defense=shown[-1], manifest=facts, published=bool(facts["benchmarks"])
    )
    write_report(out / "report.html", page, show_unsafe)
    print_table(Console(), found.rows)
    print_scores(Console(), found.rows)
    print_costs(Console(), found.rows, metrics.latency(found.responses))
    print(f"answers, verdicts, metrics.json and report.html are in {out}")
    judges.check(said, test, max_unscored)
