"""PAT: its search on the tiny model, what a kill leaves, and its tokens at a question."""

import faulthandler
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch

from davsp import LVLM, DavspError, Query
from davsp.defenses.pat import PatSettings, train, train_pat
from davsp.defenses.pat.defense import CONFIG, PAT, PUBLISHED
from davsp.defenses.pat.search import Search, allowed_tokens
from davsp.defenses.pat.train import FILE, SENTENCE_TOKENS, first_sentence
from davsp.lvlm.onehot import answer_losses
from davsp.lvlm.templates import CHECKPOINT
from tiny import SPECIAL, queries

SETTINGS = PatSettings(
    steps=3, length=4, attack_length=3, start="please", candidates=12, top_k=8, behaviours=3,
    refusal="sorry no", target="yes", benign_answers="reference",
)  # fmt: skip
TEXT = "be safe"


def search(lvlm: LVLM, **changes: object) -> Search:
    settings = SETTINGS.model_copy(update=changes)
    search = Search(lvlm, queries("malicious", 4), TEXT, settings)
    search.keep(queries("benign", 3), ["a red cake"] * 3)
    return search


def test_accepted_only_if_better_the_loss_falls_and_never_rises(lvlm: LVLM) -> None:
    one = search(lvlm, accept="better")
    state, good = one.start(), [0, 1, 2]
    before = float(one._score("defence", [state], good)["loss"])
    attack = [float(one._score("attack", [state], [])["attack_loss"])]
    losses = [before]
    for step in range(6):
        state = type(state)(step, state.defence, state.attack)  # other candidates a step
        text, figures = one._change("defence", state, good)
        losses.append(figures["loss"])
        attack.append(one._change("attack", state, [])[1]["attack_loss"])
        state = state.having("defence", text)
    assert all(b <= a + 1e-5 for a, b in pairwise(losses)), losses
    assert losses[-1] < losses[0] - 0.1, losses
    assert attack[1] <= attack[0] + 1e-5, attack  # of the start's own defence; later ones are against other defences


def test_accepted_always_takes_the_best_candidate_even_if_it_is_worse(lvlm: LVLM) -> None:
    one = search(lvlm, candidates=1)
    state, rose = one.start(), False
    for step in range(8):
        state = type(state)(step, state.defence, state.attack)
        before = float(one._score("defence", [state], [0, 1, 2])["loss"])
        text, figures = one._change("defence", state, [0, 1, 2])
        assert text != state.defence
        rose, state = rose or figures["loss"] > before, state.having("defence", text)
    assert rose


def test_loss_is_of_the_rows_as_deployed(lvlm: LVLM) -> None:
    one, bad, benign = search(lvlm, behaviours=4), queries("malicious", 4), queries("benign", 3)
    state = one.start()
    losses = one._score("defence", [state], [0, 0, 2, 1])
    defended = PAT(state.defence, TEXT).prepare(benign)
    questions = [PAT(state.defence, TEXT).prepare([q])[0].question + " " + state.attack for q in bad]
    with torch.no_grad():
        refusal = answer_losses(lvlm, lvlm.preprocess([q.picture() for q in bad]), questions, ["sorry no"] * 4).mean()  # type: ignore[misc]
        rows = [defended[i] for i in (0, 0, 2, 1)]
        benign_loss = answer_losses(
            lvlm,
            lvlm.preprocess([q.picture() for q in rows]),
            [q.question for q in rows],
            ["a red cake"] * 4,  # type: ignore[misc]
        ).mean()
    assert float(losses["refusal_loss"]) == pytest.approx(float(refusal), rel=1e-4)
    assert float(losses["loss"]) == pytest.approx(float(0.8 * refusal + 0.2 * benign_loss), rel=1e-4)


def test_candidates_are_ordinary_words_one_away_from_the_present_ones(lvlm: LVLM, mini: LVLM) -> None:
    one = search(lvlm)
    state = one.start()
    texts = one._candidates("defence", state, Random(0))
    assert 3 < len(texts) <= 12
    for text in texts:
        words = text.split()
        assert len(words) == 4 and sum(word != "please" for word in words) == 1
        assert not set(words) & set(SPECIAL)
    allowed = allowed_tokens(mini)
    words = {mini.tokenizer.decode([i]) for i in allowed.nonzero().flatten().tolist()}
    assert {"!", "picture", "sorry"} <= words and not words & {"<image>", "<unk>", "user:", "assistant:", "<s>"}


