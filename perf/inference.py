"""What a defense costs while answering: latency and tokens, defended against undefended, alternating in one run.

    python perf/inference.py --out results/perf/inference.json
    python perf/inference.py --model llava-hf/llava-1.5-7b-hf --device cuda --out results/perf/inference_llava.json

Four forms: no defense, the border alone, the safety text alone, both. One query at a time, from the picture and question
as they come to the answer as text, so that putting the picture into the border and preparing the canvas are counted.
Every answer has the same number of new tokens: the end token is set to an id beyond the vocabulary, which is never
generated, and the passes are counted to be sure. So the length of answers, which a defense changes, plays no part.

Each query is asked in all forms, in random order, before the next; the ratio is that of one query's two times, the figure
the median over queries of each query's median, with a 95 % bootstrap interval over queries. Time is CPU time of one thread
(on a GPU wall time). A border of noise costs what a trained one costs.
"""

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from davsp import LVLM, Query, VisualSafetyPrompt, embedded
from davsp.benchmarks.custom import load_queries
from davsp.defenses import Defense, NoDefense, SafetyText, VisualPrompt
from davsp.lvlm import model_name
from davsp.runtime.files import manifest, write_json

NONE, BORDER, TEXT, BOTH = "no defense", "border", "text", "border and text"
TARGET = 1.02  # of the border alone
CONSOLE = Console(stderr=True)


def forms(lvlm: LVLM, padding: int, text: str) -> dict[str, Defense]:
    """The four defenses."""
    border = VisualSafetyPrompt.create(lvlm.canvas, padding, "random")
    both = VisualSafetyPrompt.create(lvlm.canvas, padding, "random", text=text)
    return {NONE: NoDefense(), BORDER: VisualPrompt(border), TEXT: SafetyText(text), BOTH: VisualPrompt(both)}


@contextmanager
def endless(lvlm: LVLM) -> Iterator[None]:
    """No answer ends before its last token: the end token is one that can't be generated."""
    config = lvlm.model.generation_config
    before = config.eos_token_id
    config.eos_token_id = lvlm.model.get_output_embeddings().weight.shape[0]
    try:
        yield
    finally:
        config.eos_token_id = before


@contextmanager
def counting(lvlm: LVLM) -> Iterator[list[int]]:
    """The tokens of every forward pass, as long as it lasts."""
    lengths: list[int] = []
    handle = lvlm.layers[0].register_forward_pre_hook(lambda block, inputs: lengths.append(inputs[0].shape[1]))
    try:
        yield lengths
    finally:
        handle.remove()


def measure(
    lvlm: LVLM, defenses: dict[str, Defense], queries: Sequence[Query], rounds: int, new_tokens: int, seed: int
) -> list[dict[str, Any]]:
    """One row an answer: query, form, CPU and wall seconds, prompt tokens; a round before the first warms up."""
    rng, rows = random.Random(seed), []
    with endless(lvlm), counting(lvlm) as passes:
        for number in range(rounds + 1):
            for query in track(queries if number else queries[:1], f"round {number} of {rounds}", console=CONSOLE):
                for name in rng.sample(list(defenses), len(defenses)):
                    passes.clear()
                    cpu, wall = time.process_time(), time.perf_counter()
                    defenses[name].respond(lvlm, [query], max_new_tokens=new_tokens)
                    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                    if passes[1:] != [1] * (new_tokens - 1):
                        raise RuntimeError(f"an answer of {len(passes)} tokens, not {new_tokens}")
                    if number:
                        rows.append({"query": query.id, "form": name, "cpu": cpu, "wall": wall, "prompt": passes[0]})
    return rows


def canvas_seconds(lvlm: LVLM, defense: Defense, queries: Sequence[Query]) -> float:
    """Median CPU seconds from a picture to the canvas the model is given."""
    seconds = []
    for query in queries:
        start = time.process_time()
        lvlm.preprocess([picture for q in defense.prepare([query]) if (picture := q.picture()) is not None])
        seconds.append(time.process_time() - start)
    return median(seconds)


