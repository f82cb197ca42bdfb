"""Configuration files: JSON that a pydantic model checks. They may come from strangers, and are printed and put on cards."""

import math
import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from davsp.errors import DavspError, refused_as
from davsp.runtime.files import check_regular, read_json
from davsp.runtime.terminal import CONTROLS

Config = TypeVar("Config", bound=BaseModel)
NAMES = ("model_id", "revision")
"""Fields of one line, as the names of all fields are: a line break could pass for what davsp itself says."""


def read_config(path: Path, kind: type[Config]) -> Config:
    """Read a configuration file.

    Raises:
        DavspError: it is missing, no JSON, or a field is unknown or wrong, holds NaN, an infinity, a control character (a terminal
            obeys those), half a character, or in a name a line break; the message names it.
    """
    check_regular(path)
    content = read_json(path)
    _check(path, "", content)
    with refused_as(
        lambda field, why, _: f"{path}: field '{field or 'the file'}': {why.lower()}; correct or remove it"
    ):
        return kind.model_validate(content)


def _check(path: Path, field: str, value: Any) -> None:
    """Raise DavspError at the first value that may be neither printed nor written again."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_text(path, field, name, lines=False)
            _check(path, f"{field}.{name}" if field else name, inner)
    elif isinstance(value, list):
        for inner in value:
            _check(path, field, inner)
    elif isinstance(value, float) and not math.isfinite(value):
        raise DavspError(f"{path}: field '{field}' holds {value}, which is no figure; correct or remove it")
    elif isinstance(value, str):
        _check_text(path, field, value, lines=field not in NAMES)


def _check_text(path: Path, field: str, text: str, lines: bool) -> None:
    if bad := CONTROLS.search(text) or (None if lines else re.search(r"[\n\r\t]", text)):
        place = f"field '{field}'" if field else "a field"
        raise DavspError(f"{path}: {place} holds the control character {bad[0]!r}; correct or remove it")
