"""`davsp attack`: pictures made against a defense by somebody who knows it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from davsp.cli import judges
from davsp.cli.defenses import rows
from davsp.cli.inputs import (
    compare_pictures,
    compare_templates,
    default_target,
    embedded_protocol,
    in_processes,
    is_shipped,
    load_lvlm,
    terminal,
)
from davsp.cli.options import (
    JUDGES,
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
from davsp.cli.testset import by_options, load_test_set, queries_at, with_room
from davsp.errors import DavspError, refused_as

if TYPE_CHECKING:
    from davsp.attacks import AttackSettings
    from davsp.defenses import Defense
    from davsp.lvlm import LVLM
    from davsp.query import Query

KINDS = "noise, transfer, comply, deed, hide, both, universal, square, redraw, random-words, suffix, joint"


@dataclass(frozen=True)
class AttackedOptions(RowOptions):
    """The defenses that are attacked."""

    vector: Annotated[Path | None, typer.Option(help="Folder of the defender's vector; hide and both need it.")] = None


@dataclass(frozen=True)
class AttackOptions:
    """The attacks, and how hard each tries."""

    panel: ClassVar[str] = "Attacks"
    kinds: Annotated[
        list[str] | None,
        typer.Option("--attack", help=f"Repeatable: {KINDS}. Left out: all that can be run (docs/attack.md)."),
    ] = None
    eps: Annotated[
        str,
        typer.Option(
            help="Largest changes of a pixel, in levels of 255, with commas; 255 is a picture without bounds."
        ),
    ] = "2,8,32,255"
    steps: Annotated[int, typer.Option(min=1, help="Gradients a picture and start.")] = 100
    restarts: Annotated[int, typer.Option(min=1, help="Starts a picture: the clean one, then random ones.")] = 1
    universal_queries: Annotated[
        Path | None,
        typer.Option(
            help="Malicious queries with pictures that universal is trained on; left out: the embedded protocol's training queries, if its test is attacked."
        ),
    ] = None
    universal_steps: Annotated[int, typer.Option(min=1, help="Steps of universal's training, a batch each.")] = 200
    tries: Annotated[int, typer.Option(min=2, help="Losses a picture that square may ask for.")] = 500
    words: Annotated[int, typer.Option(min=1, help="Tokens that suffix and random-words put after the question.")] = 10
    word_steps: Annotated[int, typer.Option(min=1, help="Changes of one token, of suffix.")] = 30
    word_candidates: Annotated[int, typer.Option(min=1, help="Changes tried for each.")] = 64
    target: Annotated[
        str | None, typer.Option(help="How the answer begins that the attacker wants, in the model's words.")
    ] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures attacked at a time.")] = 8

    def named(self) -> list[str]:
        """Those of --attack; none: all that can be run."""
        return [name for part in self.kinds or [] for name in part.split(",")]


def attack(
    row: AttackedOptions,
    attacks: AttackOptions,
    test: TestSetOptions,
    model: ModelOptions,
    processes: ProcessOptions,
    access: VerdictOptions,
    requests: RequestOptions,
    limit: Limit = None,
    judge: Annotated[
        list[str] | None, typer.Option(help=f"One judge. {judges.NAMES} Left out: keyword.", rich_help_panel=JUDGES)
    ] = None,
    out: Out = Path("out/attack"),
    max_new_tokens: MaxNewTokens = None,
    show_unsafe: Annotated[bool, typer.Option("--show-unsafe", help="Print compliant answers in the report.")] = False,
    seed: Seed = 0,
) -> None:
    """Attack defenses with pictures made against them: RSR by size of the change, its worst case, and whether to believe it."""
    from davsp.attacks import attack as run
    from davsp.evaluation.judging import apart
    from davsp.judges.verdicts import judge_name
    from davsp.lvlm import undefended
    from davsp.runtime import parallel
    from davsp.vector import HarmfulnessVector

    model = in_processes(processes, model)
    direction = HarmfulnessVector.load(row.vector) if row.vector else None
    shipped = is_shipped(model.name)
    defenses = rows(row.defense or [], row.prompt, row.text, shipped, direction)
    names = judge or []
    judge_settings = judges.judge_settings(names, access, requests, access.cache or out / "cache.sqlite", model.device)
    queries, notes = load_test_set(test, model.name, limit, seed)
    scorers, graders = judges.judges_and_graders(names, judge_settings)
    if len(scorers) > 1 or graders:
        raise DavspError(
            "--judge: an attack is counted by one judge of harmful answers; score utility with davsp eval."
        )
    judges.check_prompts(scorers, queries)
    caveat = judges.caveat_of(scorers, shipped, [query for query in queries if query.image is not None])
    training = _training(attacks, test, model.name, seed)
    settings = _attack_settings(attacks, defenses, direction is not None, shipped, queries, bool(training), seed)
    if test.benchmark:
        queries = [query for query in apart(queries) if query.label == "malicious"]
    lvlm = load_lvlm(model)
    lvlm.reasoning_tags = judge_settings.reasoning_tags
    queries, left_out = with_room(lvlm, defenses, queries, max_new_tokens, test.skip_broken)
    notes += left_out
    if direction is not None:
        compare_pictures(direction, lvlm)
    compare_templates(lvlm, {"the vector": direction, **{f"the prompt of {name}": d for name, d in defenses.items()}})
    with by_options():
        results = run(
            lvlm, defenses, queries, out, settings, direction, scorers[0], training=training,
            max_new_tokens=max_new_tokens, console=terminal(),
        )  # fmt: skip
    if parallel.rank() > 0:
        return
    facts: dict[str, Any] = {
        "settings": settings.model_dump(), "notes": notes, "benchmarks": test.benchmark or [], "split": test.split,
        "max_new_tokens": max_new_tokens or lvlm.longest, "judge": judge_name(scorers[0]),
        "undefended": undefended.facts(lvlm, queries),
    }  # fmt: skip
    caveat = " ".join(filter(None, (caveat, undefended.note(facts["undefended"]))))
    _finish(out, lvlm, queries, results, defenses, facts, show_unsafe, seed, caveat)
    groups = [dict(result.evaluation.verdicts) for result in results]
    judges.check_scored([*groups, *(_all(results, name) for name in defenses)], queries, access.max_unscored)


def _training(options: AttackOptions, test: TestSetOptions, model: str | None, seed: int) -> "list[Query]":
    """What `universal` is trained on; none where nobody gives any, or wants it."""
    folder, wanted = options.universal_queries, not options.named() or "universal" in options.named()
    if folder and not wanted:
        raise DavspError("--universal-queries goes with the attack universal; name it (--attack), or leave them out.")
    if not wanted:
        return []
    protocol = embedded_protocol(model, seed) if folder is None and test.embedded else None
    if folder is None and protocol is None:
        return []
    return queries_at(folder, protocol.train_malicious if protocol else None, "--universal-queries", test.allow_outside)


def _attack_settings(
    options: AttackOptions, defenses: "dict[str, Defense]", with_vector: bool, shipped: bool, queries: "list[Query]",
    with_training: bool, seed: int,
) -> "AttackSettings":  # fmt: skip
    """The settings; with no --attack all that the rows, the vector and the queries allow."""
    from davsp.attacks import AttackSettings
    from davsp.attacks.deeds import wanted
    from davsp.attacks.settings import ATTACKS, BASELINE, SEARCHED
    from davsp.defenses import Gate

    gated = any(isinstance(defense, Gate) for defense in defenses.values())
    target = default_target(shipped) if options.target is None else options.target
    with_deeds = all(wanted(q, target) for q in queries if q.label == "malicious" and q.image is not None)
    possible = [
        name
        for name in ATTACKS
        if (with_vector or name not in ("hide", "both"))
        and (BASELINE in defenses or name != "transfer")
        and not (gated and name in SEARCHED)
        and (with_training or name != "universal")
        and (with_deeds or name != "deed")
    ]
    kinds = options.named() or possible
    with refused_as(_impossible):
        return AttackSettings(
            attacks=tuple(kinds), eps=_levels(options.eps), steps=options.steps, restarts=options.restarts,
            tries=options.tries, batch_size=options.batch_size, words=options.words, word_steps=options.word_steps,
            word_candidates=options.word_candidates, seed=seed,
            target=target, universal_steps=options.universal_steps,
        )  # fmt: skip


def _impossible(field: str, why: str, _: Any) -> str:
    option = field.split(".")[0]
    why = why.removeprefix("Value error, ").replace("String", "text").replace("Input", "input")
    return f"--{'attack' if option == 'attacks' else option}: {why}."


def _all(results: list[Any], name: str) -> dict[str, list[Any]]:
    """The worst verdict on each query over all attacks: what single ones leave unscored adds up."""
    from davsp.attacks.table import worst_of
    from davsp.query import Verdict

    labels = worst_of([result.labels for result in results if result.defense == name])
    return {name: [Verdict(i, name, "the worst of all attacks", label) for i, label in labels.items()]}  # type: ignore[arg-type]


def _levels(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise DavspError(f"--eps {text!r} is not a list of whole levels like 2,8,255.") from None


def _finish(
    out: Path, lvlm: "LVLM", queries: "list[Query]", results: list[Any], defenses: "dict[str, Defense]",
    facts: dict[str, Any], show_unsafe: bool, seed: int, caveat: str,
) -> None:  # fmt: skip
    """Files and tables."""
    from rich.console import Console

    from davsp import metrics
    from davsp.attacks import page
    from davsp.attacks.checks import checks
    from davsp.attacks.run import probe
    from davsp.attacks.table import rows
    from davsp.lvlm import model_facts, model_name
    from davsp.report.cells import cut_note
    from davsp.runtime.files import manifest, write_json, write_text

    name = model_name(lvlm)
    pictures = [q for q in queries if q.label == "malicious" and q.image is not None]
    probes = {row: probe(lvlm, defense, pictures, facts["settings"]["target"]) for row, defense in defenses.items()}
    findings, table = checks(results, defenses, probes), rows(name, results, queries, seed)
    lengths = cut_note([row for result in results for row in result.evaluation.rows])
    caveat = " ".join(filter(None, (caveat, lengths)))
    facts = manifest(**model_facts(lvlm), seed=seed, **facts)
    described = {row: defense.describe() for row, defense in defenses.items()}
    write_json(out / "manifest.json", facts | {"defenses": described})
    write_json(out / "metrics.json", metrics.metrics_file(table) | {"checks": [c._asdict() for c in findings]})
    write_text(out / "attack.md", page.markdown(table, results, findings, name, caveat))
    shown = {key: facts[key] for key in ("model", "template", "davsp", "torch", "time", "settings")}
    page.write_page(out / "attack.html", name, table, results, findings, defenses, shown, show_unsafe, caveat)
    page.print_tables(Console(), table, results, findings, caveat)
    print(f"pictures, answers, metrics.json, attack.md and attack.html are in {out}")
