"""`davsp reproduce`: the paper's tables, one command each."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from davsp.cli import judges
from davsp.cli.baseline import chat_defender
from davsp.cli.groups import changed
from davsp.cli.inputs import ask_as_published, embedded_protocol, in_processes, is_shipped, load_lvlm, published
from davsp.cli.options import (
    JUDGES,
    Benchmark,
    DefenderOptions,
    GraderRuns,
    JudgeOptions,
    MaxNewTokens,
    ModelOptions,
    ProcessOptions,
    Recipe,
    RequestOptions,
    Seed,
    SplitFile,
)
from davsp.cli.own import ALONE, OWN, PARTS, only_of_tables, own
from davsp.cli.testset import folders, from_split, noted
from davsp.errors import DavspError
from davsp.runtime import parallel

if TYPE_CHECKING:
    from davsp.defenses.adashield_a.defender import ChatDefender
    from davsp.embedded.data import Protocol
    from davsp.experiments.paper.kit import Kit

TABLES = (
    "utility (Table 1), resistance (2), transfer (3), ablation (4), intervention (5), ecso (6), or all; and one setting at a "
    "time: sweep-padding, -layer, -lam, -margins, -data, -steps, -text, or sweeps; and gate and gate-kinds (docs/gate.md), deep-alignment (docs/deep-alignment.md) and leave-one-out (docs/siblings.md), one --seed a call"
)


@dataclass(frozen=True)
class MethodOptions:
    """How the methods of the tables are made."""

    panel: ClassVar[str] = "Methods"
    text: Annotated[
        str | None,
        typer.Option(
            help="Safety text of all methods but No Defense; left out: AdaShield-S in the paper's wording, or the own one of a "
            "model that ships."
        ),
    ] = None
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="UniGuard's harmful sentences, one a line; without it that row is left out. A model that ships has its own."
        ),
    ] = None
    padding: Annotated[
        int | None,
        typer.Option(help="Border width in pixels; left out: a twelfth of the canvas, or 30 of 336 as published."),
    ] = None
    steps: Annotated[int | None, typer.Option(min=1, help="Of every prompt that is trained.")] = None
    recipe: Recipe = None


def reproduce(
    names: Annotated[list[str], typer.Argument(help=f"{TABLES}")],
    methods: MethodOptions,
    model: ModelOptions,
    defender: DefenderOptions,
    access: JudgeOptions,
    requests: RequestOptions,
    processes: ProcessOptions,
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
    judge: Annotated[
        list[str] | None, typer.Option(help=f"One judge, and graders. {judges.NAMES}", rich_help_panel=JUDGES)
    ] = None,
    grader_runs: GraderRuns = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Queries answered at a time.")] = 32,
    max_new_tokens: MaxNewTokens = None,
    ecso: Annotated[
        bool,
        typer.Option(
            "--ecso/--no-ecso",
            help="Of gate: also ECSO, adaptive ECSO and gates before ECSO, which ask up to five times a query.",
        ),
    ] = True,
    part: Annotated[
        str | None,
        typer.Option(
            help=f"Of deep-alignment: {', '.join(PARTS)} (docs/deep-alignment.md); left out: begun and depth."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be run, with calls and hours; load no model.")
    ] = False,
    per_call: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Of --dry-run: seconds a model call takes, batches counted in; left out: a guess by the longest answer.",
        ),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Make the paper's tables on one model, with intervals, beside the paper's figures. A stopped run goes on."""
    from davsp.experiments.paper.plan import dry
    from davsp.lvlm import answer_length

    if not ecso and "gate" not in names:
        raise DavspError("--no-ecso goes with gate, which can do without ECSO's rows; leave it out.")
    if part and "deep-alignment" not in names:
        raise DavspError("--part goes with deep-alignment, which has several; leave it out.")
    if set(OWN) & set(names):
        unused = {
            "judge": judge, "grader_runs": grader_runs, "dry_run": dry_run, "per_call": per_call,
            "max_new_tokens": max_new_tokens, "borrow": borrow,
        }  # fmt: skip
        for group in (methods, defender, access, requests):
            unused |= changed(group)
        only_of_tables({name: value for name, value in unused.items() if name != "steps"})
        what = f"--part {part}" if part in ALONE else "reproduce leave-one-out" if "leave-one-out" in names else ""
        if what and (changed(processes) or parallel.processes() > 1):
            raise DavspError(f"{what} takes one process; leave --num-processes, --gpus-per-process and torchrun out.")
        model = in_processes(processes, model)
        own(names, model, methods.steps, out, batch_size, seed, ecso, part, bool(benchmark or split))
        return
    tables, sweeps = _tables_and_sweeps(names)
    published(methods.recipe)  # an unknown one is told before the queries are drawn
    if not dry_run:
        model = in_processes(processes, model)
    embedded_data = not benchmark and split is None
    name = (model.name or "davsp-mini").rstrip("/").split("/")[-1]
    out = out or Path("out/reproduce") / name
    if borrow and "transfer" not in tables:
        raise DavspError("--borrow goes with the table transfer.")
    if is_shipped(model.name) and (methods.corpus or defender.defender):
        raise DavspError("--corpus and --defender are for other models; those that ship have words of their own.")
    borrowed = _borrowed(borrow, out, name) if "transfer" in tables else None
    text_model = None if dry_run else chat_defender(defender, requests.trust_env)
    protocol = embedded_protocol(model.name, seed) if embedded_data else None
    if dry_run:
        print(dry(tables, name, protocol, max_new_tokens or answer_length(is_shipped(model.name)), per_call))
        return
    protocol = protocol or _published(benchmark or [], split)
    settings = judges.judge_settings(judge or [], access, requests, out / "cache.sqlite", model.device, grader_runs)
    scorers, graders = judges.judges_and_graders(judge or [], settings)
    if len(scorers) > 1:
        raise DavspError("--judge names several judges; a table has one: score the run again with davsp judge.")
    judges.check_prompts(scorers, protocol.test)
    judges.warn_of_keyword(scorers, is_shipped(model.name))
    kit = _kit(model, protocol, out, methods, seed, text_model, borrowed)
    kit.lvlm.reasoning_tags = settings.reasoning_tags
    evaluation: dict[str, Any] = {
        "judge": scorers[0], "graders": None if embedded_data else graders, "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    _run(tables, sweeps, kit, out, seed, evaluation)


def _tables_and_sweeps(names: list[str]) -> tuple[list[str], list[str]]:
    """The tables and the sweeps that the arguments mean, in the paper's order.

    Raises:
        DavspError: a name that is neither.
    """
    from davsp.experiments.paper.sweeps import SWEEPS
    from davsp.experiments.paper.tables import TABLES

    if wrong := [n for n in names if n not in (*TABLES, "all", "sweeps", *(f"sweep-{x}" for x in SWEEPS))]:
        raise DavspError(
            f"{wrong[0]!r} is not known; choose {', '.join(TABLES)}, all, gate, sweeps or sweep-{{{','.join(SWEEPS)}}}."
        )
    tables = list(TABLES) if "all" in names else [name for name in dict.fromkeys(names) if name in TABLES]
    return tables, list(SWEEPS) if "sweeps" in names else [x for x in SWEEPS if f"sweep-{x}" in names]


def _kit(
    model: ModelOptions, protocol: "Protocol", out: Path, methods: MethodOptions, seed: int,
    defender: "ChatDefender | None", borrowed: dict[str, Path] | None,
) -> "Kit":  # fmt: skip
    """What all cells share. Text, settings and templates are the model's own if it ships, whatever the data; else as published."""
    from davsp import embedded
    from davsp.defenses.adashield_s import DAVSP
    from davsp.defenses.ecso import PUBLISHED
    from davsp.embedded.ecso_templates import TEMPLATES
    from davsp.experiments.paper.run import make_kit
    from davsp.lvlm.templates import CHECKPOINT
    from davsp.training.recipe import PUBLISHED as RECIPE
    from davsp.training.sentences import read_sentences
    from davsp.training.settings import TrainSettings

    shipped = is_shipped(model.name)
    as_published = published(methods.recipe, default=not shipped)
    settings = embedded.SETTINGS if shipped else TrainSettings(steps=1200, batch_size=2, normalise=False)
    if as_published:
        settings = TrainSettings(**(settings.model_dump() | RECIPE))
    if methods.steps:
        settings = settings.model_copy(update={"steps": methods.steps})
    corpus = read_sentences(methods.corpus) if methods.corpus else ()
    lvlm = load_lvlm(model)
    ask_as_published(lvlm, CHECKPOINT if shipped else model.template)
    return make_kit(
        lvlm, protocol, out, text=methods.text or (embedded.SAFETY_TEXT if shipped else DAVSP),
        settings=settings, templates=TEMPLATES if shipped else PUBLISHED, seed=seed, padding=methods.padding, shipped=shipped,
        corpus=corpus, defender=defender, borrowed=borrowed, published=as_published,
    )  # fmt: skip


def _run(tables: list[str], sweeps: list[str], kit: "Kit", out: Path, seed: int, evaluation: dict[str, Any]) -> None:
    """Make sweeps and tables, and print them."""
    from davsp.experiments.paper.run import reproduce
    from davsp.experiments.paper.sweeps import sweep

    if sweeps:
        sweep(sweeps, kit, out / "sweeps", seed=seed, **evaluation)
        if parallel.rank() == 0:
            print((out / "sweeps" / "sweeps.md").read_text())
    if not tables:
        return
    reproduction = reproduce(tables, kit, **evaluation)
    if parallel.rank() > 0:
        return
    for name in reproduction.tables:
        print((out / f"{name}.md").read_text())
    print((out / "claims.md").read_text())
    print(f"{out / 'tables.html'} has them all; .md, .csv and .tex lie beside it")


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
        queries = from_split(split, [x for x in sets if x.partition("=")[0] in needed], kind)
        assert queries is not None
        parts[kind] = queries
    tested = {name: root for name, root in roots.items() if name != "vlguard"}
    test, _ = noted(lambda: for_test(Path(split), tested))
    (vector_bad, vector_good), (train_bad, train_good) = parts["vector"], parts["train"]
    return Protocol(vector_bad, vector_good, [], [], train_bad, train_good, apart(test))


def _borrowed(specs: list[str] | None, out: Path, here: str) -> dict[str, Path]:
    """Name of another model -> folder of its border; those beside `out`, but not its own, if no spec is there."""
    if specs is None:
        beside = sorted(out.parent.glob("*/prompts/davsp/vsp_config.json"))
        return {p.parents[2].name: p.parent for p in beside if p.parents[2].name not in (here, out.name)}
    borders = {}
    for spec in specs:
        name, _, folder = spec.partition("=")
        if not name or not folder or not Path(folder).is_dir():
            raise DavspError(f"--borrow {spec!r} is not MODEL=FOLDER of a saved border.")
        borders[name] = Path(folder)
    return borders
