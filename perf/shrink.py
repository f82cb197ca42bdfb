"""What a border costs a model's utility before it is trained: a white one of several widths, with the safety text, beside no defense.

    python perf/shrink.py --model davsp-mini-narrow --out results/hardening/shrink/davsp-mini-narrow.json

The picture is shrunk into the border. What is lost under a white one is lost by reading a smaller picture, and no training gives it back.
Rows as in metrics.json: utility (of the MM-Vet-like questions), yes or no, descriptions and over-refusal, differences paired with no defense.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from davsp import VisualSafetyPrompt, embedded, evaluate
from davsp.defenses import Defense, NoDefense, SafetyText, VisualPrompt
from davsp.lvlm import model_facts
from davsp.runtime.files import manifest, write_json
from davsp.store import queries_hash

WIDTHS = (4, 8, 12)
SIZES = {"harm": 1, "utility": 40, "mme": 20, "llava_bench": 20}
PLACES = (("utility", "accuracy"), ("utility", "accuracy_difference"), ("benign", "over_refusal"))
CONSOLE = Console(stderr=True)


def main(
    model: Annotated[str, typer.Option(help="A model that ships.")] = "davsp-mini-narrow",
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("out/shrink.json"),
    seed: int = 0,
) -> None:
    """Answer the benign pictures under every width, print utility, write the rows."""
    torch.set_num_threads(1)
    lvlm, text = embedded.load(model, device_map="cpu"), embedded.SAFETY_TEXT
    test = [q for q in embedded.protocol(seed, **SIZES).test if q.label == "benign" and q.image is not None]
    defenses: dict[str, Defense] = {"none": NoDefense(), "safety-text": SafetyText(text)}
    for width in (*WIDTHS, round(lvlm.canvas / 12)):
        defenses[f"white-{width}"] = VisualPrompt(VisualSafetyPrompt.create(lvlm.canvas, width, text=text))
    rows = [r for r in evaluate(lvlm, defenses, test, console=CONSOLE).rows if r["split"] == "total"]
    facts = manifest(
        **model_facts(lvlm), canvas=lvlm.canvas, seed=seed, test={"queries": len(test), "sha256": queries_hash(test)}
    )
    write_json(
        out,
        {"manifest": facts, "rows": [r for r in rows if "accuracy" in r["metric"] or r["metric"] == "over_refusal"]},
    )
    show(rows, model)


def show(rows: list[dict[str, Any]], model: str) -> None:
    """Print percent with 95 % intervals."""
    at = {(r["defense"], r["benchmark"], r["metric"]): r for r in rows}
    table = Table("", "utility", "against none", "over-refusal", title=model)
    for name in dict.fromkeys(r["defense"] for r in rows):
        cells = [at.get((name, *place)) for place in PLACES]
        table.add_row(
            name,
            *(
                "–" if c is None else "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * c[k] for k in ("value", "low", "high")))
                for c in cells
            ),
        )
    CONSOLE.print(table)


if __name__ == "__main__":
    typer.run(main)
