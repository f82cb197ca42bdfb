"""A file beside a prompt: what was measured with it. It is no part of the prompt, and is bound to its pixels and texts.

The hashes in `vsp_config.json` and the prompt's own are the same with and without it. It has a hash of its own, over all that it says.
What was measured without a border lies in a folder of its own, and says so by its pixels (`UNTOUCHED`).
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict

from davsp.errors import DavspError
from davsp.runtime.config import read_config
from davsp.runtime.files import check_regular, sha256_bytes, to_json

if TYPE_CHECKING:
    from davsp.prompts.base import Prompt

B = TypeVar("B", bound="Beside")

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


UNTOUCHED = ""
"""In place of a border's pixels: pictures are left as they are."""


def texts(prompt: "Prompt") -> tuple[str, str, str]:
    """What the prompt puts around a question."""
    return prompt.text, prompt.separator, prompt.suffix


class Beside(BaseModel):
    """What such files have in common.

    Attributes:
        pixels, texts: of the prompt that was measured: `pixels_sha256()`, or `UNTOUCHED`; text, separator, suffix.
        model, revision, weights: that was asked; `weights` is `davsp.lvlm.fingerprint`.
        sha256: of all the rest.
        mend: what to do with a file that is wrong, for the error.
    """

    model_config = STRICT
    mend: ClassVar[str]

    pixels: str
    texts: tuple[str, str, str]
    model: str
    revision: str | None = None
    weights: str | None = None
    sha256: str = ""

    def digest(self) -> str:
        """What `sha256` must be."""
        return sha256_bytes(json.dumps(self.model_dump(exclude={"sha256"}), sort_keys=True).encode())

    def contents(self) -> bytes:
        """The file's bytes, with its hash."""
        return to_json(self.model_copy(update={"sha256": self.digest()}).model_dump()).encode()

    def belong(self, prompt: "Prompt") -> bool:
        """Whether it was measured with this very prompt."""
        return (self.pixels, self.texts) == (prompt.pixels_sha256(), texts(prompt))

    @classmethod
    def read(cls: "type[B]", path: Path, prompt: "Prompt | None") -> "B":
        """The file in a prompt's folder, or, with None, in one without a border.

        Raises:
            DavspError: it is broken, was changed, or is of another border or text.
        """
        check_regular(path)
        content = read_config(path, cls)
        if content.sha256 != content.digest():
            raise DavspError(f"{path} was changed since it was written: its field 'sha256' is another one; {cls.mend}")
        if prompt is None:
            if content.pixels != UNTOUCHED:
                raise DavspError(f"{path} was measured with a border, and there is none beside it; put it back there")
        elif not content.belong(prompt):
            what = "border" if content.pixels != prompt.pixels_sha256() else "text"
            raise DavspError(f"{path} was measured with another {what} than this prompt's; {cls.mend}")
        return content
