"""`davsp corruptions`: what is left of a border's effect when the canvas is changed on its way to the model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from davsp.cli.inputs import compare_pictures, compare_templates, in_processes, is_shipped, load_lvlm, terminal
from davsp.cli.judges import warn_of_keyword
from davsp.cli.options import Limit, MaxNewTokens, ModelOptions, ProcessOptions, Seed, TestSetOptions
from davsp.cli.testset import load_test_set, with_room
from davsp.errors import DavspError

if TYPE_CHECKING:
    from davsp.prompts import VisualSafetyPrompt
    from davsp.vector import HarmfulnessVector


def corruptions(
    test: TestSetOptions,
    model: ModelOptions,
    processes: ProcessOptions,
    prompt: Annotated[
        str | None, typer.Option(help="Folder or hub id of the border; left out: the one that ships with davsp-mini.")
    ] = None,
    vector: Annotated[Path | None, typer.Option(help="Folder of a vector: the table then has projections.")] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(
            help="Only these, repeatable or with commas: jpeg-75, shift-1, … (docs/prompt.md). Left out: all."
        ),
    ] = None,
    limit: Limit = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; left out: out/corruptions/MODEL.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Queries answered at a time.")] = 32,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = 0,
) -> None:
    """Change the finished canvas as a server in between might (JPEG, resizing, shifts) and measure what the border still does."""
    from davsp.defenses import NoDefense, VisualPrompt
    from davsp.evaluation.judging import apart
    from davsp.experiments.corruptions.run import corruptions as run
    from davsp.judges import keyword
    from davsp.runtime import parallel

    model = in_processes(processes, model)
    border, direction = _border(prompt, vector, model.name or "davsp-mini")
    queries, _ = load_test_set(test, model.name, limit, seed)
    if test.benchmark:  # their benign queries are scored by graders, which are not asked here
        queries = [query for query in apart(queries) if query.label == "malicious"]
    names = [name for part in change or [] for name in part.split(",")]
    caveat = warn_of_keyword([keyword], is_shipped(model.name))
    out = out or Path("out/corruptions") / (model.name or "davsp-mini").rstrip("/").split("/")[-1]
    lvlm = load_lvlm(model)
    rows = {"none": NoDefense(), "border": VisualPrompt(border)}
    queries, _ = with_room(lvlm, rows, queries, max_new_tokens, test.skip_broken)
    if direction is not None:
        compare_pictures(direction, lvlm)
    compare_templates(lvlm, {"the vector": direction, "the prompt": border})
    run(
        lvlm, border, queries, out, direction, names, batch_size=batch_size, max_new_tokens=max_new_tokens,
        seed=seed, console=terminal(), caveat=caveat,
    )  # fmt: skip
    if parallel.rank() == 0:
        print((out / "corruptions.md").read_text())


def _border(
    prompt: str | None, vector: Path | None, model: str
) -> "tuple[VisualSafetyPrompt, HarmfulnessVector | None]":
    from davsp.app.compare import border_of, shipped_folder
    from davsp.prompts import VisualSafetyPrompt
    from davsp.vector import HarmfulnessVector

    direction = HarmfulnessVector.load(vector) if vector else None
    if prompt is not None:
        return VisualSafetyPrompt.from_pretrained(prompt), direction
    folder = shipped_folder(model)
    if folder is None:
        raise DavspError(
            f"--prompt is missing: no border ships for {model}; `davsp reproduce transfer --model {model}` leaves one in "
            "prompts/davsp of its folder, and the vector in vector."
        )
    return border_of(folder / "vsp.png"), direction or HarmfulnessVector.load(folder)
