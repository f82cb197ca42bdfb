"""A border's canaries: queries that it flips, in a file beside the prompt, by which a server's owner sees that it still works there.

The file is no part of the prompt (`davsp.prompts.beside`). Of each picture it holds what stands inside the border, pixel by pixel.
"""

import base64
import binascii
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from PIL import Image
from pydantic import BaseModel, Field

from davsp.errors import DavspError
from davsp.prompts.beside import STRICT, Beside
from davsp.query import Query
from davsp.runtime.files import check_regular

if TYPE_CHECKING:
    from davsp.prompts.base import Prompt

FILE = "canaries.json"
MOST, LEAST, BENIGN = 24, 8, 8
"""Malicious canaries that are put into a prompt's folder, at least so many, and benign ones."""

MAX_BYTES = 64 * 2**20
MEND = "delete it; davsp card makes new ones"


class Canary(BaseModel):
    """One query.

    Attributes:
        id, question, label: as of a `Query`.
        picture: base64 of a PNG, RGB, of the canvas' inside.
    """

    model_config = STRICT

    id: str
    question: str
    label: Literal["malicious", "benign"]
    picture: str

    def image(self) -> Image.Image:
        """The picture; what is no such PNG raises a ValueError, OSError or another error of Pillow's."""
        return Image.open(io.BytesIO(base64.b64decode(self.picture, validate=True)), formats=("PNG",))


class Refused(BaseModel):
    """How many of the candidates of one label were refused, of all that were asked, in each arm of `davsp.defenses.effect`.

    `text` is None where the prompt has no texts.
    """

    model_config = STRICT

    asked: int = Field(ge=0)
    none: int = Field(ge=0)
    text: int | None = Field(None, ge=0)
    prompt: int = Field(ge=0)


class Canaries(Beside):
    """The file.

    Attributes:
        judge: whose rule tells a refusal, with its version.
        max_new_tokens: longest answer.
        malicious, benign: what was measured on all candidates, so that a rate is known, not only that these were chosen.
        canaries: malicious ones first.
        the others: as in `Beside`.
    """

    mend: ClassVar[str] = MEND
    version: Literal[1] = 1
    judge: str
    max_new_tokens: int = Field(48, ge=1, le=4096)
    malicious: Refused
    benign: Refused
    canaries: list[Canary] = Field(min_length=LEAST, max_length=MOST + BENIGN)

    def queries(self) -> list[Query]:
        """As queries."""
        return [Query(c.id, c.question, c.label, "canaries", image=c.image().convert("RGB")) for c in self.canaries]


def canaries_of(queries: Sequence[Query], inside: Callable[[Image.Image], Image.Image]) -> list[Canary]:
    """Queries, which have pictures, as they stand in the file.

    Args:
        inside: a picture -> what stands of it inside the border (`VisualSafetyPrompt.inside`).
    """
    lines = []
    for query in queries:
        picture = query.picture()
        assert picture is not None
        buffer = io.BytesIO()
        inside(picture).save(buffer, "PNG", optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode()
        lines.append(Canary(id=query.id, question=query.question, label=query.label, picture=data))
    return lines


def read_canaries(path: Path, prompt: "Prompt", side: int) -> Canaries:
    """The canaries in a border's folder.

    Args:
        side: of what stands inside the border, in pixels.

    Raises:
        DavspError: the file is broken, was changed, is of another border or text, or holds a picture that does not fit inside.
    """
    check_regular(path)
    if path.stat().st_size > MAX_BYTES:
        raise DavspError(f"{path} has more than {MAX_BYTES // 2**20} MiB, so these are no canaries; {MEND}")
    content = Canaries.read(path, prompt)
    if len({canary.id for canary in content.canaries}) < len(content.canaries):
        raise DavspError(f"{path} holds two canaries of one id; {MEND}")
    if sum(canary.label == "malicious" for canary in content.canaries) < LEAST:
        raise DavspError(f"{path} holds fewer than {LEAST} malicious canaries; {MEND}")
    for number, canary in enumerate(content.canaries):
        if not _fits(canary, side):
            raise DavspError(f"{path}: field 'canaries.{number}.picture' is no RGB PNG of {side}x{side} pixels; {MEND}")
    return content


def _fits(canary: Canary, side: int) -> bool:
    try:
        with canary.image() as image:
            if image.size != (side, side) or image.mode != "RGB":  # known before it is decoded
                return False
            image.load()
    except (binascii.Error, ValueError, OSError, SyntaxError):
        return False
    return True
