"""From --defense, --prompt and --text to the rows of `davsp eval`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from davsp.cli.inputs import safety_text
from davsp.errors import DavspError

if TYPE_CHECKING:
    from davsp.defenses import Defense


def rows(specs: Sequence[str], prompt: Path | None, text: str | None, own: bool) -> "dict[str, Defense]":
    """Name -> defense. With --defense just those that it names; else none, the safety text and the prompt, if there are any.

    Args:
        specs: `none`, `safety-text`, `safety-text=TEXT`, or `NAME=FOLDER` of a prompt.
        prompt: folder or hub id of a prompt, whose row is named by its kind.
        text: of the row safety-text; "" leaves it out.
        own: the embedded test is asked, so that its safety text is the default.

    Raises:
        DavspError: a spec that is none of these, a name twice, or a prompt that can't be read.
    """
    from davsp.defenses import NoDefense, SafetyText, VisualPrompt
    from davsp.prompts import load_prompt

    said = safety_text(text, own)
    found: dict[str, Defense] = {}
    for spec in specs or ["none", *["safety-text"] * bool(said)]:
        name, _, value = spec.partition("=")
        if name in found:
            raise DavspError(f"--defense names {name!r} twice; give each row a name of its own.")
        if spec == "none":
            found[name] = NoDefense()
        elif name == "safety-text":
            if not (value or said):
                raise DavspError("--defense safety-text needs a text: safety-text=TEXT, or --text.")
            found[name] = SafetyText(value or said)
        elif value and name != "none":
            found[name] = VisualPrompt(load_prompt(value), name)
        else:
            raise DavspError(
                f"--defense {spec!r} is not known: give none, safety-text, safety-text=TEXT or NAME=FOLDER."
            )
    if prompt:
        loaded = load_prompt(prompt)
        name = "davsp" if loaded.kind == "border" else loaded.kind
        if name in found:
            raise DavspError(f"--prompt and --defense both make the row {name!r}; leave one out.")
        found[name] = VisualPrompt(loaded, name)
    return found
