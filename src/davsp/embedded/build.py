"""How davsp-mini is made: nine resumable, seeded stages, then the folder that ships.

====== ===================================================== =========================================================
stage  trains                                                on
====== ===================================================== =========================================================
tower  the vision tower, with throw-away heads               pages of words and things, a class for every patch
read   the same                                              pages of whole words: reading is the slowest to come
words  the decoder                                           questions without pictures, and pictures whose patches
                                                             are handed over as word embeddings ("oracle" patches)
place  the decoder's layers                                  the same with a mark of place on every patch: where, how many
bridge tower and projector                                   regression onto the oracle patches and their places
joint  everything, gently                                    lessons: pictures with several questions each
sight  tower and projector                                   pages and lessons' pictures without questions: small, framed,
                                                             figures, and a mark on the centre of each thing
skills everything, gently                                    lessons again, with more of what comes slowly: where, how many, borders
polish everything, gently                                    the same, and whether an answer is harmful with the picture there (ECSO's question)
====== ===================================================== =========================================================

`tower`, `read` on one side and `words` on the other can run side by side, and so can `bridge` and `place`. Data is a pure function of (seed, stage, step):
a killed run goes on from its last checkpoint and ends the same. What was tried and failed: docs/log.md.
"""

import json
import math
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from davsp.embedded import FOLDER, words
from davsp.embedded.architecture import (
    BLUEPRINTS,
    FRAMES,
    MEAN,
    STD,
    Heads,
    Hints,
    Oracle,
    is_qwen,
    match_heads,
    new_model,
    projector,
    tower_parameters,
)
from davsp.embedded.losses import Packer, bridge_loss, joint_loss, sight_loss, tower_loss, words_loss
from davsp.errors import DavspError
from davsp.runtime.files import read_json, read_tensors, read_tensors_and_metadata, save_tensors, sha256, write_json


@dataclass(frozen=True)
class Stage:
    """steps of `batch` pictures (plus `texts` rows of questions without a picture), peak learning rate.

    `of`: the schedule is that of so many steps, of which only the first `steps` are taken. `draws`: the name that the data is drawn
    by, in place of the stage's own.
    """

    steps: int
    batch: int
    lr: float
    texts: int = 0
    after: tuple[str, ...] = ()
    of: int | None = None
    draws: str = ""


STAGES = {
    "tower": Stage(steps=2600, batch=24, lr=9e-4),
    "words": Stage(steps=2000, batch=6, lr=1e-3, texts=2),
    "read": Stage(steps=2400, batch=24, lr=7e-4, after=("tower",)),
    "place": Stage(steps=1000, batch=6, lr=6e-4, texts=2, after=("words",)),
    "bridge": Stage(steps=900, batch=20, lr=1e-3, after=("read", "words")),
    "joint": Stage(steps=1500, batch=8, lr=4e-4, texts=1, after=("bridge", "place")),
    "sight": Stage(steps=2000, batch=24, lr=6e-4, after=("joint",)),
    "skills": Stage(steps=4500, batch=8, lr=4e-4, texts=1, after=("sight",)),
    "polish": Stage(steps=700, batch=8, lr=1.5e-4, texts=1, after=("skills",)),
}

# The siblings' shorter road, made of what the first model's log taught: hints from its tower in place of most of the pages,
# matching heads and the loss on names from the decoder's first steps on.
SHORT = {
    "see": Stage(steps=1600, batch=24, lr=9e-4),
    "speak": Stage(steps=2200, batch=6, lr=1e-3, texts=2),
    "look": Stage(steps=2000, batch=20, lr=8e-4, after=("see", "speak")),
    "join": Stage(steps=2300, batch=8, lr=4e-4, texts=1, after=("look",), of=3500, draws="skills"),
    "sight": Stage(steps=1200, batch=24, lr=6e-4, after=("join",)),
    "skills": Stage(steps=1000, batch=8, lr=3e-4, texts=1, after=("sight",), draws="skills again"),
    "sharpen": Stage(steps=900, batch=24, lr=4e-4, after=("skills",)),
    "polish": Stage(steps=1500, batch=8, lr=3e-4, texts=1, after=("sharpen",)),
}
JOINED = {"davsp-mini-narrow": 2300, "davsp-mini-qwen": 1800}  # where each was when its tower was seen to lag behind


