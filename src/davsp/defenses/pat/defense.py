"""PAT, prompt adversarial tuning: a few trained tokens before the question (Mo et al., NeurIPS 2024, arXiv 2402.06255).

`davsp.defenses.pat` trains them; here they are put in place, saved and read. The order is: safety text, tokens, question.

As published (PKU-ML/PAT): the tokens stand before the user's text with one space between, as a prefix; the three strings of
`PUBLISHED`, letter by letter (the last one's final space included).

INFERRED, for DAVSP's comparison (its repository has no PAT, PAT's has no pictures): that the common AdaShield text stands before
all, "for fair comparison"; `text=""` is PAT as its authors have it. A string is a model's own: a closed vocabulary that lacks its
words (the embedded models') is refused, as it would read as so many unknown words.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

import davsp
from davsp.defenses.adashield_s import DAVSP
from davsp.defenses.base import Defense
from davsp.errors import DavspError
from davsp.lvlm import LVLM, AnsweringLVLM
from davsp.lvlm.templates import CHECKPOINT
from davsp.query import Query
from davsp.runtime.config import read_config
from davsp.runtime.files import write_json

CONFIG = "pat.json"
PUBLISHED = {  # README.md of PAT's repository: for Vicuna-7B, for Llama-2, and trained on Guanaco-7B and Vicuna-7B together
    "vicuna": r"""Answer seriously esper quietlymedia (/ \". harmcgi{{[.(_{( zv\":""",
    "llama-2": "{[[ Tili particulderr einemroom folgenderomasquestion bezeichneter {%Begin Charlotteawtativelyiostream sug>::",
    "transfer": "Come ! critique ! respond seriously?. evil fortune////////////////WRITE asked ein legalEGIN chat,. /**------+ "
    r"nicelyTurnCred/) Base Question sid!(button [\"itle ",
}


class PatConfig(BaseModel):
    """What `pat.json` holds; a file with other fields is refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    control: str = Field(min_length=1)
    safety_text: str = ""
    model_id: str | None = None
    revision: str | None = None
    settings: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    data: dict[str, Any] = {}
    davsp_version: str = davsp.__version__


class PAT(Defense):
    """Puts safety text and tokens before every question, with or without a picture.

    Args:
        control: the tokens, as text; taken as it is.
        text: before the tokens; "" for none.
        name: of its row.
        config: what is known of its making; None: a string from elsewhere.

    Raises:
        DavspError: no word in the control.
    """

    def __init__(self, control: str, text: str = DAVSP, name: str = "pat", config: PatConfig | None = None) -> None:
        if not control.strip():
            raise DavspError("PAT got no tokens; for the safety text alone, use SafetyText")
        self.control, self.text, self.name = control, text, name
        self.config = config or PatConfig(control=control, safety_text=text)

    @property
    def template(self) -> str | None:
        """The conversation template that the tokens were searched under; None: not known."""
        return str(self.config.data.get("template", CHECKPOINT)) if self.config.data else None

    @classmethod
    def published(cls, preset: str, text: str = DAVSP) -> "PAT":
        """One of the authors' strings: vicuna, llama-2 or transfer.

        Raises:
            DavspError: another name.
        """
        if preset not in PUBLISHED:
            raise DavspError(f"PAT has no published string {preset!r}: choose {', '.join(PUBLISHED)}")
        return cls(PUBLISHED[preset], text, f"pat:{preset}")

    @classmethod
    def load(cls, folder: str | Path, name: str | None = None) -> "PAT":
        """What `save` wrote.

        Raises:
            DavspError: the file is missing, no JSON, or a field is unknown or wrong.
        """
        config = read_config(Path(folder) / CONFIG, PatConfig)
        return cls(config.control, config.safety_text, name or "pat", config)

    def save(self, folder: str | Path) -> None:
        """Write `pat.json`."""
        write_json(Path(folder) / CONFIG, self.config.model_dump())

    def check(self, lvlm: AnsweringLVLM) -> None:
        """Raises DavspError if the model's vocabulary lacks a word of it: the tokens would all be "unknown"."""
        tokenizer = lvlm.tokenizer if isinstance(lvlm, LVLM) else None  # a served model shows none
        if tokenizer is None or tokenizer.unk_token_id is None:
            return
        for word in f"{self.text} {self.control}".split():
            if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False)["input_ids"]:
                raise DavspError(
                    f"{self.name}: the vocabulary of {lvlm.model_id} lacks {word!r}; train PAT on this model "
                    "(davsp baseline pat), with a text in its words"
                )

    def prepare(self, queries: Sequence[Query]) -> list[Query]:
        return [replace(q, question=place(self.text, self.control, q.question)) for q in queries]

    def describe(self) -> dict[str, Any]:
        return {"kind": "pat", "text": self.text, "control": self.control}


def place(text: str, control: str, question: str) -> str:
    """Text, tokens, question, one space between."""
    return f"{text} {control} {question}" if text else f"{control} {question}"
