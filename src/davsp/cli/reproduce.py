"""`davsp reproduce`: the paper's tables, one command each."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from davsp.cli import judges
from davsp.cli.inputs import embedded_protocol, load_lvlm
from davsp.cli.options import (
    Benchmark,
    Canvas,
    Concurrency,
    Device,
    Dtype,
    GraderRuns,
    JudgeKey,
    JudgeModel,
    JudgeUrl,
    Model,
    Quantization,
    Revision,
    Seed,
    SplitFile,
    Timeout,
)
from davsp.cli.testset import folders, from_split, noted
from davsp.errors import DavspError

if TYPE_CHECKING:
    from davsp.embedded.data import Protocol

TABLES = (
    "utility (Table 1), resistance (2), transfer (3), ablation (4), intervention (5), ecso (6), or all; and one setting at a "
    "time: sweep-padding, -layer, -lam, -margins, -data, -steps, -text, or sweeps"
)


def reproduce(
    names: Annotated[list[str], typer.Argument(help=f"{TABLES}")],
    model: Model = None,
    out: Annotated[Path | None, typer.Option(help="Folder of this model's run; left out: out/reproduce/MODEL.")] = None,
    borrow: Annotated[
        list[str] | None,
        typer.Option(
            help="For transfer: MODEL=FOLDER of a border trained on another model. Repeatable; left out: those that "
            "`davsp reproduce` made beside this model's folder."
        ),
    ] = None,
    benchmark: Benchmark = None,
    split: SplitFile = None,
    judge: Annotated[list[str] | None, typer.Option(help=f"One judge, and graders. {judges.NAMES}")] = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    judge_key_env: JudgeKey = None,
    grader_runs: GraderRuns = None,
    text: Annotated[
        str | None,
        typer.Option(help="Safety text of all methods but No Defense; left out: AdaShield-S in the paper's wording."),
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="UniGuard's harmful sentences, one a line; without it that row is left out.")
    ] = None,
    defender: Annotated[
        str | None, typer.Option(help="Text model that writes AdaShield-A's prompts; without it that row is left out.")
    ] = None,
    defender_url: Annotated[str | None, typer.Option(help="Its OpenAI-compatible server; left out: OpenAI.")] = None,
    defender_key_env: Annotated[str | None, typer.Option(help="Environment variable with its key.")] = None,
    padding: Annotated[
        int | None, typer.Option(help="Border width in pixels; left out: a twelfth of the canvas.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of every prompt that is trained.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Queries answered at a time.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 48,
    concurrency: Concurrency = 8,
    timeout: Timeout = 300.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be run, with calls and hours; load no model.")
    ] = False,
    per_call: Annotated[
        float, typer.Option(min=0, help="Of --dry-run: seconds a model call takes, batches counted in.")
    ] = 0.3,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    canvas: Canvas = None,
    seed: Seed = 0,
) -> None:
    """Make the paper's tables on one model, with intervals, beside the paper's figures. A stopped run goes on."""
    from rich.console import Console

    from davsp import embedded
    from davsp.experiments.demo import SETTINGS
    from davsp.experiments.paper.plan import dry
    from davsp.experiments.paper.run import make_kit
    from davsp.experiments.paper.run import reproduce as run
    from davsp.experiments.paper.sweeps import SWEEPS, sweep
    from davsp.experiments.paper.tables import TABLES as known
    from davsp.training.sentences import read_sentences
    from davsp.training.settings import TrainSettings

    chosen = list(known) if "all" in names else [name for name in dict.fromkeys(names) if name in known]
    sweeps = list(SWEEPS) if "sweeps" in names else [x for x in SWEEPS if f"sweep-{x}" in names]
    if wrong := [n for n in names if n not in (*known, "all", "sweeps", *(f"sweep-{x}" for x in SWEEPS))]:
        raise DavspError(
            f"{wrong[0]!r} is not known; choose {', '.join(known)}, all, sweeps or sweep-{{{','.join(SWEEPS)}}}."
        )
    own = not benchmark and split is None
    here = (model or "davsp-mini").rstrip("/").split("/")[-1]
    out = out or Path("out/reproduce") / here
    if borrow and "transfer" not in chosen:
        raise DavspError("--borrow goes with the table transfer.")
    if own and (corpus or defender):
        raise DavspError("--corpus and --defender are for other models; those that ship have words of their own.")
    if (defender_url or defender_key_env) and not defender:
        raise DavspError("--defender-url and --defender-key-env go with --defender.")
    borrowed = _borrowed(borrow, out, here) if "transfer" in chosen else None
    data = None if not own else embedded_protocol(model, seed)
    if dry_run:
        print(dry(chosen, here, data, per_call))
        return
    data = data or _published(benchmark or [], split)
    settings = SETTINGS if own else TrainSettings(steps=1200, batch_size=2, normalise=False)
    if steps:
        settings = settings.model_copy(update={"steps": steps})
    how = judges.asking(
        judge or [], judge_url, judge_model, judge_key_env, grader_runs, concurrency=concurrency, timeout=timeout,
        cache=out / "cache.sqlite", device=device, console=Console(stderr=True),
    )  # fmt: skip
    named, graders = judges.sorted_out(judge or [], how)
    if len(named) > 1:
        raise DavspError("--judge names several judges; a table has one: score the run again with davsp judge.")
    judges.fit(named, data.test)
    from davsp.defenses.adashield_s import DAVSP as TEXT
    from davsp.defenses.ecso import PUBLISHED
    from davsp.embedded.ecso_templates import TEMPLATES

    lvlm = load_lvlm(model, revision, device, dtype, quantization, canvas)
    kit = make_kit(
        lvlm, data, out, text=text or (embedded.SAFETY_TEXT if own else TEXT), settings=settings,
        templates=TEMPLATES if own else PUBLISHED, seed=seed, padding=padding, own=own,
        corpus=read_sentences(corpus) if corpus else (),
        defender=_defender(defender, defender_url, defender_key_env),
        borrowed=borrowed,
    )  # fmt: skip
    asked: dict[str, Any] = {
        "judge": named[0], "graders": None if own else graders, "batch_size": batch_size, "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    if sweeps:
        sweep(sweeps, kit, out / "sweeps", seed=seed, **asked)
        print((out / "sweeps" / "sweeps.md").read_text())
    if not chosen:
        return
    made = run(chosen, kit, **asked)
    for name in made.tables:
        print((out / f"{name}.md").read_text())
    print((out / "claims.md").read_text())
    print(f"{out / 'tables.html'} has them all; .md, .csv and .tex lie beside it")


def _defender(model: str | None, url: str | None, key: str | None) -> Any:
    """AdaShield-A's defender behind a server; None without a model."""
    from davsp.defenses.adashield_a.defender import ChatDefender

    return None if model is None else ChatDefender(model, url, key)


