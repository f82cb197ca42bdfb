"""Configuration files: JSON that a pydantic model checks. They may come from strangers, and are printed and put on cards."""

import math
import unicodedata
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from davsp.errors import DavspError, refused_as
from davsp.runtime.files import read_json

Config = TypeVar("Config", bound=BaseModel)


def read_config(path: Path, kind: type[Config]) -> Config:
    """Read a configuration file.

    Raises:
        DavspError: it is missing, no JSON, or a field is unknown or wrong, holds NaN, an infinity or a control character (a
            terminal obeys those); the message names it.
    """
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
            _check(path, field, name)
            _check(path, f"{field}.{name}" if field else name, inner)
    elif isinstance(value, list):
        for inner in value:
            _check(path, field, inner)
    elif isinstance(value, float) and not math.isfinite(value):
        raise DavspError(f"{path}: field '{field}' holds {value}, which is no figure; correct or remove it")
    elif isinstance(value, str) and (bad := next(filter(_controls, value), None)):
        place = f"field '{field}'" if field else "a field"
        raise DavspError(f"{path}: {place} holds the control character {bad!r}; correct or remove it")


def _controls(character: str) -> bool:
    return unicodedata.category(character) == "Cc" and character not in "\n\r\t"
