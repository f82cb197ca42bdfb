"""PAT's search: attack tokens and defence tokens in turn, each by a greedy coordinate gradient, with the picture present.

A row of the search is `safety text, defence, question, attack`. A step first changes one attack token, so that the model begins to
do what is asked (cross-entropy of `target`), then one defence token, so that it refuses all the same and answers benign
questions as before: refuse_weight x CE(refusal) + benign_weight x CE(benign answer). For either, the gradient with respect to
one-hot tokens names `top_k` tokens a place, `candidates` changes of one token are drawn from them, and the best is taken.

As published (PKU-ML/PAT and the llm-attacks code that it is built on): the numbers of `PatSettings`; candidates from the gradient of
the refusal rows alone, the benign term only where candidates are scored; one benign row drawn a malicious row a step; benign
answers that are the first sentence of the model's own; no end token in any wanted answer; both changes taken
unconditionally (`accept="always"`); the tokens of the last step are the result.

Not as published: the rows hold the query's picture, as it is undefended. A candidate counts only if its text gives the same
tokens again in every malicious row (published: the same number of tokens), so what is scored is what is deployed. INFERRED: that
benign rows carry no attack; that benign queries which the model itself refuses are left out; one target for all rows where
AdvBench has one each. `accept="better"` keeps the present tokens where no candidate is better on the step's own rows.

Tokens are drawn from those that are printable ASCII and no special ones. An embedded model's vocabulary is closed: its ordinary
words, without the marks of the two speakers.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console

from davsp.defenses.pat.defense import PAT, PatConfig
from davsp.defenses.pat.search import Search, State, rows_of
from davsp.defenses.pat.settings import PatSettings
from davsp.errors import DavspError, Interrupted
from davsp.lvlm import LVLM, fingerprint
from davsp.query import Query
from davsp.runtime.files import alone, read_json, sha256_bytes, write_json
from davsp.runtime.progress import bar
from davsp.vector import check_classes

FILE = "pat-search.json"


def train_pat(
    lvlm: LVLM,
    malicious: Sequence[Query],
    benign: Sequence[Query],
    text: str,
    settings: PatSettings,
    out: Path,
    resume: bool = True,
    console: Console | None = None,
) -> PAT:
    """Search PAT's tokens; every step is kept in `out/pat-search.json`, and a killed search goes on to the same tokens.

    Args:
        malicious, benign: training queries, each with a picture.
        text: stands before the tokens while they are trained and where they are used; "" for none.
        resume: go on from the file in `out`, if there is one; False starts anew.
        console: where the bar goes; None is silent.

    Raises:
        DavspError: bad data or settings; a file of another search; a vocabulary without `start`.
        Interrupted: Ctrl-C; what was done is kept.
    """
    with alone(out):
        return _train(lvlm, malicious, benign, text, settings, out, resume, console or Console(quiet=True))


def _train(
    lvlm: LVLM,
    malicious: Sequence[Query],
    benign: Sequence[Query],
    text: str,
    settings: PatSettings,
    out: Path,
    resume: bool,
    console: Console,
) -> PAT:
    check_classes(malicious, benign)
    if len(benign) > settings.pairs:
        benign = Random(f"{settings.seed} pairs").sample(benign, settings.pairs)
    identity = {
        **settings.model_dump(exclude={"batch_size"}),
        "text": text,
        "model": fingerprint(lvlm),
        "data": {"train_malicious": _digest(malicious), "train_benign": _digest(benign)},
    }
    kept = _kept(out / FILE, identity) if resume else None
    if kept is None:
        kept = {"identity": identity, "benign_answers": _benign_answers(lvlm, benign, settings), "history": []}
        write_json(out / FILE, kept)  # a folder one can't write to is known before the work
    search = Search(lvlm, malicious, benign, kept["benign_answers"], text, settings)
    state = search.start()
    if history := kept["history"]:
        state = State(len(history), history[-1]["defence"], history[-1]["attack"])
    with bar(console) as shown:
        task = shown.add_task("pat", total=settings.steps, completed=state.step)
        try:
            while state.step < settings.steps:
                state, figures = search.advance(state)
                kept["history"].append(figures)
                write_json(out / FILE, kept)
                shown.update(task, completed=state.step)
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped at step {state.step} of {settings.steps}; the tokens are in {out / FILE}: give the same "
                "command again to go on"
            ) from None
    last = {name: value for name, value in kept["history"][-1].items() if name not in ("defence", "attack")}
    config = PatConfig(
        control=state.defence, safety_text=text, model_id=lvlm.model_id, revision=lvlm.revision,
        settings=settings.model_dump(), figures=last, data=identity["data"],
    )  # fmt: skip
    return PAT(state.defence, text, config=config)


def first_sentence(text: str) -> str:
    """Up to and with the first mark that ends a sentence."""
    found = re.match(r".*?[.!?](?=\s|$)", text.strip(), re.DOTALL)
    return found.group(0) if found else text.strip()


def _benign_answers(lvlm: LVLM, benign: Sequence[Query], settings: PatSettings) -> list[str]:
    """What benign rows are to go on saying."""
    if settings.benign_answers == "reference":
        if missing := [q.id for q in benign if not q.reference]:
            raise DavspError(
                f"benign query {missing[0]} has no reference answer: add one, or choose benign_answers model"
            )
        return [q.reference for q in benign]
    rows, answers = rows_of(lvlm, benign, [""] * len(benign)), []
    for start in range(0, len(benign), settings.batch_size):
        some = slice(start, start + settings.batch_size)
        answers += lvlm.generate(rows.canvases[some], rows.questions[some])
    return [first_sentence(answer) for answer in answers]


def _kept(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """What a search before left, if it is of the same."""
    if not path.exists():
        return None
    kept = read_json(path)
    found = kept.get("identity") if isinstance(kept, dict) else None
    if not isinstance(found, dict) or not isinstance(kept.get("history"), list):
        raise DavspError(f"{path} is not a search of davsp train --method pat; delete it to start anew")
    if found != identity:
        names = [name for name in {**found, **identity} if found.get(name) != identity.get(name)]
        raise DavspError(
            f"{path} is of a search with other settings ({', '.join(names)}): choose another folder, give those settings "
            "again, or start anew with --no-resume"
        )
    return kept


def _digest(queries: Sequence[Query]) -> str:
    """SHA-256 over pictures, questions and references."""
    facts = []
    for query in queries:
        picture = query.picture()
        facts.append([query.question, query.reference, picture and sha256_bytes(picture.tobytes())])
    return sha256_bytes(json.dumps(facts).encode())