def _published(sets: list[str], split: str | None) -> "Protocol":
    """The paper's protocol from the published sets and a split file."""
    from davsp.benchmarks.protocol import for_test
    from davsp.benchmarks.splits import SOURCES
    from davsp.embedded.data import Protocol
    from davsp.evaluation.judging import apart

    roots = folders(sets)
    if split is None or not sets:
        raise DavspError("--split FILE.json (of davsp data split) and --benchmark NAME=FOLDER go together.")
    parts: dict[str, Any] = {}
    for kind in ("vector", "train"):
        needed = {SOURCES[f"{kind}_malicious"], SOURCES[f"{kind}_benign"]}
        if lacking := sorted(needed - set(roots)):
            raise DavspError(f"--benchmark {lacking[0]}=FOLDER is missing: the {kind} set is drawn from it.")
        drawn = from_split(split, [x for x in sets if x.partition("=")[0] in needed], kind)
        assert drawn is not None
        parts[kind] = drawn
    tested = {name: root for name, root in roots.items() if name != "vlguard"}
    test, _ = noted(lambda: for_test(Path(split), tested))
    (vector_bad, vector_good), (train_bad, train_good) = parts["vector"], parts["train"]
    return Protocol(vector_bad, vector_good, [], [], train_bad, train_good, apart(test))


def _borrowed(given: list[str] | None, out: Path, here: str) -> dict[str, Path]:
    """Name of another model -> folder of its border; those beside `out` if none is given."""
    if given is None:
        beside = sorted(out.parent.glob("*/prompts/davsp/vsp_config.json"))
        return {p.parents[2].name: p.parent for p in beside if p.parents[2].name != here}
    found = {}
    for spec in given:
        name, _, folder = spec.partition("=")
        if not name or not folder or not Path(folder).is_dir():
            raise DavspError(f"--borrow {spec!r} is not MODEL=FOLDER of a saved border.")
        found[name] = Path(folder)
    return found
