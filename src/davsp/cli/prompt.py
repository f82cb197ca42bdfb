"""`davsp apply`, `davsp info`, `davsp card` and `davsp push`: what one does with a finished prompt."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from davsp.cli.canaries import Canaries, candidates_of, describe, own_queries, try_canaries, with_canaries
from davsp.cli.inputs import compare_templates, is_shipped, load_lvlm, say
from davsp.cli.options import ModelOptions
from davsp.errors import DavspError


def apply(
    image: Annotated[Path, typer.Argument(help="A picture.")],
    prompt: Annotated[Path, typer.Option(help="Folder or hub id of a prompt.")],
    out: Annotated[Path, typer.Option(help="Where to write the defended canvas; must end in .png.")] = Path(
        "out/defended.png"
    ),
) -> None:
    """Put a prompt around a picture and write the finished canvas as a lossless PNG."""
    import io

    from davsp.prompts import load_prompt
    from davsp.query import open_picture
    from davsp.runtime.files import write_bytes

    if out.suffix.lower() != ".png":
        raise DavspError(f"--out {out} must end in .png: other formats would change the border's pixels.")
    loaded, buffer = load_prompt(prompt), io.BytesIO()
    loaded.image(open_picture(image)).save(buffer, "PNG")
    write_bytes(out, buffer.getvalue())
    note = f"{out}: {loaded.canvas} x {loaded.canvas} pixels; ask with this text before the question: {loaded.text!r}"
    if (loaded.separator, loaded.suffix) != (" ", ""):
        note += f", {loaded.separator!r} between them, and {loaded.suffix!r} after it"
    print(note)


def info(
    prompt: Annotated[
        Path, typer.Argument(help="Folder or hub id of a prompt, or folder of a pool, of PAT's tokens or of a gate.")
    ],
) -> None:
    """What a prompt is: model, sizes, layer, margins, text, data hashes, figures. Checks the files' hashes and each against the others."""
    from rich.console import Console
    from rich.text import Text

    from davsp.defenses.adashield_a.pool import CONFIG as POOL
    from davsp.defenses.adashield_a.pool import Pool
    from davsp.defenses.gate import read_alone
    from davsp.defenses.load import holds_gate
    from davsp.defenses.pat.defense import CONFIG, PAT
    from davsp.prompts import VisualSafetyPrompt, load_prompt, saved_files
    from davsp.runtime.table import TextTable

    if (prompt / POOL).exists():
        pool = Pool.load(prompt)
        pool.table().print(Console())
        print(f"{pool.summary()}; beta {pool.config.beta}, keys by {pool.config.encoder['kind']}")
        return
    if (prompt / CONFIG).exists():
        Console().print_json(data=PAT.load(prompt).config.model_dump())
        return
    if holds_gate(prompt):
        print(read_alone(prompt).described())
        return
    loaded = load_prompt(prompt)
    table = TextTable("field", "value", right=False, frame=False)
    for name, value in loaded.config.items():
        if name == "measured":
            continue
        if isinstance(value, dict):
            for inner, v in value.items():
                table.add_row(f"{name}.{inner}", Text(f"{v:.4g}" if isinstance(v, float) else str(v)))
        else:
            table.add_row(name, Text(f"{value:.4g}" if isinstance(value, float) else str(value)))
    table.print(Console())
    if measured := loaded.config.get("measured"):
        _print_measured(measured)
    agree = {
        "border": "configuration, tensor and picture are of one prompt, every value in [0, 1]",
        "additive": "configuration and tensor are of one prompt, every value within eps",
        "exact": "configuration and tensor are of one prompt, every value finite; it is no picture",
    }
    for name, state in saved_files(prompt):
        print(f"{name}: {state}")
    if isinstance(loaded, VisualSafetyPrompt) and loaded.canaries is not None:
        print(describe(loaded))
    if isinstance(loaded, VisualSafetyPrompt) and loaded.gate is not None:
        print(loaded.gate.described())
    if isinstance(loaded, VisualSafetyPrompt) and loaded.served is not None:
        print(loaded.served.described())
    print(f"files agree: {agree[loaded.kind]}")


def _print_measured(measured: dict[str, Any]) -> None:
    """The table that the card has."""
    from rich.console import Console
    from rich.text import Text

    from davsp.prompts.measured import with_interval
    from davsp.runtime.table import TextTable

    at = f" at {measured['revision']}" if measured["revision"] else ""
    judges = ", ".join(measured["judges"]) or "their words"
    headings = ("benchmark", "figure", "n", "no defense", "this prompt", "difference")
    title = f"measured on {measured['model']}{at}, {measured['queries']} queries, judged by {judges}"
    table = TextTable(*headings, keys=2, title=title)
    for row in measured["figures"]:
        values = with_interval(row["without"]), with_interval(row["value"]), with_interval(row["difference"], sign=True)
        table.add_row(*map(Text, (row["benchmark"], row["metric"], str(row["n"]), *values)))
    table.print(Console())
    if measured["max_new_tokens"]:
        print(f"answers were cut after {measured['max_new_tokens']} tokens")
    if measured["undefended"]:
        print(measured["undefended"])
    for name, digest in measured["files"].items():
        print(f"of the run, {name}: SHA-256 {digest}")


def card(
    prompt: Annotated[Path, typer.Argument(help="Folder of a border.")],
    model: ModelOptions,
    run: Annotated[
        Path | None, typer.Option(help="Folder of a finished davsp eval or davsp demo with this prompt in it.")
    ] = None,
    canaries: Canaries = None,
) -> None:
    """Put the figures of a run that measured a border on its card and into its configuration, and canaries beside it if it has none.

    The canaries are asked of --model; left out: the model that the border was trained on.
    """
    from davsp.prompts import VisualSafetyPrompt

    if not prompt.is_dir():
        raise DavspError(f"there is no folder {prompt}; give that of a border.")
    own = own_queries(canaries)
    border = VisualSafetyPrompt.from_pretrained(prompt)
    if run is not None:
        border = border.measured(run)
        border.save_pretrained(prompt)
        print(f"{prompt / 'README.md'}: {len(border.config['measured']['figures'])} figures of {run}")
    name = model.name or border.config.get("model_id")
    shipped = name is not None and is_shipped(name)
    if own is None and (border.canaries is not None or (run is not None and not shipped)):
        return
    if name is None:
        raise DavspError(f"{prompt} names no model to ask for canaries; give one (--model).")
    queries = candidates_of(own, shipped)
    lvlm = load_lvlm(replace(model, name=name, revision=model.revision or border.config.get("revision")))
    compare_templates(lvlm, {"the prompt": border})
    watched = with_canaries(border, lvlm, queries) if run is None else try_canaries(border, lvlm, queries, shipped)
    if watched:
        watched.save_pretrained(prompt)
        print(describe(watched))


def push(
    prompt: Annotated[Path, typer.Argument(help="Folder of a border.")],
    repo: Annotated[str, typer.Argument(help="USER/NAME on the hub; made if it is not there.")],
    license: Annotated[str | None, typer.Option(help="To publish it under, such as apache-2.0.")] = None,
    branch: Annotated[str | None, typer.Option(help="To put it on; made if it is not there. Left out: main.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Publish a border on the Hugging Face hub, with its card; the key is the one of `hf auth login`, or HF_TOKEN."""
    from davsp.prompts import VisualSafetyPrompt

    loaded = VisualSafetyPrompt.from_pretrained(prompt)
    if "measured" not in loaded.config:
        say(f"note: no run has measured it, and its card will say so; davsp card {prompt} --run RUN mends that.")
    print(loaded.push_to_hub(repo, license=license, revision=branch, private=private or None))
