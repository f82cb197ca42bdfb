"""`davsp mini`: how the small vision-language model that ships is made, and its data."""

from pathlib import Path
from typing import Annotated

import typer

from davsp.cli.groups import add
from davsp.cli.options import Out, Seed

app = typer.Typer(no_args_is_help=True, help="The small vision-language model that ships: how it is made, its data.")


def train(
    out: Annotated[Path | None, typer.Option(help="Folder to write into; left out: out/mini, or out/MODEL.")] = None,
    model: Annotated[
        str, typer.Option(help="davsp-mini, or a sibling: davsp-mini-narrow (LLaVA), davsp-mini-qwen (Qwen2-VL).")
    ] = "davsp-mini",
    stage: Annotated[
        str | None,
        typer.Option(
            help="Only one: tower, words, read, place, bridge, joint, sight, skills (siblings: see, speak, look, join, sight, skills), "
            "or card; left out: what is missing."
        ),
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Where the finished model goes; left out: OUT/MODEL.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Seed = 0,
    start: Annotated[
        Path | None,
        typer.Option(help="A finished davsp-mini: only the stages from sight on are run, from its weights."),
    ] = None,
) -> None:
    """Train davsp-mini or a sibling from nothing, in resumable stages, measure it and write its card."""
    from davsp.embedded.make import make
    from davsp.lvlm import check_device

    check_device(device)
    out = out or Path("out") / ("mini" if model == "davsp-mini" else model)
    make(out, folder or out / model, stage, device, seed, start, model)


def data(out: Out = Path("out/data"), seed: Seed = 0) -> None:
    """Write the embedded protocol as folders of queries, in the form in which your own data is read."""
    from dataclasses import fields

    from davsp.benchmarks.custom import save_queries
    from davsp.embedded.data import protocol

    parts = protocol(seed)
    for field in fields(parts):
        save_queries(out / field.name, getattr(parts, field.name))
        print(f"{out / field.name}: {len(getattr(parts, field.name))} queries")


add(app, train)
add(app, data)
