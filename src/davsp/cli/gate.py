"""`davsp gate`: the scores and thresholds by which a border is looked through."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from davsp.cli.evaluate import EngineOptions, lvlm_of, server_of
from davsp.cli.inputs import compare_templates, is_shipped, load_lvlm, say_where
from davsp.cli.options import ModelOptions, RequestOptions, Seed
from davsp.cli.testset import queries_at
from davsp.cli.train import direction_of
from davsp.errors import DavspError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from davsp.prompts.gate import Threshold
    from davsp.query import Query


def gate(
    prompt: Annotated[Path, typer.Argument(help="Folder of a border; gate.json goes into it.")],
    model: ModelOptions,
    engine: EngineOptions,
    requests: RequestOptions,
    vector: Annotated[
        Path | None, typer.Option(help="Folder that `davsp vector` wrote; left out: fitted, for a model that ships.")
    ] = None,
    malicious: Annotated[
        Path | None,
        typer.Option(help="Malicious queries that weigh the scores; the border was not trained on them."),
    ] = None,
    benign: Annotated[Path | None, typer.Option(help="Benign queries that weigh the scores.")] = None,
    held_malicious: Annotated[Path | None, typer.Option(help="Held-out malicious queries: what is caught.")] = None,
    held_benign: Annotated[
        Path | None, typer.Option(help="Held-out benign queries, like those that are served: they set the thresholds.")
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
    """Calibrate a border's gate: what it looks at, and above which score a query is refused."""
    from davsp import embedded
    from davsp.defenses.gate import calibrate, calibrate_served
    from davsp.defenses.gate.served import TOP
    from davsp.prompts import VisualSafetyPrompt
    from davsp.training import TrainSettings

    if not 0 < false_refusals < 1 or confidence == 1:
        raise DavspError("--false-refusals is above 0 and below 1, and --confidence below 1.")
    if not prompt.is_dir():
        raise DavspError(f"there is no folder {prompt}; give that of a border.")
    server = server_of(engine, model)
    border = VisualSafetyPrompt.from_pretrained(prompt)
    name = server[0] if server else model.name or border.config.get("model_id")
    shipped = is_shipped(name)
    fit = {"--malicious": malicious, "--benign": benign}
    if server and (vector or malicious or benign):
        raise DavspError(
            "--vector, --malicious and --benign go with a model loaded here: a server's one score has no weights to fit."
        )
    if not server and top_logprobs is not None:
        raise DavspError("--top-logprobs goes with --engine openai.")
    folders = ({} if server else fit) | {"--held-malicious": held_malicious, "--held-benign": held_benign}
    fit_bad, fit_good, held_bad, held_good = _queries(folders, name, shipped, seed, allow_outside)
    if not server and vector is None and not shipped:
        raise DavspError("--vector is needed for this model; make one with `davsp vector`.")
    text = refusal or (embedded.REFUSAL if shipped else TrainSettings().refusal)
    promise = false_refusals, confidence or None
    lines: dict[str, Threshold]
    if server:
        remote = lvlm_of(model, server, engine, requests)
        compare_templates(remote, {"the prompt": border})
        with _looking(held_bad, held_good) as progress:
            border.served = calibrate_served(
                remote, border, (held_bad, held_good), text, *promise, top_logprobs or TOP, progress=progress
            )
        file, lines = "gate_served.json", {"first": border.served.first}
    else:
        lvlm = load_lvlm(replace(model, name=name, revision=model.revision or border.config.get("revision")))
        say_where(lvlm)
        compare_templates(lvlm, {"the prompt": border})
        protocol = embedded.protocol(seed) if shipped else None
        direction = direction_of(vector, protocol, lvlm, border.text, "the prompt puts")
        with _looking(fit_bad, fit_good, held_bad, held_good) as progress:
            border.gate = calibrate(
                lvlm, border, direction, (fit_bad, fit_good), (held_bad, held_good), text, *promise, progress=progress
            )
        file, lines = "gate.json", {"states": border.gate.states, "first": border.gate.first}
    border.save_pretrained(prompt)
    _print(lines, *promise)
    where = " with the same --engine" if server else ""
    print(
        f"saved to {prompt / file}; `davsp eval --defense none --defense gate:first+davsp={prompt}`{where} measures it"
    )


def _queries(
    folders: "Mapping[str, Path | None]", name: str | None, shipped: bool, seed: int, allow_outside: bool
) -> "Sequence[list[Query]]":
    """Malicious and benign queries to fit on (none for a server), and held out: the user's own or those of a model that ships."""
    from davsp.embedded.data import calibration

    missing = [option for option, folder in folders.items() if folder is None]
    if 0 < len(missing) < len(folders):
        raise DavspError(f"the sets of queries go together; give {missing[0]}, too, or none of them.")
    if missing and not shipped:
        raise DavspError(f"queries are drawn for the models that ship alone; give your own ({', '.join(missing)}).")
    own = [queries_at(folder, None, option, allow_outside) for option, folder in folders.items() if folder is not None]
    return [[], [], *own][-4:] if own else calibration(seed)


@contextmanager
def _looking(*sets: "Sequence[Query]") -> "Iterator[Callable[[int], object]]":
    """A bar of the queries that were looked at."""
    from rich.console import Console

    from davsp.runtime.progress import bar

    with bar(Console(stderr=True)) as shown:
        task = shown.add_task("looking", total=sum(map(len, sets)))
        yield lambda count: shown.advance(task, count)


def _print(lines: "Mapping[str, Threshold]", rate: float, confidence: float | None) -> None:
    from rich.console import Console

    from davsp.prompts.gate import promise
    from davsp.runtime.table import TextTable

    table = TextTable(
        "look", "AUROC", "threshold", "benign refused", "malicious refused", title="gate, on the held-out queries",
        caption=f"made for at most {promise(rate, confidence)}",
    )  # fmt: skip
    for name, line in lines.items():
        refused = f"{line.refused_benign} of {line.benign}", f"{line.refused_malicious} of {line.malicious}"
        table.add_row(name, f"{line.auroc:.4f}", f"{line.threshold:.4g}", *refused)
    table.print(Console())