def road(name: str) -> dict[str, Stage]:
    """The stages of one of `BLUEPRINTS`, in their order."""
    if name == "davsp-mini":
        return STAGES
    return SHORT | {"join": replace(SHORT["join"], steps=min(JOINED[name], SHORT["join"].steps))}


AGAIN, LAST = "sight", "polish"  # where a finished model goes on; the stage whose model ships
START_HEADS = 200  # steps for the throw-away heads, when training goes on from a finished model


def groups(model: Any, name: str, extra: nn.Module, lr: float) -> list[dict]:
    """The parameters that stage `name` trains, with their learning rates."""
    tower, bridge, decoder = list(tower_parameters(model)), projector(model).parameters(), model.get_decoder()
    seeing = [(tower, lr), (extra.parameters(), lr)]
    chosen: Any = {
        "tower": seeing,
        "read": seeing,
        "see": seeing,
        "words": [(decoder.parameters(), lr), (extra.parameters(), lr)],
        "speak": [(decoder.parameters(), lr), (extra.parameters(), lr)],
        "place": [
            (decoder.layers.parameters(), lr),
            (decoder.norm.parameters(), lr),
        ],  # the embeddings are bridge's target
        "sight": [(tower, lr), (bridge, lr), (extra.parameters(), lr)],
        "sharpen": [(tower, lr), (bridge, lr), (extra.parameters(), lr)],
        "look": [(tower, lr), (bridge, lr), (extra.parameters(), lr)],
        "bridge": [(bridge, lr), (tower, lr * 0.2), (extra.parameters(), lr * 0.2)],
        "joint": [(tower, lr * 0.3), (bridge, lr), (decoder.parameters(), lr), (extra.parameters(), lr)],
        # what `sight` taught is soon washed out at a higher rate (docs/log.md)
        "join": [(tower, lr * 0.15), (bridge, lr * 0.3), (decoder.parameters(), lr), (extra.parameters(), lr)],
        "skills": [(tower, lr * 0.15), (bridge, lr * 0.3), (decoder.parameters(), lr), (extra.parameters(), lr)],
        "polish": [(tower, lr * 0.15), (bridge, lr * 0.3), (decoder.parameters(), lr), (extra.parameters(), lr)],
    }[name]
    model.requires_grad_(False)
    out = []
    for parameters, rate in chosen:
        listed = [p.requires_grad_(True) for p in parameters]
        out.append({"params": listed, "lr": rate, "peak": rate})
    return out


def schedule(step: int, steps: int) -> float:
    """100 steps of warm-up, flat to 40 %, then a cosine to 3 %."""
    if step < 100:
        return (step + 1) / 100
    done = max(0.0, (step / steps - 0.4) / 0.6)
    return 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * done))


