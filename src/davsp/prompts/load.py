"""Reading a prompt of either kind."""

from pathlib import Path

from davsp.errors import DavspError
from davsp.prompts import additive, border
from davsp.prompts.additive import AdditiveNoise
from davsp.prompts.border import VisualSafetyPrompt


def load_prompt(source: str | Path) -> VisualSafetyPrompt | AdditiveNoise:
    """The prompt in a folder, border or noise by the configuration file that is there; a hub id is a border.

    Raises:
        DavspError: the folder holds prompts of both kinds; else as `from_pretrained` of the kind.
    """
    folder = Path(source)
    if not (folder / additive.CONFIG).exists():
        return VisualSafetyPrompt.from_pretrained(source)
    if (folder / border.CONFIG).exists():
        raise DavspError(f"{folder} holds both {border.CONFIG} and {additive.CONFIG}; take the files of one away.")
    return AdditiveNoise.from_pretrained(folder)
