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
Canvas = Annotated[
    int | None, typer.Option(help="Side of the canvas in pixels, where the model takes many sizes (Qwen2-VL).")
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; left out: float32 on CPU, bfloat16 on a GPU.")
]
Quantization = Annotated[str | None, typer.Option(help="4bit or 8bit, by bitsandbytes on a GPU.")]
Processes = Annotated[
    int, typer.Option("--num-processes", min=1, help="Processes on this machine, a GPU each; the work is shared.")
]
