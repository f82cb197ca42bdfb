"""Reading a prompt of any kind."""

from pathlib import Path

from davsp.errors import DavspError
from davsp.prompts import additive, border, published
from davsp.prompts.additive import AdditiveNoise
from davsp.prompts.border import VisualSafetyPrompt
from davsp.prompts.published import ExactBorder


def load_prompt(source: str | Path) -> VisualSafetyPrompt | AdditiveNoise:
    """The prompt in a folder: border, exact border or noise, by the files that are there; a hub id is a border.

    Raises:
        DavspError: the folder holds prompts of two kinds; else as `from_pretrained` of the kind.
    """
    folder = Path(source)
    for one, other in ((border.CONFIG, additive.CONFIG), (border.TENSORS, published.TENSORS)):
        if (folder / one).exists() and (folder / other).exists():
            raise DavspError(f"{folder} holds both {one} and {other}; take the files of one away.")
    if (folder / additive.CONFIG).exists():
        return AdditiveNoise.from_pretrained(folder)
    if (folder / published.TENSORS).exists():
        return ExactBorder.from_pretrained(folder)
    return VisualSafetyPrompt.from_pretrained(source)
