"""What the commands do with their options: models, data and texts, and what is used where one is left out."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from davsp.errors import DavspError, refused_as
from davsp.runtime import parallel
from davsp.runtime.terminal import plain

if TYPE_CHECKING:
    from rich.console import Console

    from davsp.cli.options import ModelOptions, ProcessOptions
    from davsp.embedded.data import Protocol
    from davsp.lvlm import LVLM, AnsweringLVLM
    from davsp.vector import HarmfulnessVector


def say(text: str) -> None:
    """Print to stderr: what is no result. Of several processes the first one says it."""
    if parallel.rank() == 0:
        complain(text)


def complain(text: str) -> None:
    """As `say`, by whichever process."""
    print(plain(text), file=sys.stderr)


def terminal() -> "Console":
    """Where bars and notes go: stderr, in the first process."""
    from rich.console import Console

    return Console(stderr=True, quiet=parallel.rank() > 0)


def load_lvlm(model: "ModelOptions") -> "LVLM":
    """The model that --model names, one of those that ship by its bare name; left out: davsp-mini."""
    import torch

    from davsp import embedded
    from davsp.lvlm import LVLM, answer_length
    from davsp.lvlm.templates import read_kwargs

    if model.dtype not in (None, "float32", "bfloat16", "float16"):
        raise DavspError(f"--dtype {model.dtype!r} is not known: choose float32, bfloat16 or float16.")
    if model.name is None or model.name in embedded.MODELS:
        loading = model.revision or model.dtype or model.quantization or model.canvas or model.attn_implementation
        if loading or model.template_kwargs or model.template not in (None, "checkpoint"):
            raise DavspError(
                "--revision, --dtype, --quantization, --attn-implementation, --canvas, --template and --template-kwargs are for other models; those that "
                "ship have their own."
            )
        return embedded.load(model.name or "davsp-mini", device_map=model.device, undefended=model.undefended)
    dtype = getattr(torch, model.dtype) if model.dtype else None
    lvlm = LVLM.from_pretrained(
        model.name, revision=model.revision, device_map=model.device, dtype=dtype, quantization=model.quantization,
        attn_implementation=model.attn_implementation,
        canvas=model.canvas, template=model.template or "checkpoint", template_kwargs=read_kwargs(model.template_kwargs),
        undefended=model.undefended,
    )  # fmt: skip
    lvlm.longest = answer_length(is_shipped(model.name))
    return lvlm


def needs_extra() -> None:
    """Raises DavspError where what the proxy needs is not installed."""
    from importlib.util import find_spec

    if missing := [name for name in ("starlette", "uvicorn", "prometheus_client") if find_spec(name) is None]:
        raise DavspError(f"{missing[0]} is not installed: pip install 'davsp[serve]'.")


def in_processes(options: "ProcessOptions", model: "ModelOptions") -> "ModelOptions":
    """Run this very command as several processes and leave with their exit code; go on if this is one of them, or the only one.

    To be called before anything asks CUDA.

    Returns:
        The model's options, its device among the GPUs of this process.

    Raises:
        DavspError: the options do not go together, or with torchrun; fewer GPUs than they ask for.
    """
    import typer

    count, each, there = options.num_processes, options.gpus_per_process, parallel.processes()
    if each is not None and model.device not in (None, "auto"):
        raise DavspError(f"--gpus-per-process and --device {model.device} do not go together; leave one of them out.")
    if max(count, there) > 1 and ":" in (model.device or ""):
        raise DavspError(
            f"--device {model.device} is one for all processes; leave it out, and each takes GPUs of its own."
        )
    if there > 1 and count not in (1, there):
        raise DavspError(f"torchrun started {there} processes; leave --num-processes {count} out.")
    if count > 1 and there == 1:
        from davsp.runtime.launch import check_gpus, launch

        if model.device != "cpu":
            check_gpus(count, each)
        raise typer.Exit(launch(sys.argv[1:], count))
    if parallel.rank() > 0:
        sys.stdout = open(os.devnull, "w")  # results are shown by the first process
    if (each is None and there == 1) or model.device == "cpu":
        return model
    from davsp.runtime.launch import take_gpus

    place = take_gpus(each)
    return replace(model, device=model.device or place)


def shipped_protocol(model: str | None, malicious: Path | None, benign: Path | None, seed: int) -> "Protocol | None":
    """The embedded protocol, if no data was given; both classes must come from one place."""
    if (malicious is None) != (benign is None):
        missing = "--malicious" if malicious is None else "--benign"
        raise DavspError(f"{missing} is missing: both classes are needed, or neither for the embedded data.")
    return None if malicious else embedded_protocol(model, seed)


def embedded_protocol(model: str | None, seed: int) -> "Protocol":
    """The embedded protocol; its words are those of the models that ship, so another model is refused."""
    from davsp import embedded

    if not is_shipped(model):
        names = ", ".join(embedded.MODELS)
        raise DavspError(f"the embedded data is for {names}, not for {model}; give your own queries.")
    return embedded.protocol(seed)


def is_shipped(model: str | None) -> bool:
    """Whether --model names one of the models that ship, or a folder of one: texts, refusal and budget are then its own."""
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
    if vector.text is None:
        say(f"note: nobody says which text stood before every question when the vector was made; {who} {text!r} there.")
    elif vector.text != text:
        say(f"note: the vector was fitted with the text {vector.text!r} before every question; {who} {text!r} there.")


def compare_templates(lvlm: "AnsweringLVLM", made: dict[str, Any]) -> None:
    """Say so where a vector or a prompt was made under another conversation template than the one a model is asked by here.

    Args:
        made: what it is called -> a `HarmfulnessVector` or a `Prompt`, or a defense: PAT, AdaShield-A, or one in which prompts may stand.
    """
    from davsp.lvlm import template_of
    from davsp.lvlm.templates import CHECKPOINT

    here = template_of(lvlm)
    asked = f"{lvlm.model_id} is asked by {here} here (--template, --template-kwargs)"
    if lvlm.server and here == CHECKPOINT:
        asked = "the server asks by its own"
    for what, thing in made.items():
        for one in _with_template(thing):
            if one.template not in (None, here):
                say(f"note: {what} was trained under the template {one.template}, and {asked}.")


def say_where(lvlm: "LVLM") -> None:
    """Say so where the chat template opens a thought: the last prompt token then stands before that, and not before the answer."""
    if tag := lvlm.opened():
        say(
            f"note: the chat template of {lvlm.model_id} ends every prompt in {tag}, so states are read, and a refusal is put, where the "
            "thought starts; to have them where the answer starts, switch thinking off by what the template reads (--template-kwargs "
            "enable_thinking=false of most)."
        )


def _with_template(thing: Any) -> list[Any]:
    """The thing itself, or the prompts in a defense: alone, in a chain, inside of another or in its place."""
    if thing is None or hasattr(thing, "template"):
        return [thing] if thing else []
    inner = [getattr(thing, name, None) for name in ("prompt", "inner", "instead", "else_")]
    return [one for part in [*inner, *getattr(thing, "defenses", ())] if part for one in _with_template(part)]


def published(recipe: str | None, default: bool = False) -> bool:
    """Whether --recipe means the authors' setting.

    Raises:
        DavspError: it is neither of the two.
    """
    if recipe not in (None, "published", "own"):
        raise DavspError(f"--recipe {recipe!r} is not known: choose published or own.")
    return default if recipe is None else recipe == "published"


def ask_as_published(lvlm: "LVLM", template: str | None) -> None:
    """Ask a LLaVA-1.5 by the template of DAVSP's authors, if --template says nothing, and say so."""
    if template is None and lvlm.takes_templates():
        lvlm.use_template("llava_v1")
        say(
            f"{lvlm.model_id} is asked by the template llava_v1, as by DAVSP's authors; --template checkpoint asks by its own."
        )


