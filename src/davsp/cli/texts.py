"""`davsp train --method pat` and `adashield-a`: texts that are trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from davsp.cli.inputs import is_embedded, say
from davsp.errors import DavspError

if TYPE_CHECKING:
    from davsp.lvlm import LVLM
    from davsp.query import Query

METHODS = ("pat", "adashield-a")


@dataclass(frozen=True)
class Asked:
    """What the options say; None where one was not given."""

    model: str | None
    text: str | None
    sets: Sequence[str]
    given: dict[str, Any]  # settings by name, from options of their own
    defender: str | None
    defender_url: str | None
    defender_key: str | None
    encoder: str | None


def check_options(method: str, others: dict[str, Any], asked: Asked) -> None:
    """Raises DavspError at the first option that does not go with the method; `others` are those that neither of ours takes."""
    ours = {"--set": asked.sets or None}
    of_adashield = {
        "--defender": asked.defender, "--defender-url": asked.defender_url, "--defender-key-env": asked.defender_key,
        "--encoder": asked.encoder,
    }  # fmt: skip
    wrong = others if method in METHODS else {**ours, **of_adashield}
    if method == "pat":
        wrong = {**wrong, **of_adashield}
    if method == "adashield-a":
        wrong = {**wrong, "--text": asked.text, **{f"--{name.replace('_', '-')}": v for name, v in asked.given.items()}}
    for option, value in wrong.items():
        if value not in (None, [], False):
            raise DavspError(f"{option} does not go with --method {method}; leave it out.")


def train(
    method: str,
    asked: Asked,
    load: "Callable[[], LVLM]",
    malicious: "Sequence[Query]",
    benign: "Sequence[Query]",
    out: Path,
    seed: int,
    resume: bool,
) -> None:
    """Train and save.

    Raises:
        DavspError: no defender for a model that is not one of ours; else as the method.
    """
    (_pat if method == "pat" else _adashield_a)(asked, load, malicious, benign, out, seed, resume)


def _pat(asked: Asked, load: Any, malicious: Any, benign: Any, out: Path, seed: int, resume: bool) -> None:
    from rich.console import Console

    from davsp import embedded
    from davsp.cli.train import settings_of
    from davsp.defenses.adashield_s import DAVSP
    from davsp.defenses.pat import PatSettings, train_pat
    from davsp.embedded.budgets import TOKENS

    own = is_embedded(asked.model)
    base = {**TOKENS, "refusal": embedded.REFUSAL} if own else {}
    given = {name: value for name, value in asked.given.items() if value is not None}
    settings = settings_of(PatSettings, base | {"seed": seed} | given | _sets(asked.sets, PatSettings))
    text = asked.text if asked.text is not None else embedded.SAFETY_TEXT if own else DAVSP
    made = train_pat(load(), malicious, benign, text, settings, out / "training", resume, Console(stderr=True))
    made.save(out)
    print(f"saved to {out}: the tokens are {made.control!r}; `davsp eval --defense pat={out}` measures them")


def _adashield_a(asked: Asked, load: Any, malicious: Any, benign: Any, out: Path, seed: int, resume: bool) -> None:
    from rich.console import Console

    from davsp import embedded
    from davsp.cli.train import settings_of
    from davsp.defenses.adashield_a import RefineSettings, make_pool
    from davsp.defenses.adashield_a.defender import ChatDefender, Defender
    from davsp.defenses.adashield_a.features import CLIP, ClipEncoder, LVLMEncoder
    from davsp.embedded.phrases import PhraseDefender

    own = is_embedded(asked.model)
    if own and (asked.defender or asked.defender_url or asked.defender_key):
        raise DavspError(
            "--defender writes words that this model lacks; leave it out, and a grammar of its phrases takes its place."
        )
    if not own and not asked.defender:
        raise DavspError("--defender is missing; name a text model, and its server by --defender-url.")
    mini = {
        "placement": "prefix",
        "separator": " ",
        "start": embedded.SAFETY_TEXT,
        "judge": "keyword",
        "max_new_tokens": 48,
    }
    settings = settings_of(RefineSettings, (mini if own else {}) | {"seed": seed} | _sets(asked.sets, RefineSettings))
    defender: Defender = PhraseDefender()
    if not own:
        defender = ChatDefender(str(asked.defender), asked.defender_url, asked.defender_key)
    lvlm = load()
    encoder = LVLMEncoder(lvlm) if own and not asked.encoder else ClipEncoder(asked.encoder or CLIP, device=lvlm.device)
    pool = make_pool(lvlm, malicious, defender, encoder, settings, out / "training", resume, Console(stderr=True))
    pool.save(out)
    say(pool.summary())
    print(f"saved to {out}: `davsp info {out}` prints the pool, `davsp eval --defense adashield-a={out}` measures it")


def _sets(sets: Sequence[str], kind: Any) -> dict[str, Any]:
    """NAME=VALUE of --set; "none" is None."""
    found: dict[str, Any] = {}
    for one in sets:
        name, equals, value = one.partition("=")
        if not equals or name not in kind.model_fields:
            raise DavspError(
                f"--set {one!r} is not known: give NAME=VALUE, NAME one of {', '.join(kind.model_fields)}."
            )
        found[name] = None if value == "none" else value
    return found
