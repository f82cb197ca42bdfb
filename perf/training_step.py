"""The training step: the published way against ours, in one run on one model, alternating; the ratios are what counts.

Published, as its description has it: sample by sample, a forward pass through all blocks that keeps all hidden states;
for the answer a second one, padded to 1024 text tokens, with the logits of every token. Where the description is silent
it is given the cheaper reading: backward after each sample, and no attention mask, so that SDPA takes its fast kernel.
Ours is `Run.gradient`, the very code of `davsp train`.

The model is a LLaVA of random weights: a tower of 24 blocks (hidden 64), a decoder of 40 (hidden 256), 336 pixels,
p = 30, projection at layer 20, batches of 2 of one class; prompts of 35 + 576 + 118..131 tokens, answers of 96..120.

    python perf/training_step.py --out results/perf/training_step.json
    python perf/training_step.py --device cuda --dtype bfloat16 --out results/perf/training_step_cuda.json

Time is CPU time of one thread (on a GPU wall time); peak memory is resident memory above the loaded model, each way in a
process of its own (on a GPU allocated memory). Gradients are compared for each term of the loss alone and for both.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from random_llava import MEDIUM, SMALL, Size, build, queries
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

from davsp import LVLM, HarmfulnessVector, TrainSettings, VisualSafetyPrompt
from davsp.runtime.files import manifest, write_json
from davsp.training.batches import Batch, pixels
from davsp.training.borders import Run

MARGIN = 1e4  # beyond every projection: each row's hinge has a gradient
LAM = 0.02
CONSOLE = Console(stderr=True)


@dataclass(frozen=True)
class Way:
    """One way to take a step."""

    step: str  # "benign": hinge and answer; "malicious": hinge alone
    who: str  # "published" or "ours"
    attention: str = "sdpa"
    micro_batch: int | None = None
    checkpointing: bool = False

    @property
    def name(self) -> str:
        extras = [f"micro-batch {self.micro_batch}"] * bool(self.micro_batch) + ["checkpointing"] * self.checkpointing
        return " ".join([self.step, self.who, self.attention, *extras])


WAYS = [
    Way("benign", "published"),
    Way("benign", "published", "eager"),
    Way("benign", "ours"),
    Way("benign", "ours", micro_batch=1),
    Way("benign", "ours", checkpointing=True),
    Way("benign", "ours", micro_batch=1, checkpointing=True),
    Way("malicious", "published"),
    Way("malicious", "published", "eager"),
    Way("malicious", "ours"),
    Way("malicious", "ours", micro_batch=1),
]


class Bench:
    """The loaded model, the border, and a batch of each class."""

    def __init__(self, folder: Path, size: Size, device: str = "cpu", dtype: str = "float32"):
        self.size, self.lvlm = size, LVLM.from_pretrained(folder, device_map=device, dtype=dtype)
        self.prompt = VisualSafetyPrompt.create(size.canvas, size.padding, "random")
        self.delta = self.prompt.delta.to(self.lvlm.device)
        vectors = torch.randn(size.layers - 1, size.hidden, generator=torch.Generator().manual_seed(0))
        vectors /= vectors.norm(dim=1, keepdim=True)
        self.vector = HarmfulnessVector(vectors, torch.ones(1, size.layers - 1), torch.zeros(1, size.layers - 1))
        self.data = {label: queries(label, size) for label in ("malicious", "benign")}

    def run(self, objective: str, way: Way, lam: float = LAM) -> Run:
        """A training run with this way's options."""
        settings = TrainSettings(
            batch_size=2, objective=objective, lam=lam, normalise=False, layer=self.size.layer, mu_plus=MARGIN,
            mu_minus=-MARGIN, micro_batch=way.micro_batch, activation_checkpointing=way.checkpointing,
        )  # fmt: skip
        return Run(self.lvlm, self.prompt, *self.data.values(), self.vector, settings, Path("unused"), [])

    def step(self, way: Way, run: Run) -> Callable[[], Tensor]:
        """What computes the border's gradient in this way."""
        self.lvlm.model.set_attn_implementation(way.attention)
        malicious = way.step == "malicious"
        examples = run.malicious if malicious else run.benign
        answers = [None, None] if malicious or not run.weight_answer else examples.answers
        batch = Batch(examples.interiors, examples.questions, torch.full((2,), malicious), answers)
        if way.who == "published":
            return lambda: published(run, self.delta, batch, self.size.text)
        return lambda: run.gradient(self.delta, batch)[0]