def compare_pictures(vector: Any, lvlm: Any) -> None:
    """Say so if a vector was fitted on pictures that came to the model's shape in another way than undefended ones do now.

    Of a server nobody knows.
    """
    if lvlm.server is None and vector.undefended not in ("", lvlm.undefended):
        say(
            f"note: the vector was fitted with --undefended {vector.undefended}; undefended pictures are shown by "
            f"{lvlm.undefended} now."
        )


def safety_text(text: str | None, shipped: bool) -> str:
    """The safety text: as given; else the model's own if it ships, none for another."""
    from davsp import embedded

    return text if text is not None else embedded.SAFETY_TEXT if shipped else ""


def default_target(shipped: bool) -> str:
    """How the models that ship begin when they comply; else the usual words of the field."""
    from davsp.attacks import AttackSettings
    from davsp.embedded.recipes import TOKENS

    return str(TOKENS["target"] if shipped else AttackSettings.model_fields["target"].default)


def direction_of(
    given: "HarmfulnessVector | None", protocol: "Protocol | None", lvlm: "LVLM", text: str, who: str
) -> "HarmfulnessVector":
    """The vector of --vector, held against the model; None: one fitted and swept on the embedded protocol, which is there then.

    Args:
        text: that stands before every question here.
        who: who puts it there, with the verb.
    """
    from davsp.vector import HarmfulnessVector

    if given:
        given.check(lvlm)
        compare_pictures(given, lvlm)
        compare_texts(given, text, who)
        compare_templates(lvlm, {"the vector": given})
        return given
    assert protocol is not None
    direction = HarmfulnessVector.fit(lvlm, protocol.vector_malicious, protocol.vector_benign, text=text)
    direction.sweep(lvlm, protocol.sweep_malicious, protocol.sweep_benign, text=text)
    return direction


def settings_of(cls: type, values: dict[str, Any]) -> Any:
    """Settings from options; a value that is not possible is named by its option."""
    with refused_as(_impossible):
        return cls(**values)


def _impossible(field: str, why: str, value: Any) -> str:
    option = field.split(".")[0].replace("_", "-")
    return f"--{option} {value!r} is not possible: {why.removeprefix('Value error, ').lower()}."