def summary(rows: Sequence[dict[str, Any]], clock: str, seed: int) -> dict[str, dict[str, Any]]:
    """Of every form: median seconds, prompt tokens, and the ratio to no defense with its interval."""
    table = {}
    apart = {name: [row for row in rows if row["form"] == name] for name in (NONE, BORDER, TEXT, BOTH)}
    for name, mine in apart.items():
        ratios = by_query(mine, apart[NONE], clock)
        resampled = np.random.default_rng(seed).choice(ratios, size=(10_000, len(ratios)))
        low, high = np.quantile(np.median(resampled, axis=1), [0.025, 0.975])
        table[name] = {
            "seconds": median(row[clock] for row in mine),
            "wall": median(row["wall"] for row in mine),
            "prompt_tokens": mean(row["prompt"] for row in mine),
            "ratio": float(np.median(ratios)),
            "low": float(low),
            "high": float(high),
        }
    return table


def by_query(mine: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]], clock: str) -> list[float]:
    """Each query's median ratio; round by round, a query's answers stand in the same place of both lists."""
    ratios_of: dict[str, list[float]] = {}
    for a, b in zip(mine, plain, strict=True):
        ratios_of.setdefault(a["query"], []).append(a[clock] / b[clock])
    return [median(ratios) for ratios in ratios_of.values()]


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    title = f"{result['model']}: one query, {result['new_tokens']} new tokens, {result['clock']} time"
    table = Table("form", "ms", "wall ms", "canvas ms", "prompt tokens", "times no defense", "target", title=title)
    for name, row in result["forms"].items():
        ratio = f"{row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        target = f"<= {TARGET}: {'yes' if row['ratio'] <= TARGET else 'no'}" if name == BORDER else ""
        figures = (f"{1000 * row[key]:.1f}" for key in ("seconds", "wall", "canvas"))
        table.add_row(name, *figures, f"{row['prompt_tokens']:.0f}", ratio, target)
    CONSOLE.print(table)


def main(
    out: Annotated[Path | None, typer.Option(help="Where the figures go, as JSON.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id; left out: davsp-mini.")] = None,
    data: Annotated[Path | None, typer.Option(help="Queries with pictures; left out: the embedded test.")] = None,
    count: Annotated[int, typer.Option(min=2, help="Queries, drawn at random.")] = 24,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    new_tokens: Annotated[int, typer.Option(min=2, help="Of every answer.")] = 32,
    padding: Annotated[int | None, typer.Option(help="Border in pixels; left out: a twelfth of the canvas.")] = None,
    text: Annotated[str, typer.Option(help="The safety text.")] = embedded.SAFETY_TEXT,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: int = 0,
) -> None:
    """Compare defended with undefended answers."""
    torch.set_num_threads(1)
    lvlm = LVLM.from_pretrained(model, device_map=device) if model else embedded.load(device_map=device)
    pool = [q for q in (load_queries(data) if data else embedded.protocol(seed).test) if q.image is not None]
    queries = random.Random(seed).sample(pool, min(count, len(pool)))
    defenses = forms(lvlm, padding or round(lvlm.canvas / 12), text)
    rows = measure(lvlm, defenses, queries, rounds, new_tokens, seed)
    clock = "wall" if lvlm.device.type == "cuda" else "cpu"
    table = summary(rows, clock, seed)
    for name, row in table.items():
        row["canvas"] = canvas_seconds(lvlm, defenses[name], queries)
    facts = manifest(device=device, dtype=str(lvlm.dtype), rounds=rounds, seed=seed)
    result = {
        "model": model_name(lvlm),
        "clock": clock,
        "queries": len(queries),
        "new_tokens": new_tokens,
        "text": text,
    }
    result |= {"forms": table, "target": {"form": BORDER, "ratio": TARGET, "met": table[BORDER]["ratio"] <= TARGET}}
    show(result)
    if out:
        write_json(out, {"manifest": facts, **result, "answers": rows})


if __name__ == "__main__":
    typer.run(main)
