"""`davsp import-published`: files that others have published or made by published code, in davsp's forms."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from davsp.cli.options import Out
from davsp.errors import DavspError

# What each option may go with; the others are for all.
ONLY = {"padding": "border", "form": "border", "mu_plus": "vector", "mu_minus": "vector", "text_part": "uniguard"}
FORMS = {"displayable": "clamped to [0, 1] and rounded to 8 bit", "exact": "kept as floats; it is no picture"}


def import_published(
    pt: Annotated[Path, typer.Argument(metavar="PT", help="A file of torch.save; no code in it is run.")],
    kind: Annotated[
        str | None,
        typer.Option(
            help="border, vector, or uniguard for its noise; left out: border or vector, by what the file holds."
        ),
    ] = None,
    out: Out = Path("out/published"),
    padding: Annotated[int | None, typer.Option(help="Of a border: its width in pixels; left out: 30.")] = None,
    form: Annotated[
        str | None,
        typer.Option(
            help="Of a border: displayable (clamped to a picture; the default) or exact (as it is, for training and Python only)."
        ),
    ] = None,
    text_part: Annotated[
        str | None,
        typer.Option(help="Of UniGuard: its own text, none (the default), fixed or optimised, as published."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Id of the model that it is of, to be written down.")] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="Of a prompt: the safety text that belongs before every question. Of a vector: the one that stood there; left out: not known."
        ),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Layer, of a border to be written down; of a vector, left out: 20, the authors'.")
    ] = None,
    mu_plus: Annotated[
        float | None, typer.Option(help="Of a vector: margin of malicious queries; left out: 27.")
    ] = None,
    mu_minus: Annotated[float | None, typer.Option(help="Of a vector: margin of benign queries; left out: -2.")] = None,
) -> None:
    """Bring a file of the authors' code (a border, the vector) or UniGuard's noise into davsp's form, and say what was measured."""
    if form not in (None, *FORMS):
        raise DavspError(f"--form is displayable or exact, not {form!r}.")
    kind = kind or _kind(pt)
    if kind not in ("border", "vector", "uniguard"):
        raise DavspError(f"--kind is border, vector or uniguard, not {kind!r}.")
    given = {"padding": padding, "form": form, "mu_plus": mu_plus, "mu_minus": mu_minus, "text_part": text_part}
    for name, value in given.items():
        if value is not None and ONLY[name] != kind:
            raise DavspError(
                f"--{name.replace('_', '-')} is for --kind {ONLY[name]}; {pt} is read as {kind}: leave it out."
            )
    if kind == "uniguard" and layer is not None:
        raise DavspError("--layer is of a border or a vector; UniGuard's noise has none: leave it out.")
    if kind == "border":
        _border(pt, out, 30 if padding is None else padding, form or "displayable", model, text or "", layer)
    elif kind == "vector":
        _vector(pt, out, layer, mu_plus, mu_minus, model, text)
    else:
        _noise(pt, out, text_part or "none", model, text or "")


def _kind(pt: Path) -> str:
    """A dictionary or a matrix is a vector, anything else is to be a border."""
    from torch import Tensor

    from davsp.runtime.files import read_torch

    found = read_torch(pt, "a border or a vector of the authors' code")
    return "vector" if isinstance(found, dict) or (isinstance(found, Tensor) and found.dim() == 2) else "border"


def _border(pt: Path, out: Path, padding: int, form: str, model: str | None, text: str, layer: int | None) -> None:
    from rich.console import Console

    from davsp.prompts.published import published_prompt, save_published
    from davsp.runtime.table import TextTable

    prompt, overshoot = published_prompt(pt, padding, form, model, text, layer)
    save_published(prompt, out)
    headings = ("channel", "values", "outside", "share", "largest", "mean")
    caption = "overshoot of those outside, in grey levels of 255"
    table = TextTable(*headings, title="border values outside [0, 1]", caption=caption)
    for row in overshoot:
        figures = f"{row.values}", f"{row.outside}", f"{row.share:.2%}", f"{row.largest:.2f}", f"{row.mean:.2f}"
        table.add_row(row.channel, *figures)
    table.print(Console())
    print(f"saved to {out}: {prompt.canvas} x {prompt.canvas} pixels, padding {padding}, {FORMS[form]}")


def _vector(
    pt: Path,
    out: Path,
    layer: int | None,
    mu_plus: float | None,
    mu_minus: float | None,
    model: str | None,
    text: str | None,
) -> None:
    from davsp.vector import HarmfulnessVector

    vector = HarmfulnessVector.from_published(pt, layer, mu_plus, mu_minus, model or "", text)
    vector.save(out)
    layers, width = vector.vectors.shape
    source = ", of the authors' training script" if (mu_plus, mu_minus) == (None, None) else ""
    print(
        f"saved to {out}: a unit direction of {width} numbers at layers 1 to {layers}; layer {layers + 1} is left out, as it was taken "
        f"after the final norm. Layer {vector.layer}, margins {vector.mu_plus:+g} / {vector.mu_minus:+g}{source}."
    )
    unknown = ["the model"] * (model is None) + ["the text before the questions"] * (text is None)
    print(f"Not in the file, so not known: {', '.join([*unknown, 'the queries and their projections'])}.")
    print(
        f"Their code asks by the template {vector.template}, pictures padded to a square in white; so it is written down."
    )


def _noise(pt: Path, out: Path, text_part: str, model: str | None, text: str) -> None:
    from davsp.defenses.uniguard import with_text_part
    from davsp.prompts.published import published_noise

    if text_part not in ("none", "fixed", "optimised"):
        raise DavspError(f"--text-part is none, fixed or optimised, not {text_part!r}.")
    noise, seen = published_noise(pt, model)
    with_text_part(noise, text, cast(Any, text_part)).save_pretrained(out)
    print(
        f"saved to {out}: {noise.canvas} x {noise.canvas} pixels; the bound as measured is {seen.bound:.4g}/255 (from {seen.lowest:+.4g} to "
        f"{seen.highest:+.4g}, {seen.below_zero:.1%} of the values below zero)"
    )
    if seen.lowest >= 0:
        print(
            "No value is below zero: the noise has been through a picture, which holds none, and its negative half is lost."
        )
