"""Reading a prompt of any kind."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from davsp.errors import DavspError
from davsp.prompts import additive, border, published
from davsp.prompts.additive import AdditiveNoise
from davsp.prompts.border import VisualSafetyPrompt
from davsp.prompts.hub import fetch
from davsp.prompts.published import ExactBorder
from davsp.runtime.files import read_json, sha256


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


def saved_files(source: str | Path) -> Iterator[tuple[str, str]]:
    """The files of a prompt that `load_prompt` took, each with its SHA-256 and whether it is as it was saved.

    The card may have been changed by hand; any other change `load_prompt` refuses. Folders from before hashes were kept have none.
    """
    folder = fetch(source, None, [border.CONFIG])
    config = next(folder / name for name in (border.CONFIG, additive.CONFIG) if (folder / name).exists())
    files: dict[str, Any] = read_json(config).get("files", {})
    for name, saved_hash in files.items():
        hash_now = sha256(folder / name) if (folder / name).exists() else None
        yield (
            name,
            f"SHA-256 {hash_now}, {'as saved' if hash_now == saved_hash else 'changed since it was saved'}"
            if hash_now
            else "gone",
        )
    yield config.name, f"SHA-256 {sha256(config)}{'' if files else '; it keeps no hashes of the others: save anew'}"
