"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str | None, typer.Option(help="Folder or hub id of the LVLM; left out: the embedded davsp-mini.")]
Revision = Annotated[str | None, typer.Option(help="Hub branch, tag or commit of the model.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, auto; left out: a GPU if there is one.")]
Malicious = Annotated[
    Path | None, typer.Option(help="Folder or .jsonl of malicious queries; left out: the embedded protocol's.")
]
Benign = Annotated[
    Path | None, typer.Option(help="Folder or .jsonl of benign queries; left out: the embedded protocol's.")
]
Out = Annotated[Path, typer.Option(help="Folder to write into.")]
Seed = Annotated[int, typer.Option(help="Seed of all random choices.")]
