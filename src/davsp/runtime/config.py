"""Configuration files: JSON that a pydantic model checks."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from davsp.errors import refused_as
from davsp.runtime.files import read_json

Config = TypeVar("Config", bound=BaseModel)


def read_config(path: Path, kind: type[Config]) -> Config:
    """Read a configuration file.

    Raises:
        DavspError: it is missing, no JSON, or a field is unknown or wrong; the message names it.
    """
    content = read_json(path)
    with refused_as(
        lambda field, why, _: f"{path}: field '{field or 'the file'}': {why.lower()}; correct or remove it"
    ):
        return kind.model_validate(content)
