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

import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from random import Random

from rich.console import Console

from davsp.defenses.pat.defense import PAT, PatConfig
from davsp.defenses.pat.search import Search, TokenPair, rows_of
from davsp.defenses.pat.settings import PatSettings
from davsp.errors import DavspError, Interrupted
from davsp.lvlm import LVLM, fingerprint, template_record
from davsp.lvlm.undefended import in_records
from davsp.query import Query
from davsp.runtime import journal, parallel
from davsp.runtime.files import alone, write_json
from davsp.runtime.progress import bar
from davsp.store import fields_hash
from davsp.vector import check_classes

SENTENCE_TOKENS = 48  # of a benign answer only the first sentence is kept

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

    Several processes share the candidates of each step; all of them must come here, and return the same tokens.

    Args:
        malicious, benign: training queries, each with a picture.
        text: stands before the tokens while they are trained and where they are used; "" for none.
        resume: go on from the file in `out`, if there is one; False starts anew.
        console: where the bar goes; None is silent.

    Raises:
        DavspError: bad data or settings; a file of another search; a vocabulary without `start`.
        Interrupted: Ctrl-C; what was done is kept.
    """
    with nullcontext() if parallel.rank() > 0 else alone(out):  # the first process writes for all
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
        "data": {
            "train_malicious": fields_hash(malicious, "question", "reference"),
            "train_benign": fields_hash(benign, "question", "reference"),
        },
        **in_records(lvlm, malicious, benign),
    }
    first = parallel.rank() == 0
    state = parallel.shared(
        journal.restore(out / FILE, identity, benign_answers=list, history=list) if resume and first else None
    )
    search = Search(lvlm, malicious, text, settings)
    tokens = search.start()  # before the model is asked anything
    if state is None:
        state = {"identity": identity, "benign_answers": _benign_answers(lvlm, benign, settings), "history": []}
        if first:
            write_json(out / FILE, state)  # a folder one can't write to is known before the work
    search.keep(benign, state["benign_answers"])
    if history := state["history"]:
        tokens = TokenPair(len(history), history[-1]["defence"], history[-1]["attack"])
    with bar(console) as bars:
        task = bars.add_task("pat", total=settings.steps, completed=tokens.step)
        try:
            while tokens.step < settings.steps:
                tokens, figures = search.advance(tokens)
                history.append(figures)
                if first:
                    write_json(out / FILE, state)
                bars.update(task, completed=tokens.step)
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped at step {tokens.step} of {settings.steps}; the tokens are in {out / FILE}: give the same "
                "command again to go on"
            ) from None
    last = {name: value for name, value in history[-1].items() if name not in ("defence", "attack")}
    config = PatConfig(
        control=tokens.defence, safety_text=text, model_id=lvlm.model_id, revision=lvlm.revision,
        settings=settings.model_dump(), figures=last,
        data=identity["data"] | in_records(lvlm, malicious, benign) | template_record(lvlm),
    )  # fmt: skip
    return PAT(tokens.defence, text, config=config)


def first_sentence(text: str) -> str:
    """Up to and with the first mark that ends a sentence."""
    sentence = re.match(r".*?[.!?](?=\s|$)", text.strip(), re.DOTALL)
    return sentence.group(0) if sentence else text.strip()


def _benign_answers(lvlm: LVLM, benign: Sequence[Query], settings: PatSettings) -> list[str]:
    """What benign rows are to go on saying."""
    if settings.benign_answers == "reference":
        if missing := [q.id for q in benign if not q.reference]:
            raise DavspError(
                f"benign query {missing[0]} has no reference answer: add one, or choose benign_answers model"
            )
        return [q.reference for q in benign]
    rows, starts = rows_of(lvlm, benign, [""] * len(benign)), range(0, len(benign), settings.batch_size)

    def answers_of(number: int) -> list[str]:
        some = slice(starts[number], starts[number] + settings.batch_size)
        return lvlm.generate(rows.canvases[some], rows.questions[some], SENTENCE_TOKENS)

    parts = parallel.shared([answers for _, answers in parallel.work(len(starts), answers_of)])
    return [first_sentence(answer) for answers in parts for answer in answers]