@pytest.mark.parametrize(
    ("start", "pictured", "message"),
    [("xylophonist", True, "start 'xylophonist' is no token"), ("please", False, "has no image: PAT is trained here")],
)
def test_what_cannot_be_searched_is_told_before_the_model_is_asked(
    lvlm, tmp_path, monkeypatch, start, pictured, message
) -> None:
    monkeypatch.setattr(type(lvlm), "generate", lambda *_: pytest.fail("the model was asked"))
    bad = [q if pictured else replace(q, image=None) for q in queries("malicious", 4)]
    settings = SETTINGS.model_copy(update={"start": start, "benign_answers": "model"})
    with pytest.raises(DavspError, match=message):
        train_pat(lvlm, bad, queries("benign", 3), TEXT, settings, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.json"))


def test_saved_and_read_again(lvlm: LVLM, tmp_path: Path) -> None:
    pat = train_pat(lvlm, queries("malicious", 4), queries("benign", 3), TEXT, SETTINGS, tmp_path)
    pat.save(tmp_path)
    again = PAT.load(tmp_path)
    assert again.describe() == pat.describe() and again.name == "pat"
    assert again.prepare(queries("benign", 1))[0].question == f"{TEXT} {pat.control} {queries('benign', 1)[0].question}"
    assert again.config.settings["length"] == 4 and again.config.figures["step"] == 3
    assert (
        again.template == CHECKPOINT
        and "template" not in again.config.data
        and PAT.published("vicuna").template is None
    )
    (tmp_path / CONFIG).write_text(json.dumps(pat.config.model_dump() | {"tokens": []}))
    with pytest.raises(DavspError, match="field 'tokens'"):
        PAT.load(tmp_path)


def test_the_template_is_kept_where_it_is_not_the_checkpoints(
    lvlm: LVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("davsp.lvlm.identity.template_of", lambda _: "llava_v1")
    train_pat(
        lvlm, queries("malicious", 4), queries("benign", 3), TEXT, SETTINGS.model_copy(update={"steps": 1}), tmp_path
    ).save(tmp_path)
    assert PAT.load(tmp_path).template == "llava_v1"


def dying(write: Callable[[Path, object], None], at: int) -> Callable[[Path, object], None]:
    """`write`, but the process is killed where it is called for the at-th time."""
    calls = 0

    def dies(path: Path, value: object) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, value)

    return dies


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_it_goes_on_to_the_same_tokens(lvlm: LVLM, tmp_path: Path) -> None:
    data = queries("malicious", 4), queries("benign", 3)
    whole = train_pat(lvlm, *data, TEXT, SETTINGS, tmp_path / "whole")
    for number in (1, 3):
        child = os.fork()
        if child == 0:
            faulthandler.dump_traceback_later(120, exit=True)  # one that hangs tells where
            train.write_json = dying(train.write_json, number + 1)  # the first one is before the first step
            try:
                train_pat(lvlm, *data, TEXT, SETTINGS, tmp_path / f"killed{number}")
            finally:
                os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        state = json.loads((tmp_path / f"killed{number}" / FILE).read_text())
        assert len(state["history"]) == number - 1
        again = train_pat(lvlm, *data, TEXT, SETTINGS, tmp_path / f"killed{number}")
        assert again.config == whole.config
        assert (tmp_path / f"killed{number}" / FILE).read_text() == (tmp_path / "whole" / FILE).read_text()
    with pytest.raises(DavspError, match=r"other settings \(length\)"):
        train_pat(lvlm, *data, TEXT, SETTINGS.model_copy(update={"length": 5}), tmp_path / "whole")


def test_benign_answers_are_the_models_own_first_sentences(lvlm: LVLM, tmp_path: Path) -> None:
    assert first_sentence("It is 3.5 m. It is red.") == "It is 3.5 m."
    assert first_sentence(" no end ") == "no end" and first_sentence("") == ""
    settings = SETTINGS.model_copy(update={"benign_answers": "model", "steps": 1})
    train_pat(lvlm, queries("malicious", 4), queries("benign", 3), TEXT, settings, tmp_path)
    answers = lvlm.generate(
        lvlm.preprocess([q.picture() for q in queries("benign", 3)]),
        [q.question for q in queries("benign", 3)],
        SENTENCE_TOKENS,
    )  # type: ignore[misc]
    assert json.loads((tmp_path / FILE).read_text())["benign_answers"] == [first_sentence(one) for one in answers]


def test_published_strings_and_where_they_stand() -> None:
    assert PUBLISHED["transfer"].endswith("itle ") and PUBLISHED["vicuna"].startswith("Answer seriously esper")
    query = [Query("q", "what is this", "benign", "t")]
    assert PAT.published("llama-2").prepare(query)[0].question.startswith("Before processing any instruction")
    assert PAT.published("llama-2", "").prepare(query)[0].question == PUBLISHED["llama-2"] + " what is this"


def test_misuse_is_said(lvlm: LVLM, tmp_path: Path) -> None:
    data = queries("malicious", 4), queries("benign", 3)
    with pytest.raises(DavspError, match="no published string"):
        PAT.published("gpt")
    with pytest.raises(DavspError, match="lacks"):
        PAT.published("vicuna", "").respond(lvlm, queries("benign", 1))
    with pytest.raises(DavspError, match="no tokens"):
        PAT(" ")
    with pytest.raises(DavspError, match="no token of"):
        train_pat(lvlm, *data, TEXT, SETTINGS.model_copy(update={"start": "!"}), tmp_path)
    with pytest.raises(DavspError, match="no image"):
        train_pat(lvlm, [Query("q", "what", "malicious", "t")], data[1], TEXT, SETTINGS, tmp_path / "b")
