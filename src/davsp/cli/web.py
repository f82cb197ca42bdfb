"""`davsp app`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from davsp.cli.defenses import GRAMMAR, rows
from davsp.cli.inputs import is_embedded, load_lvlm, say
from davsp.cli.options import Canvas, Device, Dtype, Model, Quantization, Revision
from davsp.errors import DavspError

if TYPE_CHECKING:
    from davsp.app.compare import Comparison


def app(
    model: Model = None,
    prompt: Annotated[
        Path | None, typer.Option(help="Folder or hub id of a prompt; left out: the one that ships for davsp-mini.")
    ] = None,
    defense: Annotated[str | None, typer.Option(help=f"Another defense, as of davsp eval: {GRAMMAR}")] = None,
    vector: Annotated[
        Path | None,
        typer.Option(help="Folder that `davsp vector` wrote; left out: the one that ships, or no projections."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; another than this machine's own needs --token-env.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any that is free.")] = 7860,
    token_env: Annotated[
        str | None, typer.Option(help="Environment variable with the password of the page; left out: none.")
    ] = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    canvas: Canvas = None,
) -> None:
    """A page to try a defense in: a picture, a question, both answers side by side (docs/app.md). Keeps nothing."""
    from importlib.util import find_spec

    if missing := [name for name in ("gradio", "uvicorn") if find_spec(name) is None]:
        raise DavspError(f"{missing[0]} is not installed: pip install 'davsp[app]'.")
    from davsp.app import server
    from davsp.runtime import keys

    token = keys.read(token_env, "page")
    server.check(host, token)
    compared = _comparison(model, prompt, defense, vector, (revision, device, dtype, quantization, canvas))
    embedded = is_embedded(model)
    sock = server.listen(host, port)
    name = f"[{host}]" if ":" in host else host

    def page() -> object:
        from davsp.app.page import page as made

        return made(compared, embedded)

    with sock:
        server.serve(
            page, sock, token, lambda: say(f"open http://{name}:{sock.getsockname()[1]}/ in a browser; Ctrl-C ends it")
        )


def _comparison(
    model: str | None, prompt: Path | None, spec: str | None, vector: Path | None, loading: tuple
) -> "Comparison":
    """What the options name; what ships for the model where they name nothing."""
    from davsp import embedded
    from davsp.app.compare import Comparison, border_of, shipped_folder
    from davsp.defenses import VisualPrompt, load_defense
    from davsp.vector import HarmfulnessVector

    if prompt and spec:
        raise DavspError("give either --prompt or --defense: the one defense that the page shows.")
    shipped = shipped_folder(model or "davsp-mini")
    if not (prompt or spec or shipped):
        of = f"--model {model} "
        raise DavspError(
            f"no prompt ships for {model}: make one with `davsp train {of}--out out/prompt` and `davsp vector {of}--out "
            "out/vector`, then give --prompt out/prompt --vector out/vector."
        )
    lvlm, mini = load_lvlm(model, *loading), is_embedded(model)
    folder = vector or shipped
    found = HarmfulnessVector.load(folder) if folder else None
    if prompt:
        defense = load_defense(prompt)
    elif spec:
        defense = next(iter(rows([spec], None, None, own=mini, mini=mini, vector=found).values()))
    else:
        assert shipped is not None
        defense = VisualPrompt(border_of(shipped / "vsp.png"))
    compared = Comparison(lvlm, defense, found, 48 if mini else 256)
    compared.ask(*_first(lvlm.canvas, embedded.SAFETY_TEXT))  # the first answer is slow, and its time would mislead
    return compared


def _first(side: int, question: str) -> tuple:
    from PIL import Image

    return Image.new("RGB", (side, side), "white"), question
