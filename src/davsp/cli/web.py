"""`davsp app`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from davsp.cli.defenses import rows
from davsp.cli.inputs import compare_pictures, compare_templates, is_shipped, load_lvlm, say
from davsp.cli.options import GRAMMAR, ModelOptions
from davsp.errors import DavspError

if TYPE_CHECKING:
    from davsp.app.compare import Comparison


def app(
    model: ModelOptions,
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
) -> None:
    """A page to try a defense in: a picture, a question, both answers side by side (docs/app.md). Keeps nothing."""
    from importlib.util import find_spec

    if missing := [name for name in ("gradio", "uvicorn") if find_spec(name) is None]:
        raise DavspError(f"{missing[0]} is not installed: pip install 'davsp[app]'.")
    from davsp.app import server
    from davsp.runtime import keys

    token = keys.read(token_env, "page")
    server.check(host, token)
    compared = _comparison(model, prompt, defense, vector)
    shipped = is_shipped(model.name)
    sock = server.listen(host, port)
    name = f"[{host}]" if ":" in host else host

    def page() -> object:
        from davsp.app.page import page as build

        return build(compared, shipped)

    with sock:
        server.serve(
            page, sock, token, lambda: say(f"open http://{name}:{sock.getsockname()[1]}/ in a browser; Ctrl-C ends it")
        )


def _comparison(model: ModelOptions, prompt: Path | None, spec: str | None, folder: Path | None) -> "Comparison":
    """What the options name; what ships for the model where they name nothing."""
    from davsp import embedded
    from davsp.app.compare import Comparison, border_of, shipped_folder
    from davsp.defenses import VisualPrompt, load_defense
    from davsp.vector import HarmfulnessVector

    if prompt and spec:
        raise DavspError("give either --prompt or --defense: the one defense that the page shows.")
    shelf = shipped_folder(model.name or "davsp-mini")
    if not (prompt or spec or shelf):
        of = f"--model {model.name} "
        raise DavspError(
            f"no prompt ships for {model.name}: make one with `davsp train {of}--out out/prompt` and `davsp vector {of}--out "
            "out/vector`, then give --prompt out/prompt --vector out/vector."
        )
    lvlm, shipped = load_lvlm(model), is_shipped(model.name)
    folder = folder or shelf
    vector = HarmfulnessVector.load(folder) if folder else None
    if prompt:
        defense = load_defense(prompt)
    elif spec:
        defense = next(iter(rows([spec], None, None, shipped, vector).values()))
    else:
        assert shelf is not None
        defense = VisualPrompt(border_of(shelf / "vsp.png"))
    compare_pictures(vector, lvlm)
    compare_templates(lvlm, {"the vector": vector, "the prompt": defense})
    compared = Comparison(lvlm, defense, vector)
    compared.ask(*_first(lvlm.canvas, embedded.SAFETY_TEXT))  # the first answer is slow, and its time would mislead
    return compared


def _first(side: int, question: str) -> tuple:
    from PIL import Image

    return Image.new("RGB", (side, side), "white"), question
