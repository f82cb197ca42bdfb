"""The small LVLMs that ship, their data, and how they were trained."""

from pathlib import Path
from typing import TYPE_CHECKING

from davsp.embedded.words import REFUSAL, SAFETY_TEXT

if TYPE_CHECKING:
    from davsp.embedded.data import Protocol, protocol
    from davsp.embedded.recipes import SETTINGS
    from davsp.lvlm import LVLM

FOLDER = Path(__file__).parent / "davsp-mini"
MODELS = ("davsp-mini", "davsp-mini-narrow", "davsp-mini-qwen")  # names that --model takes
PADDING = 14  # one ring of patches: 44 of 144 image tokens, as 30 of 336 pixels is in the paper

__all__ = ["FOLDER", "MODELS", "PADDING", "REFUSAL", "SAFETY_TEXT", "SETTINGS", "Protocol", "load", "protocol"]


def load(model: str | Path = "davsp-mini", device_map: str | None = None, undefended: str | None = None) -> "LVLM":
    """davsp-mini or another of `MODELS` by its name, or such a folder, as any hub model is loaded; float32 on any device.

    Raises:
        DavspError: the folder is missing or broken.
    """
    from davsp.errors import DavspError
    from davsp.lvlm import LVLM, answer_length

    folder = FOLDER.with_name(model) if isinstance(model, str) else model
    if not (folder / "config.json").exists():
        raise DavspError(f"there is no model in {folder}; make one with `davsp mini train`.")
    lvlm = LVLM.from_pretrained(folder, dtype="float32", device_map=device_map, undefended=undefended)
    lvlm.model_id = (
        model if isinstance(model, str) else "davsp-mini"
    )  # the path of an installation is no name: it would end up in prompts' cards
    lvlm.longest = answer_length(shipped=True)
    return lvlm


def __getattr__(name: str) -> object:
    from importlib import import_module

    home = {"Protocol": "data", "protocol": "data", "SETTINGS": "recipes"}.get(name)
    if home is None:
        raise AttributeError(name)
    return getattr(import_module(f"{__name__}.{home}"), name)
