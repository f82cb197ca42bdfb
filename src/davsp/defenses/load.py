"""Reading a defense from a folder."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

from davsp.defenses.adashield_a import pool
from davsp.defenses.adashield_a.defense import AdaShieldA
from davsp.defenses.base import Defense
from davsp.defenses.gate import KINDS, Gate
from davsp.defenses.gate.defense import Kind
from davsp.defenses.pat import defense as pat
from davsp.defenses.visual import VisualPrompt
from davsp.errors import DavspError
from davsp.prompts import VisualSafetyPrompt, additive, border, load_prompt, published

GATE = re.compile(r"(gate(?::(\w*))?)\+(?:([^=+:/]+)=)?(.+)", re.DOTALL)  # gate:KIND+NAME=FOLDER, as in davsp eval


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
        source: folder or hub id; with `gate+`, `gate:first+` or `gate:states+` before it, alone or as NAME=FOLDER, a gate that looks
            through it.
        name: of its row; None: the kind's own, davsp for a border.

    Raises:
        DavspError: the folder holds none of the known kinds, or two; else as the kind's own reader.
    """
    folder = Path(source)
    if not folder.is_dir() and (spec := GATE.fullmatch(f"{source}")):
        inner = load_defense(spec[4], spec[3])
        return gated(inner, spec[2] if spec[2] is not None else "answer", name or f"{spec[1]}+{inner.name}")
    kinds = {LOADERS[file]: file for file in LOADERS if (folder / file).exists()}
    if len(kinds) > 1:
        raise DavspError(f"{folder} holds {' and '.join(kinds.values())}; take the files of one away.")
    if not kinds and folder.is_dir():
        raise DavspError(f"{folder} holds no defense: none of {', '.join(LOADERS)} is there.")
    return next(iter(kinds), _visual)(source, name)


def gated(inner: Defense, kind: str, name: str | None = None) -> Gate:
    """A gate that looks through a defense; its thresholds are those in the folder of the prompt.

    Raises:
        DavspError: as `Gate`.
    """
    if kind not in KINDS:
        raise DavspError(f"a gate has no kind {kind!r}: behind gate: may stand {', '.join(KINDS)}.")
    prompt = inner.prompt if isinstance(inner, VisualPrompt) else None
    border = prompt if isinstance(prompt, VisualSafetyPrompt) and kind != "answer" else None
    served = border.served if border and kind == "first" else None
    return Gate(inner, cast(Kind, kind), border.gate if border else None, name=name, served=served)
