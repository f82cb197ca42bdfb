"""`davsp attack`: pictures made against a defense by somebody who knows it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from davsp.cli import judges
from davsp.cli.defenses import GRAMMAR, rows
from davsp.cli.inputs import is_embedded, load_lvlm
from davsp.cli.options import (
    Benchmark,
    Cache,
    Canvas,
    Concurrency,
    Device,
    Dtype,
    JudgeKey,
    JudgeModel,
    JudgeUrl,
    MaxUnscored,
    Model,
    Out,
    Quantization,
    Queries,
    Revision,
    Seed,
    Split,
    Timeout,
)
from davsp.cli.testset import asked
from davsp.errors import DavspError, refused_as

KINDS = "noise, transfer, comply, hide, both, square, redraw, suffix, joint"


def attack(
    prompt: Annotated[
        Path | None, typer.Option(help="Folder or hub id of a prompt: adds the row davsp, or additive.")
    ] = None,
    defense: Annotated[
        list[str] | None,
        typer.Option(help=f"A row of the table, repeatable: {GRAMMAR} Left out: none, the safety text and --prompt."),
    ] = None,
    vector: Annotated[Path | None, typer.Option(help="Folder of the defender's vector; hide and both need it.")] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option("--attack", help=f"Repeatable: {KINDS}. Left out: all that can be run (docs/attack.md)."),
    ] = None,
    eps: Annotated[
        str,
        typer.Option(
            help="Largest changes of a pixel, in levels of 255, with commas; 255 is a picture without bounds."
        ),
    ] = "2,8,32,255",
    steps: Annotated[int, typer.Option(min=1, help="Gradients a picture and start.")] = 100,
    restarts: Annotated[int, typer.Option(min=1, help="Starts a picture: the clean one, then random ones.")] = 1,
    tries: Annotated[int, typer.Option(min=2, help="Losses a picture that square may ask for.")] = 500,
    words: Annotated[int, typer.Option(min=1, help="Tokens that suffix puts after the question.")] = 10,
    word_steps: Annotated[int, typer.Option(min=1, help="Changes of one token, of suffix.")] = 30,
    word_candidates: Annotated[int, typer.Option(min=1, help="Changes tried for each.")] = 64,
    target: Annotated[
        str | None, typer.Option(help="How the answer begins that the attacker wants, in the model's words.")
    ] = None,
    queries: Queries = None,
    benchmark: Benchmark = None,
    split: Split = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many of each set.")] = None,
    judge: Annotated[list[str] | None, typer.Option(help=f"One judge. {judges.NAMES} Left out: keyword.")] = None,
    out: Out = Path("out/attack"),
    model: Model = None,
    text: Annotated[str | None, typer.Option(help="Safety text of the row safety-text.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures attacked at a time.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 48,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    judge_key_env: JudgeKey = None,
    max_unscored: MaxUnscored = 0.02,
    concurrency: Concurrency = 8,
    timeout: Timeout = 300.0,
    cache: Cache = None,
    show_unsafe: Annotated[bool, typer.Option("--show-unsafe", help="Print compliant answers in the report.")] = False,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    canvas: Canvas = None,
    seed: Seed = 0,
) -> None:
    """Attack defenses with pictures made against them: RSR by size of the change, its worst case, and whether to believe it."""
    from rich.console import Console

    from davsp.attacks import AttackSettings
    from davsp.attacks import attack as run
    from davsp.attacks.settings import ATTACKS, BASELINE
    from davsp.evaluation.judging import apart
    from davsp.vector import HarmfulnessVector

    mini = is_embedded(model)
    defenses = rows(
        defense or [], prompt, text, own=not (queries or benchmark), mini=mini,
        vector=(direction := HarmfulnessVector.load(vector) if vector else None),
    )  # fmt: skip
    chosen = [name for part in kinds or [] for name in part.split(",")] or [
        name
        for name in ATTACKS
        if (direction is not None or name not in ("hide", "both")) and (BASELINE in defenses or name != "transfer")
    ]
    with refused_as(_impossible):
        settings = AttackSettings(
            attacks=tuple(chosen), eps=_levels(eps), steps=steps, restarts=restarts, tries=tries, batch_size=batch_size,
            words=words, word_steps=word_steps, word_candidates=word_candidates,
            seed=seed, target=_default_target(mini) if target is None else target,
        )  # fmt: skip
    how = judges.asking(
        judge or [], judge_url, judge_model, judge_key_env, None, concurrency=concurrency, timeout=timeout,
        cache=cache or out / "cache.sqlite", device=device, console=Console(stderr=True),
    )  # fmt: skip
    test, notes = asked(benchmark or [], split, queries, model, limit, seed, False)
    named, graders = judges.sorted_out(judge or [], how)
    if len(named) > 1 or graders:
        raise DavspError(
            "--judge: an attack is counted by one judge of harmful answers; score utility with davsp eval."
        )
    judges.fit(named, test)
    if benchmark:
        test = [query for query in apart(test) if query.label == "malicious"]
    lvlm = load_lvlm(model, revision, device, dtype, quantization, canvas)
    console = Console(stderr=True)
    done = run(
        lvlm, defenses, test, out, settings, direction, named[0], max_new_tokens=max_new_tokens, console=console
    )  # fmt: skip
    facts = {"settings": settings.model_dump(), "notes": notes, "benchmarks": benchmark or [], "split": split}
    _finish(out, lvlm, test, done, defenses, facts, show_unsafe, seed)
    said = [dict(one.evaluation.verdicts) for one in done]
    judges.check([*said, *(_all(done, name) for name in defenses)], test, max_unscored)


def _all(done: list[Any], name: str) -> dict[str, list[Any]]:
    """The worst verdict on each query over all attacks: what single ones leave unscored adds up."""
    from davsp.attacks.table import worst_of
    from davsp.query import Verdict

    found = worst_of([one.labels for one in done if one.defense == name])
    return {name: [Verdict(i, name, "the worst of all attacks", label) for i, label in found.items()]}  # type: ignore[arg-type]


def _default_target(mini: bool) -> str:
    """How the models that ship begin when they comply; else the usual words of the field."""
    from davsp.attacks import AttackSettings
    from davsp.embedded.budgets import TOKENS

    return str(TOKENS["target"] if mini else AttackSettings.model_fields["target"].default)


def _impossible(field: str, why: str, _: Any) -> str:
    option = field.split(".")[0]
    why = why.removeprefix("Value error, ").replace("String", "text").replace("Input", "input")
    return f"--{'attack' if option == 'attacks' else option}: {why}."


def _levels(given: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in given.split(","))
    except ValueError:
        raise DavspError(f"--eps {given!r} is not a list of whole levels like 2,8,255.") from None


def _finish(
    out: Path, lvlm: Any, test: list[Any], done: list[Any], defenses: dict[str, Any], given: dict[str, Any],
    show_unsafe: bool, seed: int,
) -> None:  # fmt: skip
    """Files and tables."""
    from rich.console import Console

    from davsp import metrics
    from davsp.attacks import page
    from davsp.attacks.checks import checks
    from davsp.attacks.run import probe
    from davsp.attacks.table import rows
    from davsp.lvlm import fingerprint, model_name
    from davsp.runtime.files import manifest, write_json, write_text

    name = model_name(lvlm)
    asked = [q for q in test if q.label == "malicious" and q.image is not None]
    probes = {one: probe(lvlm, d, asked, given["settings"]["target"]) for one, d in defenses.items()}
    found, table = checks(done, defenses, probes), rows(name, done, test, seed)
    facts = manifest(model=name, revision=lvlm.revision, weights=fingerprint(lvlm), seed=seed, **given)
    described = {one: d.describe() for one, d in defenses.items()}
    write_json(out / "manifest.json", facts | {"defenses": described})
    write_json(out / "metrics.json", metrics.metrics_file(table) | {"checks": [c._asdict() for c in found]})
    write_text(out / "attack.md", page.markdown(table, done, found, name))
    shown = {key: facts[key] for key in ("model", "davsp", "torch", "time", "settings")}
    page.write_page(out / "attack.html", name, table, done, found, defenses, shown, show_unsafe)
    page.print_tables(Console(), table, done, found)
    print(f"pictures, answers, metrics.json, attack.md and attack.html are in {out}")
