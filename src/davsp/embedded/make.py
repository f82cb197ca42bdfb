"""`davsp mini train`: the stages one after another, the export, the measuring, the card."""

import json
import shutil
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from davsp.embedded import build, draw, load, words
from davsp.embedded.architecture import BLUEPRINTS
from davsp.embedded.card import measure, save_card
from davsp.errors import DavspError, Interrupted
from davsp.runtime.files import alone, read_json, sha256, write_bytes, write_json

HINTS = """
Its tower was not learnt alone: in the stage `see` each of its blocks was also drawn towards the same block of davsp-mini's tower, through
maps that were thrown away. Its decoder saw nothing of davsp-mini. So the two see alike more than towers trained apart would, as LLaVA-1.5-7B
and 13B do, which share one tower; keep that in mind where a prompt is carried from one to the other.
"""


def make(
    out: Path,
    folder: Path,
    stage: str | None = None,
    device: str = "cpu",
    seed: int = 0,
    start: Path | None = None,
    which: str = "davsp-mini",
) -> None:
    """Run the stages that are missing in `out` (or just `stage`), then write the model with its card to `folder`.

    Args:
        start: a finished davsp-mini folder; only the stages from `build.AGAIN` on are run, from its weights.
        which: model of `BLUEPRINTS`.

    Raises:
        DavspError: an unknown stage, no such device, a folder of another run or with another process in it, a `start` that is no
            finished model.
        Interrupted: Ctrl-C; the last checkpoint is kept.
    """
    if which not in BLUEPRINTS:
        raise DavspError(f"--model {which!r} is not known here; the models are {', '.join(BLUEPRINTS)}.")
    stages = list(build.road(which))
    later = stages[stages.index(build.AGAIN) :]
    if stage not in (None, "card", *stages):
        raise DavspError(f"--stage {stage!r} is not known; {which}'s stages are {', '.join(stages)} and card.")
    if start and which != "davsp-mini":
        raise DavspError(f"--start goes with davsp-mini alone: {which} has no later stages to begin with.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DavspError(f"--device {device}: torch sees no GPU here; use --device cpu.")
    if start and stage not in (None, *later, "card"):
        raise DavspError(f"--start goes with the stages {', '.join(later)}, not with --stage {stage}.")
    if start and not ((start / "model.safetensors").exists() and (start / "training.json").exists()):
        raise DavspError(f"--start {start} is no finished davsp-mini: model.safetensors or training.json is missing.")
    console = Console()
    with alone(out):
        for name in [stage] if stage else [*(later if start else stages), "card"]:
            if name == "card":
                finish(out, folder, seed, console, start, which)
            elif (out / name / "done.json").exists():
                build.check_done(out, name, seed, start, which)
            else:
                _stage(name, out, seed, device, console, start, which)


def _stage(name: str, out: Path, seed: int, device: str, console: Console, start: Path | None, which: str) -> None:
    columns = (TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as bar:
        task = bar.add_task(name, total=build.road(which)[name].steps, note="")
        smooth: dict[str, float] = {}
        try:
            for record in build.run_stage(name, out, seed, device, start=start, which=which):
                for key in record.keys() - {"stage", "step", "steps"}:
                    smooth[key] = 0.98 * smooth.get(key, record[key]) + 0.02 * record[key]
                note = " · ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in sorted(smooth.items(), reverse=True))
                bar.update(task, completed=record["step"], note=note)
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped in stage {name}; give the same command again to go on from the last checkpoint."
            ) from None
    curves(out)


def finish(
    out: Path, folder: Path, seed: int, console: Console, start: Path | None = None, which: str = "davsp-mini"
) -> None:
    """Export, load as a user would, measure, write card, figures and training curves."""
    stages = list(build.road(which))
    if start:
        later = stages[stages.index(build.AGAIN) :]
        before = read_json(start / "training.json")["stages"]
        records = {f"{name} (before)": record for name, record in before.items()}
        records |= {name: build.check_done(out, name, seed, start) for name in later}
    else:
        records = {name: build.check_done(out, name, seed, which=which) for name in stages}
    part = folder.with_name(folder.name + ".part")  # the model that is there stays until the new one is measured
    shutil.rmtree(part, ignore_errors=True)
    build.export(out, part, seed, which)
    write_json(part / "training.json", {"seed": seed, "stages": records, "torch": torch.__version__})
    lvlm = load(part)
    lvlm.model_id = which
    measurements = measure(lvlm, console=console)
    write_bytes(part / "curves.png", curves(out).read_bytes())
    parameters = sum(p.numel() for p in lvlm.model.parameters())
    blueprint = BLUEPRINTS[which]
    save_card(part, measurements, {"stages": records, "text": {
        "name": which, "kind": type(lvlm.model).__name__, "transformers": lvlm.model.config.transformers_version, "depth": lvlm.num_layers, "width": blueprint.width,
        "hints": HINTS if which != "davsp-mini" else "",
        "parameters": f"{parameters / 1e6:.1f} M", "things": len(words.THINGS), "canvas": lvlm.canvas, "tokens": lvlm.tokens_per_image,
        "words": len(words.DRAWN_WORDS), "faces": len(draw.FACES) + len(draw.HELD_FACES), "seed": seed,
        "command": "davsp mini train" + (f" --model {which}" if which != "davsp-mini" else " --start" if start else ""), "sha256": sha256(part / "model.safetensors"),
    }})  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    unmet = [b["behaviour"] for b in measurements["bars"] if not b["met"]]
    console.print(f"{folder}: {len(measurements['bars']) - len(unmet)} of {len(measurements['bars'])} bars met"
                  + (f"; not met: {'; '.join(unmet)}" if unmet else ""))  # fmt: skip


def curves(out: Path) -> Path:
    """Draw loss and accuracy of every stage so far to `out/curves.png`."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for name in {**build.STAGES, **build.SHORT}:
        log = out / name / "metrics.jsonl"
        if not log.exists():
            continue
        records = [json.loads(line) for line in log.read_text().splitlines()]
        for axis, key in ((axes[0], "loss"), (axes[1], "patch_accuracy"), (axes[1], "token_accuracy")):
            points = [(r["step"], r[key]) for r in records if key in r]
            blocks = [points[i : i + 25] for i in range(0, len(points), 25)]
            xs, ys = ([sum(p[j] for p in b) / len(b) for b in blocks] for j in (0, 1))
            if blocks:
                axis.plot(xs, ys, label=name if key == "loss" else f"{name}, {key.replace('_', ' ')}")
    axes[0].set(xlabel="step", ylabel="loss", yscale="log")
    axes[1].set(xlabel="step", ylabel="share right", ylim=(0, 1.02))
    for axis in axes:
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_bytes(out / "curves.png", buffer.getvalue())
    return out / "curves.png"
