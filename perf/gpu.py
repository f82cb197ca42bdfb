"""A training step and generation on models in their published shapes, random weights, on a GPU: seconds and memory.

    bash perf/gpu.sh                      # one GPU of 80 GB or more; results/perf/gpu.json
    python perf/gpu.py --small --device cpu --dtype float32      # tiny shapes, to try the script

A step is of two benign queries with answers of 96 to 120 tokens: the published way (`training_step.published`), ours, and ours with
activation checkpointing and micro-batches of one. All ways in turn, the first round is not counted. Generation: 8 queries, 64 tokens,
without a defense and with a border. The 4-bit step is Qwen2.5-VL-7B's decoder by bitsandbytes, if that is installed.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from random_llava import Size, queries
from random_shapes import SHAPES, build
from rich.console import Console
from rich.table import Table
from torch import Tensor
from training_step import MARGIN, published

from davsp import LVLM, HarmfulnessVector, TrainSettings, VisualSafetyPrompt
from davsp.defenses import NoDefense, VisualPrompt
from davsp.lvlm.loading import load_weights
from davsp.runtime.files import manifest, write_json
from davsp.training.batches import Batch
from davsp.training.borders import Run

WAYS: dict[str, dict[str, Any]] = {
    "published": {}, "ours": {}, "ours, checkpointing": {"activation_checkpointing": True, "micro_batch": 1},
}  # fmt: skip
ASKED, TOKENS = 8, 64


class Bench:
    """A model, a border of a twelfth of its canvas, and two queries of each class."""

    def __init__(self, lvlm: LVLM, small: bool):
        self.lvlm = lvlm
        self.size = Size(
            canvas=lvlm.canvas, padding=round(lvlm.canvas / 12), layer=lvlm.num_layers // 2, vocabulary=190, before=3,
            questions=(9, 12) if small else (118, 131), answers=(6, 8) if small else (96, 120), text=64 if small else 1024,
        )  # fmt: skip
        self.prompt = VisualSafetyPrompt.create(lvlm.canvas, self.size.padding, "random")
        width = lvlm.model.config.get_text_config().hidden_size
        vectors = torch.randn(lvlm.num_layers - 1, width, generator=torch.Generator().manual_seed(0))
        ones = torch.ones(1, lvlm.num_layers - 1)
        self.vector = HarmfulnessVector(vectors / vectors.norm(dim=1, keepdim=True), ones, torch.zeros_like(ones))
        self.data = {label: queries(label, self.size) for label in ("malicious", "benign")}

    def step(self, way: str) -> Callable[[], Tensor]:
        """What computes the border's gradient in this way."""
        settings = TrainSettings(
            batch_size=2,
            objective="both",
            normalise=False,
            layer=self.size.layer,
            mu_plus=MARGIN,
            mu_minus=-MARGIN,
            **WAYS[way],
        )
        run = Run(self.lvlm, self.prompt, *self.data.values(), self.vector, settings, Path("unused"), [])
        rows = run.benign
        batch = Batch(rows.interiors, rows.questions, torch.tensor([False, False]), rows.answers)
        delta = self.prompt.delta.to(self.lvlm.device)
        if way == "published":
            return lambda: published(run, delta, batch, self.size.text)
        return lambda: run.gradient(delta, batch)[0]

    def answering(self, border: bool) -> Callable[[], Any]:
        """What answers eight queries."""
        defense = VisualPrompt(self.prompt) if border else NoDefense()
        asked = defense.prepare([self.data["benign"][i % 2] for i in range(ASKED)])
        pixels = self.lvlm.preprocess([q.picture() for q in asked])
        return lambda: self.lvlm.generate(pixels, [q.question for q in asked], TOKENS)


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, int | None]:
    """Wall seconds, and on a GPU the most bytes allocated above what was there before."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start, None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() - before


def measure(lvlm: LVLM, rounds: int, small: bool) -> dict[str, Any]:
    """Seconds and memory of every way, all in turn. A way that the device has no memory for is said, not left out."""
    bench = Bench(lvlm, small)
    works = {f"step, {way}": bench.step(way) for way in WAYS}
    works |= {"generate, undefended": bench.answering(False), "generate, border": bench.answering(True)}
    found: dict[str, Any] = {name: {"seconds": [], "peak": None} for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            if "error" in found[name]:
                continue
            try:
                seconds, peak = timed(lvlm.device, work)
            except torch.cuda.OutOfMemoryError:
                found[name] = {"error": "out of memory"}
                torch.cuda.empty_cache()
                continue
            if number:
                found[name]["seconds"].append(seconds)
                found[name]["peak"] = max(found[name]["peak"] or 0, peak or 0) or None
    parameters = sum(p.numel() for p in lvlm.model.parameters())
    return {"parameters": parameters, "canvas": lvlm.canvas, "picture_tokens": lvlm.tokens_per_image, "ways": found}


def quantized(name: str, small: bool, device: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """The same with a decoder of 4 bits; the model is written to disk once, as bitsandbytes reads it from there."""
    with TemporaryDirectory() as folder:
        lvlm = build(name, small, device, dtype)
        lvlm.model.save_pretrained(folder)
        parts = type(lvlm), lvlm.tokenizer, lvlm.image_processor, lvlm.canvas
        del lvlm
        torch.cuda.empty_cache()
        model = load_weights(folder, None, device, dtype, "4bit")
        family, tokenizer, processor, canvas = parts
        return measure(family(model, tokenizer, processor, f"random {name}", None, canvas), rounds, small)


def show(results: dict[str, Any]) -> None:
    """A table a model."""
    for name, result in results.items():
        table = Table("", "seconds", "peak GB", title=f"{name}, {result['parameters'] / 1e9:.1f} B random weights")
        for way, row in result["ways"].items():
            if "error" in row:
                table.add_row(way, row["error"], "-")
            else:
                table.add_row(
                    way, f"{median(row['seconds']):.3f}", "-" if row["peak"] is None else f"{row['peak'] / 1e9:.2f}"
                )
        Console(stderr=True).print(table)


def main(
    out: Annotated[Path | None, typer.Option(help="Where the figures go, as JSON.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="That count.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    small: Annotated[bool, typer.Option(help="Tiny shapes, to try the script.")] = False,
    four_bit: Annotated[
        bool, typer.Option("--4bit/--no-4bit", help="Also Qwen2.5-VL-7B with a decoder of 4 bits.")
    ] = False,
) -> None:
    """Measure a training step and generation on published shapes."""
    results = {}
    for name in SHAPES:
        results[name] = measure(build(name, small, device, getattr(torch, dtype)), rounds, small)
        if device == "cuda":
            torch.cuda.empty_cache()
        show({name: results[name]})
        if out:  # after each: the time on a lent machine may end
            write_json(
                out,
                {"manifest": manifest(device=device, dtype=dtype, rounds=rounds, weights="random"), "models": results},
            )
    if four_bit:
        name = "Qwen2.5-VL-7B"
        results[f"{name}, 4 bit"] = quantized(name, small, device, getattr(torch, dtype), rounds)
        show({f"{name}, 4 bit": results[f"{name}, 4 bit"]})
        if out:
            write_json(
                out,
                {"manifest": manifest(device=device, dtype=dtype, rounds=rounds, weights="random"), "models": results},
            )


if __name__ == "__main__":
    typer.run(main)
