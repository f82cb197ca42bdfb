"""How much quicker a test set is answered in batches of like length than one query at a time, both in one run.

    python perf/evaluation.py --out results/perf/evaluation.json
    python perf/evaluation.py --model llava-hf/llava-1.5-7b-hf --device cuda --out results/perf/evaluation_llava.json

Both forms are `davsp.evaluate` with a run folder; one has a batch size of 1. The figure is of answering, preparing pictures
included; that of the whole run, with hashing, flushing, judging and the bootstrap, which cost the same in both, stands beside it.
Rounds alternate, in random order, after one that warms up; figures are medians over rounds of a round's ratio. Time is CPU time of one thread (on a GPU wall time). Answers must be the same.
"""

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from davsp import LVLM, Query, Response, VisualSafetyPrompt, embedded, evaluate
from davsp.benchmarks.custom import load_queries
from davsp.defenses import Defense, NoDefense, VisualPrompt
from davsp.evaluation.evaluate import planned
from davsp.lvlm import model_name
from davsp.runtime.files import manifest, write_json

TARGET = 4.0
CONSOLE = Console(stderr=True)


class Timed(Defense):
    """A defense that adds up what its answers cost: CPU and wall seconds of preparing pictures and generating."""

    def __init__(self, inner: Defense) -> None:
        self.inner, self.name, self.cpu, self.wall = inner, inner.name, 0.0, 0.0

    def prepare(self, queries: Sequence[Query]) -> list[Query]:
        return self.inner.prepare(queries)

    def describe(self) -> dict[str, Any]:
        return self.inner.describe()

    def respond(self, *args: Any, **options: Any) -> list[Response]:
        cpu, wall = time.process_time(), time.perf_counter()
        responses = self.inner.respond(*args, **options)
        self.cpu, self.wall = self.cpu + time.process_time() - cpu, self.wall + time.perf_counter() - wall
        return responses


def measure(
    lvlm: LVLM, defenses: dict[str, Defense], queries: Sequence[Query], sizes: Sequence[int], rounds: int, new_tokens: int,
    seed: int,
) -> tuple[list[dict[str, Any]], dict[int, dict[str, list[str]]]]:  # fmt: skip
    """One row a round and batch size: CPU and wall seconds; and the answers by batch size and defense."""
    rng, rows, answers = random.Random(seed), [], {}
    for number in range(rounds + 1):
        for size in rng.sample(list(sizes), len(sizes)):
            queries_now = list(queries) if number else list(queries)[:8]
            with tempfile.TemporaryDirectory() as out:
                timed: dict[str, Defense] = {name: Timed(defense) for name, defense in defenses.items()}
                cpu, wall = time.process_time(), time.perf_counter()
                evaluation = evaluate(lvlm, timed, queries_now, Path(out), batch_size=size, max_new_tokens=new_tokens)
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if number:
                row: dict[str, Any] = {"round": number, "batch": size, "run_cpu": cpu, "run_wall": wall}
                rows.append(row | {clock: sum(getattr(t, clock) for t in timed.values()) for clock in ("cpu", "wall")})
                answers[size] = {name: [r.text for r in one] for name, one in evaluation.responses.items()}
            CONSOLE.print(f"round {number} of {rounds}, batches of {size}: {cpu:.1f} s of CPU, {wall:.1f} s")
    return rows, answers


def parts(lvlm: LVLM, queries: Sequence[Query], size: int, rounds: int, new_tokens: int) -> list[dict[str, float]]:
    """Of one batch of undefended pictures, by round, CPU seconds: what it takes and of that the tower and the prompts; the same
    one at a time; and which share of the rows that are computed after the first token still belong to an answer."""
    batch = planned([q for q in queries if q.image is not None])[:size]
    canvas, questions = lvlm.preprocess([p for q in batch if (p := q.picture())]), [q.question for q in batch]

    def answers(new: int, each: int) -> list[str]:
        spans = [slice(at, at + each) for at in range(0, len(questions), each)]
        return [a for s in spans for a in lvlm.generate(canvas[s], questions[s], max_new_tokens=new)]

    def seconds(call: Callable[[], Any]) -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    with torch.no_grad():
        pixels = lvlm.pixel_inputs(canvas if isinstance(canvas, torch.Tensor) else list(canvas))
        calls: dict[str, Callable[[], Any]] = {
            "tower": lambda: lvlm.model.get_image_features(**pixels),
            "prompts": lambda: answers(1, size),
            "batch": lambda: answers(new_tokens, size),
            "prompts_alone": lambda: answers(1, 1),
            "alone": lambda: answers(new_tokens, 1),
        }
        lengths = [len(lvlm.tokenizer(a)["input_ids"]) for a in answers(new_tokens, size)]
        rows_kept = sum(lengths) / (len(lengths) * max(lengths))
        return [{name: seconds(call) for name, call in calls.items()} | {"rows_kept": rows_kept} for _ in range(rounds)]


