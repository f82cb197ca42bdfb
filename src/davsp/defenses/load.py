"""Reading a defense from a folder."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

from davsp.defenses.adashield_a import pool
from davsp.defenses.adashield_a.defense import AdaShieldA
from davsp.defenses.base import Defense
from davsp.defenses.gate import KINDS, Gate, read_alone
from davsp.defenses.gate.defense import Kind
from davsp.defenses.gate.through import seen_through
from davsp.defenses.none import NoDefense
from davsp.defenses.pat import defense as pat
from davsp.defenses.text import SafetyText
from davsp.defenses.visual import VisualPrompt
from davsp.errors import DavspError
from davsp.prompts import VisualSafetyPrompt, additive, border, load_prompt, published
from davsp.prompts.gate import FILE, SERVED

GATE = re.compile(r"(gate(?::([^+]*))?)\+(?:([^=+:/]+)=)?(.+)", re.DOTALL)  # gate:KIND+NAME=FOLDER, as in davsp eval


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
            through it; `gate+safety-text=TEXT` looks through a text.
        name: of its row; None: the kind's own, davsp for a border.

    Raises:
        DavspError: the folder holds none of the known kinds, or two; else as the kind's own reader.
    """
    folder = Path(source)
    if not os.path.isdir(source) and (spec := GATE.fullmatch(f"{source}")):
        head, kind, inside, value = spec.groups()
        kind = "answer" if kind is None else kind
        if holds_gate(value):
            return _gated_alone(value, inside, kind, name, head)
        inner = SafetyText(value) if inside == "safety-text" else load_defense(value, inside)
        return gated(inner, kind, name or f"{head}+{inner.name}")
    if holds_gate(folder):
        raise DavspError(
            f"{folder} holds a gate without a border, which is no defense by itself; give gate:first+{folder} or "
            f"gate:states+{folder}."
        )
    kinds = {LOADERS[file]: file for file in LOADERS if (folder / file).exists()}
    if len(kinds) > 1:
        raise DavspError(f"{folder} holds {' and '.join(kinds.values())}; take the files of one away.")
    if not kinds and folder.is_dir():
        raise DavspError(
            f"{folder} holds no defense: none of {', '.join(LOADERS)} is there, nor, to stand behind gate:first+, {FILE} or {SERVED}; give "
            "the folder that davsp train, baseline or gate wrote."
        )
    return next(iter(kinds), _visual)(source, name)


def holds_gate(folder: str | Path) -> bool:
    """Whether a folder holds a gate's thresholds and no border or other defense that they could belong to."""
    there = set(os.listdir(folder)) if os.path.isdir(folder) else set()  # not Path's, which fails on a long text
    return bool(there & {FILE, SERVED}) and not there & set(LOADERS)


def _gated_alone(folder: str, inside: str | None, kind: str, name: str | None, head: str) -> Gate:
    """A gate that looks through what its own files say."""
    inner, calibration, served = read_alone(folder, inside)
    return Gate(inner, _kind(kind), calibration, name=name or f"{head}+{inner.name}", served=served)


def _kind(word: str) -> Kind:
    if word not in KINDS:
        raise DavspError(
            f"a gate has no kind {word!r}: behind gate: may stand {', '.join(KINDS)}; ECSO behind one is a word of --defense "
            "(gate:answer,ecso+NAME=FOLDER); in Python write Gate(..., else_=ECSO())."
        )
    return cast(Kind, word)


def gated(inner: Defense, kind: str, name: str | None = None) -> Gate:
    """A gate that looks through a defense; its thresholds are those in the folder of the prompt.

    Raises:
        DavspError: a threshold of what has none, or as `Gate`.
    """
    which = _kind(kind)
    if which != "answer" and isinstance(inner, NoDefense | SafetyText):
        look = "none" if isinstance(inner, NoDefense) else "text"
        raise DavspError(
            f"gate:{kind}+{inner.name} has no threshold; make one with davsp gate FOLDER --look {look} and give "
            f"gate:{kind}+{inner.name}=FOLDER"
        )
    if which != "answer":
        seen_through(inner)
    prompt = inner.prompt if isinstance(inner, VisualPrompt) else None
    border = prompt if isinstance(prompt, VisualSafetyPrompt) and which != "answer" else None
    served = border.served if border and which == "first" else None
    return Gate(inner, which, border.gate if border else None, name=name, served=served)
