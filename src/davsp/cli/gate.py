"""`davsp gate`: the scores and thresholds by which a border, a safety text or nothing is looked through."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from davsp.cli.engine import EngineOptions, lvlm_of, server_of
from davsp.cli.inputs import (
    compare_templates,
    direction_of,
    in_processes,
    is_shipped,
    load_lvlm,
    safety_text,
    say_where,
    terminal,
)
from davsp.cli.options import ModelOptions, ProcessOptions, RequestOptions, Seed
from davsp.cli.testset import queries_at
from davsp.errors import DavspError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from davsp.defenses import Defense
    from davsp.embedded.data import Protocol
    from davsp.lvlm import LVLM, AnsweringLVLM
    from davsp.prompts import VisualSafetyPrompt
    from davsp.prompts.gate import Calibration, Served
    from davsp.query import Query
    from davsp.vector import HarmfulnessVector

    Classes = tuple[list[Query], list[Query]]  # malicious, benign


def gate(
    prompt: Annotated[
        Path,
        typer.Argument(
            help="Folder of a border, beside which gate.json is put; with --look one of its own, made if missing."
        ),
    ],
    model: ModelOptions,
    engine: EngineOptions,
    requests: RequestOptions,
    processes: ProcessOptions,
    look: Annotated[
        str | None,
        typer.Option(
            help="What the gate looks through without a border: none, or text. Left out: the border in the folder."
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="With --look text: the safety text; left out: of a model that ships.")
    ] = None,
    score: Annotated[
        str,
        typer.Option(help="Of first: both, projection and likelihood of a refusal weighed together, or refusal alone."),
    ] = "both",
    vector: Annotated[
        Path | None, typer.Option(help="Folder that `davsp vector` wrote; left out: fitted, for a model that ships.")
    ] = None,
    malicious: Annotated[
        Path | None, typer.Option(help="Malicious queries that weigh the scores; the border was not trained on them.")
    ] = None,
    benign: Annotated[Path | None, typer.Option(help="Benign queries that weigh the scores.")] = None,
    held_malicious: Annotated[Path | None, typer.Option(help="Held-out malicious queries: what is caught.")] = None,
    held_benign: Annotated[
        Path | None, typer.Option(help="Held-out benign queries, like those that are served: they set the thresholds.")
    ] = None,
    draw: Annotated[
        int | None,
        typer.Option(min=1, help="Held-out queries a class that are drawn for a model that ships; left out: 600."),
    ] = None,
    false_refusals: Annotated[
        float, typer.Option(min=0, max=1, help="Share of benign queries that may be refused.")
    ] = 0.005,
    confidence: Annotated[
        float, typer.Option(min=0, max=1, help="How sure that is to be; 0: on average over calibration sets.")
    ] = 0.95,
    refusal: Annotated[
        str | None,
        typer.Option(help="Whose likelihood is a score, and what the gate says; left out: as in davsp train."),
    ] = None,
    top_logprobs: Annotated[
        int | None,
        typer.Option(min=1, help="With --engine openai: likeliest tokens that the server is asked for; left out: 20."),
    ] = None,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Take pictures from outside the folder of a file of queries, too.")
    ] = False,
    seed: Seed = 0,
) -> None:
    """Calibrate a gate: what it looks at, and above which score a query is refused."""
    from davsp import embedded
    from davsp.defenses import VisualPrompt
    from davsp.defenses.gate import check_sets
    from davsp.runtime import parallel
    from davsp.training import TrainSettings
    from davsp.vector import HarmfulnessVector

    server = server_of(engine, model, processes.num_processes)
    own = {"--malicious": malicious, "--benign": benign}
    held_own = {"--held-malicious": held_malicious, "--held-benign": held_benign}
    _check_options(server, engine.extra_body, score, vector, own, refusal, top_logprobs)
    if not 0 < false_refusals < 1 or confidence == 1:
        raise DavspError("--false-refusals is above 0 and below 1, and --confidence below 1.")
    model = in_processes(processes, model)
    border = _border(prompt, look, text)
    made: dict[str, Any] = border.config if border else {}
    name = server[0] if server else model.name or made.get("model_id")
    shipped = is_shipped(name)
    if not server and vector is None and not shipped:
        raise DavspError("--vector is needed for this model; make one with `davsp vector`.")
    inner = VisualPrompt(border) if border else _bare(prompt, look, text, shipped)
    weighed = not server and score == "both"
    fit, held = _queries((own if weighed else {}) | held_own, shipped, seed, allow_outside, draw)
    weigh, promise = fit if weighed else None, (false_refusals, confidence or None)
    check_sets(weigh, held, *promise)
    given = HarmfulnessVector.load(vector) if vector else None
    says = refusal or (embedded.REFUSAL if shipped else TrainSettings().refusal)
    file: Calibration | Served
    if server:
        lvlm: Any = lvlm_of(model, server, engine, requests)
        compare_templates(lvlm, {"the prompt": border})
        file = _of_server(lvlm, inner, held, says, promise, top_logprobs)
    else:
        lvlm = load_lvlm(replace(model, name=name, revision=model.revision or made.get("revision")))
        say_where(lvlm)
        compare_templates(lvlm, {"the prompt": border})
        file = _of_model(lvlm, inner, given, embedded.protocol(seed) if shipped else None, weigh, held, says, promise)
    if parallel.rank() > 0:
        return
    saved = _save(prompt, border, file)
    _print(file)
    where = " with the same --engine" if server else ""
    print(
        f"saved to {saved}; `davsp eval --defense none --defense gate:first+{inner.name}={prompt}`{where} measures it"
    )


def _check_options(
    server: tuple[str, list[str]] | None, extra_body: list[str] | None, score: str, vector: Path | None,
    own: "Mapping[str, Path | None]", refusal: str | None, top_logprobs: int | None,
) -> None:  # fmt: skip
    """Raise DavspError if options do not go together."""
    if score not in ("both", "refusal"):
        raise DavspError(f"--score {score!r} is not known: choose both or refusal.")
    if refusal is not None and not refusal.strip():
        raise DavspError("--refusal is blank: give the words of a refusal, or leave it out.")
    if not server:
        if score == "refusal" and any(own.values()):
            raise DavspError(
                "--malicious and --benign weigh the two scores, and --score refusal has one; leave them out."
            )
        if top_logprobs is not None:
            raise DavspError("--top-logprobs goes with --engine openai.")
        return
    if len(server[1]) > 1 or extra_body:
        raise DavspError(
            "a gate is calibrated on one server, asked as davsp serve asks it: give one --base-url, no --extra-body."
        )
    if vector or any(own.values()) or score != "both":
        raise DavspError(
            "--vector, --score, --malicious and --benign go with a model loaded here: a server's one score has no weights to fit."
        )


def _of_model(
    lvlm: "LVLM", inner: "Defense", given: "HarmfulnessVector | None", protocol: "Protocol | None", weigh: "Classes | None",
    held: "Classes", says: str, promise: "tuple[float, float | None]",
) -> "Calibration":  # fmt: skip
    """Thresholds on a model that is loaded here."""
    from davsp.defenses.gate import calibrate
    from davsp.defenses.gate.through import seen_through

    inner.check(lvlm)  # before a vector is fitted
    _, (text, *_) = seen_through(inner)
    direction = direction_of(given, protocol, lvlm, text, "the gate puts")
    with _looking(*(weigh or ()), *held) as progress:
        return calibrate(lvlm, inner, direction, weigh, held, says, *promise, progress=progress)


def _of_server(
    lvlm: "AnsweringLVLM", inner: "Defense", held: "Classes", says: str, promise: "tuple[float, float | None]", top: int | None
) -> "Served":  # fmt: skip
    """The threshold on a server, by so many of its likeliest tokens."""
    from davsp.defenses.gate import calibrate_served
    from davsp.defenses.gate.served import TOP

    with _looking(*held) as progress:
        return calibrate_served(lvlm, inner, held, says, *promise, top or TOP, progress=progress)


def _border(folder: Path, look: str | None, text: str | None) -> "VisualSafetyPrompt | None":
    """The border that is looked through; None: there is none.

    Raises:
        DavspError: the folder holds one where none is looked through, or none where one is; an option that does not go with that.
    """
    from davsp.defenses.load import LOADERS
    from davsp.prompts import VisualSafetyPrompt
    from davsp.prompts.border import CONFIG

    if look not in (None, "none", "text"):
        raise DavspError(
            f"--look {look!r} is not known: choose none or text; left out, the gate looks through the border."
        )
    if text is not None and look != "text":
        raise DavspError("--text goes with --look text: a border has its own.")
    if look is None:
        if not folder.is_dir():
            raise DavspError(f"there is no folder {folder}; give that of a border, or --look none or text.")
        if not (folder / CONFIG).exists():
            raise DavspError(
                f"{folder} holds no border ({CONFIG} is not there); give the folder of one, or --look none or text for a gate without."
            )
        return VisualSafetyPrompt.from_pretrained(folder)
    if folder.exists() and not folder.is_dir():
        raise DavspError(f"{folder} is no folder; give one of the gate's own.")
    if other := [name for name in LOADERS if (folder / name).exists()]:
        raise DavspError(
            f"{folder} holds another defense ({other[0]}); a gate without a border has a folder of its own."
        )
    return None


def _bare(folder: Path, look: str | None, text: str | None, shipped: bool) -> "Defense":
    """What is looked through without a border.

    Raises:
        DavspError: there is no text, or the folder has thresholds of another look.
    """
    from davsp.defenses import NoDefense, SafetyText
    from davsp.defenses.gate import read_alone
    from davsp.defenses.gate.through import seen_through
    from davsp.defenses.load import holds_gate

    words = safety_text(text, shipped) if look == "text" else ""
    if look == "text" and not words.strip():
        raise DavspError("--look text needs a text for this model: --text TEXT.")
    inner: Defense = SafetyText(words) if words else NoDefense()
    if holds_gate(folder) and seen_through(read_alone(folder).inner) != seen_through(inner):
        raise DavspError(
            f"{folder} holds a gate that looks through another text or none; give this one another folder."
        )
    return inner


def _save(folder: Path, border: "VisualSafetyPrompt | None", file: "Calibration | Served") -> Path:
    """Put the thresholds beside the border, or into their own folder; the path of the file."""
    from davsp.prompts.gate import FILE, SERVED, Calibration
    from davsp.runtime.files import write_all

    name = FILE if isinstance(file, Calibration) else SERVED
    if border is None:
        write_all(folder, {name: file.contents()})
        return folder / name
    if isinstance(file, Calibration):
        border.gate = file
    else:
        border.served = file
    border.save_pretrained(folder)
    return folder / name


def _queries(
    folders: "Mapping[str, Path | None]", shipped: bool, seed: int, allow_outside: bool, draw: int | None
) -> "tuple[Classes, Classes]":
    """Queries to fit on (none where no folder is for them), and held out: the user's own, or drawn for a model that ships."""
    from davsp.embedded.data import calibration

    missing = [option for option, folder in folders.items() if folder is None]
    if 0 < len(missing) < len(folders):
        raise DavspError(f"the sets of queries go together; give {missing[0]}, too, or none of them.")
    if missing and not shipped:
        raise DavspError(f"queries are drawn for the models that ship alone; give your own ({', '.join(missing)}).")
    own = [queries_at(folder, None, option, allow_outside) for option, folder in folders.items() if folder is not None]
    if own and draw:
        raise DavspError("--draw is for queries that are drawn; leave it out, or your own queries.")
    *fit, held_bad, held_good = own or calibration(seed, draw or 600)
    bad, good = fit or ([], [])
    return (bad, good), (held_bad, held_good)


@contextmanager
def _looking(*sets: "Sequence[Query]") -> "Iterator[Callable[[int], object]]":
    """A bar of the queries that were looked at."""
    from davsp.runtime.progress import bar

    with bar(terminal()) as shown:
        task = shown.add_task("looking", total=sum(map(len, sets)))
        yield lambda count: shown.advance(task, count)


def _print(file: "Calibration | Served") -> None:
    from rich.console import Console

    from davsp.prompts.gate import promise
    from davsp.runtime.table import TextTable

    table = TextTable(
        "look", "AUROC", "threshold", "benign refused", "malicious refused", title="gate, on the held-out queries",
        caption=f"made for at most {promise(file.rate, file.confidence)}",
    )  # fmt: skip
    for name, line in file.lines().items():
        refused = f"{line.refused_benign} of {line.benign}", f"{line.refused_malicious} of {line.malicious}"
        table.add_row(name, f"{line.auroc:.4f}", f"{line.threshold:.4g}", *refused)
    table.print(Console())