def run_stage(
    name: str,
    out: Path,
    seed: int = 0,
    device: str = "cpu",
    steps: int | None = None,
    save_every: int = 100,
    start: Path | None = None,
    which: str = "davsp-mini",
) -> Iterator[dict]:
    """Run one stage, or what is left of it; yields a record a step. Ends with `out/NAME/done.json` written.

    Args:
        which: of `BLUEPRINTS`.
        start: a finished davsp-mini folder to go on from, in place of the stages before `AGAIN`.

    Raises:
        DavspError: the stages it needs are not done, or the folder holds another run's checkpoint.
    """
    stage, folder, width = road(which)[name], out / name, BLUEPRINTS[which].width
    steps = steps or stage.steps
    model, heads, oracle = new_model(which, seed), Heads(width), Oracle(width)
    about = identity(name, seed, steps, start, which)
    fresh = start if name == AGAIN else None
    if fresh:
        _load_start(model, heads, fresh, seed)
    for needed in () if fresh else stage.after:
        check_done(out, needed, seed, start, which)
        _load_parts({"model": model, "heads": heads, "oracle": oracle}, out / needed / "state.safetensors", needed)
    extra: nn.Module = oracle if name == "words" else heads
    parts = {"model": model, "heads": heads, "oracle": oracle}
    hints = teacher = None
    if name == "see":
        teacher = _teacher().to(device)
        parts["hints"] = hints = Hints(width, teacher)
        extra = nn.ModuleList([heads, hints])
    if name == "speak":
        extra = nn.ModuleList([heads, oracle])
    both = nn.ModuleDict(parts).to(device).train()
    optimizer = torch.optim.AdamW(groups(model, name, extra, stage.lr), betas=(0.9, 0.98), weight_decay=0.01)
    if name == "speak" or (name == AGAIN and not start and which == "davsp-mini"):
        match_heads(model)  # a finished model has them
    first, seconds = _resume(both, optimizer, folder, about)
    packer, log = Packer(3 if is_qwen(model) else 1), (folder / "metrics.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    _truncate(log, first)
    clock = time.monotonic()
    for step in range(first, steps):
        rng = random.Random(f"{seed} {stage.draws or name} {step}")
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, steps if steps != stage.steps else stage.of or steps)
        if name in ("tower", "read", "see"):
            loss, stats = tower_loss(model, heads, rng, stage.batch, name != "tower", hints, teacher)
        elif name in ("words", "place", "speak"):
            loss, stats = words_loss(model, heads, oracle, packer, rng, stage.batch, stage.texts, step, name)
        elif name in ("sight", "look", "sharpen"):
            loss, stats = sight_loss(model, heads, oracle, rng, stage.batch, name)
        elif name == "bridge":
            loss, stats = bridge_loss(model, heads, oracle, rng, stage.batch)
        else:
            kind = name if name in ("joint", "polish") else "skills"
            loss, stats = joint_loss(model, heads, oracle, packer, rng, stage.batch, stage.texts, kind)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"stage {name}, step {step + 1}: the loss is {loss.item()}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        record = {"stage": name, "step": step + 1, "steps": steps, "loss": round(loss.item(), 5), **stats}
        with log.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if (step + 1) % save_every == 0 or step + 1 == steps:
            _save(
                both,
                optimizer,
                folder,
                {
                    **about,
                    "hardware": hardware(device),
                    "step": step + 1,
                    "seconds": round(seconds + time.monotonic() - clock, 1),
                },
            )
        yield record
    write_json(folder / "done.json", json.loads(read_tensors_and_metadata(folder / "state.safetensors")[1]["about"]))


def identity(
    name: str, seed: int, steps: int | None = None, start: Path | None = None, which: str = "davsp-mini"
) -> dict:
    """What a stage's result depends on; a checkpoint of another identity is refused."""
    stage = road(which)[name]
    steps = steps or stage.steps
    about = {"stage": name, "seed": seed, "steps": steps, "batch": stage.batch, "texts": stage.texts, "lr": stage.lr}
    if which != "davsp-mini":
        about |= {"model": which}
    if stage.of:
        about |= {"of": stage.of}
    if name == "see":
        about |= {"hints": sha256(FOLDER / "model.safetensors")}
    return about | ({"start": sha256(start / "model.safetensors")} if start else {})


def _teacher() -> Any:
    """davsp-mini as it ships: the siblings' towers learn beside its tower."""
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).requires_grad_(False).eval()


def hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()})"


def check_done(out: Path, name: str, seed: int, start: Path | None = None, which: str = "davsp-mini") -> dict:
    """The record of a finished stage.

    Raises:
        DavspError: it is not done, or it was done with other settings.
    """
    path = out / name / "done.json"
    if not path.exists():
        raise DavspError(f"stage {name} is not done in {out}; run `davsp mini train --stage {name}` first.")
    record = read_json(path)
    differ = {
        k: (record.get(k), v) for k, v in identity(name, seed, start=start, which=which).items() if record.get(k) != v
    }
    if differ:
        raise DavspError(f"{path} is of other settings {differ} (there, here); choose another --out or delete it.")
    return record