def summary(
    rows: Sequence[dict[str, Any]], sizes: Sequence[int], clock: str, answered: int
) -> dict[str, dict[str, Any]]:
    """By batch size: answers a second, and the median, least and greatest ratio to one at a time."""
    table = {}
    alone = {row["round"]: row[clock] for row in rows if row["batch"] == 1}
    whole = {row["round"]: row[f"run_{clock}"] for row in rows if row["batch"] == 1}
    for size in sizes:
        mine = [row for row in rows if row["batch"] == size]
        ratios = [alone[row["round"]] / row[clock] for row in mine]
        table[str(size)] = {
            "answers_a_second": answered / median(row[clock] for row in mine),
            "ratio": median(ratios), "low": min(ratios), "high": max(ratios),
            "whole_run_ratio": median(whole[row["round"]] / row[f"run_{clock}"] for row in mine),
        }  # fmt: skip
    return table


def main(
    out: Annotated[Path | None, typer.Option(help="Where the figures go, as JSON.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id; left out: davsp-mini.")] = None,
    data: Annotated[Path | None, typer.Option(help="Queries; left out: the embedded test.")] = None,
    count: Annotated[int, typer.Option(min=8, help="Queries, drawn at random.")] = 160,
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes, repeatable; the first one is judged.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 48,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    only_parts: Annotated[
        bool, typer.Option("--parts", help="Only what one batch's time goes to, CPU seconds.")
    ] = False,
    beside: Annotated[str, typer.Option(help="What else ran on the machine, for the record.")] = "",
    seed: int = 0,
) -> None:
    """Compare batches with one query at a time."""
    torch.set_num_threads(1)
    lvlm = LVLM.from_pretrained(model, device_map=device) if model else embedded.load(device_map=device)
    pool = load_queries(data) if data else embedded.protocol(seed).test
    queries = random.Random(seed).sample(pool, min(count, len(pool)))
    border = VisualSafetyPrompt.create(lvlm.canvas, round(lvlm.canvas / 12), "random", text=embedded.SAFETY_TEXT)
    defenses: dict[str, Defense] = {"none": NoDefense(), "davsp": VisualPrompt(border)}
    sizes = [1, *(batch or [32])]
    if only_parts:
        seconds_by_round = parts(lvlm, queries, sizes[1], rounds, new_tokens)
        for row in seconds_by_round:
            CONSOLE.print(", ".join(f"{name} {value:.2f}" for name, value in row.items()))
        if out:
            write_json(out, {"manifest": manifest(device=device, beside=beside), "parts": seconds_by_round})
        return
    rows, answers = measure(lvlm, defenses, queries, sizes, rounds, new_tokens, seed)
    clock = "wall" if lvlm.device.type == "cuda" else "cpu"
    table = summary(rows, sizes, clock, len(queries) * len(defenses))
    differing = {
        str(size): sum(a != b for name in defenses for a, b in zip(answers[1][name], answers[size][name], strict=True))
        for size in sizes[1:]
    }
    ratio = table[str(sizes[1])]["ratio"]
    printed = Table(
        "batch",
        "answers a second",
        "times one at a time",
        "whole run",
        "other answers",
        title=f"{model_name(lvlm)}, {clock} time",
    )
    for size, row in table.items():
        times = f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        printed.add_row(
            size, f"{row['answers_a_second']:.1f}", times, f"{row['whole_run_ratio']:.2f}", str(differing.get(size, ""))
        )
    CONSOLE.print(printed)
    if out:
        facts = manifest(device=device, dtype=str(lvlm.dtype), rounds=rounds, seed=seed, beside=beside)
        result = {"model": model_name(lvlm), "clock": clock, "queries": len(queries), "defenses": list(defenses)}
        result |= {"new_tokens": new_tokens, "batches": table, "differing_answers": differing}
        met = ratio >= TARGET and not any(differing.values())
        write_json(out, {"manifest": facts, **result, "target": {"ratio": TARGET, "met": met}, "rounds": rows})
    if any(differing.values()):
        raise SystemExit(f"answers differ from those given one at a time: {differing}")


if __name__ == "__main__":
    typer.run(main)