def published(run: Run, delta: Tensor, batch: Batch, text: int, stacked: bool = False) -> Tensor:
    """The published step's gradient: per sample, full depth, all states, the answer in a pass of its own.

    Args:
        text: tokens that prompt and answer are padded to, image tokens apart.
        stacked: one backward for the losses of all samples, as the authors' code has it; False: one after each, which is cheaper.
    """
    lvlm, delta = run.lvlm, delta.clone().requires_grad_()
    gradient, losses = torch.zeros_like(delta), []
    for row in batch.parts(1):
        canvas = run.prompt.with_delta(delta).apply(pixels(row.interiors, delta.device))
        common: dict[str, Any] = lvlm.pixel_inputs(canvas) | {"use_cache": False}
        states = lvlm.model(input_ids=lvlm.encode(row.questions, True).ids, output_hidden_states=True, **common)
        s = run.vector.project(states.hidden_states[run.layer][0, -1], run.layer)
        hinge = (run.mu_plus - s if row.malicious.all() else s - run.mu_minus).clamp(min=0)
        loss = run.weight_hinge * hinge
        if row.answered:
            tokens = lvlm.encode(row.questions, True, row.answers)
            ids = tokens.ids.new_full((1, lvlm.tokens_per_image + text), lvlm.pad_token_id)
            ids[:, : tokens.ids.shape[1]] = tokens.ids
            targets = torch.full_like(ids, -100)
            targets[:, : tokens.ids.shape[1]][tokens.answer_mask] = tokens.ids[tokens.answer_mask]
            logits = lvlm.model(input_ids=ids, **common).logits
            loss = loss + run.weight_answer * cross_entropy(logits[0, :-1].float(), targets[0, 1:])
        losses.append(loss / len(batch))
        if not stacked:
            gradient += torch.autograd.grad(losses.pop(), delta)[0]
    return torch.autograd.grad(torch.stack(losses).sum(), delta)[0] if stacked else gradient


# -- measuring ---------------------------------------------------------------------------------------------------------


def seconds(bench: Bench, step: Callable[[], Tensor]) -> tuple[float, float]:
    """CPU and wall seconds per sample of one step."""
    wait = torch.cuda.synchronize if bench.lvlm.device.type == "cuda" else lambda: None
    wait()
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    wait()
    return (time.process_time() - cpu) / 2, (time.perf_counter() - wall) / 2


def peak(bench: Bench, way: Way) -> int | None:
    """Bytes above the loaded model at the worst moment of a first step; None where there is no /proc to read them."""
    step = bench.step(way, bench.run("both", way))
    for weight in bench.lvlm.model.parameters():
        weight.sum()  # weights are mapped from the file and only then resident
    if bench.lvlm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        loaded = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - loaded
    if not Path("/proc/self/clear_refs").exists():
        return None
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    loaded = resident("VmRSS")
    step()
    return resident("VmHWM") - loaded