def _load_parts(parts: dict[str, nn.Module], path: Path, stage: str) -> None:
    """Take over what `stage` trained: the tower with its heads, or the decoder with its own and the oracle; all from the rest."""
    state = read_tensors(path)
    tower = ("model.model.vision_tower.", "model.model.visual.", "heads.")
    bridge = ("model.model.multi_modal_projector.", "model.model.visual.merger.")
    decoder = ("model.model.language_model.", "model.lm_head.", "oracle.", "heads.named_")
    prefixes = {"tower": tower, "read": tower, "see": tower, "words": decoder, "place": decoder, "speak": decoder}
    if stage == "bridge":
        prefixes["bridge"] = (*tower, *bridge)
    for name, module in parts.items():
        inner = {k.removeprefix(f"{name}."): v for k, v in state.items()
                 if k.startswith(f"{name}.") and k.startswith(prefixes.get(stage, ""))}  # fmt: skip
        if inner or name == "model":
            result = module.load_state_dict(inner, strict=False)
            assert inner and not result.unexpected_keys, f"{path} holds other parameters than {name}"


def _load_start(model: nn.Module, heads: Heads, start: Path, seed: int) -> None:
    """Take over a finished model; the throw-away heads did not ship, so they are learnt again on the tower as it is."""
    from transformers import LlavaForConditionalGeneration

    weights = LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32).state_dict()
    model.load_state_dict(weights, strict=True)
    model.requires_grad_(False)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=3e-3)
    for step in range(START_HEADS):
        loss, _ = tower_loss(model, heads, random.Random(f"{seed} heads {step}"), 16, whole=step % 2 == 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _save(both: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, about: dict) -> None:
    state = {k: v.detach().cpu().clone().contiguous() for k, v in both.state_dict().items()}
    for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        for k, v in optimizer.state[p].items():
            state[f"optimizer.{i}.{k}"] = v.detach().cpu().clone().contiguous()
    # one file: state and step can't come apart in a kill
    save_tensors(folder / "state.safetensors", state, metadata={"about": json.dumps(about)})


def _resume(both: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, about: dict) -> tuple[int, float]:
    """Load the checkpoint of `folder`, if any; returns (first step to run, seconds spent before)."""
    if not (folder / "state.safetensors").exists():
        return 0, 0.0
    state, metadata = read_tensors_and_metadata(folder / "state.safetensors")
    checkpoint = json.loads(metadata["about"])
    differ = {k: (checkpoint.get(k), v) for k, v in about.items() if checkpoint.get(k) != v}
    if differ:
        raise DavspError(
            f"{folder} holds a run with other settings {differ} (there, here); choose another --out or delete it."
        )
    both.load_state_dict({k: v for k, v in state.items() if not k.startswith("optimizer.")})
    for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        prefix = f"optimizer.{i}."
        entry = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if entry:
            optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in entry.items()}
    return checkpoint["step"], checkpoint["seconds"]


def _truncate(log: Path, step: int) -> None:
    """Drop the lines that a killed run wrote after its last checkpoint."""
    if log.exists():
        lines = [line for line in log.read_text().splitlines() if line and json.loads(line)["step"] <= step]
        log.write_text("".join(f"{line}\n" for line in lines))


def export(out: Path, folder: Path, seed: int = 0, which: str = "davsp-mini") -> None:
    """Write the last stage's model as a Hugging Face folder: float16 safetensors, tokenizer, image processor."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model, blueprint = new_model(which, seed), BLUEPRINTS[which]
    _load_parts({"model": model}, out / LAST / "state.safetensors", LAST)
    model.eval().half()
    model.generation_config.update(max_new_tokens=48, do_sample=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)
    words.tokenizer().save_pretrained(folder)
    common: Any = {"image_mean": list(MEAN), "image_std": list(STD), "resample": 3}
    if is_qwen(model):
        bounds = {
            "shortest_edge": 64 * blueprint.patch**2,
            "longest_edge": blueprint.side**2,
        }  # pixels in all: 64 to 144 tokens
        processor: Any = Qwen2VLImageProcessorPil(
            size=bounds, patch_size=blueprint.patch, merge_size=1, temporal_patch_size=FRAMES, **common
        )
    else:
        square = {"height": blueprint.side, "width": blueprint.side}
        processor = CLIPImageProcessorPil(size={"shortest_edge": blueprint.side}, crop_size=square, **common)
    processor.save_pretrained(folder)
