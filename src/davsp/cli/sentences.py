"""`davsp train --method uniguard` and `esiii`: noise trained on sentences."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from davsp.cli.inputs import is_embedded, safety_text, say
from davsp.errors import DavspError

if TYPE_CHECKING:
    from davsp.lvlm import LVLM

METHODS = ("uniguard", "esiii")
TEXT_PARTS = ("none", "fixed", "optimised", "searched")


def refuse(method: str, davsp: dict[str, Any], both: dict[str, Any], uniguard: dict[str, Any]) -> None:
    """Raises DavspError at the first option that belongs to another method than the one asked for; options not given are None."""
    others = {
        "davsp": [(both, "uniguard or esiii"), (uniguard, "uniguard")],
        "uniguard": [(davsp, "davsp")],
        "esiii": [(davsp, "davsp"), (uniguard, "uniguard")],
    }
    for options, owner in others[method]:
        for option, value in options.items():
            if value not in (None, []):
                raise DavspError(f"{option} is for --method {owner}, not for {method}; leave it out.")


def train(
    method: str,
    model: str | None,
    load: "Callable[[], LVLM]",
    out: Path,
    corpus: Path | None,
    picture: Path | None,
    text: str | None,
    text_part: str | None,
    with_text: bool,
    eps: float | None,
    given: dict[str, Any],
    search: dict[str, Any],
    resume: bool,
) -> None:
    """Train and save; what is None of `given` (settings of the noise) and `search` (of the text) is left to the method.

    Raises:
        DavspError: no corpus for a model that is not one of ours; options that do not go together; else as the method.
    """
    from davsp.cli.train import settings_of
    from davsp.defenses import esiii, uniguard
    from davsp.defenses.adashield_s import DAVSP
    from davsp.defenses.uniguard.search import SearchSettings
    from davsp.embedded import corpus as embedded
    from davsp.embedded.budgets import NOISE
    from davsp.query import open_picture
    from davsp.runtime import parallel
    from davsp.training.sentences import read_sentences
    from davsp.training.settings import SentenceSettings

    own, part = is_embedded(model), text_part or "none"
    if part not in TEXT_PARTS:
        raise DavspError(f"--text-part is {', '.join(TEXT_PARTS[:-1])} or {TEXT_PARTS[-1]}, not {text_part!r}.")
    if part == "optimised" and own:
        raise DavspError("--text-part optimised is in the tokens of LLaVA, which this model lacks; take searched.")
    if part != "searched" and (option := next((name for name, value in search.items() if value is not None), None)):
        raise DavspError(f"--{option.replace('_', '-')} is for --text-part searched; leave it out.")
    if method == "uniguard" and corpus is None and not own:
        raise DavspError("--corpus is missing; give a text file of harmful sentences, one a line.")
    said = read_sentences(corpus) if corpus else None
    pictures = [open_picture(picture)] if picture else []
    if method == "uniguard" and not pictures and not (own and said is None):
        say(
            "note: without --picture the noise is trained on mid grey; UniGuard's own is an attack picture of Qi et al."
        )
    likely = {"likely": method == "esiii"}
    settings = settings_of(
        SentenceSettings, likely | (NOISE if own else {}) | {k: v for k, v in given.items() if v is not None}
    )
    common: dict[str, Any] = {
        "text": safety_text(text, True) if own or text is not None else DAVSP,
        "eps": uniguard.EPS if eps is None else eps, "settings": settings, "resume": resume,
    }  # fmt: skip
    if method == "uniguard":
        chosen = {name: value for name, value in search.items() if value is not None}
        common |= {"search": settings_of(SearchSettings, {"seed": settings.seed} | chosen)}
        common |= {
            "text_part": part,
            "with_text": with_text,
            "fixed": embedded.UNIGUARD_TEXT if own else uniguard.FIXED,
        }
        if said is None:
            said, found = embedded.corpus(settings.seed)
            pictures = pictures or found
        prompt = uniguard.train_uniguard(load(), said, out / "training", pictures=pictures, **common)
    else:
        question = embedded.QUESTION if own else esiii.QUESTION
        said = said or list(embedded.SAFETY_SENTENCES if own else esiii.SENTENCES)
        prompt = esiii.train_esiii(
            load(), out / "training", sentences=said, question=question, pictures=pictures, **common
        )
    if parallel.rank() > 0:
        return
    prompt.save_pretrained(out)
    print(f"saved to {out}: noise.safetensors is the noise; `davsp eval --defense {method}={out}` measures it")
