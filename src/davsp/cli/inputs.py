"""What the commands do with their options: models, data and texts, and what is used where one is left out."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from davsp.errors import DavspError

if TYPE_CHECKING:
    from davsp.embedded.data import Protocol
    from davsp.lvlm import LVLM
    from davsp.query import Query


def say(text: str) -> None:
    """Print to stderr: what is no result."""
    print(text, file=sys.stderr)


def load_lvlm(
    model: str | None,
    revision: str | None,
    device: str | None,
    dtype: str | None = None,
    quantization: str | None = None,
    canvas: int | None = None,
) -> "LVLM":
    """The model that --model names, one of those that ship by its bare name; left out: davsp-mini. One of several processes takes its own GPU."""
    import torch

    from davsp import embedded
    from davsp.lvlm import LVLM
    from davsp.runtime import parallel

    device = device or parallel.device()
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise DavspError(f"--dtype {dtype!r} is not known: choose float32, bfloat16 or float16.")
    if model is None or model in embedded.MODELS:
        if dtype or quantization or canvas:
            raise DavspError(
                "--dtype, --quantization and --canvas are for other models; those that ship have their own."
            )
        return embedded.load(model or "davsp-mini", device_map=device)
    number = getattr(torch, dtype) if dtype else None
    return LVLM.from_pretrained(
        model, revision=revision, device_map=device, dtype=number, quantization=quantization, canvas=canvas
    )


def in_processes(count: int) -> None:
    """Run this very command as `count` processes and leave with their exit code; go on if this is one of them."""
    import typer

    from davsp.runtime import parallel

    if count == 1 or parallel.processes() > 1:
        return
    raise typer.Exit(parallel.launch(sys.argv[1:], count))


def own_protocol(model: str | None, malicious: Path | None, benign: Path | None, seed: int) -> "Protocol | None":
    """The embedded protocol, if no data was given; both classes must come from one place."""
    if (malicious is None) != (benign is None):
        missing = "--malicious" if malicious is None else "--benign"
        raise DavspError(f"{missing} is missing: both classes are needed, or neither for the embedded data.")
    return None if malicious else embedded_protocol(model, seed)


def embedded_protocol(model: str | None, seed: int) -> "Protocol":
    """The embedded protocol; its words are those of the models that ship, so another model is refused."""
    from davsp import embedded

    if model is not None and model not in embedded.MODELS and not is_mini(Path(model)):
        names = ", ".join(embedded.MODELS)
        raise DavspError(f"the embedded data is for {names}, not for {model}; give your own queries.")
    return embedded.protocol(seed)


def is_embedded(model: str | None) -> bool:
    """Whether --model names one of the models that ship, or a folder of one, so that texts are to be in their words."""
    from davsp import embedded

    return model is None or model in embedded.MODELS or is_mini(Path(model))


def is_mini(folder: Path) -> bool:
    """Whether a folder holds a davsp-mini or a sibling: one of their canvases, a vocabulary as large as the embedded world's."""
    from davsp.embedded import words
    from davsp.runtime.files import read_json

    if not (folder / "config.json").is_file():
        return False
    config = read_json(folder / "config.json")
    parts = [config.get(name) if isinstance(config, dict) else None for name in ("vision_config", "text_config")]
    vision, text = (part if isinstance(part, dict) else {} for part in parts)
    kind = config.get("model_type") if isinstance(config, dict) else None
    known = vision.get("image_size") in (168, 192) or kind == "qwen2_vl"
    return known and text.get("vocab_size") == len(words.vocabulary())


def compare_texts(vector: Any, text: str, who: str) -> None:
    """Say so if a vector was fitted with another text before the questions; its margins may then not fit."""
    if vector.text != text:
        say(f"note: the vector was fitted with the text {vector.text!r} before every question; {who} {text!r} there.")


def queries_at(path: Path | None, otherwise: "list[Query] | None", option: str) -> "list[Query]":
    """The queries that an option names; left out: `otherwise`, and without that DavspError."""
    from davsp.benchmarks.custom import load_queries

    if path is not None:
        return load_queries(path)
    if otherwise is None:
        raise DavspError(f"{option} is missing; give a folder or .jsonl of queries.")
    return otherwise


def safety_text(text: str | None, own: bool) -> str:
    """The safety text: as given; else the embedded model's for its own data, none for a user's."""
    from davsp import embedded

    return text if text is not None else embedded.SAFETY_TEXT if own else ""
