"""Reading a defense from a folder."""

from collections.abc import Callable
from pathlib import Path

from davsp.defenses.adashield_a import pool
from davsp.defenses.adashield_a.defense import AdaShieldA
from davsp.defenses.base import Defense
from davsp.defenses.pat import defense as pat
from davsp.defenses.visual import VisualPrompt
from davsp.errors import DavspError
from davsp.prompts import additive, border, load_prompt, published


def _visual(source: str | Path, name: str | None) -> Defense:
    prompt = load_prompt(source)
    return VisualPrompt(prompt, name or ("davsp" if prompt.kind == "border" else prompt.kind))


LOADERS: dict[str, Callable[[str | Path, str | None], Defense]] = {
    border.CONFIG: _visual,
    additive.CONFIG: _visual,
    published.TENSORS: _visual,
    pat.CONFIG: pat.PAT.load,
    pool.CONFIG: AdaShieldA.load,
}
"""By the file that a folder of the kind holds; a new kind of trained defense is a line here."""


def load_defense(source: str | Path, name: str | None = None) -> Defense:
    """The defense in a folder, by the files that are there; what is no folder is the hub id of a border.

    Args:
        source: folder or hub id.
        name: of its row; None: the kind's own, davsp for a border.

    Raises:
        DavspError: the folder holds none of the known kinds, or two; else as the kind's own reader.
    """
    folder = Path(source)
    kinds = {LOADERS[file]: file for file in LOADERS if (folder / file).exists()}
    if len(kinds) > 1:
        raise DavspError(f"{folder} holds {' and '.join(kinds.values())}; take the files of one away.")
    if not kinds and folder.is_dir():
        raise DavspError(f"{folder} holds no defense: none of {', '.join(LOADERS)} is there.")
    return next(iter(kinds), _visual)(source, name)
