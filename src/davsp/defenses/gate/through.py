"""What a gate with a threshold looks through, and how its file names that: a border, a text before the question, or nothing.

The file of a border's gate lies beside the border. Without one the file says all there is, and lies in a folder of its own.
"""

from pathlib import Path
from typing import NamedTuple

from davsp.defenses.base import Defense
from davsp.defenses.none import NoDefense
from davsp.defenses.text import SafetyText
from davsp.defenses.visual import VisualPrompt
from davsp.errors import DavspError
from davsp.prompts import VisualSafetyPrompt
from davsp.prompts.beside import UNTOUCHED, texts
from davsp.prompts.gate import FILE, SERVED, Calibration, Served

Seen = tuple[str, tuple[str, str, str]]


def seen_through(inner: Defense) -> Seen:
    """A border's pixels, or `UNTOUCHED`, and the texts around the question.

    Raises:
        DavspError: it shows something else, for which the file has no words.
    """
    if isinstance(inner, VisualPrompt) and isinstance(inner.prompt, VisualSafetyPrompt):
        return inner.prompt.pixels_sha256(), texts(inner.prompt)
    if isinstance(inner, NoDefense) and inner.way is None:
        return UNTOUCHED, ("", " ", "")
    if isinstance(inner, SafetyText) and inner.placement == "prefix":
        return UNTOUCHED, (inner.text, inner.separator, "")
    raise DavspError(
        f"a gate with a threshold looks through a border, a safety text before the question, or nothing, not through {inner.name}; "
        "take gate:answer"
    )


def check_bound(file: Calibration | Served, inner: Defense) -> None:
    """Raises DavspError unless the thresholds were made through this very defense."""
    if (file.pixels, file.texts) != seen_through(inner):
        raise DavspError(
            f"the gate's threshold was made through another border or text than {inner.name}'s; make one with davsp gate"
        )


class Alone(NamedTuple):
    """A gate's folder without a border."""

    inner: Defense
    calibration: Calibration | None
    served: Served | None

    def described(self) -> str:
        """What is looked through, and a line for each file."""
        through = f"the text {self.inner.text!r}" if isinstance(self.inner, SafetyText) else "nothing"
        files = [one.described() for one in (self.calibration, self.served) if one is not None]
        return "\n".join([f"a gate without a border, which looks through {through}", *files])


def read_alone(folder: str | Path, name: str | None = None) -> Alone:
    """The files of such a folder, of which at least one is there, and what they look through.

    Args:
        name: of what is looked through; None: none or safety-text.

    Raises:
        DavspError: a file is broken or was changed, is a border's, the two look through different texts, or the name is that of the
            other look.
    """
    folder = Path(folder)
    calibration = Calibration.read(folder / FILE, None) if (folder / FILE).exists() else None
    served = Served.read(folder / SERVED, None) if (folder / SERVED).exists() else None
    (text, separator, suffix), *other = dict.fromkeys(one.texts for one in (calibration, served) if one is not None)
    if other or suffix:
        raise DavspError(
            f"{folder}: {FILE} and {SERVED} look through different texts; give each a folder of its own"
            if other
            else f"{folder} looks through a text behind the question, which no safety text here has; make it anew with davsp gate"
        )
    inner: Defense = SafetyText(text, separator=separator) if text else NoDefense()
    if name in ("none", "safety-text") and name != inner.name:
        raise DavspError(f"the gate in {folder} looks through {inner.name}, not through {name}; call it {inner.name}")
    inner.name = name or inner.name
    return Alone(inner, calibration, served)
