"""`davsp eval`: a test set without and with a prompt."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from davsp.cli.inputs import compare_texts, embedded_protocol, in_processes, load_lvlm, queries_at, safety_text
from davsp.cli.options import Canvas, Device, Dtype, Model, Out, Processes, Quantization, Revision, Seed

if TYPE_CHECKING:
    from davsp.defenses import Defense
    from davsp.query import Query


def evaluate(
    prompt: Annotated[
        Path | None, typer.Option(help="Folder or hub id of a prompt: adds the row davsp, or additive for noise.")
    ] = None,
    queries: Annotated[
        Path | None, typer.Option(help="Folder or .jsonl of queries; left out: the embedded test.")
    ] = None,
    out: Out = Path("out/eval"),
    model: Model = None,
    text: Annotated[
        str | None, typer.Option(help='Safety text of the row safety-text ("" leaves the row out).')
    ] = None,
    vector: Annotated[
        Path | None, typer.Option(help="Folder of a vector: records the projection of every answer.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first queries of each benchmark.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 48,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    canvas: Canvas = None,
    num_processes: Processes = 1,
    seed: Seed = 0,
) -> None:
    """Answer a test set without and with the prompt; rates with 95 % intervals, paired with No Defense."""
    from rich.console import Console

    from davsp import parallel
    from davsp.defenses import NoDefense, SafetyText, VisualPrompt
    from davsp.evaluation import evaluate
    from davsp.prompts import load_prompt
    from davsp.report.terminal import print_table
    from davsp.vector import HarmfulnessVector

    in_processes(num_processes)
    lvlm = load_lvlm(model, revision, device, dtype, quantization, canvas)
    test = queries_at(queries, None if queries else embedded_protocol(model, seed).test, "--queries")
    if limit:
        test = _first(test, limit)
    defenses: dict[str, Defense] = {"none": NoDefense()}
    if text := safety_text(text, queries is None):
        defenses["safety-text"] = SafetyText(text)
    direction = HarmfulnessVector.load(vector) if vector else None
    if direction:
        direction.check(lvlm)
    if prompt:
        loaded = load_prompt(prompt)
        loaded.check(lvlm)
        name = "davsp" if loaded.kind == "border" else loaded.kind
        defenses[name] = VisualPrompt(loaded, name)
        if direction:
            compare_texts(direction, loaded.text, "the prompt puts")
    found = evaluate(
        lvlm, defenses, test, out, direction,
        max_new_tokens=max_new_tokens, seed=seed, console=Console(stderr=True),
    )  # fmt: skip
    if parallel.rank() > 0:
        return
    print_table(Console(), found.rows)
    print(f"answers, verdicts and metrics.json are in {out}")


def _first(queries: "list[Query]", limit: int) -> "list[Query]":
    seen: dict[tuple[str, str], int] = {}
    kept = []
    for query in queries:
        key = (query.benchmark, query.category if query.label == "benign" else "")
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= limit:
            kept.append(query)
    return kept