def resident(field: str) -> int:
    """A figure of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


TERMS = {  # objective and batch
    "malicious, hinge": ("projection", "malicious"),
    "benign, hinge": ("projection", "benign"),
    "benign, answer": ("answer", "benign"),
    "benign, both": ("both", "benign"),  # weighed so that neither hides the other
}


def gradients(bench: Bench) -> list[dict[str, Any]]:
    """How far each of our ways is from the published gradient, for each term of the loss."""
    rows, largest, lam = [], {}, 0.0
    for term, (objective, label) in TERMS.items():
        if objective == "both":
            lam = largest["benign, hinge"] / largest["benign, answer"]
        ways = [way for way in WAYS if way.step == label and way.attention == "sdpa"]
        expected, *ours = (
            bench.step(way, bench.run(objective, way, lam))() for way in track(ways, term, console=CONSOLE)
        )
        largest[term] = float(expected.abs().max())
        rows += [
            {"term": term, "way": way.name, **agreement(expected, g)} for way, g in zip(ways[1:], ours, strict=True)
        ]
    return rows


def agreement(expected: Tensor, gradient: Tensor) -> dict[str, float]:
    """Largest difference relative to the largest value, cosine, and signs that differ."""
    return {
        "largest": float(expected.abs().max()),
        "relative": float((gradient - expected).abs().max() / expected.abs().max()),
        "cosine": float(torch.cosine_similarity(gradient.flatten().double(), expected.flatten().double(), dim=0)),
        "signs": int((gradient.sign() != expected.sign()).sum()),
    }


def times(bench: Bench, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """CPU and wall seconds per sample of every way, all ways in turn; a first round warms up and is not counted."""
    seconds_of: dict[str, list[tuple[float, float]]] = {way.name: [] for way in WAYS}
    runs = {way.name: bench.run("both", way) for way in WAYS}
    for number in range(rounds + 1):
        for way in track(WAYS, f"round {number} of {rounds}", console=CONSOLE):
            cpu_and_wall = seconds(bench, bench.step(way, runs[way.name]))
            if number:
                seconds_of[way.name].append(cpu_and_wall)
    return seconds_of


def peaks(folder: Path, size: Size, device: str, dtype: str) -> dict[str, int | None]:
    """Peak bytes of every way, each in a process of its own, so that no way finds the memory of another."""
    peak_bytes = {}
    for way in track(WAYS, "memory", console=CONSOLE):
        command = [sys.executable, __file__, "--peak-of", way.name, "--folder", str(folder), "--device", device]
        command += ["--dtype", dtype, *["--small"] * (size == SMALL)]
        peak_bytes[way.name] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return peak_bytes


# -- saying it ---------------------------------------------------------------------------------------------------------


def targets(rows: dict[str, dict[str, Any]], grads: list[dict[str, Any]], dtype: str) -> list[dict[str, Any]]:
    """What was wanted and what came out; of gradients in float32 alone: in bfloat16 small values change sign."""

    def faster(slow: str, quick: str) -> float:
        pairs = zip(rows[slow]["seconds"], rows[quick]["seconds"], strict=True)
        return median(a / b for a, b in pairs)

    def smaller(big: str, small: str) -> float | None:
        a, b = rows[big]["peak"], rows[small]["peak"]
        return b / a if a and b else None

    benign, malicious = "benign ours sdpa", "malicious ours sdpa"
    one, both = f"{benign} micro-batch 1", f"{benign} micro-batch 1 checkpointing"
    goals: list[tuple[str, str, float | None, float]] = [
        ("benign step, times as fast as SDPA", ">=", faster("benign published sdpa", benign), 3.5),
        ("the same, micro-batch 1", ">=", faster("benign published sdpa", one), 3.5),
        ("malicious step, times as fast as SDPA", ">=", faster("malicious published sdpa", malicious), 1.5),
        ("malicious step, times as fast as eager", ">=", faster("malicious published eager", malicious), 5.0),
        ("benign peak memory, share of SDPA's", "<=", smaller("benign published sdpa", benign), 1 / 3),
        ("the same, micro-batch 1", "<=", smaller("benign published sdpa", one), 1 / 3),
        ("the same, micro-batch 1 and checkpointing", "<=", smaller("benign published sdpa", both), 1 / 3),
    ]
    goals += [
        (f"gradient, {term}: largest difference", "<=", max(g["relative"] for g in grads if g["term"] == term), 1e-5)
        for term in (TERMS if dtype == "float32" else ())
    ]
    return [
        {"target": name, "wanted": f"{sign} {bound:.3g}", "measured": value,
         "met": None if value is None else value >= bound if sign == ">=" else value <= bound}
        for name, sign, value, bound in goals
    ]  # fmt: skip


def show(result: dict[str, Any]) -> None:
    """Print the three tables."""
    ways = Table("step", "s / sample", "wall s", "peak MB", title=f"one step, {result['clock']} time")
    for name, row in result["ways"].items():
        mb = "-" if row["peak"] is None else f"{row['peak'] / 1e6:.0f}"
        ways.add_row(name, f"{median(row['seconds']):.3f}", f"{median(row['wall']):.3f}", mb)
    grads = Table(
        "gradient", "max|diff| / max|g|", "cosine", "signs that differ", title="against the published, worst way"
    )
    for term in TERMS:
        worst = max((g for g in result["gradients"] if g["term"] == term), key=lambda g: g["relative"])
        grads.add_row(term, f"{worst['relative']:.1e}", f"{worst['cosine']:.7f}", str(worst["signs"]))
    goals = Table("target", "wanted", "measured", "met")
    for t in result["targets"]:
        value = "-" if t["measured"] is None else f"{t['measured']:.3g}"
        goals.add_row(t["target"], t["wanted"], value, {True: "yes", False: "no", None: "-"}[t["met"]])
    for table in (ways, grads, goals):
        CONSOLE.print(table)


def measure(folder: Path, size: Size, device: str, dtype: str, rounds: int, apart: bool = True) -> dict[str, Any]:
    """All figures. Without `apart` no processes are started, and there is no peak memory on a CPU."""
    bench = Bench(folder, size, device, dtype)
    grads, seconds_of = gradients(bench), times(bench, rounds)
    memory = peaks(folder, size, device, dtype) if apart else dict.fromkeys(seconds_of)
    clock = "wall" if bench.lvlm.device.type == "cuda" else "CPU"
    rows = {
        way.name: asdict(way) | {
            "seconds": [wall if clock == "wall" else cpu for cpu, wall in seconds_of[way.name]],
            "wall": [wall for _, wall in seconds_of[way.name]],
            "peak": memory[way.name],
        }
        for way in WAYS
    }  # fmt: skip
    result = {"clock": clock, "size": asdict(size), "ways": rows, "gradients": grads}
    return result | {"targets": targets(rows, grads, dtype)}


def main(
    out: Annotated[Path | None, typer.Option(help="Where the figures go, as JSON.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of every way that are timed.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    small: Annotated[bool, typer.Option(help="A tiny model, to try the script.")] = False,
    peak_of: Annotated[str | None, typer.Option(hidden=True)] = None,
    folder: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare the published training step with ours."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    size = SMALL if small else MEDIUM
    if peak_of and folder:
        (way,) = (way for way in WAYS if way.name == peak_of)
        print(json.dumps(peak(Bench(folder, size, device, dtype), way)))
        return
    with TemporaryDirectory() as place:
        build(Path(place), size)
        result = measure(Path(place), size, device, dtype, rounds)
    show(result)
    if out:
        write_json(out, {"manifest": manifest(device=device, dtype=dtype, rounds=rounds), **result})


if __name__ == "__main__":
    typer.run(main)
