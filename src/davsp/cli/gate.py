"""`davsp gate`: the scores and thresholds by which a border is looked through."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from davsp.cli.inputs import is_shipped, load_lvlm
from davsp.cli.options import ModelOptions, Seed
from davsp.cli.testset import queries_at
from davsp.cli.train import direction_of
from davsp.errors import DavspError

if TYPE_CHECKING:
    from davsp.prompts.gate import Calibration


def gate(
    prompt: Annotated[Path, typer.Argument(help="Folder of a border; gate.json goes into it.")],
    model: ModelOptions,
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
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Take pictures from outside the folder of a file of queries, too.")
    ] = False,
    seed: Seed = 0,
) -> None:
    """Calibrate a border's gate: what it looks at, and above which score a query is refused."""
    from rich.console import Console

    from davsp import embedded
    from davsp.defenses.gate import calibrate
    from davsp.embedded.data import calibration
    from davsp.prompts import VisualSafetyPrompt
    from davsp.runtime.progress import bar
    from davsp.training import TrainSettings

    if not 0 < false_refusals < 1 or confidence == 1:
        raise DavspError("--false-refusals is above 0 and below 1, and --confidence below 1.")
    if not prompt.is_dir():
        raise DavspError(f"there is no folder {prompt}; give that of a border.")
    folders = {
        "--malicious": malicious, "--benign": benign, "--held-malicious": held_malicious, "--held-benign": held_benign,
    }  # fmt: skip
    missing = [name for name, folder in folders.items() if folder is None]
    if 0 < len(missing) < 4:
        raise DavspError(f"the four sets of queries go together; give {missing[0]}, too, or none of them.")
    border = VisualSafetyPrompt.from_pretrained(prompt)
    name = model.name or border.config.get("model_id")
    shipped = is_shipped(name)
    if missing and not shipped:
        raise DavspError(f"queries are drawn for the models that ship alone; give your own ({', '.join(missing)}).")
    if vector is None and not shipped:
        raise DavspError("--vector is needed for this model; make one with `davsp vector`.")
    own = [queries_at(folder, None, option, allow_outside) for option, folder in folders.items() if folder is not None]
    fit_bad, fit_good, held_bad, held_good = own or calibration(seed)
    lvlm = load_lvlm(replace(model, name=name, revision=model.revision or border.config.get("revision")))
    direction = direction_of(vector, embedded.protocol(seed) if shipped else None, lvlm, border.text, "the prompt puts")
    text = refusal or (embedded.REFUSAL if shipped else TrainSettings().refusal)
    with bar(Console(stderr=True)) as shown:
        task = shown.add_task("looking", total=sum(map(len, (fit_bad, fit_good, held_bad, held_good))))
        border.gate = calibrate(
            lvlm, border, direction, (fit_bad, fit_good), (held_bad, held_good), text, false_refusals, confidence or None,
            progress=lambda count: shown.advance(task, count),
        )  # fmt: skip
    border.save_pretrained(prompt)
    _print(border.gate)
    print(
        f"saved to {prompt / 'gate.json'}; `davsp eval --defense none --defense gate:first+davsp={prompt}` measures it"
    )


def _print(calibration: "Calibration") -> None:
    from rich.console import Console

    from davsp.runtime.table import TextTable

    sure = f", with {calibration.confidence:.0%} confidence" if calibration.confidence else " on average"
    table = TextTable(
        "look", "AUROC", "threshold", "benign refused", "malicious refused", title="gate, on the held-out queries",
        caption=f"made for at most {calibration.rate:.2%} of benign queries{sure}",
    )  # fmt: skip
    for name, line in (("states", calibration.states), ("first", calibration.first)):
        refused = f"{line.refused_benign} of {line.benign}", f"{line.refused_malicious} of {line.malicious}"
        table.add_row(name, f"{line.auroc:.4f}", f"{line.threshold:.4g}", *refused)
    table.print(Console())
